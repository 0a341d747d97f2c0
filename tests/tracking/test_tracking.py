"""What trackers have of a run, read back by each tracker's own means: the points of metrics.jsonl, each once."""

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contracts.config import validate
from contracts.points import METRICS, Point, read_points
from tracking.base import POINT
from tracking.config import TrackingSection
from tracking.task import MARK, TrackingTask, sent_file

Found = list[tuple[int, dict[str, float]]]
"""The place of each point in the stream, and its metrics, as often as a tracker has it. The trackers' libraries are
imported where they are read: the fast loop has none of these tests, but collects them."""
AXES = ("iteration", "global_step", "stage_step")


def read_wandb(run: Path) -> Found:
    from tracking.wandb_files import history

    files = sorted((run / "tracking/wandb").glob("*run-*/run-*.wandb"))
    return [(step, _metrics(values)) for file in files for step, values in history(file)]


def read_trackio(run: Path) -> Found:
    (database,) = (run / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    return [(step, _metrics(json.loads(metrics))) for step, metrics in rows]


def read_tensorboard(run: Path) -> Found:
    from tracking.tensorboard_tracker import scalars

    files = sorted((run / "tracking/tensorboard").glob("*tfevents*"))
    return [(int(values[POINT]), _metrics(values)) for file in files for _, values in scalars(file)]


def read_mlflow(run: Path) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/tracking/mlflow.db")
    (place,) = [found.experiment_id for found in client.search_experiments() if found.name == "ratchet"]
    (one,) = client.search_runs([place])
    rows: dict[int, dict[str, float]] = {}
    found: Found = []
    times = {metric.timestamp: int(metric.value) for metric in client.get_metric_history(one.info.run_id, POINT)}
    for name in one.data.metrics:
        for metric in client.get_metric_history(one.info.run_id, name):
            rows.setdefault(times[metric.timestamp], {})
            if name == POINT:
                found.append((int(metric.value), rows[int(metric.value)]))
            elif name not in AXES and name != "system/iteration":
                assert name not in rows[times[metric.timestamp]], "twice"
                rows[times[metric.timestamp]][name] = metric.value
    return found


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in values.items()
        if "/" in name and name not in (POINT, "system/iteration") and not name.startswith("_")
    }


TRACKERS: dict[str, tuple[dict[str, Any], Callable[[Path], Found]]] = {
    "wandb": ({"mode": "offline"}, read_wandb),
    "trackio": ({"directory": "RUN/trackio"}, read_trackio),
    "tensorboard": ({}, read_tensorboard),
    "mlflow": ({}, read_mlflow),
}


QUICK = (
    "-c",
    "import sys, tracking.__main__ as tracking; tracking.POLL_SECONDS = tracking.OFFLINE_SECONDS = 0.2; "
    "sys.exit(tracking.main())",
)
"""Sends at short intervals, so that whoever kills it in between finds it at work."""


