"""The toy task: deterministic, disjoint, of mixed quality, with a model that loads as it was written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.artifacts import Artifact
from contracts.models import ModelInfo
from contracts.records import WORLD
from embedded.reviews import gold_score, read_review

SETS = {"train": 2304, "preference": 1536, "heldout": 384, "demonstrations": 3072}


def make_world(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedded", "world", f"output={output}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def conversations(world: Path, name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (world / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        result = make_world(tmp_path / name, f"seed={seed}")
        assert result.returncode == 0, result.stderr
    first, again, other = (
        Artifact.open(path, WORLD).manifest for path in (world, tmp_path / "again", tmp_path / "other")
    )
    assert first.digest == again.digest
    shas = [{file.path: file.sha256 for file in manifest.files} for manifest in (first, other)]
    differing = {path for path in shas[0] if shas[0][path] != shas[1][path]}
    assert differing == {"model/model.safetensors", *(f"{name}.jsonl" for name in SETS)}


def test_the_sets_have_their_sizes_and_share_no_prompt(world: Path) -> None:
    prompts = [messages[0]["content"] for name in SETS for messages in conversations(world, name)]
    assert {name: len(conversations(world, name)) for name in SETS} == SETS
    assert len(set(prompts)) == len(prompts) == sum(SETS.values())
    assert Artifact.open(world, WORLD).damage() == []


def test_demonstrations_are_mediocre_but_mostly_well_formed(world: Path) -> None:
    rows = conversations(world, "demonstrations")
    assert all([turn["role"] for turn in row] == ["user", "assistant"] for row in rows)
    share = sum(read_review(row[1]["content"]) is not None for row in rows) / len(rows)
    gold = sum(
        gold_score(messages=row[:1], response=row[1]["content"], finish_reason="stop", answer=None) for row in rows
    ) / len(rows)
    assert 0.8 < share < 0.95
    assert 0.4 < gold < 0.65


def test_the_model_loads_with_every_weight_and_a_tied_head(world: Path) -> None:
    import torch  # here: the fast loop collects this, but does not run it
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = load_file(world / "model" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    model, info = AutoModelForCausalLM.from_pretrained(world / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    config = json.loads((world / "model" / "config.json").read_text())
    assert (config["rope_theta"], config["torch_dtype"], config["head_dim"]) == (10000.0, "float32", 32)
    assert json.loads((world / "model" / "generation_config.json").read_text())["eos_token_id"] == [
        config["eos_token_id"]
    ]
    facts = ModelInfo.read(world / "model")
    facts.require_causal()
    facts.require_chat_template()


def test_conversations_become_tokens_and_back(world: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    unknown = tokenizer.unk_token_id
    for messages in conversations(world, "demonstrations")[:200]:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        assert (ids[-1], ids.count(tokenizer.eos_token_id)) == (tokenizer.eos_token_id, 1)
        assert unknown not in ids
        assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == messages[1]["content"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("train=9000", "Lower one of them"), ("hidden_size=48", "hidden_size"), ("hiden_size=64", "'hidden_size'")],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, argument: str, expected: str) -> None:
    result = make_world(tmp_path / "out", argument)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
