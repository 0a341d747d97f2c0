"""Trackers of a run: fed by processes of their own, which the run does not depend on."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Forked
from pipelines_smallest import pipeline, write_pretended

from contracts.points import read_points
from contracts.processes import pids_with_variable
from contracts.stages.prompts import IMPORT_PROMPTS
from pipelines.config.load import load_run_config
from pipelines.environments.locked import interpreter
from pipelines.execution.driver import Driver
from pipelines.execution.executors.base import Site
from pipelines.graph import Graph
from pipelines.insight import readers
from pipelines.insight.event_text import notable_lines
from pipelines.insight.listeners import listeners_of
from pipelines.job import ENTRY
from pipelines.planning.cluster import cluster_of
from pipelines.planning.placement import place
from pipelines.run.directory import RunDirectory
from pipelines.run.events import TrackerFailed
from tracking.task import MARK

READ = """
import sys
from pathlib import Path
from tracking.base import POINT
from tracking.tensorboard_tracker import scalars
for file in sorted(Path(sys.argv[1]).glob("*tfevents*")):
    for step, values in scalars(file):
        print(int(values[POINT]), step)
"""


class Scene:
    """A run of one light stage, whose tracker's interpreter is a shell script."""

    def __init__(self, folder: Path, config: Path, script: str, **tracking: object) -> None:
        python = folder / "tracker"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        source = folder / "prompts.jsonl"
        source.write_text('{"prompt": "so?"}\n')
        options = [f"tracking.{name}={value}" for name, value in {"mlflow": "{}", **tracking}.items()]
        self.config = load_run_config(config, [f"environments.tracking.python={python}", *options])
        self.run = RunDirectory(self.config.run_directory)
        self.run.claim(self.config, config, 0)
        graph = Graph(self.run.path)
        graph.add(IMPORT_PROMPTS, "prompts", {"source": source})
        self.graph = place(graph, cluster_of(self.config))

    def drive(self) -> TrackerFailed:
        """Run it; what it says of its tracker, once."""
        Driver(Site(self.run, self.graph, self.config, ENTRY), listeners_of(self.run, self.graph)).drive()
        assert len(read_points(self.run.path)) == 1
        (event,) = [event for event in self.run.events() if isinstance(event, TrackerFailed)]
        return event


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(smallest: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, smallest, "echo 'no route to the tracker' >&2; exit 1")
    event = scene.drive()
    assert event.tracker == "mlflow"
    assert "no route to the tracker" in event.error
    (line,) = notable_lines([event])
    assert line.endswith(f"the tracker mlflow failed; the next command sends it the rest: {event.error}")


def test_a_tracker_that_hangs_is_ended_when_its_time_is_over(smallest: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path, smallest, "sleep 1000", grace_seconds=0.5)
    assert "not done in time" in scene.drive().error
    assert pids_with_variable(f"{MARK}={scene.run.path}/mlflow") == []


CHATTY = """
import pathlib, sys
for number in range(3000): print('line', number, flush=True)
pathlib.Path(sys.argv[1]).touch()
sys.stdin.read()
for number in range(3000, 6000): print('line', number, flush=True)
raise SystemExit(3)
"""


def test_the_log_of_a_reader_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much a hook or a tracker prints while a run goes on, and what it said last is still told."""
    monkeypatch.setattr(readers, "MAX_LOG_BYTES", 10_000)
    log = tmp_path / "logs" / "reader.log"
    process = readers.ReaderProcess([sys.executable, "-c", CHATTY, tmp_path / "told"], os.environ, b"", log)
    while not (tmp_path / "told").exists():
        assert process.failure() is None
        time.sleep(0.01)
    assert process.failure() is None
    assert log.stat().st_size <= 10_000, "while it runs"
    assert log.read_text().startswith("(what came before was cut off)\nline ")
    process.end_input()
    failure = process.wait(time.monotonic() + 200)
    assert failure is not None
    assert failure.startswith("line 5997 | line 5998 | line 5999 (exit code 3")
    assert log.stat().st_size <= 10_000
    assert log.read_text().startswith("(what came before was cut off)\nline ")


@pytest.mark.slow
def test_a_tracker_has_every_metric_once_after_kills_of_the_driver(root: Path, tmp_path: Path) -> None:
    command = ["run", str(write_pretended(tmp_path)), "--iters", "2", "tracking.tensorboard={}"]
    chance = random.Random(2)
    for _ in range(6):
        driver = Forked("pipelines", *command)
        time.sleep(chance.uniform(0.5, 3.0))
        driver.kill()
        driver.wait()
    done = pipeline(*command)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/pretended"
    assert not [event for event in RunDirectory(run).events() if isinstance(event, TrackerFailed)]
    reader = [str(interpreter("tracking")), "-c", READ, str(run / "tracking/tensorboard")]
    found = subprocess.run(reader, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)}).stdout
    points = read_points(run)
    expected = [f"{point.point} {point.global_step}" for point in points]
    assert sorted(found.splitlines()) == sorted(expected)
    stages = {point.stage for point in points if point.unit == "stage"}
    assert {path.parent.relative_to(run).as_posix() for path in run.glob("*/**/manifest.json")} == stages
    again = pipeline(*command)
    assert "nothing to do" in again.stdout
    assert read_points(run) == points
