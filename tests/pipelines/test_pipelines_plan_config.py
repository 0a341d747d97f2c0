"""The section `placement`: what it takes, from where, and what it refuses in words."""

from pathlib import Path

import pytest

from contracts.config import Role
from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.config.placement import PlacementSection
from pipelines.config.run import RunConfig
from pipelines.iteration import build_graph
from pipelines.planning.entries import check_entries

PLAN = """
strategy: separation
pools:
  generation: [0, 1]
  training: 2
stages:
  reference: training
  generation: {layout: {tp: 2}}
"""


def load(path: Path, *overrides: str) -> RunConfig:
    return load_run_config(path, list(overrides))


def test_it_is_a_section_a_word_or_a_file(smallest: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    assert load(smallest).placement == PlacementSection()
    assert load(smallest, "placement=interleaving").placement.strategy == "interleaving"
    read = load(smallest, f"placement={file}").placement
    assert (read.strategy, read.pools["generation"].devices, read.pools["training"].devices) == (
        "separation", [0, 1], 2
    )  # fmt: skip
    assert read.stages["reference"].pool == "training"
    assert read.stages["generation"].layout.tp == 2


def test_what_is_said_beside_a_file_changes_single_keys_of_it(smallest: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN)
    smallest.write_text(f"{smallest.read_text()}\nplacement: {file}\n")
    assert load(smallest, "placement.streaming=true").placement.streaming
    other = load(smallest, "placement=flattening", "placement.pools.generation=1").placement
    assert (other.strategy, other.pools["generation"].devices, other.pools["training"].devices) == ("flattening", 1, 2)
    alone = tmp_path / "other.yaml"
    alone.write_text("strategy: interleaving\n")
    assert load(smallest, f"placement={alone}", "placement.streaming=true").placement == PlacementSection(
        strategy="interleaving", streaming=True
    )


def test_async_needs_a_lag_in_some_iteration(smallest: Path) -> None:
    assert load(smallest, "placement=async", "lag=1").placement.strategy == "async"
    assert load(smallest, "placement=async", "lag=1", "changes={2: {lag: 0}}").placement.strategy == "async"


def test_colocated_needs_processes_that_stay(smallest: Path) -> None:
    assert load(smallest, "placement=colocated").executor.warm
    with pytest.raises(UserError, match=r"executor\.warm is false\. Set executor\.warm=true, or placement=flattening"):
        load(smallest, "placement=colocated", "executor.warm=false")


def test_nothing_of_it_is_identity(smallest: Path) -> None:
    config = load(smallest, "placement={strategy: separation, pools: {generation: 1, training: [3]}, streaming: true}")
    assert config.select(Role.IDENTITY) == load(smallest).select(Role.IDENTITY)
    assert config.placement.select(Role.IDENTITY) == {}


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ("sepration", "'placement.strategy' is 'sepration'"),
        ("{pools: {a: [0, 1], b: [1]}}", "pools.a and pools.b both have device 1. A device is in one pool"),
        ("{pools: {a: [2, 2]}}", "devices is [2, 2], which names a device twice"),
        ("{pools: {a: 0}}", "devices is 0; it must be a number of devices, at least 1"),
        ("{pools: {a: []}}", "devices is []; it must be a number of devices"),
        ("{pools: {a: [-1]}}", "devices is [-1]"),
        ("{pools: {sampling: 1}, stages: {generation: smpling}}", "is not a pool. Did you mean 'sampling'?"),
        ("{stages: {generation: sampling}}", "is not a pool. Known: none; add it to `pools`."),
        ("{stages: {generation: {layout: {tensor: 2}}}}", "unknown key 'placement.stages.generation.layout.tensor'"),
        ("{stages: {training: {layout: {zero: 4}}}}", "zero"),
        ("async", "but lag is 0: every iteration samples from the policy that the previous one trains. Set lag=1"),
        ("nowhere.yaml", "config file nowhere.yaml does not exist"),
    ],
)
def test_a_mistake_is_named_with_its_fix(smallest: Path, section: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        load(smallest, f"placement={section}")
    assert complaint in str(error.value)


def test_a_key_of_a_layout_that_no_named_stage_has_is_refused(smallest: Path) -> None:
    config = load(smallest, "placement.stages={generation: {layout: {tp: 2}}}")
    with pytest.raises(UserError, match=r"layout\.tp is 2, but .*/generation has no such key; it has repl"):
        check_entries(build_graph(config, 1), config)
    config = load(smallest, "placement.stages={'*': {layout: {tp: 2, replicas: 2}}}")
    check_entries(build_graph(config, 1), config)


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("generaton", "placement.stages has an entry for 'generaton', but the run has no such stage. Did you mean"),
        ("refrence", "Did you mean 'reference'"),
        ("iteration-009/*", "A key is generation, scoring, training, light, the role or the name of a stage"),
    ],
)
def test_an_entry_for_no_stage_is_refused(smallest: Path, key: str, complaint: str) -> None:
    config = load(smallest, f"placement.stages={{{key}: {{layout: {{replicas: 1}}}}}}")
    with pytest.raises(UserError) as error:
        check_entries(build_graph(config, 1), config)
    assert complaint in str(error.value)
