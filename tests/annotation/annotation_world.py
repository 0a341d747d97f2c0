"""Generates random tiny models, rollouts and scores for the tests of annotation."""

import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from warm_stages import run_stage_warm

from contracts.artifacts import Artifact
from contracts.jsonl import read_jsonl
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import ROLLOUTS, SCORES, Completion, Message, Rollout, Sampling, Schema, Score

ROOT = Path(__file__).parents[2]
WORDS = "review the film book meal was great good bad awful and blue long .".split()
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|> {{ message.content }} "
    "{% elif message.role == 'assistant' %}<|assistant|> {{ message.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
IDS = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
EOS = IDS["</s>"]


def run_cli(*arguments: Any, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process forked from one that has imported the libraries."""
    result = run_stage_warm("annotation", *arguments, environment=environment)
    assert not check or result.returncode == 0, result.stderr
    return result


def publish(
    target: Path, schema: Schema, shards: Iterable[list[Any]], inputs: dict[str, Any] | None = None, **known: Any
) -> Artifact:
    """Publish records directly, like a stage."""
    publication = Publication(target, schema, schema.name, target.name)
    publication.begin()
    for index, rows in enumerate(shards):
        ledger = Ledger("rows")
        ledger.keep(len(rows))
        publication.write_rows(f"shard-{index:05d}.jsonl", rows, ledger)
    manifest = {"key_parts": {}, "input_paths": {}, "weights": None, "versions": {}, "seconds": {}, "facts": {}}
    return publication.publish(inputs=inputs or {}, unit="rows", **{**manifest, **known})


def make_rollout(number: int, texts: list[str], *, seed: int = 0, temperature: float = 1.0) -> Rollout:
    """A rollout with an answer per text; a text without a final full stop is a truncated answer."""
    rng = random.Random(f"{seed}-{number}")
    messages = (Message("user", f"review the film {'long ' * number}"),)
    prompt = [IDS["<s>"], IDS["<|user|>"], *(IDS[word] for word in messages[0].content.split()), IDS["<|assistant|>"]]
    completions = []
    for sample, text in enumerate(texts):
        finished = text.endswith(".")
        ids = (*(IDS[word] for word in text.split()), *((EOS,) if finished else ()))
        completions.append(
            Completion(
                sample=sample,
                response_ids=ids,
                text=text,
                finish_reason="stop" if finished else "length",
                logprobs=tuple(-rng.random() for _ in ids),
                seed=sample,
                sampling=Sampling(temperature, 1.0, 0, 16),
            )
        )
    return Rollout(prompt_id(messages), messages, tuple(prompt), tuple(completions), "policy", 0, "processed", "great")


def make_rollouts(prompts: int, k: int, *, seed: int = 0, **known: Any) -> list[Rollout]:
    """Rollouts with random answers of varying length, some of them truncated."""
    rng = random.Random(seed)

    def text() -> str:
        words = rng.choices(WORDS[:-1], k=rng.randint(1, 12))
        return " ".join([*words, *(["."] if rng.random() < 0.8 else [])])

    return [make_rollout(number, [text() for _ in range(k)], seed=seed, **known) for number in range(prompts)]


def publish_rollouts(
    target: Path, rollouts: list[Rollout], shard: int = 4, facts: dict[str, Any] | None = None
) -> Artifact:
    """Publish rollouts, `shard` prompts per shard."""
    shards = [rollouts[i : i + shard] for i in range(0, len(rollouts), shard)]
    return publish(target, ROLLOUTS, shards, facts={"bos_token_id": IDS["<s>"], **(facts or {})})


def publish_scores(
    target: Path, rollouts: Artifact, score: Callable[[Rollout, Completion], float | None], **known: Any
) -> Artifact:
    """Publish the scores returned by `score`; None drops a sample."""
    shards: list[list[Score]] = []
    for path in rollouts.shards:
        values = [(r.prompt_id, c.sample, score(r, c)) for r in read_jsonl(path, Rollout) for c in r.completions]
        shards.append([Score(prompt, sample, value) for prompt, sample, value in values if value is not None])
    return publish(target, SCORES, shards, {"rollouts": rollouts.manifest.digest}, **known)


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": len(IDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": EOS, "initializer_range": 0.3, **changes,
        }
    )  # fmt: skip


def save_model(directory: Path, auto_class: Any, config: Any, tokenizer: Any) -> Path:
    """Save a random model with its tokenizer."""
    import torch

    torch.manual_seed(0)
    auto_class.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
