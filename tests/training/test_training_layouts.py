"""One process = any layout of several: losses, gradient norms and weights of five steps of SGD, and a resumption."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    assert_same_training,
    dpo_settings,
    five_steps,
    interrupted_after,
    make_model,
    run_cli,
    run_here,
    training_log,
)
from warm_stages import start_stage

from contracts.artifacts import Artifact
from contracts.errors import UserError
from training.launch import RENDEZVOUS_FILE, rank_variables
from training.parallel import ParallelConfig, check_layout

SMALL = {"micro_batch_tokens": 48}
"""Several micro-batches in each process, fewer for the last step."""
LAUNCHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddp": ("policy", "tied", {"dp": 2}),
    "zero1": ("policy", "tied", {"dp": 2, "zero": 1}),
    "zero2": ("policy", "tied", {"dp": 2, "zero": 2}),
    "zero3": ("sft", "untied", {"dp": 2, "zero": 3}),
    "zero3-offloaded": ("policy", "untied", {"dp": 2, "zero": 3, "offload": ["optimizer", "param"]}),
    "pp-dp-tp": ("policy", "tied", {"pp": 2, "dp": 2, "tp": 2, "zero": "fsdp2"}),
}
"""Each by the command line, in processes of its own."""
TOGETHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fsdp2": ("policy", "untied", {"dp": 2, "zero": "fsdp2"}),
    "fsdp2-recomputed": ("policy", "tied", {"dp": 2, "zero": "fsdp2"}),
    "fsdp2-lora": ("policy", "tied", {"dp": 2, "zero": "fsdp2"}),
    "tp": ("policy", "biased", {"tp": 2}),
    "tp-reward": ("reward", "normed", {"tp": 2}),
    "pp": ("policy", "tied", {"pp": 2}),
    "pp-kto": ("policy", "untied", {"pp": 2}),
    "fsdp2-kto": ("policy", "untied", {"dp": 2, "zero": "fsdp2"}),
    "pp-lora": ("policy", "biased", {"pp": 2}),
    "pp-sft": ("sft", "untied", {"pp": 2}),
    "pp-reward-recomputed": ("reward", "biased", {"pp": 2}),
    "sp": ("policy", "untied", {"sp": 2}),
    "sp-lora": ("policy", "tied", {"sp": 2}),
    "sp-frozen": ("sft", "tied", {"sp": 2, "zero": "fsdp2"}),
}
"""All in the same two processes."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of four layers with grouped queries; `biased` is a Qwen2, `normed` a Qwen3 (norms of queries and keys)."""
    folder = tmp_path_factory.mktemp("deep")
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return {
        "tied": make_model(folder / "tied", **shape),
        "untied": make_model(folder / "untied", tied=False, seed=1, **shape),
        "biased": make_model(folder / "biased", kind="qwen2", seed=2, **shape),
        "normed": make_model(folder / "normed", kind="qwen3", seed=3, **shape),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture
def expected(
    request: pytest.FixtureRequest,
    folder: Path,
    deep: dict[str, Path],
    pairs: dict[str, Path],
    demonstrations: Path,
) -> Path:
    """The same training as that of the test's layout, in one process."""
    layout = request.node.callspec.params["layout"]
    stage, model, _ = {**LAUNCHED, **TOGETHER}[layout]
    changes = changes_of(layout)
    settings = five_steps(stage, deep[model], pairs, demonstrations) | changes
    output = folder / "-".join(["one", stage, model, *changes])
    if not output.exists():
        run_here(stage, **settings, output=output)
    return output


def changes_of(layout: str) -> dict[str, Any]:
    """Settings of a layout's training beside its parallel ones."""
    changes: dict[str, Any] = {}
    if layout.endswith("kto"):  # which asks for statistics of the whole step
        changes["algorithm"] = "kto"
    if layout.endswith("recomputed"):
        changes["gradient_checkpointing"] = True
    if layout.endswith("lora"):
        changes |= {"lora": {"rank": 4}, "learning_rate": 0.5}
    if layout.endswith("frozen"):
        changes["frozen"] = ["embed_tokens", "layers.1.mlp"]
    return changes


def run_ranks(folder: Path, processes: int, trainings: list[dict[str, Any]]) -> None:
    """Run trainings one after another in as many processes."""
    (folder / "trainings.json").write_text(json.dumps(trainings, default=str))
    common = {"MASTER_ADDR": "127.0.0.1", RENDEZVOUS_FILE: str(folder / "port")}
    ranks = [
        start_stage(
            "training", folder / "trainings.json",
            module="tests.training.ranks", libraries=["deepspeed"],
            environment=common | rank_variables(ParallelConfig(dp=processes), 0, rank),
        )
        for rank in range(processes)
    ]  # fmt: skip
    for rank in ranks:
        texts = rank.communicate(240)
        assert rank.returncode == 0, texts


@pytest.fixture(scope="module")
def together(folder: Path, deep: dict[str, Path], pairs: dict[str, Path], demonstrations: Path) -> Path:
    """The trainings of TOGETHER, and some that go on in another layout."""
    trainings: list[dict[str, Any]] = []
    for name, (stage, model, parallel) in TOGETHER.items():
        settings = five_steps(stage, deep[model], pairs, demonstrations) | SMALL | changes_of(name)
        trainings.append({"stage": stage, "settings": {**settings, "parallel": parallel, "output": folder / name}})
    with interrupted_after(2):
        run_here("policy", **moving_settings(deep, pairs, folder / "one-fsdp2"), checkpoint_seconds=0)
    for name, parallel, after in (
        ("one-fsdp2", {"dp": 2, "zero": "fsdp2"}, None),
        ("pp-tp", {"pp": 2}, 2),
        ("pp-tp", {"tp": 2}, None),
        ("sp-one", {"sp": 2, "zero": "fsdp2"}, 2),
        ("pp-whole", {"pp": 2}, None),
        ("pp-again", {"pp": 2}, 3),
        ("pp-again", {"pp": 2}, None),
    ):
        settings = moving_settings(deep, pairs, folder / name) | {"parallel": parallel, "checkpoint_seconds": 0}
        trainings.append({"stage": "policy", "settings": settings, "interrupt_after": after})
    run_ranks(folder, 2, trainings)
    return folder


def moving_settings(deep: dict[str, Path], pairs: dict[str, Path], output: Path) -> dict[str, Any]:
    """A training with moments, of a model with tied embeddings, to be continued elsewhere."""
    return dpo_settings(deep, pairs, output, max_steps=4, global_batch=6, weight_decay=0.1, **SMALL)


def require_layout(output: Path, parallel: dict[str, Any]) -> None:
    """Libraries fall back without a word, and the losses agree all the same: the manifest says what really ran."""
    facts = Artifact.open(output).manifest.facts
    declared = ParallelConfig(**parallel)
    assert facts["processes"] == declared.processes
    assert facts["parallel"].items() >= parallel.items()
    assert facts["parallel"]["by"].startswith("torch" if declared.is_native else "accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAUNCHED)
def test_processes_of_the_command_line(
    layout: str, expected: Path, folder: Path, deep: dict[str, Path], pairs: dict[str, Path], demonstrations: Path
) -> None:
    stage, model, parallel = LAUNCHED[layout]
    settings = five_steps(stage, deep[model], pairs, demonstrations) | SMALL
    settings |= {"parallel": parallel, "output": folder / layout}
    (folder / f"{layout}.json").write_text(json.dumps(settings, default=str))
    run_cli(stage, "--config", folder / f"{layout}.json")
    require_layout(folder / layout, parallel)
    assert_same_training(expected, folder / layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", TOGETHER)
def test_layouts_of_two_processes(layout: str, expected: Path, together: Path) -> None:
    require_layout(together / layout, TOGETHER[layout][2])
    assert_same_training(expected, together / layout)


def test_a_training_goes_on_in_another_layout(
    together: Path, deep: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    run_here("policy", **moving_settings(deep, pairs, tmp_path / "whole"))
    run_here("policy", **moving_settings(deep, pairs, together / "sp-one"))
    expected = training_log(tmp_path / "whole")
    for name in ("one-fsdp2", "pp-tp", "sp-one"):
        assert Artifact.open(together / name).manifest.facts["resumed_steps"] == 2
        for line, other in zip(expected, training_log(together / name), strict=True):
            assert other == pytest.approx(line, rel=1e-4, abs=1e-5)
    whole, again = (Artifact.open(together / name).manifest for name in ("pp-whole", "pp-again"))
    assert again.facts["resumed_steps"] == 3
    assert again.files == whole.files


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"zero": 3, "tp": 2}, "combined with data parallelism only"),
        ({"offload": ["optimizer"]}, "only DeepSpeed offloads"),
        ({"zero": "fsdp2", "offload": ["param"]}, "only DeepSpeed offloads"),
        ({"zero": 2, "offload": ["param"]}, "only ZeRO-3 offloads weights"),
        ({"dp": 0}, "greater than or equal to 1"),
        ({"zero": 4}, "zero"),
    ],
)
def test_combinations_that_are_refused(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**parallel)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 4}, r"parallel.tp · sp is 4, which does not divide num_key_value_heads \(2\)"),
        ({"tp": 2, "sp": 2}, r"is 4, which does not divide num_key_value_heads"),
        ({"tp": 3}, r"does not divide num_attention_heads \(4\)"),
        ({"pp": 5}, "has 4 layers. Set it to at most 4"),
    ],
)
def test_a_model_that_cannot_be_divided(parallel: dict[str, Any], message: str, deep: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        check_layout(ParallelConfig(**parallel), deep["untied"])


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", kind="gpt_neox")
    check_layout(ParallelConfig(dp=2, zero="fsdp2"), model)
    with pytest.raises(
        UserError, match="is a GPTNeoXForCausalLM; tensor, pipeline and sequence parallelism support Llama"
    ):
        check_layout(ParallelConfig(pp=2), model)


def test_the_variables_of_ranks_are_those_of_torchrun() -> None:
    variables = rank_variables(ParallelConfig(dp=4, nodes=2), node=1, local=1)
    assert {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    assert (variables["GROUP_RANK"], variables["GROUP_WORLD_SIZE"]) == ("1", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("{dp: 2}", "1 process(es) were started, but parallel (dp=2) declares 2"),
        ("{pp: 2}", "1 process(es) were started, but parallel (pp=2) declares 2"),
    ],
)
def test_a_layout_that_does_not_run_is_an_error(
    parallel: str, message: str, deep: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """A rank that another launcher has started must not train as if nothing were amiss."""
    result = run_cli(
        "policy", f"model={deep['tied']}", f"pairs=[{pairs['pairs']}]", f"reference=[{pairs['reference']}]",
        f"output={tmp_path / 'out'}", f"parallel={parallel}",
        check=False, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="theirs",
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
