"""`pipeline plan search`: what it prints and writes, that a run takes it, and what the report says afterwards."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pipelines_smallest import FinishedRun, pipeline, write_smallest
from test_pipelines_plan import refused, said
from test_pipelines_search import Jobs, large, on_scheduler, setting_of

from contracts.config import validate
from contracts.errors import UserError
from pipelines.config.load import load_run_config
from pipelines.config.placement import PlacementSection
from pipelines.insight.plan_search import run_search
from pipelines.insight.report.data import RunReport, StageRow, TimeFacts
from pipelines.insight.report.expected import expected_lines, expected_table, plan_statement
from pipelines.planning.search.plan_file import digest_of, plan_text
from pipelines.run.directory import RunDirectory

EXPECTED = {
    "chosen": "found", "seconds": 100.0, "error": 5.0, "iterations": 2, "devices": "test", "config": "",
    "stages": {
        "training": {"seconds": [10.0, 20.0], "first": 1, "error": 0.12, "basis": "analytic"},
        "heldout/generation": {"seconds": [5.0], "error": 0.1, "basis": "measured"},
        "reference": {"seconds": [5.0], "error": 0.1, "basis": "measured"},
    },
}  # fmt: skip


@pytest.mark.slow
def test_a_plan_is_written_and_read_with_what_is_expected_of_it(tmp_path: Path) -> None:
    setting = large(tmp_path, 8)
    view, section = run_search(setting, seed=1, seconds=60)
    file = tmp_path / "plan.yaml"
    file.write_text(plan_text(section, "pipeline plan search"))
    config = load_run_config("llama3-8b-ppo", [f"policy={tmp_path}/policy", f"placement={file}"])
    assert config.placement == section
    expectation = config.placement.expectation
    assert expectation is not None
    assert (expectation.chosen, expectation.devices, expectation.seed) == (view.chosen, "8 GPU of 80 GiB", 1)
    assert expectation.config == digest_of(setting.config)
    row = next(row for row in view.plans if row.name == view.chosen)
    assert expectation.seconds == pytest.approx(row.seconds, rel=1e-3)
    training = expectation.stages["training"]
    assert (training.first, training.basis, training.error) == (1, "analytic", 0.1)
    assert len(training.seconds) == 1, "every iteration is alike"
    other = load_run_config("llama3-8b-ppo", [f"placement={file}", "placement.strategy=separation"])
    assert other.placement.expected is not None
    assert other.placement.expectation is None, "it was changed since"


def test_of_a_job_and_of_a_scorer_that_follows_it_expects_what_a_report_measures(shared_smallest: Path) -> None:
    roles = ("generation", "reward", "training")
    measured = Jobs({"generation": [4.0], "reward": [2.0], "training": [5.0]}, {}, queue=3.0, finish=2.0)
    setting = on_scheduler(setting_of(shared_smallest, roles, measured, 1, 1, 8), 1)
    _, section = run_search(setting, seed=0, seconds=60)
    assert section.streaming
    assert section.expected is not None
    expected = section.expected.stages
    assert expected["training"].seconds == [3 + 5], "with its queue, and without the job that finishes it"
    assert expected["training"].error == pytest.approx(math.hypot(0.1 * 5, 3) / 8, rel=1e-3)
    assert expected["reward"].seconds == [4 + 2], "from the generation's beginning until that is published"


@pytest.mark.slow
def test_another_plan_of_the_table_can_be_asked_for(tmp_path: Path) -> None:
    setting = large(tmp_path, 4)
    view, section = run_search(setting, seed=0, seconds=60, take="interleaving")
    assert (view.chosen, section.strategy) == ("interleaving", "interleaving")
    assert "requested with --take; the search would adopt" in view.reason
    with pytest.raises(UserError, match="--take is async, which is not a possible plan: async is for runs with a lag"):
        run_search(setting, seed=0, seconds=60, take="async")


def expecting(path: Path, **changes: Any) -> Any:
    """A config whose plan says what it expects."""
    config = load_run_config(path, [])
    plan = validate(PlacementSection, {"strategy": "interleaving"}, "test")
    data = {**EXPECTED, "config": digest_of(config), "plan": plan.digest, **changes}
    placement = validate(PlacementSection, {"strategy": "interleaving", "expected": data}, "test")
    return config.model_copy(update={"placement": placement})


def row(role: str, iteration: int, total: float, attempts: int = 1) -> StageRow:
    name = f"iteration-{iteration:03d}/{role}"
    return StageRow(
        name=name, kind="x", iteration=iteration, role=role, state="published", attempts=attempts, total=total, wait=1.0
    )


def reported(config: Any, rows: list[StageRow]) -> RunReport:
    time = TimeFacts(
        wall=1.0, stages=1.0, device_hours=0, load=0, compute=0, wait=0, other=0, by_role={}, held=0, idle={},
        tokens_per_second={},
    )  # fmt: skip
    return RunReport(
        name="x", path="runs/x", made=0.0, state="finished", iterations=2, time=time,
        expected=expected_lines(config, rows), stages=rows,
    )  # fmt: skip


def test_what_took_as_long_as_expected_is_said_to_have(shared_smallest: Path) -> None:
    config = expecting(shared_smallest)
    rows = [row("training", 1, 9.5), row("training", 2, 20.0), row("heldout/generation", 0, 4.2)]
    report = reported(config, rows)
    (statement,) = plan_statement(report, config)
    assert (statement.tone, statement.details) == ("good", [])
    assert statement.answer == "Yes. Its stages took 1x of what it expected, none beyond twice its stated error."
    (later,) = plan_statement(report, expecting(shared_smallest, config="before a gate was added"))
    assert (later.tone, later.details) == ("good", [])
    assert later.answer.startswith("Yes, although the run's config has changed since it was made. Its stages took 1x")
    _, table = expected_table(report)
    assert table[0] == ["training", "2", "15 s ± 12%", "15.8 s", "1.05", "analytic"]
    assert [line[0] for line in table] == ["training", "heldout/generation"], "no reference was made"


def test_a_drift_beyond_the_stated_error_is_told_with_what_the_plan_stands_on(shared_smallest: Path) -> None:
    config = expecting(shared_smallest, config="of another run")
    again = row("heldout/generation", 0, 500.0, attempts=2)
    report = reported(config, [row("training", 1, 10.0), row("training", 2, 37.0), again])
    (statement,) = plan_statement(report, config)
    assert statement.tone == "unclear"
    assert "Iteration 2's training took 1.9x of what the plan expected with ± 12%" in statement.answer
    assert "the plan knew it by data sheets alone" in statement.answer
    assert any("pipeline plan search CONFIG --runs runs/x" in line for line in statement.details)
    assert "The run's config has changed since the plan was made, which may be why." in statement.details
    assert expected_table(report)[1][0][-1] == "analytic, drifted"


def test_without_an_expectation_nothing_is_said(shared_smallest: Path) -> None:
    config = load_run_config(shared_smallest, [])
    assert plan_statement(reported(config, [row("training", 1, 1.0)]), config) == []


def test_mistakes_are_named_before_anything_is_searched(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = ("plan", "search", str(smallest))
    assert "--lags is '0,x'; it must be numbers" in refused(capsys, *search, "--lags", "0,x")
    assert "a plan is a YAML file" in refused(capsys, *search, "--output", "plan.json")
    assert "--seconds is 0; it must be more than 0" in refused(capsys, *search, "--seconds", "0")


def test_of_a_schedulers_jobs_both_ways_are_told(
    smallest: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_PROFILES", "off")
    monkeypatch.setenv("RATCHET_VARIANT", "auto")
    search = ("plan", "search", str(smallest), "executor=slurm", "--iters", "1")
    attached, detached = json.loads(said(capsys, *search, "--json"))["searches"]
    assert (attached["way"], detached["way"]) == ("attached", "detached")
    seconds = [{row["name"]: row["seconds"] for row in view["plans"]} for view in (attached, detached)]
    assert seconds[1]["as written"] > seconds[0]["as written"] + 60, "each training has a job more, which waits too"
    assert seconds[0]["found"] < seconds[0]["as written"], "streaming, which a detached run cannot have"
    assert detached["found"].get("streaming", False) is False
    assert "none of its jobs has been measured: 60 s in the queue are assumed for each" in attached["devices"]
    (alone,) = json.loads(said(capsys, *search, "executor.stages.light=local", "--json"))["searches"]
    assert alone["way"] == "attached", "what runs here takes a driver"
    monkeypatch.setenv("RATCHET_VARIANT", "auto")  # it was decided for jobs without GPUs
    unknown = refused(capsys, *search, "executor.resources.gpus=8")
    assert "stages ask slurm for GPUs, and no job has been seen yet that had one" in unknown
    assert unknown in refused(capsys, "plan", "simulate", *search[2:], "executor.resources.gpus=8")


@pytest.mark.slow
def test_a_run_takes_the_plan_that_was_searched_by_what_another_has_taken(
    tmp_path: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_PROFILES", str(tmp_path / "profiles"))
    config, plan = write_smallest(tmp_path), tmp_path / "plan.yaml"
    search = ["plan", "search", str(config), "--iters", "1", "--runs", str(finished_run.path)]
    told = json.loads(said(capsys, *search, "--output", str(plan), "--json"))
    (view,) = told["searches"]
    assert {row["name"] for row in view["plans"]} >= {"flattening", "colocated", "found"}
    text = said(capsys, *search, "--plain")
    assert f"take {view['chosen']}: " in text
    assert "placement=plan.yaml" in text
    result = pipeline("run", str(config), "--iters", "1", f"placement={plan}", "--quiet")
    assert result.returncode == 0, result.stderr
    run = RunDirectory(tmp_path / "runs" / "smallest")
    assert run.config.placement.expectation is not None
    assert "## Expected by the plan, and measured" in said(capsys, "report", str(run.path), "--markdown")
    stages = {stage["stage"]: stage for stage in json.loads(said(capsys, "status", str(run.path), "--json"))["stages"]}
    training = stages["iteration-001/training"]
    assert training["expected_seconds"] == run.config.placement.expectation.stages["training"].seconds_of(1)
    assert training["seconds"] > 0
    assert stages["iteration-001/pairs"]["expected_seconds"] is None, "it has no devices"
