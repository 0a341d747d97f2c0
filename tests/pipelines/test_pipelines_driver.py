"""The driver when stages do not do what they should: tried again, given up, or stopped at once, and told how."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.manifest import MANIFEST
from contracts.stages.prompts import IMPORT_PROMPTS
from contracts.versions import installed_versions, source_version
from pipelines.config.load import load_run_config
from pipelines.execution import attempts
from pipelines.execution.attempts import Retries, StageFailedError
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Site
from pipelines.execution.supervisor import RUN
from pipelines.graph import Graph
from pipelines.insight.display import Display
from pipelines.insight.event_text import notable_lines
from pipelines.insight.status import print_status
from pipelines.job import ENTRY
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import place
from pipelines.run.directory import CANCEL, RunDirectory
from pipelines.run.events import Event, OrphanEnded, RunEnded, StageEvent, StageFailed, StagePublished, StageStarted

INTERPRETER = """#!/usr/bin/env bash
# An interpreter that misbehaves in its first {times} attempts at a stage.
case "$2" in *installed_versions*) echo '{versions}'; exit ;; esac
echo attempt >> {count}
if [ "$(wc -l < {count})" -le {times} ]; then
  {misbehave}
fi
exec {python} "$@"
"""


class Scene:
    """A run with a single stage, in an interpreter that misbehaves."""

    def __init__(self, folder: Path, config: Path, misbehave: str, times: int, **executor: Any) -> None:
        python = folder / "python"
        self.count = folder / "attempts"
        versions = json.dumps(installed_versions())
        text = INTERPRETER.format(
            times=times, count=self.count, misbehave=misbehave, python=sys.executable, versions=versions
        )
        python.write_text(text)
        python.chmod(0o755)
        source = folder / "prompts.jsonl"
        source.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(3)))
        settings = {"kind": "inline", "backoff_seconds": 0.05, "grace_seconds": 1, **executor}
        overrides = [f"executor.{key}={value}" for key, value in settings.items()]
        self.config = load_run_config(config, [*overrides, f"environments.annotation.python={python}"])
        self.run = RunDirectory(self.config.run_directory)
        self.run.claim(self.config, config, 0)
        graph = Graph(self.run.path)
        self.output = graph.add(IMPORT_PROMPTS, "prompts/all", {"source": source})
        self.graph = place(graph, cluster_of(self.config))
        self.said = io.StringIO()

    def drive(self) -> None:
        console = Console(file=self.said, width=200)
        site = Site(self.run, self.graph, self.config, ENTRY)
        Driver(site, [Display(console, self.run, self.graph)]).drive()

    @property
    def attempts(self) -> int:
        return len(self.count.read_text().splitlines())

    @property
    def events(self) -> list[Event]:
        return self.run.events()


def test_a_killed_stage_is_tried_again(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "kill -9 $$", times=2, kind="local")
    scene.drive()
    assert Artifact.open(scene.output).manifest.rows == 3
    assert scene.attempts == 3
    assert scene.said.getvalue().count("retry  prompts/all  (was killed by SIGKILL") == 2
    assert [event.kind for event in scene.events if isinstance(event, StageFailed)] == ["transient"] * 2


def test_transient_failures_are_given_up_after_the_retries_and_the_same_command_goes_on(
    tmp_path: Path, smallest: Path
) -> None:
    scene = Scene(tmp_path, smallest, "kill -9 $$", times=2, retries=1)
    with pytest.raises(StageFailedError, match="killed by SIGKILL") as failure:
        scene.drive()
    assert "Then continue with: " in str(failure.value)
    assert str(scene.run.path / "logs/prompts/all/attempt-2/stage.log") in str(failure.value)
    scene.drive()
    assert (scene.output / MANIFEST).is_file()


def test_a_preempted_stage_is_started_again_without_limit(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "kill -USR1 $$", times=5, retries=0, backoff_seconds=0)
    scene.drive()
    assert scene.attempts == 6


def test_a_defect_ends_the_run_at_once_with_its_log_tail(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "echo 'what happened'; exit 3", times=1)
    with pytest.raises(StageFailedError, match=r"(?s)failed with exit code 3.*what happened"):
        scene.drive()
    assert scene.attempts == 1


def test_a_mistake_of_the_users_ends_the_run_at_once(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "true", times=0)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(UserError, match="stage prompts/all: "):
        scene.drive()
    assert scene.attempts == 1


def test_a_run_that_is_cancelled_from_anywhere_is_interrupted(tmp_path: Path, smallest: Path) -> None:
    run = load_run_config(smallest, []).run_directory
    scene = Scene(tmp_path, smallest, f"touch {run / CANCEL}; kill -9 $$", times=5, retries=10)
    with pytest.raises(KeyboardInterrupt):
        scene.drive()
    assert scene.attempts == 1
    (ended,) = [event for event in scene.events if isinstance(event, RunEnded)]
    assert ended.outcome == "interrupted"


def test_what_a_killed_driver_has_left_is_ended_and_told(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "true", times=0)
    left = subprocess.Popen(["sleep", "1000"], env={**os.environ, RUN: str(scene.run.path)}, start_new_session=True)
    scene.drive()
    assert left.wait(200) < 0
    assert [event.pid for event in scene.events if isinstance(event, OrphanEnded)] == [left.pid]


def test_a_silent_stage_shows_where_it_stands_is_ended_and_tried_again(tmp_path: Path, smallest: Path) -> None:
    hang = (
        f"exec {sys.executable} -c 'import faulthandler, signal, time; "
        "faulthandler.register(signal.SIGQUIT); time.sleep(600)'"
    )
    scene = Scene(tmp_path, smallest, hang, times=1, stall_seconds=8, kind="local")
    scene.drive()
    assert "showed no activity for 8 s" in scene.said.getvalue()
    log = (scene.run.path / "logs/prompts/all/attempt-1/stage.log").read_text()
    assert 'File "<string>", line 1' in log
    assert (scene.output / MANIFEST).is_file()


def test_a_finished_run_says_what_it_reuses_and_its_events_do_not_repeat_it(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "exit 1", 0)
    scene.drive()
    for _ in range(3):
        scene.said.truncate(0)
        scene.drive()
        assert "reuse  prompts/all  (published under the same key)" in scene.said.getvalue()
    about = [event for event in scene.events if isinstance(event, StageEvent)]
    assert [type(event) for event in about] == [StageStarted, StagePublished]


def test_a_manifest_says_where_the_time_of_its_stage_went(tmp_path: Path, smallest: Path) -> None:
    scene = Scene(tmp_path, smallest, "true", times=0)
    scene.drive()
    seconds = dict(Artifact.open(scene.output).manifest.seconds)
    total = seconds.pop("total")
    assert {"prepare", "import", "check"} <= seconds.keys()
    assert sum(seconds.values()) <= total


def test_another_result_than_was_asked_for_is_not_taken(tmp_path: Path, smallest: Path) -> None:
    """As when the code or an input changes between the driver's decision and the stage's start."""
    source = tmp_path / "prompts.jsonl"
    change = f'echo \'{{"prompt": "one more"}}\' >> {source}'
    scene = Scene(tmp_path, smallest, change, times=1)
    with pytest.raises(StageFailedError, match="changed while it ran"):
        scene.drive()
    scene.drive()
    assert Artifact.open(scene.output).manifest.rows == 4


def test_a_stage_that_other_source_code_has_made_is_named(
    tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the checkout is edited between a job's submission and its start."""
    scene = Scene(tmp_path, smallest, "true", times=0)
    scene.drive()
    version = Artifact.open(scene.output).manifest.versions["ratchet"]
    assert version == source_version("contracts")
    assert not notable_lines(scene.events)

    scene.output.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(attempts, "source_version", lambda package: f"{package} of yesterday")
    scene.drive()
    (line,) = notable_lines(scene.events)
    assert f"prompts/all: computed by Ratchet's source {version}; it was contracts of yesterday when" in line


