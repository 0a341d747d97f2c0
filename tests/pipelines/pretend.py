"""Fake stages that compute nothing, for tests of the driver: with real configs, keys, shards and manifests, no model.

`write_interpreter` writes an interpreter that runs these instead of the real stages and misbehaves on request: the
first start of a stage's process performs the first of that stage's acts, the second start the second act, and so on.

    kill          is killed, as if memory had run out
    exit N        exits with this code
    mistake       reports a user's mistake
    hang          stops responding until it is ended
    wait          continues when the file release-STAGE ("-" for "/") is in the interpreter's folder

With "after N" ("kill after 1") it acts after N shards.

`set_seconds` sets how long stages take in addition; the time is spent before their shards are written.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from annotation.gating.config import GateConfig
from annotation.gating.stage import decision_of
from contracts.attempt import report_progress
from contracts.config import StageConfig
from contracts.declaration import stages_of
from contracts.errors import UserError
from contracts.fingerprint import weights_fingerprint
from contracts.following import Source
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import CHECKPOINT, EVALUATION, ROLLOUTS, Completion, Message, Pair, Prompt, Rollout, Score
from contracts.stage import Context, Outcome, main
from contracts.versions import installed_versions
from contracts.workers import share_shards

SHARDS = 3
ACTS = "acts.json"
VERSIONS = "versions.json"
SECONDS = "seconds.json"


def write_interpreter(folder: Path, **acts: list[str]) -> Path:
    """Write the interpreter into a new folder.

    The versions of its libraries are stored next to it in VERSIONS: every run queries them three times, and each query
    would have to start Python.

    Args:
        acts: the acts of each stage, with "__" for "/" and "_" for "-" in its name.
    """
    from warm_jobs import warm_command  # not above: a fake stage in a process of its own does not find it

    folder.mkdir()
    named = {stage.replace("__", "/").replace("_", "-"): wanted for stage, wanted in acts.items()}
    (folder / ACTS).write_text(json.dumps(named))
    (folder / VERSIONS).write_text(json.dumps(installed_versions()))
    set_seconds(folder, {})
    path = folder / "python"
    command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    path.write_text(
        f'#!/bin/sh\ncase "$1 $2" in\n  "-c "*installed_versions*) exec cat "{folder / VERSIONS}" ;;\n'
        f'  -c*|*.*) exec "{sys.executable}" "$@" ;;\nesac\nshift\n'
        f'exec {shlex.join(warm_command(command))} "$@"\n'
    )
    path.chmod(0o755)
    return path


def set_seconds(folder: Path, seconds: dict[str, float]) -> None:
    """Set how long stages take, by suffixes of their names; the first matching suffix counts."""
    (folder / SECONDS).write_text(json.dumps(seconds))


def seconds_of(output: Path) -> float:
    """The seconds that a stage takes."""
    seconds: dict[str, float] = json.loads((Path(sys.argv[1]) / SECONDS).read_text())
    return next((each for name, each in seconds.items() if f"{output}".endswith(f"/{name}")), 0.0)


def run(config: StageConfig, context: Context) -> Outcome:
    """Run any of the stages."""
    acts = act(config.output)
    acts(0)
    if config.stage == "policy":
        for step in (1, 2):
            context.report_step(step, {"loss": 1 / step})
    names = [f"shard-{number:05d}.jsonl" for number in range(SHARDS)]
    publication = context.publication
    source = Source(config.rollouts, ROLLOUTS) if config.stage == "score" else None  # type: ignore[attr-defined]
    made: list[str] = []
    works_in_shards = config.stage in ("generation", "score")
    pause = seconds_of(config.output) / (SHARDS if works_in_shards else 1)

    def make(name: str) -> None:
        time.sleep(pause)
        ledger = Ledger("rows")
        ledger.keep()
        if source is None:
            rows = [row_of(config, name)]
        else:
            rows = [Score(row.prompt_id, 0, 0.5) for row in source.rows(name, Rollout)]
        publication.write_rows(name, rows, ledger)
        made.append(name)
        acts(len(made))

    if works_in_shards:
        share_shards(context, source or names, lambda: make)
    else:
        make(names[0])
    if not context.publishes:
        return Outcome("rows")
    return Outcome("rows", **outcome_fields(config, publication))


def row_of(config: StageConfig, name: str) -> Any:
    """The only row of a shard."""
    messages = (Message("user", str(config.output.name)),)
    if config.stage == "generation":
        answers = tuple(Completion(sample, (5, 2), f"answer {sample}", "stop", (), 1, None) for sample in range(2))
        return Rollout(name, messages, (1, 4), answers, "weights", 1, "processed")
    if config.stage == "pairs":
        ends = ("stop", "stop", 1.0, 0.5, 0.5, "max_min", 1)
        return Pair(name, name, "so?", (1, 4), (5, 2), (6, 2), "answer 0", "answer 1", 0, 1, *ends, messages)
    return Prompt(name, messages)


def outcome_fields(config: StageConfig, publication: Publication) -> dict[str, Any]:
    """The weights and facts of a stage's outcome, if it has any; writes its model files."""
    if config.stage == "world":
        for name in ("demonstrations", "heldout", "preference", "train"):
            commit(publication, f"{name}.jsonl", b'{"prompt": "one"}\n')
        return {"weights": commit_weights(publication, "model/model.safetensors", "init")}
    if publication.schema == CHECKPOINT:
        return {"weights": commit_weights(publication, "model.safetensors", config.output.parent.name[-4:])}
    if publication.schema == EVALUATION:
        return {"facts": {"metrics": {"iteration": config.iteration, "reward_mean": 0.5, "kl": None}}}  # type: ignore[attr-defined]
    if isinstance(config, GateConfig):
        return {"facts": {"gate": msgspec.to_builtins(decision_of(config))}}
    return {}


