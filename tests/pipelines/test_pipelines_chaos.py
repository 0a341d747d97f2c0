"""Killed at every point of its work, a run ends with the bytes of one that nothing touched; so it does on a full disk.

The long version, with hundreds of kills chosen at random, is scripts/chaos.sh.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos import FULL, KILL, TERM, TORN, Fault, Round, Setup, freeze, make_reference
from pipelines_smallest import COMMAND, FinishedRun, write_smallest

from contracts.artifacts import Artifact
from pipelines.environments.locked import interpreter

pytestmark = pytest.mark.timeout(900)
HERE = Path(__file__).parent

FAULTS: list[dict[str, Any]] = [
    # In the middle of a shard or of a step.
    {"stage": "setup/sft", "point": "step", "action": KILL, "occurrence": 3},
    {"stage": "setup/reward-model/training", "point": "saved", "action": TORN, "occurrence": 2},
    {"stage": "setup/reward-model/generation", "point": "write", "action": TORN, "occurrence": 2},
    {"stage": "iteration-000/heldout/generation", "point": "commit", "action": TERM, "occurrence": 2},
    # Before it is published: without its manifest, and with it.
    {"stage": "prompts/train", "point": "manifest", "action": FULL},
    {"stage": "setup/reward-model/pairs", "point": "manifest", "action": TORN},
    {"stage": "setup/reward-model/labels", "point": "rename", "action": KILL, "victim": "group"},
    {"stage": "iteration-000/heldout/reward", "point": "finish", "action": TORN, "zeros": True},
    # After it is published.
    {"stage": "iteration-000/heldout/gold", "point": "published", "action": KILL, "victim": "supervisor"},
    {"stage": "iteration-000/heldout/well_formed", "point": "published", "action": TERM},
    # The driver, between stages and at its own files.
    {"stage": None, "point": "claim", "action": TORN},
    {"stage": None, "point": "between", "action": TERM, "occurrence": 5},
    {"stage": None, "point": "record", "action": KILL, "occurrence": 9},
    {"stage": None, "point": "metrics", "action": FULL},
]


def test_killed_at_every_point_it_ends_with_the_same_bytes(finished_run: FinishedRun, tmp_path: Path) -> None:
    faults = [Fault(id=number, who="stage" if at["stage"] else "driver", **at) for number, at in enumerate(FAULTS)]
    setup = Setup(freeze(tmp_path), finished_run.config, tmp_path, finished_run.path, iterations=0)
    chaos = Round(setup, 1, faults, print)
    tally = chaos.play()
    assert tally.problems == []
    assert tally.held
    assert [str(fault) for fault in chaos.waiting.values()] == [], "faults that were never met"
    assert tally.drivers_started > 2  # a driver may meet two of its four faults before it ends
    assert tally.stages_tried_again >= 4  # killed stages; one that died with its driver is started, not tried again


DATA = [
    "sft=null",
    "reward_model=null",
    "scorers={reward: {kind: rule, function: RULES:variety}}",
    "prompts.train=null",
    "prompts.mixture={reviews: {source: 'world:train.jsonl', weight: 2}, more: {source: 'world:preference.jsonl'}}",
    "prompts.per_iteration=6",
    "prompts.dynamic_sampling={rounds: 1, margin: 2}",
    "replay={decay: 0.5}",
    "generation.k=2",
]
"""A run with little to compute and much to put together."""
DATA_FAULTS: list[dict[str, Any]] = [
    {"stage": "prompts/train/more", "point": "commit", "action": TORN},
    {"stage": "iteration-001/prompts", "point": "receipt", "action": KILL, "occurrence": 2},
    {"stage": "iteration-001/round-2/prompts", "point": "commit", "action": TORN, "occurrence": 2},
    {"stage": "iteration-001/round-2/generation", "point": "committed", "action": KILL, "victim": "group"},
    {"stage": "iteration-001/selected/rollouts", "point": "committed", "action": KILL},
    {"stage": "iteration-001/selected/reward", "point": "write", "action": TORN, "occurrence": 2},
    {"stage": "iteration-002/prompts", "point": "rename", "action": KILL, "victim": "supervisor"},
    {"stage": "iteration-002/selected/rollouts", "point": "manifest", "action": TORN, "zeros": True},
    {"stage": "iteration-002/replay-of-iteration-001", "point": "write", "action": KILL},
    {"stage": None, "point": "between", "action": KILL, "occurrence": 12},
]


@pytest.mark.chaos
def test_prompts_and_pairs_of_many_places_are_put_together_the_same_when_killed(tmp_path: Path) -> None:
    """A mixture, dynamic sampling and replay: as many prompts and pairs, each once, and the same bytes."""
    config = write_smallest(tmp_path)
    overrides = [text.replace("RULES", str(tmp_path / "rules.py")) for text in DATA]
    faults = [Fault(id=number, who="stage" if at["stage"] else "driver", **at) for number, at in enumerate(DATA_FAULTS)]
    setup = Setup(freeze(tmp_path), config, tmp_path, tmp_path / "reference" / "smallest", overrides=overrides)
    make_reference(setup)
    drawn = Artifact.open(setup.reference / "iteration-001/round-2/prompts").manifest.facts
    assert (0 < drawn["wanted"] < 6, drawn["missing"]) == (True, 0), "some have no signal, and others are drawn"
    chaos = Round(setup, 1, faults, print)
    tally = chaos.play()
    assert tally.problems == []
    assert tally.held
    assert [str(fault) for fault in chaos.waiting.values()] == [], "faults that were never met"
    assert tally.stages_tried_again >= 6


def on_a_full_disk(directory: Path, when: str, command: list[str]) -> dict[str, Any]:
    """What becomes of a command whose disk fills up, and of the same command when there is room again."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("THIS MACHINE ALLOWS NO NAMESPACES (unshare --map-root-user --mount): NOT TESTED")
    directory.mkdir()
    program = [sys.executable, str(HERE / "pipelines_full_disk.py"), str(directory), when]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    result = subprocess.run(
        [*namespace, *program, *command], capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["first"]["code"] == 2, told["first"]["output"]
    assert "the disk is full" in told["first"]["output"] or "MiB are free" in told["first"]["output"]
    assert "Traceback" not in told["first"]["output"]
    assert told["second"]["code"] == 0, told["second"]["output"]
    assert told["strays"] == []
    return told


SLOW = """
import time


def slow(*, messages, response, finish_reason, answer):
    time.sleep(0.02)
    with open(__file__ + ".calls", "a") as calls:
        calls.write(".")
    return len(response)
"""


def test_scoring_on_a_full_disk_goes_on_when_there_is_room(finished_run: FinishedRun, tmp_path: Path) -> None:
    """What was finished before is not made again, and the whole is that of an undisturbed run."""
    (tmp_path / "slow.py").write_text(SLOW)
    rollouts = finished_run.path / "setup/reward-model/generation"
    config = tmp_path / "score.yaml"
    function = f"{tmp_path / 'slow.py'}:slow"
    config.write_text(yaml.safe_dump({"kind": "rule", "name": "slow", "function": function, "rollouts": str(rollouts)}))
    command = [str(interpreter("annotation")), "-m", "annotation", "score", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    subprocess.run([*command, f"output={tmp_path / 'whole'}"], check=True, timeout=100, env=environment)
    calls = tmp_path / "slow.py.calls"
    samples = calls.stat().st_size
    calls.unlink()
    disk = tmp_path / "disk"
    told = on_a_full_disk(disk, ".out.partial-*/.receipt-*", [*command, f"output={disk / 'out'}"])
    assert told["first"]["digests"] == {}
    assert told["second"]["digests"] == {"out": Artifact.open(tmp_path / "whole").manifest.digest}
    largest = max(file.rows for file in Artifact.open(tmp_path / "whole").manifest.files)
    assert samples <= calls.stat().st_size <= samples + largest, "more than the shard in hand was made again"


def test_training_on_a_full_disk_goes_on_when_there_is_room(finished_run: FinishedRun, tmp_path: Path) -> None:
    config = next((finished_run.path / "logs/setup/sft").glob("attempt-*")) / "stage.yaml"
    command = [str(interpreter("training")), "-m", "training", "sft", "--config", str(config)]
    disk = tmp_path / "disk"
    told = on_a_full_disk(disk, ".out.partial-*", [*command, f"output={disk / 'out'}"])
    assert told["first"]["digests"] == {}
    assert told["second"]["digests"] == {"out": Artifact.open(finished_run.path / "setup/sft").manifest.digest}


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(finished_run: FinishedRun, tmp_path: Path) -> None:
    """The driver's own files survive as well; without a reward model, so that it is short."""
    config = yaml.safe_load(finished_run.config.read_text())
    del config["reward_model"]
    config["scorers"]["reward"] = config["scorers"]["gold"]
    disk = tmp_path / "disk"
    path = tmp_path / "smallest.yaml"
    path.write_text(yaml.safe_dump({**config, "directory": str(disk)}))
    told = on_a_full_disk(disk, "smallest/setup/.sft.partial-*", [*COMMAND, "run", str(path), "--iters", "0"])
    assert "smallest/setup/sft" not in told["first"]["digests"]
    assert "smallest/setup/world" in told["first"]["digests"]
    same = ["setup/world", "setup/sft", "prompts/train", "prompts/heldout"]
    same += [f"iteration-000/heldout/{name}" for name in ("generation", "gold", "well_formed")]
    for place in same:
        digest = Artifact.open(finished_run.path / place).manifest.digest
        assert told["second"]["digests"][f"smallest/{place}"] == digest, place