def test_without_the_cluster_nothing_is_claimed_of_its_jobs(
    tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, smallest, "true", times=0)
    attempt = scene.run.new_attempt("prompts/all")
    jobs = {"work": "7", "finish": "8", "detached": True, "submitted": 0.0}
    (attempt / "jobs.json").write_text(json.dumps(jobs))
    monkeypatch.setenv("PATH", "/nowhere")
    said = io.StringIO()
    print_status(Console(file=said, width=200), scene.run, scene.graph)
    assert "The jobs on the cluster are not known: squeue is not on PATH" in said.getvalue()
    assert re.search("prompts/all .*unknown .*job 7, 8", said.getvalue())


def test_pauses_double_vary_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    retries = Retries(limit=3, backoff=10.0)
    pauses = [retries.pause_after("a", "transient") for _ in range(4)]
    assert pauses[3] is None
    for number, pause in enumerate(pauses[:3]):
        assert pause is not None
        assert 0.5 * 10 * 2**number <= pause <= 1.5 * 10 * 2**number
    assert retries.waits("a")
    assert not retries.waits("b")
    assert retries.pause_after("a", "error") is None
    assert retries.pause_after("a", "user") is None
    longest = [retries.pause_after("a", "stopped") for _ in range(30)][-1]
    assert longest is not None
    assert longest <= 900


def test_a_stage_starts_only_where_its_estimate_fits(
    tmp_path: Path, smallest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path, smallest, "true", times=0)
    monkeypatch.setattr("pipelines.execution.attempts.disk_bytes", lambda node, graph: 1 << 60)
    with pytest.raises(UserError, match=r"stage prompts/all may need .*executor.check_space=false"):
        scene.drive()
    assert not scene.count.exists()
    monkeypatch.undo()
    scene.drive()
    assert (scene.output / MANIFEST).is_file()
