"""Writes realistic tokenizers: byte-level BPE, trained in an instant, with any chat template."""

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' "
    "+ message.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_TOKENS = {"bos": "<bos>", "eos": "<eos>", "extra": ["<start_of_turn>", "<end_of_turn>"]}
CHATML_TOKENS = {"eos": "<|im_end|>", "extra": ["<|im_start|>"]}
CORPUS = [
    "Hello, world! The capital of France is Paris. Name a bird. An owl, a finch, a stone.",
    "def f(x):\n    return x ** 2\n\n\nTell me of the sea; what is the weather in Rome?",
    "system user assistant model tool",
    *["a\n\nb\n\n\nc\n\n"] * 50,
]


def write_tokenizer(
    folder: Path,
    template: str | None = CHATML,
    *,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    extra: list[str] | None = None,
    stop: list[str] | None = None,
    **settings: Any,
) -> Path:
    """Write the tokenizer files of a model directory, without using transformers.

    Args:
        extra: special tokens in addition to BOS and EOS.
        stop: the stop tokens of generation_config.json.
        settings: entries of tokenizer_config.json.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = [token for token in (bos, eos, *(["<|im_start|>"] if extra is None else extra)) if token is not None]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": bos, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if stop is not None:
        ids = [backend.token_to_id(token) for token in stop]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder
