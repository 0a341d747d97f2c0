"""The recipes: each is valid, draws its graph, and fits the hardware that it names, by the estimates of a dry run."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from embedded import imdb
from pipelines.config.load import load_run_config
from pipelines.iteration import build_graph
from pipelines.planning.cluster import cluster_of
from pipelines.planning.memory import device_of, estimate_memory
from pipelines.planning.placement import place
from pipelines.planning.sizes import read_size
from training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))
CAREFUL = 0.95
"""Share of a device that a recipe may be estimated to take."""
LLAMA3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "RLHFlow/LLaMA3-SFT": LLAMA3_8B,
    "OpenRLHF/Llama-3-8b-sft-mixture": LLAMA3_8B,
    "sfairXC/FsfairX-LLaMA3-RM-v0.1": {**LLAMA3_8B, "architectures": ["LlamaForSequenceClassification"]},
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": {
        "architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3", "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""The shapes in the config.json of the models that the recipes name."""
COUNTS = {"RLHFlow/LLaMA3-SFT": 8_030_261_248, "sfairXC/FsfairX-LLaMA3-RM-v0.1": 7_504_928_768}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with these config.json files and nothing else, on a machine without a GPU."""
    for name, config in MODELS.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_hardware_that_it_names(recipe: Path, cache: Path, tmp_path: Path) -> None:
    config = load_run_config(recipe, [f"directory={tmp_path}"])
    assert config.name == recipe.stem
    device = device_of(config)
    assert device.gpus == config.hardware.gpus  # type: ignore[union-attr]
    graph = place(build_graph(config, min(config.iterations, 3)), cluster_of(config, device.gpus))
    needs, unknown = estimate_memory(graph, on_gpu=True)
    assert unknown == {}
    trained = [node.name for node in graph.nodes.values() if isinstance(node.config, TrainingConfig)]
    assert trained
    assert set(trained) <= needs.keys()
    for name, need in needs.items():
        assert need.total < CAREFUL * need.share * device.bytes, (name, need)
        assert need.processes <= device.gpus


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_is_explained(recipe: Path) -> None:
    """A comment stands behind every value, or before it."""
    text = recipe.read_text()
    assert text.startswith("# ")
    assert "Sources: " in text
    lines = text.splitlines()
    top = [index for index, line in enumerate(lines) if re.match(r"\w+:", line)]
    for begin, end in zip(top, [*top[1:], len(lines)], strict=True):
        block = lines[begin:end]
        bare = lines[begin].startswith(("name:", "policy: hf:Qwen"))
        assert bare or any("#" in line for line in [lines[begin - 1], *block]), block


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_says_what_a_recipe_takes(recipe: Path, cache: Path, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Film {number} {'is ' * 60}"}) + "\n" for number in range(2000)))
    sources = yaml.safe_load(recipe.read_text())["prompts"]
    local = [name for name in ("train", "heldout") if not sources[name]["source"].startswith("hf:")]
    overrides = [f"prompts.{name}.source={data}" for name in local]
    arguments = ["run", str(recipe), "--iters", "1", "--dry-run", f"directory={tmp_path}", *overrides]
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    _, _, memory = result.stdout.partition("memory, estimated for ")
    lines = memory.splitlines()
    assert "as `hardware` says:" in lines[0]
    assert {line.split()[0] for line in lines[1:]} == {"fits"}
    (training,) = [line for line in lines if " iteration-001/training: " in line]
    for part in ("weights ", "gradients ", "optimizer ", "activations ", "logits "):
        assert part in training


def test_a_model_that_is_not_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe = ROOT / "configs/recipes/qwen-24gb-dpo.yaml"
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", str(recipe), "--dry-run", f"directory={tmp_path}"],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "hf:Qwen/Qwen2.5-1.5B-Instruct is not in the local cache; `hf download Qwen/Qwen2.5-1.5B-Instruct" in (
        result.stdout
    )


def test_the_shape_of_a_cached_model_is_enough(cache: Path) -> None:
    for name, count in COUNTS.items():
        size = read_size(Path(f"hf:{name}"))
        assert size is not None
        assert size.parameters == count
    assert read_size(Path("hf:nobody/nothing")) is None


def test_the_prompts_and_the_reward_of_the_reviews(tmp_path: Path) -> None:
    review = " ".join(f"word{index}<br /><br />" for index in range(100))
    imdb.write_prompts([review, "too short", review, "other " + review], tmp_path / "data/train.jsonl", 5)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    assert [len(prompt.split()) for prompt in prompts] == [imdb.WORDS, imdb.WORDS]
    assert prompts[0].startswith("word0 word1 ")
    assert [imdb.reward_of(logit) for logit in (-5.0, 0.1, 3.0)] == [-20.0, 1.0, 20.0]


def test_the_documented_estimates_are_those_of_the_command(cache: Path) -> None:
    text = (ROOT / "docs/recipes.md").read_text()
    for line in table():
        assert line in text


STAGES = ("generation", "reward", "reference", "values", "training", "critic")


def table() -> Iterator[str]:
    """Lines of the table of estimates."""
    for recipe in RECIPES:
        config = load_run_config(recipe, [])
        graph = place(build_graph(config, 1), cluster_of(config, device_of(config).gpus))
        needs, _ = estimate_memory(graph, on_gpu=True)
        totals = [needs.get(f"iteration-001/{stage}") for stage in STAGES]
        cells = [f"{need.total / (1 << 30):.1f}" if need else "" for need in totals]
        yield f"| {recipe.stem} | {' | '.join(cells)} |"
