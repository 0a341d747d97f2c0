"""Fixtures of the generation tests: a random tiny chat model, and prompts for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generation_runs import generate, processed_config, publish_prompts, raw_config

from contracts.artifacts import Artifact

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
    """A Llama with two layers (head_dim 32, which vLLM needs) and a word-level tokenizer; some of its answers end."""
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


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 prompts: 21 of 1 to 6 words, and five that share 130 words, more than a block of the KV cache."""
    short = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(1 + i % 6)) for i in range(21)]
    common = " ".join(WORDS[(7 * i) % len(WORDS)] for i in range(130))
    return publish_prompts(tmp_path_factory.mktemp("data") / "prompts", [*short, *(f"{common} w{i}" for i in range(5))])


@pytest.fixture(scope="session", params=["vllm", "transformers"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each engine; vLLM only if it is installed."""
    if request.param == "vllm":
        pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    return str(request.param)


@pytest.fixture(scope="session")
def processed(engine: str, policy: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Two samples at T=1 and two at T=0.7, with processed log-probabilities."""
    return generate(tmp_path_factory.mktemp("processed") / "out", **processed_config(engine, policy, prompts))


@pytest.fixture(scope="session")
def raw(engine: str, policy: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One sample at T=0.7 and one greedy sample, with raw log-probabilities."""
    return generate(tmp_path_factory.mktemp("raw") / "out", **raw_config(engine, policy, prompts))
