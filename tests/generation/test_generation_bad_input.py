"""Mistakes of the user: one message with the fix, exit code 2, nothing left behind."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generation_runs import publish_prompts, refuse

from contracts.config import validate
from contracts.declaration import Stage
from contracts.errors import UserError
from contracts.records import ROLLOUTS
from contracts.stage import run_stage
from generation.config import GenerationConfig
from generation.engine import devices_per_replica
from generation.stages.generation import GENERATION


def test_missing_model_directory(prompts: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=tmp_path / "nowhere", prompts=prompts)
    assert f"{tmp_path / 'nowhere'} does not exist" in message


def test_directory_that_is_no_model(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refuse(tmp_path / "out", policy=tmp_path / "empty", prompts=prompts)
    assert "is not a model: it has no config.json" in message


def test_model_that_is_no_language_model(changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path) -> None:
    classifier = changed_policy(config={"architectures": ["LlamaForSequenceClassification"]})
    message = refuse(tmp_path / "out", policy=classifier, prompts=prompts)
    assert "a policy must be a causal language model" in message


def test_tokenizer_without_chat_template(changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=changed_policy(chat_template=None), prompts=prompts)
    assert "has no chat template" in message


@pytest.mark.parametrize("lengths", [{"max_new_tokens": 192}, {"max_new_tokens": 100, "max_prompt_tokens": 93}])
def test_lengths_beyond_the_context(policy: Path, prompts: Path, tmp_path: Path, lengths: dict[str, int]) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=prompts, **lengths)
    assert "193 tokens, but the context" in message
    assert "is 192 (max_position_embeddings)" in message


def test_prompts_that_are_not_published(policy: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=tmp_path / "missing")
    assert f"{tmp_path / 'missing'} does not exist" in message


def test_no_prompts(policy: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=publish_prompts(tmp_path / "none", []), max_new_tokens=8)
    assert "holds no prompts" in message


def test_more_prompts_than_there_are(policy: Path, prompts: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=prompts, count=27, max_new_tokens=8)
    assert "count=27 is more than the 26 prompts" in message


def test_every_prompt_too_long(policy: Path, prompts: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=prompts, max_prompt_tokens=3, max_new_tokens=8)
    assert "26 prompts in = 0 kept + 26 too_long (too_long: more than 3 tokens" in message


def test_too_many_prompts_too_long(policy: Path, prompts: Path, tmp_path: Path) -> None:
    message = refuse(tmp_path / "out", policy=policy, prompts=prompts, max_prompt_tokens=60, max_new_tokens=8)
    assert "26 prompts in = 21 kept + 5 too_long is more than max_dropped=0.1 allows" in message


def test_template_that_begins_twice(changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path) -> None:
    twice = changed_policy(chat_template="{{ bos_token }}{{ bos_token }} <user> {{ messages[0].content }}")
    message = refuse(tmp_path / "out", policy=twice, prompts=prompts, max_new_tokens=8)
    assert "with two BOS tokens ('<bos>')" in message


def test_template_that_refuses_a_prompt(policy: Path, tmp_path: Path) -> None:
    prompts = publish_prompts(tmp_path / "prompts", ["w1"], system="w2")
    message = refuse(tmp_path / "out", policy=policy, prompts=prompts, max_new_tokens=8)
    assert "no system messages here" in message


def test_model_without_an_end_token(changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path) -> None:
    endless = changed_policy(
        generation_config={"eos_token_id": None}, config={"eos_token_id": None}, tokenizer_config={"eos_token": None}
    )
    message = refuse(tmp_path / "out", policy=endless, prompts=prompts, max_new_tokens=8)
    assert "names no EOS token" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"k": 3, "temperatures": [1.0, 0.7]}, "cannot be divided equally"),
        ({"k": 2, "temperatures": [0.0]}, "would all be the same"),
        ({"temperatures": [0.005]}, "must be 0 \\(greedy\\) or at least 0.01"),
        ({"temperatures": [-1.0]}, "must be 0 \\(greedy\\) or at least 0.01"),
        ({"servers": 2, "replicas": 2}, "every server is a replica"),
        ({"servers": 2, "engine": "transformers"}, "servers needs engine=vllm"),
    ],
)
def test_values_that_contradict_each_other(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GenerationConfig(policy=Path("a"), prompts=Path("b"), output=Path("c"), **values)


def test_more_devices_than_there_are() -> None:
    config = GenerationConfig(
        policy=Path("a"), prompts=Path("b"), output=Path("c"), tensor_parallel=4096, engine="transformers"
    )
    with pytest.raises(UserError, match="tensor_parallel is 4096, but this machine shows"):
        devices_per_replica(config)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "lacks model.norm.weight, which LlamaForCausalLM needs"),
        ("nan", "NaN or infinite: model.norm.weight"),
        ("shape", "with another shape than config.json implies"),
        ("small", r"has only 5 rows \(vocab_size in config.json\)"),
    ],
)
def test_damaged_weights(
    damage: str, words: str, engine: str, changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    """vLLM itself would sample from what lies in the memory of a weight that is missing, and say nothing."""
    from safetensors.torch import load_file, save_file

    policy = changed_policy(config={"shape": {"intermediate_size": 96}, "small": {"vocab_size": 5}}.get(damage, {}))
    tensors = load_file(policy / "model.safetensors")
    if damage == "missing":
        del tensors["model.norm.weight"]
    elif damage == "nan":
        tensors["model.norm.weight"][3] = float("nan")
    elif damage == "small":  # as when tokens were added to the tokenizer alone
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:5].clone()
    save_file(tensors, policy / "model.safetensors", {"format": "pt"})
    settings = {"policy": policy, "prompts": prompts, "output": tmp_path / "out", "max_new_tokens": 8}
    command = Stage(GenerationConfig, ROLLOUTS, "generation.run:run")
    with pytest.raises(UserError, match=words):
        run_stage(command, validate(GenerationConfig, {**settings, "engine": engine}, "test"))
    assert not list(tmp_path.glob("*out*"))


def test_checks_come_before_torch() -> None:
    """The stage's module, and with it every check above, loads none of the large libraries."""
    check = "import sys, generation.run; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=200, check=True)
    assert result.stdout.strip() == "set()"


def test_a_draw_that_has_nothing_to_replace_needs_no_engine(policy: Path, tmp_path: Path) -> None:
    drawn = publish_prompts(tmp_path / "draw", [], stage="draw")
    config = GenerationConfig(policy=policy, prompts=drawn, output=tmp_path / "out", max_new_tokens=8)
    artifact = run_stage(GENERATION, config)
    assert artifact is not None
    assert (artifact.manifest.rows, artifact.shards, artifact.manifest.facts["completions"]) == (0, [], 0)
