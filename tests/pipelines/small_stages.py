"""Replaces stages by tiny ones that run in the test's own process, with real keys and manifests."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

import pipelines.execution.driver
import pipelines.execution.lifecycle
import pipelines.run.verdicts
from annotation.gating.config import GateConfig
from annotation.gating.stage import decision_of
from contracts.artifacts import input_damage
from contracts.fingerprint import digest
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST
from contracts.publication import Publication
from contracts.records import CHECKPOINT, EVALUATION, EXPERIENCE, GATE, PAIRS, PROMPTS, ROLLOUTS, SCORES, WORLD
from contracts.stage import key_parts, stage_key
from embedded.config import WORLD_FILES
from pipelines.execution.executors.base import Executor, Site
from pipelines.execution.supervisor import REQUEST, AttemptRequest
from pipelines.graph import Node
from pipelines.planning.scheduling import streams
from pipelines.run.events import JobEnded

KINDS = {
    "world": WORLD,
    "prompts": PROMPTS,
    "generation": ROLLOUTS,
    "score": SCORES,
    "pairs": PAIRS,
    "experience": EXPERIENCE,
    "evaluation": EVALUATION,
    "gate": GATE,
}
REWARDS = [0.1, 0.5, 0.9, 0.3, 0.4, 0.2, 0.6]
"""The rewards of the policies by iteration."""


def make(node: Node, salt: str = "") -> None:
    """Publish a tiny version of a stage's output. Raises AssertionError if one of its inputs is incomplete."""
    config, parts = node.config, key_parts(node.config, {})
    damage = [problem for path in config.input_paths() for problem in input_damage(path)]
    assert damage == [], f"{node.name} was started without its inputs"
    content = stage_key(parts) + salt
    publication = Publication(config.output, KINDS.get(config.stage, CHECKPOINT), config.stage, stage_key(parts))
    publication.begin()
    files: dict[str, bytes] = {}
    facts: dict[str, Any] = {}
    if config.stage == "world":
        files = {name: name.encode() for name in WORLD_FILES if name != "model"}
        files |= {f"model/{name}": data for name, data in model(content).items()}
    elif config.stage == "evaluation":
        number = config.model_dump()["iteration"]
        facts["metrics"] = {"iteration": number, "reward_mean": REWARDS[number]}
        files = {"evaluation.json": content.encode()}
    elif isinstance(config, GateConfig):
        facts["gate"] = msgspec.to_builtins(decision_of(config))
        files = {"gate.json": content.encode()}
    elif config.stage in KINDS:
        files = {f"shard-0000{i}.jsonl": f'{{"row": "{i} {content * 20}"}}\n'.encode() for i in range(2)}
    else:
        files = {**model(content), "training-log.jsonl": b"{}\n"}
    for name, data in files.items():
        publication.scratch(name).write_bytes(data)
        publication.commit(name, Ledger("rows"), rows=data.count(b"\n"))
    publication.publish(
        key_parts=parts,
        inputs=parts["inputs"],
        input_paths={str(number): str(path) for number, path in enumerate(config.input_paths())},
        unit="rows",
        weights=None,
        versions={},
        seconds={},
        facts=facts,
    )


def model(content: str) -> dict[str, bytes]:
    """The files of a model."""
    data = (digest(content) * 40).encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return {"config.json": b"{}", "model.safetensors": len(header).to_bytes(8, "little") + header + data}


def without_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patch the driver so that it queries no environment for versions, sets no signal handlers and skips fsync."""
    monkeypatch.setattr(pipelines.execution.lifecycle, "probe_versions", lambda *_: {})
    monkeypatch.setattr(pipelines.run.verdicts, "probe_versions", lambda *_: {})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Sleep(Protocol):
    """A wait, with the part of Popen's interface that is used here."""

    pid: int

    def poll(self) -> int | None:
        """0 when it is over."""

    def kill(self) -> None:
        """End it."""


def sleep(seconds: float) -> Sleep:
    """Start a process that only sleeps."""
    return subprocess.Popen(["sleep", str(seconds)])


class Clock:
    """A simulated clock that advances only while the driver waits, to the next end of a stage, so that the load of the
    machine has no influence."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this process use the clock."""
        self.now = time.time()
        self._sleeps: list[Pause] = []
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(pipelines.execution.driver, "wait_for_end", self._wait_for_end)

    def sleep(self, seconds: float) -> Sleep:
        """Start a wait on this clock."""
        self._sleeps.append(Pause(self, self.now + seconds))
        return self._sleeps[-1]

    def _wait_for_end(self, pids: Iterable[int], seconds: float) -> None:
        assert list(pids), "the driver waits for nothing"
        self._sleeps = [one for one in self._sleeps if one.poll() is None]
        self.now = min(one.end for one in self._sleeps)


@dataclass
class Pause:
    """A wait on a simulated clock."""

    clock: Clock
    end: float
    pid: int = 1

    def poll(self) -> int | None:
        """0 when it is over."""
        return 0 if self.clock.now >= self.end else None

    def kill(self) -> None:
        """Do nothing, because there is no process."""


class TimedStages(Executor):
    """An executor whose stages only take a given time."""

    kind = "local"

    def __init__(self, site: Site, seconds: dict[str, float], sleep: Callable[[float], Sleep] = sleep) -> None:
        """Set the seconds of stages by role; other stages take no time."""
        super().__init__(site)
        self._seconds = seconds
        self._sleep = sleep
        self._streams = streams(self.graph, self.config)

    def submit(self, node: Node, attempt: Path) -> "TimedStage":
        """Start a stage."""
        (attempt / REQUEST).write_bytes(msgspec.json.encode(AttemptRequest([], {}, [], "", "", None)))
        (attempt / "stage.log").touch()  # tells the driver that the stage's shards can be followed
        name, share = self._streams.get(node.name, ("", 0.0))
        maker = self.graph.nodes[name].output if name else None
        return TimedStage(node, self._seconds.get(node.role, 0.0), maker, share, self._sleep)


class TimedStage:
    """A stage that publishes when its time is over. If it streams from another stage, its last shard's time starts only
    after that one has published."""

    def __init__(
        self, node: Node, seconds: float, maker: Path | None, share: float, sleep: Callable[[float], Sleep]
    ) -> None:
        self._node = node
        self._made = False
        self._last_shard = share * seconds
        self._sleep = sleep
        self._maker = None if maker is None or (maker / MANIFEST).exists() else maker
        self._sleeps = [sleep(seconds)]

    @property
    def pid(self) -> int | None:
        """The process that it waits for; None if it waits for the stage that it streams from."""
        return next((one.pid for one in self._sleeps if one.poll() is None), None)

    def ended(self) -> bool:
        """Whether its time is over; publishes if so."""
        if self._maker is not None and (self._maker / MANIFEST).exists():
            self._maker = None
            self._sleeps.append(self._sleep(self._last_shard))
        if self._maker is not None or self.pid is not None:
            return False
        if not self._made:
            make(self._node)
            self._made = True
        return True

    def news(self) -> None:
        """Do nothing."""

    def clear(self) -> list[JobEnded]:
        """Clear nothing, because no jobs are left."""
        return []

    def cancel(self) -> None:
        """End the stage."""
        for one in self._sleeps:
            one.kill()
