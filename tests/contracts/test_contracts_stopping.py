"""A stage that is asked to stop saves what it has in hand if it can, and leaves with the signal's code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contracts import stopping
from contracts.artifacts import Artifact
from contracts.records import PROMPTS

STAGE = '''
import sys, time
from pathlib import Path
from typing import ClassVar
from contracts.config import StageConfig, identity, runtime
from contracts.ledger import Ledger
from contracts.records import PROMPTS, Message, Prompt
from contracts.declaration import Stage
from contracts.stage import Outcome, main
from contracts.workers import share_shards


class SlowConfig(StageConfig):
    """Three shards, each of which takes a while."""

    stage: ClassVar[str] = "slow"
    code_version: ClassVar[int] = 1
    gate: Path | None = runtime(None)
    """A shard takes until this file is there."""


def run(config, context):
    def open_worker():
        def make(name):
            print("in hand", name, flush=True)
            while config.gate and not config.gate.exists():
                time.sleep(0.01)
            ledger = Ledger("prompts")
            ledger.keep()
            context.publication.write_rows(name, [Prompt(name, (Message("user", name),))], ledger)
        return make

    share_shards(context, [f"shard-{number}.jsonl" for number in range(3)], open_worker)
    return Outcome("prompts")


if __name__ == "__main__":
    main({"slow": Stage(SlowConfig, PROMPTS, "slow:run")}, "slow")
'''


def start(folder: Path, grace: float, code: str = STAGE) -> "subprocess.Popen[str]":
    """Start the stage; each of its shards takes until `folder / "gate"` is there."""
    (folder / "slow.py").write_text(code)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{folder}",
        "RATCHET_GRACE_SECONDS": str(grace),
        "RATCHET_ATTEMPT": str(folder),
    }
    command = [sys.executable, "-m", "slow", f"output={folder / 'out'}", f"gate={folder / 'gate'}"]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)


def stop_in_hand(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Signal the stage while it makes its first shard."""
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("in hand"))
    process.send_signal(number)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".out.partial-*/shard-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_shard_in_hand_is_finished_within_the_grace_period(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, grace=60) as process:
        stop_in_hand(process, number)
        (tmp_path / "gate").touch()
        process.communicate(timeout=200)
    assert process.returncode == 128 + number
    assert shards(tmp_path) == ["shard-0.jsonl"]
    (failure,) = (json.loads(path.read_bytes()) for path in tmp_path.glob("failure-*.json"))
    assert failure["kind"] == "stopped"

    with start(tmp_path, grace=20) as process:
        out, _ = process.communicate(timeout=200)
    assert "in hand shard-0.jsonl" not in out, "what was finished is not made again"
    assert process.returncode == 0
    assert Artifact.open(tmp_path / "out", PROMPTS).manifest.rows == 3


def test_what_takes_longer_than_the_grace_period_is_left(tmp_path: Path) -> None:
    with start(tmp_path, grace=0.5) as process:
        stop_in_hand(process, signal.SIGTERM)
        process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert shards(tmp_path) == []
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1


SLOW_REPORT = """
from contracts import attempt
report = attempt.report_failure

def report_slowly(kind, text):
    print("in hand: the report", flush=True)
    time.sleep(2)
    report(kind, text)

attempt.report_failure = report_slowly
"""


def test_a_second_request_does_not_keep_a_stage_from_saying_why_it_leaves(tmp_path: Path) -> None:
    with start(tmp_path, grace=0.5, code=STAGE.replace("\n\n\nclass", SLOW_REPORT + "\n\nclass")) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("in hand shard"))
        process.send_signal(signal.SIGUSR1)
        next(line for line in process.stdout if "the report" in line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == 128 + signal.SIGUSR1
    (failure,) = (json.loads(path.read_bytes()) for path in tmp_path.glob("failure-*.json"))
    assert failure["kind"] == "stopped"


def test_a_command_that_listens_leaves_the_signals_as_they_were() -> None:
    def command() -> None:
        with stopping.listening():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(stopping.Stopped):
        command()
    assert signal.getsignal(signal.SIGINT) == before
    assert not stopping.requested()


def test_a_stop_before_any_work_leaves_at_once(tmp_path: Path) -> None:
    code = "from contracts import stopping; import time; stopping.listen(); print('ready', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=200) == 128 + signal.SIGUSR1
