"""Fixtures of the annotation tests."""

from pathlib import Path
from typing import Any

import pytest
from annotation_world import EOS, IDS, SPECIAL, TEMPLATE, make_rollouts, publish_rollouts, save_model, tiny_config

from contracts.artifacts import Artifact


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Model directories: a reward model, the same with pad == eos, one with two labels, and causal models."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base = tmp_path_factory.mktemp("models")
    reward = tiny_config(num_labels=1)
    return {
        "reward": save_model(base / "reward", AutoModelForSequenceClassification, reward, tokenizer),
        "reward_pad_is_eos": save_model(
            base / "pad_is_eos", AutoModelForSequenceClassification,
            tiny_config(num_labels=1, pad_token_id=EOS), tokenizer,
        ),
        "two_labels": save_model(
            base / "two", AutoModelForSequenceClassification, tiny_config(num_labels=2), tokenizer
        ),
        "causal": save_model(base / "causal", AutoModelForCausalLM, tiny_config(), tokenizer),
        "tied": save_model(base / "tied", AutoModelForCausalLM, tiny_config(tie_word_embeddings=True), tokenizer),
    }  # fmt: skip


@pytest.fixture
def rollouts(tmp_path: Path) -> Artifact:
    """Ten prompts with four answers each, in three shards."""
    return publish_rollouts(tmp_path / "rollouts", make_rollouts(10, 4))
