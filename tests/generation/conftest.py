"""A tiny chat model made on the spot, prompts for it, and the stage's real command line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.artifacts import Artifact, Publication
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.records import PROMPTS, ROLLOUTS, Message, Prompt, Rollout

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{index}" for index in range(58)]
CONTEXT = 192
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}"
    " <{{ message.role }}> {{ message.content }}{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with two layers (head_dim 32, which vLLM needs) and a word-level tokenizer; answers end now and then."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model") / "policy"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def changed_policy(policy: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the policy with some files replaced (text or JSON) or removed (None)."""

    def change(**files: Any) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(policy, copy)
        for stem, content in files.items():
            (path,) = copy.glob(f"{stem}.*")
            if content is None:
                path.unlink()
            elif isinstance(content, dict):
                path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
            else:
                path.write_text(content)
        return copy

    return change


def publish_prompts(path: Path, texts: Sequence[str]) -> Path:
    """Publish one-turn prompts."""
    rows = []
    for text in texts:
        messages = (Message("user", text),)
        rows.append(Prompt(prompt_id(messages), messages, answer="w1", tags=("test",)))
    publication = Publication(path, PROMPTS, "prompts", "0" * 64)
    publication.begin()
    publication.write_rows("shard-00000.jsonl", rows, Ledger("prompts", len(rows), len(rows)))
    publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="prompts", weights=None, versions={}, seconds={}, facts={}
    )
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 prompts of 1 to 6 words; the last five share 130 words, longer than a block of the KV cache."""
    short = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + i % 6)) for i in range(21)]
    common = " ".join(WORDS[(7 * i) % len(WORDS)] for i in range(130))
    return publish_prompts(tmp_path_factory.mktemp("data") / "prompts", [*short, *(f"{common} w{i}" for i in range(5))])


def start(*overrides: str, **environment: str) -> "subprocess.Popen[str]":
    """Start `python -m generation` with these overrides."""
    return subprocess.Popen(
        [sys.executable, "-m", "generation", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def generate(output: Path, **config: Any) -> Artifact:
    """Run the stage through its command line and open what it published."""
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in {**config, "output": output}.items()]
    process = start(*overrides)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return Artifact.open(output, ROLLOUTS)


def refuse(output: Path, **config: Any) -> str:
    """Run the stage with a mistake in its configuration; return the one message, having checked that it is one."""
    overrides = [f"{name}={json.dumps(value, default=str)}" for name, value in {**config, "output": output}.items()]
    process = start(*overrides)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    left = [path.name for path in output.parent.iterdir() if path.name.lstrip(".").startswith(output.name)]
    assert left == []
    return err


def rows(artifact: Artifact) -> list[Rollout]:
    """All rollouts of an artifact."""
    return list(artifact.rows(Rollout))
