"""Stages that are small things in the place of real ones, made by the test's own process: real keys and manifests."""

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
"""Of the policies, by iteration."""


def make(node: Node, salt: str = "") -> None:
    """Publish what a stage would, in small; an AssertionError where an input of it is not whole."""
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
    """Files of a model."""
    data = (digest(content) * 40).encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return {"config.json": b"{}", "model.safetensors": len(header).to_bytes(8, "little") + header + data}


def without_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver asks no environment for its versions, leaves the signals alone and does not wait for the disk."""
    monkeypatch.setattr(pipelines.execution.lifecycle, "probe_versions", lambda *_: {})
    monkeypatch.setattr(pipelines.run.verdicts, "probe_versions", lambda *_: {})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Sleep(Protocol):
    """Some time that passes."""

    pid: int

    def poll(self) -> int | None:
        """0 when it is over."""

    def kill(self) -> None:
        """End it."""


def sleep(seconds: float) -> Sleep:
    """A process that does nothing else."""
    return subprocess.Popen(["sleep", str(seconds)])


class Clock:
    """A time that passes only while the driver waits, up to the next end of a stage: what else the machine does
    decides nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have this process go by it."""
        self.now = time.time()
        self._sleeps: list[Pause] = []
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(pipelines.execution.driver, "wait_for_end", self._wait_for_end)

    def sleep(self, seconds: float) -> Sleep:
        """So much of this time."""
        self._sleeps.append(Pause(self, self.now + seconds))
        return self._sleeps[-1]

    def _wait_for_end(self, pids: Iterable[int], seconds: float) -> None:
        assert list(pids), "the driver waits for nothing"
        self._sleeps = [one for one in self._sleeps if one.poll() is None]
        self.now = min(one.end for one in self._sleeps)


@dataclass
class Pause:
    """Some time of such a clock."""

    clock: Clock
    end: float
    pid: int = 1

    def poll(self) -> int | None:
        """0 when it is over."""
        return 0 if self.clock.now >= self.end else None

    def kill(self) -> None:
        """Nothing is left."""


class TimedStages(Executor):
    """Runs stages that take a known time, and nothing else."""

    kind = "local"

    def __init__(self, site: Site, seconds: dict[str, float], sleep: Callable[[float], Sleep] = sleep) -> None:
        """Take so long for stages of these roles, and no time for the others."""
        super().__init__(site)
        self._seconds = seconds
        self._sleep = sleep
        self._streams = streams(self.graph, self.config)

    def submit(self, node: Node, attempt: Path) -> "TimedStage":
        """Start it."""
        (attempt / REQUEST).write_bytes(msgspec.json.encode(AttemptRequest([], {}, [], "", "", None)))
        (attempt / "stage.log").touch()  # by which the driver knows that it can be followed
        name, share = self._streams.get(node.name, ("", 0.0))
        maker = self.graph.nodes[name].output if name else None
        return TimedStage(node, self._seconds.get(node.role, 0.0), maker, share, self._sleep)


class TimedStage:
    """One of them; it publishes when its time is over, and where it follows a maker, that of the last shard too."""

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
        """The process that it waits for; None: it waits for its maker."""
        return next((one.pid for one in self._sleeps if one.poll() is None), None)

    def ended(self) -> bool:
        """Whether its time is over."""
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
        """Nothing."""

    def clear(self) -> list[JobEnded]:
        """Nothing is left."""
        return []

    def cancel(self) -> None:
        """End it."""
        for one in self._sleeps:
            one.kill()
