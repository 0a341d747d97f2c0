"""docs/cluster.md says what the code does: keys, defaults, examples, the stages of each kind."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from contracts.declaration import Workload
from pipelines.config.changes import merge
from pipelines.config.executor import KINDS_WITH_KEY, ExecutorSection, ResourcesSection, minutes_of
from pipelines.config.load import load_run_config
from pipelines.config.selecting import ARRAY_KINDS, KINDS
from pipelines.execution.executors.slurm.resources import Resources, finalizing_resources, resources_of
from pipelines.graph import Graph
from pipelines.planning.placement import placed_graph

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/cluster.md").read_text()
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def no_gpus_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of Slurm decides, not this machine."""
    monkeypatch.setenv("RATCHET_VARIANT", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def table_after(heading: str) -> dict[str, list[str]]:
    """The rows of the first table whose header line begins so: first cell without backticks, the others."""
    lines = TEXT[TEXT.index(heading) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def planned(tmp_path: Path, settings: dict[str, Any]) -> tuple[ExecutorSection, Graph]:
    """The quickstart with these settings over it."""
    base = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    path = tmp_path / "quickstart.yaml"
    path.write_text(yaml.safe_dump(merge(base, settings)))
    config = load_run_config(path, [])
    return config.executor, placed_graph(config, 1)


def resources_by_kind(executor: ExecutorSection, graph: Graph) -> dict[Workload, Resources]:
    return {node.workload: resources_of(node, executor, graph) for node in graph.nodes.values()}


def test_the_table_of_keys_has_every_key_in_the_codes_order() -> None:
    assert list(table_after("| key | generation |")) == list(ResourcesSection.model_fields)


def test_the_defaults_in_the_table_are_the_codes(tmp_path: Path) -> None:
    table = table_after("| key | generation |")
    without = resources_by_kind(*planned(tmp_path, {"executor": "slurm"}))
    executor, graph = planned(tmp_path, {"executor": {"kind": "slurm", "resources": {"gpus": 1}}})
    with_gpu = resources_by_kind(executor, graph)
    for column, kind in enumerate(KINDS):
        assert minutes_of(table["time"][column]) == without[kind].minutes == with_gpu[kind].minutes
        for key in ("nodes", "tasks"):
            has_key = kind in KINDS_WITH_KEY[key]
            assert table[key][column] == (str(getattr(without[kind], key)) if has_key else "-")
        assert table["requeue"][column] == str(without[kind].requeue).lower()
        assert without[kind].gpus == 0
        assert with_gpu[kind].gpus == (0 if kind == "light" else 1)
        expected = "1" if kind == "light" else f"{with_gpu[kind].cpus} per GPU, else {without[kind].cpus}"
        assert table["cpus"][column] in (expected, f"{expected} per process")
        assert without[kind].memory is None or kind == "light"
        for key, said in (("partition", "the cluster's"), ("account", "yours"), ("qos", "the cluster's")):
            assert table[key][column] == said
            assert getattr(without[kind], key) is None
        for key in ("setup", "directives"):
            assert table[key][column] == "none"
            assert not getattr(without[kind], key)
    assert table["memory"][KINDS.index("light")] == f"{finalizing_resources(executor).memory}, or an estimate"


def test_hardware_says_the_gpus_of_a_training(tmp_path: Path) -> None:
    settings = {"executor": "slurm", "hardware": {"gpus": 4, "gib": 80}}
    found = resources_by_kind(*planned(tmp_path, settings))
    assert {kind: found[kind].gpus for kind in KINDS} == {"generation": 1, "scoring": 1, "training": 4, "light": 0}


def test_the_executors_own_defaults_are_the_codes() -> None:
    table = table_after("| key | default |")
    fields = ExecutorSection.model_fields
    for key, (said, _) in table.items():
        default = fields[key].default
        assert said == ("none" if default is None else f"{default:g}")
    left_out = set(fields) - set(table)
    assert left_out == {"kind", "resources", "stages", "check_space", "warm"}


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_are_valid(example: str, tmp_path: Path) -> None:
    settings = yaml.safe_load(example)
    settings.setdefault("executor", {}).setdefault("kind", "slurm")
    executor, graph = planned(tmp_path, settings)
    assert set(resources_by_kind(executor, graph)) == set(KINDS)


@pytest.mark.parametrize("recipe", ["llama3-8b-iterative-dpo", "llama3-8b-ppo"])
def test_the_executor_in_a_recipes_comment_is_valid(recipe: str, tmp_path: Path) -> None:
    text = (ROOT / f"configs/recipes/{recipe}.yaml").read_text()
    path = tmp_path / f"{recipe}.yaml"
    block = re.search(r"^# executor:\n(?:# +.*\n)+", text, re.MULTILINE)
    assert block is not None
    path.write_text(text.replace(block[0], re.sub(r"^# ", "", block[0], flags=re.MULTILINE)))
    config = load_run_config(path, [])
    found = resources_by_kind(config.executor, placed_graph(config, 1))
    assert (found["generation"].tasks, found["generation"].gpus) == (8, 1)
    assert (found["training"].gpus, found["light"].partition) == (8, "cpu")


def test_the_example_of_two_nodes_has_sixteen_processes(tmp_path: Path) -> None:
    example = next(text for text in EXAMPLES if "dp becomes 16" in text)
    settings = merge(yaml.safe_load(example), {"executor": {"kind": "slurm"}})
    executor, graph = planned(tmp_path, settings)
    node = graph.nodes["iteration-001/training"]
    assert (node.config.parallel.dp, node.config.parallel.nodes) == (16, 2)  # type: ignore[attr-defined]
    asked = resources_of(node, executor)
    assert (asked.nodes, asked.gpus) == (2, 8)


def test_only_the_kinds_that_the_diagram_shows_are_arrays(tmp_path: Path) -> None:
    executor, graph = planned(tmp_path, {"executor": "slurm"})
    arrays = {resources.kind for node in graph.nodes.values() if (resources := resources_of(node, executor)).is_array}
    assert arrays == set(ARRAY_KINDS) == {"generation", "scoring"}


def test_commands_that_it_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.main import PARSER

    named = set(re.findall(r"pipeline (attach|cancel|doctor|env|logs|run|status)\b", TEXT))
    assert named == {"attach", "cancel", "doctor", "env", "logs", "run", "status"}
    shown = PARSER.format_help()
    assert all(f"  {command}" in shown for command in named)
