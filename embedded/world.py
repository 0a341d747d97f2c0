"""Generates the toy task, which has everything that a complete run needs, in about a second.

Published files:
  model/                an untrained tiny Llama with its word-level tokenizer and chat template
  demonstrations.jsonl  conversations of mixed quality, to fine-tune the model into a mediocre first policy
  train.jsonl           prompts for the online iterations
  preference.jsonl      prompts for the reward model's preference data
  heldout.jsonl         prompts for the evaluation
The sets share no prompt.
"""

import random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from contracts.ledger import Ledger
from contracts.seeds import derive_seed
from contracts.stage import Context, Outcome
from embedded.checkpoint import commit_model
from embedded.config import WorldConfig
from embedded.reviews import ADJECTIVES, NOUNS, Review, all_prompts, read_request, vocabulary, write_review

PAD, BOS, EOS, UNK, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>",
)  # fmt: skip
CONTEXT = 128
HEAD_DIM = 32
"""The smallest head size that vLLM's attention supports on a CPU."""

# One BOS at the beginning. An assistant's turn ends with EOS; the other turns end where the next one begins.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

ON_SUBJECT = 0.95
"""The share of demonstrations that are about the requested thing."""
RIGHT_COUNT = 0.9
"""The share that is certain to have the requested number of adjectives; the others have a random number."""
GARBLED = 0.15
"""The share whose words are garbled."""


def run(config: WorldConfig, context: Context) -> Outcome:
    """Write the model and the four data files."""
    with context.timed("save"):
        _commit_model(config, context)
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
    """Drop a word, repeat a word, or replace an adjective by another one of the text."""
    words = text.split()
    adjectives = [index for index, word in enumerate(words) if word in ADJECTIVES]
    damage = source.choice(("lose", "stutter", "repeat"))
    if damage == "repeat" and len(adjectives) > 1:
        first, second = source.sample(adjectives, 2)
        words[first] = words[second]
    else:
        index = source.randrange(len(words))
        words[index : index + 1] = [] if damage == "lose" else [words[index]] * 2
    return " ".join(words)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_rows(context: Context, name: str, rows: list[Any]) -> None:
    ledger = Ledger("rows")
    ledger.keep(len(rows))
    context.publication.write_rows(f"{name}.jsonl", rows, ledger)


def _commit_model(config: WorldConfig, context: Context) -> None:
    tokens = [*SPECIAL, *vocabulary()]
    ids = {token: index for index, token in enumerate(tokens)}
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model_config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // HEAD_DIM,
        num_key_value_heads=config.hidden_size // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        initializer_range=0.12,  # with the usual 0.02, a model this narrow takes several times as long to learn copying
        tie_word_embeddings=True,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    commit_model(
        context.publication,
        "model/",
        state=LlamaForCausalLM(model_config).to(torch.float32).state_dict(),
        config=model_config,
        tokenizer=_tokenizer(ids),
        special={"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK},
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer(ids: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
