"""wandb online, against a double of its server (wandb_double.py): each point once, whatever happens in between."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_tracking import Stream
from wandb_double import WandbDouble

from tracking.task import sent_file

RUN = "0badcafe"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbDouble]:
    """A double, which the processes that this one starts take for the server."""
    with WandbDouble() as double:
        monkeypatch.setenv("WANDB_BASE_URL", double.address)
        yield double


def until(reached: Callable[[], bool]) -> None:
    """Wait for something."""
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def steps(server: WandbDouble) -> list[int]:
    """The steps that the server has, in the order of its lines."""
    return [row["_step"] for row in server.history(RUN)]


@pytest.mark.slow
def test_each_point_is_sent_once_under_the_same_id_after_kills(server: WandbDouble, tmp_path: Path) -> None:
    stream = Stream(tmp_path / "small")
    for _ in range(2):
        stream.write(20)
        process = stream.start("wandb", mode="online", key="k" * 40)
        until(lambda: len(server.history(RUN)) >= stream.count - 10)
        process.kill()
        process.communicate()
    stream.write(20)
    process = stream.start("wandb", mode="online", key="k" * 40)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert b"Tried to log to step" not in errors, "what the server has was sent again"
    assert steps(server) == list(range(60))
    assert list(server.runs) == [RUN]


@pytest.mark.slow
def test_a_key_revoked_meanwhile_is_told_and_the_next_process_sends_the_rest(
    server: WandbDouble, tmp_path: Path
) -> None:
    stream = Stream(tmp_path / "small")
    stream.write(20)
    process = stream.start("wandb", mode="online", key="k" * 40)
    until(lambda: len(server.history(RUN)) >= stream.count - 10)
    server.revoked = True
    stream.write(20)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors.decode()
    told = errors.decode().splitlines()[-1]
    assert "wandb has stopped sending" in told
    assert "401" in told
    assert "the key was revoked" in told, "what the server has said"
    assert not sent_file(stream.run, "wandb").exists(), "what was not sent was noted as sent"
    assert len(server.history(RUN)) < stream.count

    server.revoked = False
    stream.ends_well(stream.start("wandb", mode="online", key="k" * 40))
    assert steps(server) == list(range(40))
    assert int(sent_file(stream.run, "wandb").read_text()) == (stream.run / "metrics.jsonl").stat().st_size