def commit_weights(publication: Publication, name: str, four: str) -> str:
    """Publish a model of four bytes, and return its fingerprint."""
    commit(publication, name.replace("model.safetensors", "config.json"), b"{}")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    commit(publication, name, len(header).to_bytes(8, "little") + header + four.encode())
    return weights_fingerprint((publication.directory / name).parent)


def commit(publication: Publication, name: str, content: bytes) -> None:
    """Publish a file."""
    publication.scratch(name).write_bytes(content)
    publication.commit(name, Ledger("rows"))


def act(output: Path) -> Callable[[int], None]:
    """The act of this start of the stage, as a function that is called with the number of finished shards."""
    folder = Path(sys.argv[1])
    planned: list[tuple[str, int, Path]] = []
    for stage, wanted in json.loads((folder / ACTS).read_text()).items():
        if f"{output}".endswith(f"/{stage}"):
            report_progress(0, SHARDS, "shards")
            what = next((what for number, what in enumerate(wanted) if is_first(folder, stage, number)), "")
            word, _, number = what.partition(" after ")
            planned.append((word, int(number or 0), folder / f"release-{stage.replace('/', '-')}"))

    def acts(made: int) -> None:
        for what, number, release in planned:
            if number == made:
                perform(what, release)

    return acts


def is_first(folder: Path, stage: str, number: int) -> bool:
    """Claim an act. Returns whether no earlier start has claimed it."""
    try:
        (folder / f"{stage.replace('/', '-')}.{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def perform(what: str, release: Path) -> None:
    """Perform an act."""
    word, _, number = what.partition(" ")
    print(f"pretends to {what or 'work'}", flush=True)
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "exit":
        os._exit(int(number))
    if word == "mistake":
        raise UserError("no such dictionary")
    while word == "hang" or (word == "wait" and not release.exists()):
        time.sleep(0.02)


def run_stage() -> None:
    """Run the command of sys.argv: FOLDER PACKAGE ..."""
    _, _, package, *rest = sys.argv
    if "MASTER_ADDR" in os.environ:
        print("as node {NODE_RANK} of {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ), flush=True)
    module = ModuleType(f"{package}.pretend")  # so that it counts as a module of the package
    module.run = run  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    main(
        {
            command: replace(stage, run=f"{package}.pretend:run", launch=None, is_worker_node=None)
            for command, stage in stages_of(package).items()
        },
        package,
        rest,
    )


if __name__ == "__main__":
    run_stage()
