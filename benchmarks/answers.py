"""Generates the random reward model and answers that both sides of benchmarks/annotation.py score, from a seed."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workload import Shape, texts_of

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant")


class Case(NamedTuple):
    """The data of one case; `prompt` and `answer` are medians of log-normal lengths in tokens."""

    prompts: int
    k: int
    prompt: int
    answer: int
    spread: float

    def conversations(self, shape: Shape) -> Iterator[tuple[str, list[str]]]:
        """Yield each prompt with its answers; one word is one token."""
        generator = random.Random(f"answers-{self}")
        prompts = texts_of(generator, shape, self.prompts, self.prompt, self.spread)
        answers = texts_of(generator, shape, self.prompts * self.k, self.answer, self.spread)
        for number, prompt in enumerate(prompts):
            yield _words(prompt), [_words(ids) for ids in answers[number * self.k : (number + 1) * self.k]]


def _words(ids: list[int]) -> str:
    return " ".join(f"w{max(token, len(SPECIAL))}" for token in ids)


def read_cases(folder: Path) -> dict[str, Case]:
    """The cases of a benchmark, by name."""
    return {name: Case(**fields) for name, fields in json.loads((folder / "cases.json").read_text()).items()}


def save_model(path: Path, shape: Shape) -> None:
    """Save a reward model of this shape, with a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), shape.vocabulary))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(list(SPECIAL[:4]))
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHATML
    shape.classifier(0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "shape.json").write_text(json.dumps(vars(shape)))
