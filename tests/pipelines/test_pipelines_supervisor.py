"""Supervision: a stage's processes end with it, with the driver, and on request; how it ended is told."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from pipelines.execution.endings import Ending, ending_of, failure_of
from pipelines.execution.supervisor import AttemptRequest, process_identity, supervise

SLEEPERS = "sleep 600 & sleep 600 & echo started; wait"
"""A shell with two children of its own, as a launcher with its ranks."""


def attempt_of(folder: Path, script: str, driver: tuple[int, str] | None = None) -> Path:
    request = AttemptRequest(["bash", "-c", script], {"COLOUR": "red"}, ["HIDDEN"], str(folder), str(folder), driver)
    (folder / "request.json").write_bytes(msgspec.json.encode(request))
    return folder


def children_of(folder: Path) -> list[str]:
    """Processes that carry the mark of this run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"RATCHET_RUN={folder}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def wait_until_started(folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not (folder / "stage.log").exists() or "started" not in (folder / "stage.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_variables_and_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDDEN", "here")
    attempt = attempt_of(tmp_path, 'echo "$COLOUR ${HIDDEN:-gone}"; exit 3')
    assert supervise(str(attempt)) == 3
    assert (attempt / "stage.log").read_text() == "red gone\n"
    assert ending_of(attempt) == Ending("error", "failed with exit code 3.", None)


def test_a_killed_stage_is_told_as_killed(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path, "kill -9 $$")
    supervise(str(attempt))
    assert "was killed by SIGKILL" in ending_of(attempt).how


def test_a_cancelled_stage_takes_its_children_along(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path, SLEEPERS)
    thread = threading.Thread(target=supervise, args=(str(attempt),))
    thread.start()
    wait_until_started(tmp_path)
    assert len(children_of(tmp_path)) == 3
    (attempt / "cancel").touch()
    thread.join(timeout=200)
    assert not thread.is_alive()
    assert children_of(tmp_path) == []
    assert "SIGTERM" in ending_of(attempt).how


def test_a_stage_ends_when_its_driver_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as driver:
        attempt = attempt_of(tmp_path, SLEEPERS, process_identity(driver.pid))
        thread = threading.Thread(target=supervise, args=(str(attempt),))
        thread.start()
        wait_until_started(tmp_path)
        driver.kill()
        driver.wait()
    thread.join(timeout=200)
    assert not thread.is_alive()
    assert children_of(tmp_path) == []


def test_a_killed_supervisor_is_told_too(tmp_path: Path) -> None:
    assert "its supervisor was killed" in ending_of(tmp_path).how


def test_the_first_failure_is_the_one_that_is_told(tmp_path: Path) -> None:
    for pid, (when, text) in {1: (2.0, "connection reset"), 2: (1.0, "out of range")}.items():
        record = {"kind": "error", "text": text, "rank": str(pid), "time": when}
        (tmp_path / f"failure-{pid}.json").write_text(json.dumps(record))
    failure = failure_of(tmp_path)
    assert failure is not None
    assert failure["text"] == "out of range"
    assert failure_of(tmp_path / "nothing") is None


def test_a_process_is_known_by_more_than_its_number() -> None:
    pid, start = process_identity(os.getpid())
    assert pid == os.getpid()
    assert start.isdigit()
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert process_identity(child.pid)[1] == "gone"