class Stream:
    """A run's metrics.jsonl, written while a tracker reads it."""

    def __init__(self, run: Path) -> None:
        run.mkdir()
        self.run = run
        self.count = 0

    def write(self, count: int) -> None:
        """Append `count` points."""
        with (self.run / METRICS).open("ab") as file:
            for _ in range(count):
                chance = random.Random(self.count)
                point = Point(
                    point=self.count, time=1e9 + self.count, stage="iteration-001/training", key="0123456789ab",
                    unit="step", number=self.count + 1, iteration=1 + self.count // 50, global_step=self.count + 1,
                    metrics={"train/loss": chance.random(), "eval/reward_mean": -chance.random()},
                )  # fmt: skip
                file.write(msgspec.json.encode(point) + b"\n")
                self.count += 1

    def start(
        self, tracker: str, program: tuple[str, str] = ("-m", "tracking"), key: str = "", **changes: Any
    ) -> "subprocess.Popen[bytes]":
        """Start a tracker's process."""
        said = {
            name: str(value).replace("RUN", str(self.run)) for name, value in (TRACKERS[tracker][0] | changes).items()
        }
        section = validate(TrackingSection, {tracker: said}, "test")
        settings = section.chosen[tracker].model_dump(mode="json")
        task = TrackingTask(tracker, "0badcafe", "small", str(self.run), settings, {"training": {"algorithm": "dpo"}})
        environment = {**os.environ, MARK: f"{self.run}/{tracker}", "WANDB_API_KEY": key}
        process = subprocess.Popen(
            [sys.executable, *program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        process.stdin.flush()
        return process

    def ends_well(self, process: "subprocess.Popen[bytes]") -> None:
        """End a process's input, and wait until it has sent all."""
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()

    def has_all(self, tracker: str) -> None:
        """The tracker has every point, once."""
        found = TRACKERS[tracker][1](self.run)
        assert sorted(place for place, _ in found) == list(range(self.count))
        expected = {point.point: point.metrics for point in read_points(self.run)}
        for place, metrics in found:
            assert metrics == pytest.approx(expected[place], rel=1e-6)  # TensorBoard has single precision


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    """An empty run."""
    return Stream(tmp_path / "small")


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_every_point_once_after_kills_at_any_instant(stream: Stream, tracker: str) -> None:
    chance = random.Random(1)
    stream.write(20)
    stream.ends_well(stream.start(tracker))
    stream.has_all(tracker)
    for _ in range(3):
        process = stream.start(tracker, QUICK)
        deadline = time.monotonic() + chance.uniform(2.0, 5.0)
        while time.monotonic() < deadline:
            stream.write(7)
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = stream.start(tracker)
    stream.write(30)
    stream.ends_well(process)
    stream.has_all(tracker)


FULL = (
    "-c",
    "import resource, sys, tracking.__main__ as tracking; tracking.POLL_SECONDS = tracking.OFFLINE_SECONDS = 0.2; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); sys.exit(tracking.main())",
)
"""Cannot write more into a file than 300 KB."""


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_cannot_write_says_so_and_gets_what_it_lacks_later(stream: Stream, tracker: str) -> None:
    """Some of the libraries only warn, or say nothing."""
    stream.write(5000)
    process = stream.start(tracker, FULL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0, errors.decode()
    assert re.search("disk I/O error|file too large", errors.decode(), re.IGNORECASE), errors.decode()
    assert not sent_file(stream.run, tracker).exists()
    stream.write(30)
    stream.ends_well(stream.start(tracker))
    stream.has_all(tracker)


@pytest.mark.slow
def test_trackio_has_every_point_once_on_a_file_system_of_the_network(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it writes files that its dashboard takes into the database at some time."""
    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    for _ in range(3):
        stream.write(20)
        stream.ends_well(stream.start("trackio"))
    files = sorted((stream.run / "trackio").rglob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(row["step"] for row in rows) == list(range(stream.count))
    assert len({row["run_id"] for row in rows}) == 1, "as several runs"


@pytest.mark.slow
def test_wandb_without_a_key_says_so(stream: Stream) -> None:
    stream.write(1)
    process = stream.start("wandb", mode="online")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "wandb login" in errors.decode()


@pytest.mark.slow
def test_the_process_of_a_tracker_loads_no_configuration() -> None:
    """Which would take it a third of a second."""
    code = "import sys, tracking.__main__; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_wandb_does_not_look_at_its_own_process(stream: Stream) -> None:
    """It would tell of the wrong one, and load its launcher for that."""
    stream.write(3)
    program = (
        "import sys; from tracking.__main__ import main; sys.exit(main() or 10 * ('wandb.sdk.launch' in sys.modules))"
    )
    stream.ends_well(stream.start("wandb", ("-c", program)))
    stream.has_all("wandb")
    assert not [*(stream.run / "tracking/wandb").rglob("requirements.txt")]
    assert not [*(stream.run / "tracking/wandb").rglob("wandb-metadata.json")]
