"""The embedded world: everything that a complete run needs, made here in a second.

Published files:
  model/                an untrained tiny Llama with its word-level tokenizer and chat template
  demonstrations.jsonl  conversations of mixed quality, to fine-tune the model into a mediocre first policy
  train.jsonl           prompts for the online iterations
  preference.jsonl      prompts for the reward model's preference data
  heldout.jsonl         prompts for the evaluation
The sets share no prompt.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from contracts.ledger import Ledger
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome
from embedded.checkpoint import write_json, write_llama_config, write_weights
from embedded.config import WorldConfig
from embedded.reviews import ADJECTIVES, NOUNS, Review, all_prompts, read_request, vocabulary, write_review

PAD, BOS, EOS, UNK, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>",
)  # fmt: skip
CONTEXT = 128

# One BOS, in front. An assistant's turn ends with EOS, the others where the next begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

ON_SUBJECT = 0.95
"""Share of the demonstrations that are about the thing asked for."""
RIGHT_COUNT = 0.6
"""Share that is sure to have the number of adjectives asked for; the others have any number."""
GARBLED = 0.06
"""Share whose words are mixed up."""


def run(config: WorldConfig, context: Context) -> Outcome:
    """Write the model and the four data files."""
    _write_model(config, context)
    prompts = all_prompts()
    random.Random(derive_seed(config.seed, "split")).shuffle(prompts)
    rest = iter(prompts)
    for name, count in (("train", config.train), ("preference", config.preference), ("heldout", config.heldout)):
        rows = [{"messages": [_message("user", next(rest))]} for _ in range(count)]
        _write_rows(context, name, rows)
    source = random.Random(derive_seed(config.seed, "demonstrations"))
    rows = []
    for _ in range(config.demonstrations):
        prompt = next(rest)
        rows.append({"messages": [_message("user", prompt), _message("assistant", demonstrate(prompt, source))]})
    _write_rows(context, "demonstrations", rows)
    return Outcome(unit="rows", facts={"vocabulary": len(SPECIAL) + len(vocabulary())})


def demonstrate(prompt: str, source: random.Random) -> str:
    """A mediocre answer: words of any sentiment, sometimes off the subject, of the wrong length, or garbled."""
    request = read_request(prompt)
    noun = request.noun if source.random() < ON_SUBJECT else source.choice(NOUNS)
    count = request.count if source.random() < RIGHT_COUNT else source.randint(1, 3)
    review = Review(noun, tuple(source.sample(ADJECTIVES, count)))
    text = write_review(review, found=source.random() < 0.5)
    return _garble(text, source) if source.random() < GARBLED else text


def _garble(text: str, source: random.Random) -> str:
    """Lose a word, or stutter one."""
    words = text.split()
    place = source.randrange(len(words))
    words[place : place + 1] = [] if source.random() < 0.5 else [words[place]] * 2
    return " ".join(words)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_rows(context: Context, name: str, rows: list[Any]) -> None:
    ledger = Ledger("rows")
    ledger.keep(len(rows))
    context.publication.write_rows(f"{name}.jsonl", rows, ledger)


def _commit(context: Context, name: str, write: Callable[[Path], object]) -> None:
    name = f"model/{name}"
    write(context.publication.scratch(name))
    context.publication.commit(name, Ledger("rows"))


def _write_model(config: WorldConfig, context: Context) -> None:
    tokens = [*SPECIAL, *vocabulary()]
    ids = {token: index for index, token in enumerate(tokens)}
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model_config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // 32,
        num_key_value_heads=config.hidden_size // 32,
        head_dim=32,  # the smallest that vLLM's attention has on a CPU
        max_position_embeddings=CONTEXT,
        initializer_range=0.12,  # with the usual 0.02, so narrow a model takes several times as long to learn copying
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    model = LlamaForCausalLM(model_config).to(torch.float32)
    special_ids = {"bos_token_id": ids[BOS], "eos_token_id": [ids[EOS]], "pad_token_id": ids[PAD]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    with context.timed("save"):
        _commit(context, "model.safetensors", lambda path: write_weights(path, model))
        _commit(context, "config.json", lambda path: write_llama_config(path, model_config))
        _commit(context, "generation_config.json", lambda path: write_json(path, special_ids))
        _commit(context, "tokenizer.json", lambda path: _tokenizer(ids).save(str(path)))
        _commit(context, "tokenizer_config.json", lambda path: write_json(path, tokenizer_config))
        _commit(context, "chat_template.jinja", lambda path: path.write_text(CHAT_TEMPLATE, encoding="utf-8"))


def _tokenizer(ids: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
