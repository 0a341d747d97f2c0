"""The kill harness: checks that a run that is killed again and again publishes the same bytes as an undisturbed run.

    python tests/pipelines/chaos.py --kills 200 [--seed S] [key=value ...]        (scripts/chaos.sh)

First it executes a reference run without faults. Then come rounds: the same run in a new directory, while faults from a
seeded plan hit the driver, its supervisors and the stages: SIGKILL, SIGTERM, a full disk, and writes torn by a crash of
the machine. The command is repeated until the run is finished, and its artifacts are compared. `key=value` applies to
both if it changes what is computed (lag=1), otherwise only to the rounds (placement=async). Faults are executed within
the processes by chaos_site/sitecustomize.py, or from here at random times.

Everything runs from a copy of the code, so that edits during the test have no effect.
"""

import argparse
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipelines_smallest import write_smallest

from contracts.artifacts import Artifact
from contracts.callables import OWN_PACKAGES
from contracts.config import Role
from contracts.fingerprint import file_sha256
from contracts.jsonl import read_jsonl
from contracts.manifest import MANIFEST
from contracts.points import read_points
from contracts.processes import pids_with_variable
from pipelines.config.load import load_run_config
from pipelines.config.run import RunConfig
from pipelines.environments.paths import source_root
from pipelines.execution.supervisor import RUN
from pipelines.iteration import build_graph

CHAOS = "RATCHET_CHAOS"
"""The environment variable, with the directory of the faults, of every process of a round."""
ITERATIONS = 2
LIFE_SECONDS = 600.0
"""The time after which a driver is considered to hang."""
SETTINGS = {"backoff_seconds": 0.1, "retries": 1000, "grace_seconds": 5}
PER_ROUND = 64
PER_STAGE = {True: 2, False: 3}
"""The faults per stage and round, by whether the stage loads torch."""
TRAINING = ("sft", "reward", "policy", "critic")

KILL, TERM, FULL, TORN = ACTIONS = ("SIGKILL", "SIGTERM", "ENOSPC", "torn")
POINTS: dict[str, dict[str, tuple[str, str]]] = {
    "stage": {
        "begin": ("has taken over its hidden directory", f"{KILL} {TERM} {FULL}"),
        "compute": ("in mid-shard", f"{KILL} {TERM}"),
        "progress": ("tells how far it is", f"{KILL} {FULL}"),
        "write": ("half of a shard written", f"{KILL} {FULL} {TORN}"),
        "commit": ("shard whole, not renamed", f"{KILL} {TERM} {FULL} {TORN}"),
        "receipt": ("shard renamed, no receipt", f"{KILL} {FULL} {TORN}"),
        "committed": ("shard has its receipt", f"{KILL} {TERM} {TORN}"),
        "receipted": ("the receipt itself", TORN),
        "step": ("in mid-step", f"{KILL} {TERM}"),
        "state": ("training state not renamed", f"{KILL} {FULL} {TORN}"),
        "saved": ("training state in place", f"{KILL} {TERM} {TORN}"),
        "manifest": ("manifest not in place", f"{KILL} {TERM} {FULL} {TORN}"),
        "finish": ("manifest in place", f"{KILL} {TERM} {TORN}"),
        "rename": ("only the rename missing", f"{KILL} {TERM} {FULL} {TORN}"),
        "published": ("published", f"{KILL} {TERM}"),
    },
    "supervisor": {
        "spawned": ("stage just started", KILL),
        "exit": ("writes how the stage ended", f"{KILL} {FULL} {TORN}"),
    },
    "driver": {
        "claim": ("takes over the run", f"{KILL} {FULL} {TORN}"),
        "request": ("writes a stage's request", f"{KILL} {TERM} {FULL} {TORN}"),
        "submitted": ("has started a stage", f"{KILL} {TERM}"),
        "record": ("writes events.jsonl", f"{KILL} {TERM} {FULL} {TORN}"),
        "between": ("between stages", f"{KILL} {TERM}"),
        "metrics": ("writes metrics.jsonl", f"{KILL} {TORN}"),
    },
    "outside": {
        "driver": ("driver, at any instant", f"{KILL} {TERM}"),
        "stage": ("a stage, at any instant", f"{KILL} {TERM}"),
        "supervisor": ("a supervisor, at any instant", KILL),
    },
}
"""For each kind of process and each point of its work: a description, and the actions that are possible there."""
COMBINATIONS = [
    (who, point, action)
    for who, points in POINTS.items()
    for point, (_, actions) in points.items()
    for action in actions.split()
]


@dataclass
class Fault:
    """A fault of the plan, as written to a file for the process that will execute it."""

    id: int
    who: str
    """The process that executes it: stage, supervisor, driver, or outside (this harness)."""
    stage: str | None
    point: str
    action: str
    occurrence: int = 1
    """The number of times that the process has to reach the point."""
    seconds: float = 0.0
    """The delay after the point, for delayed faults."""
    share: float = 0.5
    """The share of the file after which it is cut."""
    zeros: bool = False
    """Whether the rest of the file is zeroed instead of cut."""
    victim: str = "self"
    """The process that is killed: self, group or supervisor."""
    attempt: str | None = None
    """The attempt of the stage that was hit; set afterwards."""

    def __str__(self) -> str:
        words = POINTS[self.who][self.point][0]
        place = f"{self.stage}/{self.attempt}" if self.attempt else self.stage or "driver"
        return f"{self.action:<8} {place}: {words}" + (f", its {self.victim}" if self.victim != "self" else "")


@dataclass
class Stage:
    """The properties of a stage that the plan depends on."""

    kind: str
    loads_torch: bool
    files: int

    def reaches(self, point: str) -> bool:
        """Whether the stage can reach a point."""
        if point in ("step", "state", "saved"):
            return self.kind in TRAINING
        if point == "progress":
            return self.kind in (*TRAINING, "generation", "score")
        return point != "write" or self.kind not in ("pairs", "evaluation", "world")


def shuffled_deck(chance: random.Random) -> list[tuple[str, str, str]]:
    """All combinations in random order, then again those that the driver survives, because they take less time."""
    again = [(who, point, action) for who, point, action in COMBINATIONS if who == "stage" and action != FULL]
    return [*chance.sample(COMBINATIONS, len(COMBINATIONS)), *chance.sample(again, len(again))]


def plan_round(
    deck: list[tuple[str, str, str]], stages: dict[str, Stage], size: int, chance: random.Random
) -> list[Fault]:
    """Take up to `size` combinations that the stages have room for from the deck; the others stay in it."""
    faults: list[Fault] = []
    hits: Counter[str] = Counter()
    left = []
    for who, point, action in deck:
        fault = Fault(len(faults), who, None, point, action, share=chance.random(), zeros=chance.random() < 0.3)
        if who in ("stage", "supervisor"):
            room = [
                name
                for name, stage in stages.items()
                if hits[name] < PER_STAGE[stage.loads_torch] and stage.reaches(point)
            ]
            if not room or len(faults) == size:
                left.append((who, point, action))
                continue
            cheap = [name for name in room if not stages[name].loads_torch]
            fault.stage = chance.choice(cheap if cheap and chance.random() < 0.6 else room)
            aim(fault, stages[fault.stage], hits[fault.stage], chance)
            hits[fault.stage] += 1
        elif len(faults) == size:
            left.append((who, point, action))
            continue
        else:
            fault.occurrence = chance.randint(1, {"claim": 2, "metrics": 8, "request": 8, "record": 8}.get(point, 4))
            fault.seconds = chance.uniform(1, 8)
        faults.append(fault)
    deck[:] = left
    return faults


def aim(fault: Fault, stage: Stage, earlier: int, chance: random.Random) -> None:
    """Choose when a fault hits a stage or its supervisor, and which process is killed."""
    if fault.point in ("commit", "receipt", "committed", "receipted", "write"):
        fault.occurrence = chance.randint(1, max(1, min(3, stage.files - earlier)))
    elif fault.point in ("step", "state", "saved"):
        fault.occurrence = chance.randint(1, 2)
    longest = {"step": 0.02, "spawned": 0.4}.get(fault.point, 4.0 if stage.loads_torch else 0.2)
    fault.seconds = chance.uniform(0, longest)
    if fault.who == "stage" and fault.action == KILL:
        fault.victim = chance.choice(["self", "self", "group", "supervisor"])


@dataclass
class Setup:
    """The settings that all rounds share."""

    code: Path
    config: Path
    folder: Path
    reference: Path
    """The directory of the undisturbed run."""
    iterations: int = ITERATIONS
    overrides: list[str] = field(default_factory=list)
    """The config overrides of the rounds."""

    @property
    def computed(self) -> list[str]:
        """The overrides that change what is computed, and therefore also apply to the reference."""
        sections = RunConfig.roles
        return [item for item in self.overrides if sections[item.partition("=")[0].partition(".")[0]] != Role.RUNTIME]

    def command(self, home: Path, *overrides: str) -> list[str]:
        """The command of a run in the directory `home`."""
        settings = [f"executor.{name}={value}" for name, value in SETTINGS.items()]
        run = ["run", str(self.config), "--iters", str(self.iterations), f"directory={home}", *settings, *overrides]
        return [sys.executable, "-m", "pipelines", *run]

    def environment(self) -> dict[str, str]:
        """The environment variables of a run from the copied code."""
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.code)}

    def stages(self) -> dict[str, Stage]:
        """The stages of the run."""
        found = {}
        config_of_run = load_run_config(self.config, self.computed)
        for name, node in build_graph(config_of_run, self.iterations).nodes.items():
            config = node.config.model_dump()
            loads_torch = node.environment == "training" or node.package == "generation" or bool(config.get("model"))
            files = len(Artifact.open(self.reference / name).manifest.files)
            found[name] = Stage(node.config.stage, loads_torch, files)
        return found


def freeze(folder: Path) -> Path:
    """Copy the code with what it was compiled to, so that edits have no effect and no process compiles it again."""
    code = folder / "code"
    for name in (*OWN_PACKAGES, "configs"):
        shutil.copytree(source_root() / name, code / name)
    shutil.copy(source_root() / "pyproject.toml", code)
    shutil.copy(Path(__file__).parent / "chaos_site" / "sitecustomize.py", code)  # stages get no other folder at start
    return code


@dataclass
class Tally:
    """The results of one round or of all rounds."""

    artifacts: int = 0
    artifacts_different: int = 0
    ids: int = 0
    ids_lost: int = 0
    ids_repeated: int = 0
    checkpoints_different: int = 0
    metrics_different: int = 0
    shards_made_again: int = 0
    steps_made_again: int = 0
    files_of_other_stages_made_again: int = 0
    """Files rewritten by stages without shards, which start over; training steps are not included."""
    torn_and_made_again: int = 0
    """Finished files that a fault has torn, or whose manifest it has torn."""
    stray_files: int = 0
    processes_left: int = 0
    drivers_started: int = 0
    stages_tried_again: int = 0
    problems: list[str] = field(default_factory=list)

    MUST_BE_ZERO = (
        "artifacts_different",
        "ids_lost",
        "ids_repeated",
        "checkpoints_different",
        "metrics_different",
        "shards_made_again",
        "steps_made_again",
        "stray_files",
        "processes_left",
    )

    def add(self, other: "Tally") -> None:
        """Add the results of a round."""
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))

    @property
    def held(self) -> bool:
        """Whether nothing was lost, repeated, different or left behind."""
        return not self.problems and not any(getattr(self, name) for name in self.MUST_BE_ZERO)


class Round:
    """A run with its faults."""

    def __init__(self, setup: Setup, number: int, faults: list[Fault], say: Callable[[Fault], None]) -> None:
        self.setup = setup
        self.home = setup.folder / f"round-{number:02d}"
        self.run = self.home / "smallest"
        self.plan = setup.folder / f"faults-{number:02d}"
        self.outputs = setup.folder / f"output-{number:02d}"
        self.say = say
        self.waiting = {fault.id: fault for fault in faults}
        self.met: list[Fault] = []
        self.tally = Tally()
        for folder in (self.plan, self.outputs):
            folder.mkdir()
        for fault in faults:
            (self.plan / f"{fault.id:04d}.json").write_text(json.dumps(asdict(fault)))

    def play(self) -> Tally:
        """Repeat the command until the run is finished, then compare it with the reference."""
        for life in itertools.count(1):
            before = len(self.met)
            code = self.live(life)
            self.tally.drivers_started += 1
            self.check_end(life, code, self.met[before:])
            if code == 0 or self.tally.problems:
                break
        self.compare()
        return self.tally

    def live(self, life: int) -> int:
        """Run one driver to its end. Returns its exit code."""
        start = time.monotonic()
        outside = next((fault for fault in self.waiting.values() if fault.who == "outside"), None)
        with self.output(life).open("w") as output:
            driver = subprocess.Popen(
                self.setup.command(self.home, *self.setup.overrides),
                cwd=self.setup.code,
                env={**self.setup.environment(), CHAOS: str(self.plan)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while driver.poll() is None:
                    self.collect_met()
                    passed = time.monotonic() - start
                    if outside and passed > outside.seconds and self.strike(outside, driver):
                        outside = None
                    if passed > LIFE_SECONDS:
                        self.tally.problems.append(f"driver {life} did not end within {LIFE_SECONDS:.0f} s")
                        break
                    time.sleep(0.05)
            finally:
                driver.kill()
                driver.wait()
        self.collect_met()
        return driver.returncode

    def output(self, life: int) -> Path:
        """The file with a driver's output."""
        return self.outputs / f"driver-{life:03d}.txt"

    def collect_met(self) -> None:
        """Report the faults that have happened since the last call."""
        for path in sorted(self.plan.glob("*.taken")):
            if fault := self.waiting.pop(int(path.stem), None):
                line = next((line for line in self.log() if line.get("fault") == fault.id), {})
                fault.attempt = line.get("attempt")
                self.take(fault)

    def take(self, fault: Fault) -> None:
        """Count a fault that has happened."""
        self.met.append(fault)
        self.say(fault)

    def log(self) -> Iterator[dict[str, Any]]:
        """The faults and the work that the processes of the run have logged."""
        path = self.plan / "log.jsonl"
        return read_jsonl(path, dict, tolerate_torn_tail=True) if path.exists() else iter(())

    def strike(self, fault: Fault, driver: "subprocess.Popen[bytes]") -> bool:
        """Execute a fault from outside. Returns False if there is no process to hit at the moment."""
        pid = driver.pid
        if fault.point != "driver":
            stages = pids_with_variable(f"{RUN}={self.run}")
            found = stages if fault.point == "stage" else self.supervisors(stages, driver.pid)
            if not found:
                return False
            pid = random.Random(fault.share).choice(sorted(found))
            if attempt := variable(pid, "RATCHET_ATTEMPT"):
                fault.stage, fault.attempt = attempt.rpartition("/logs/")[2].rsplit("/", 1)
        try:
            os.kill(pid, signal.SIGKILL if fault.action == KILL else signal.SIGTERM)
        except ProcessLookupError:
            return False
        del self.waiting[fault.id]
        (self.plan / f"{fault.id:04d}.json").unlink()
        self.take(fault)
        return True

    def supervisors(self, stages: list[int], driver: int) -> list[int]:
        """The processes of the round that are neither its driver nor its stages."""
        others = set(pids_with_variable(f"{CHAOS}={self.plan}")) - {*stages, driver}
        return [pid for pid in others if is_supervisor(Path(f"/proc/{pid}/cmdline").read_bytes())]

    def check_end(self, life: int, code: int, met: list[Fault]) -> None:
        """Check that a driver's exit is explained by its faults, and that it retried stages as documented."""
        text = self.output(life).read_text(errors="replace")
        for problem in [*self.unexpected_exits(code, text, met), *self.not_retried(code, met)]:
            self.tally.problems.append(f"driver {life} ({self.output(life)}): {problem}")

    def unexpected_exits(self, code: int, text: str, met: list[Fault]) -> Iterator[str]:
        ends: set[int] = set()
        for fault in met:
            if fault.action == FULL and fault.point == "progress":
                continue  # a failed progress report never stops a stage
            if fault.action == FULL and fault.who in ("stage", "driver"):
                ends.add(2)
            elif fault.who == "driver" or (fault.who, fault.point) == ("outside", "driver"):
                ends |= {130, -signal.SIGTERM} if fault.action == TERM else {-signal.SIGKILL}
        inside = [
            fault for fault in met if fault.who != "outside" and (fault.action, fault.point) != (FULL, "progress")
        ]
        # A full disk in a supervisor ends the run only if its stage has not published.
        beside = {2} if any(fault.action == FULL and fault.who == "supervisor" for fault in met) else set()
        if code not in (ends or {0}) | beside and not (code == 0 and not inside):
            faults = "; ".join(map(str, met)) or "no fault"
            yield f"exit code {code} after {faults}\n{text[-3000:]}"
        if code == 2 and "disk is full" not in text:
            yield f"exit code 2, but not a word of the full disk:\n{text[-3000:]}"

    def not_retried(self, code: int, met: list[Fault]) -> Iterator[str]:
        """Yield the stages that were killed, had no full disk, and were not retried by the driver."""
        failed = {(event["stage"], event["attempt"]): event for event in self.events("failed")}
        full = {(fault.stage, fault.attempt) for fault in met if fault.action == FULL}
        for fault in met:
            if not fault.stage or not fault.attempt or full & {(fault.stage, fault.attempt), (fault.stage, None)}:
                continue
            event = failed.get((fault.stage, fault.attempt))
            if fault.victim == "supervisor" and event is None:
                continue  # the stage may publish just before it ends with its supervisor
            if event is None and code == 0 and fault.point not in ("published", "compute", "step", "exit", "stage"):
                yield f"no failure was recorded after {fault}"
            if event is not None and event["retry_in"] is None:
                yield f"not tried again: {fault}"

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of a kind recorded so far."""
        path = self.run / "events.jsonl"
        if not path.exists():
            return []
        return [event for event in read_jsonl(path, dict, tolerate_torn_tail=True) if event["event"] == name]

    # Comparison.

    def compare(self) -> None:
        """Compare everything with the reference, and look for stray files and processes."""
        tally, reference = self.tally, self.setup.reference
        tally.stages_tried_again = sum(event["retry_in"] is not None for event in self.events("failed"))
        tally.processes_left = self.count_left()
        if tally.problems:
            return
        places = list(self.setup.stages())
        for place in places:
            self.compare_artifact(place, reference)
        weights = [file_sha256(run / last_policy(places) / "model.safetensors") for run in (reference, self.run)]
        tally.checkpoints_different = int(weights[0] != weights[1])
        tally.metrics_different = int(metrics(self.run) != metrics(reference, self.setup.iterations))
        strays = strays_of(self.run, places)
        tally.stray_files = len(strays)
        tally.problems += [f"stray file: {path}" for path in strays]
        self.verify()
        self.count_work()

    def verify(self) -> None:
        """Run `pipeline verify`."""
        command = [sys.executable, "-m", "pipelines", "verify", str(self.run)]
        result = subprocess.run(
            command,
            cwd=self.setup.code,
            env=self.setup.environment(),
            capture_output=True,
            text=True,
            timeout=LIFE_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            self.tally.problems.append(f"pipeline verify {self.run}: {result.stdout}{result.stderr}")

    def compare_artifact(self, place: str, reference: Path) -> None:
        tally, artifacts = self.tally, []
        for run in (reference, self.run):
            artifacts.append(Artifact.open(run / place))
        damage = artifacts[1].damage()
        tally.artifacts += 1
        if damage or artifacts[0].manifest.digest != artifacts[1].manifest.digest:
            tally.artifacts_different += 1
            tally.problems.append(f"{artifacts[1].path} differs from the reference {damage}")
        wanted, found = map(row_ids, artifacts)
        tally.ids += wanted.total()
        tally.ids_lost += (wanted - found).total()
        tally.ids_repeated += (found - wanted).total()

    def count_work(self) -> None:
        """Count the finished work that was done again."""
        kinds = {name: stage.kind for name, stage in self.setup.stages().items()}
        torn = {fault.id: fault for fault in self.met if fault.action == TORN}
        made: set[tuple[str, str]] = set()
        saved: Counter[str] = Counter()
        for line in self.log():
            stage, step = line["stage"], line.get("step", 0)
            if fault := torn.get(line.get("fault", -1)):
                self.forget_torn(fault, line["file"], made, saved)
            if "saved" in line:
                saved[stage] = line["saved"]
            if 0 < step <= saved[stage]:
                self.tally.steps_made_again += 1
                self.tally.problems.append(f"{stage}: optimizer step {step} was saved and made again")
            if "made" not in line:
                continue
            if (stage, line["made"]) in made and kinds[stage] in ("generation", "score"):
                self.tally.shards_made_again += 1
                self.tally.problems.append(f"{stage}: {line['made']} was finished and made again")
            elif (stage, line["made"]) in made:
                self.tally.files_of_other_stages_made_again += 1
            made.add((stage, line["made"]))

    def forget_torn(self, fault: Fault, file: str, made: set[tuple[str, str]], saved: "Counter[str]") -> None:
        """Forget finished work that a fault has torn, because it has to be done again."""
        stage = str(fault.stage)
        lost: set[tuple[str, str]] = set()
        if fault.point in ("committed", "receipted"):
            lost = {work for work in made if work[0] == stage and Path(work[1]).name in file}
        elif fault.point in ("finish", "rename"):  # the manifest: without its receipts, nothing is known of the files
            lost = {work for work in made if work[0] == stage}
        elif fault.point == "saved":
            saved[stage] = 0
        self.tally.torn_and_made_again += len(lost)
        made -= lost

    def count_left(self) -> int:
        """Count the processes of the round that are left, after waiting for those that are just ending."""
        deadline = time.monotonic() + 200
        while left := pids_with_variable(f"{CHAOS}={self.plan}"):
            if time.monotonic() > deadline:
                self.tally.problems += [f"process {pid} is left" for pid in left]
                break
            time.sleep(0.1)
        return len(left)


def last_policy(places: list[str]) -> str:
    """The path of the last policy."""
    return [place for place in places if place.endswith("/training")][-1]


def is_supervisor(command_line: bytes) -> bool:
    """Whether a process is a supervisor, or the process that supervisors are forked from."""
    words = command_line.split(b"\0")
    return b"pipelines.execution.supervisor" in words or {b"contracts.warm", b"pipelines"} <= set(words)


def variable(pid: int, name: str) -> str | None:
    """An environment variable of a process."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return None
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), None)


def row_ids(artifact: Artifact) -> "Counter[str]":
    """The ids of an artifact's rows with their counts; each sample has its own."""
    found: Counter[str] = Counter()
    for file in artifact.manifest.files:
        if not file.path.endswith(".jsonl"):
            continue
        for row in read_jsonl(artifact.path / file.path, dict):
            if artifact.manifest.schema.name == "rollouts":
                found.update(f"{row['prompt_id']}/{completion['sample']}" for completion in row["completions"])
            else:
                keys = [row.get(name) for name in ("prompt_id", "sample", "chosen_sample", "rejected_sample", "step")]
                found[str(keys) if any(keys) else json.dumps(row)] += 1
    return found


def metrics(run: Path, iterations: int | None = None) -> list[Any]:
    """The points of metrics.jsonl up to an iteration, without times and system metrics."""
    return sorted(
        (point.identity, point.global_step, sorted((k, v) for k, v in point.metrics.items() if "system/" not in k))
        for point in read_points(run)
        if iterations is None or point.iteration <= iterations
    )


def strays_of(run: Path, places: list[str]) -> list[Path]:
    """Files of a finished run that should not be there: scratch, hidden directories, pickles, unlisted files."""
    found = [path for path in run.rglob("*") if path.suffix in (".tmp", ".pkl") or ".partial-" in path.name]
    for place in places:
        listed = {MANIFEST, *(file.path for file in Artifact.open(run / place).manifest.files)}
        here = (path for path in (run / place).rglob("*") if path.is_file())
        found += [path for path in here if path.relative_to(run / place).as_posix() not in listed]
    return found


def make_reference(setup: Setup) -> None:
    """Execute the undisturbed run."""
    command = setup.command(setup.reference.parent, *setup.computed)
    with (setup.folder / "reference.txt").open("w") as output:
        code = subprocess.run(
            command,
            cwd=setup.code,
            env=setup.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=LIFE_SECONDS,
            check=False,
        ).returncode
    if code != 0:
        raise SystemExit(f"the run without a fault failed:\n{(setup.folder / 'reference.txt').read_text()[-3000:]}")


def campaign(folder: Path, kills: int, seed: int, overrides: list[str]) -> bool:
    """Execute the reference run, then rounds until `kills` faults have happened, and print the results. Returns whether
    all checks passed."""
    start = time.monotonic()
    setup = Setup(
        freeze(folder), write_smallest(folder), folder, folder / "reference" / "smallest", overrides=overrides
    )
    again = shlex.join(["bash", "scripts/chaos.sh", "--kills", str(kills), "--seed", str(seed), *overrides])
    print(f"seed {seed}, {kills} kills, in {folder}; again: {again}")
    make_reference(setup)
    print(f"the run without a fault took {time.monotonic() - start:.0f} s", flush=True)
    stages, total, met, deck = setup.stages(), Tally(), list[Fault](), list[tuple[str, str, str]]()
    number = 0

    def say(fault: Fault) -> None:
        met.append(fault)
        print(f"[{len(met):>3}/{kills}] {time.monotonic() - start:5.0f} s  round {number}  {fault}", flush=True)

    for number in itertools.count(1):
        chance = random.Random(f"{seed}/{number}")
        missing = kills - len(met)
        size = min(PER_ROUND, missing + missing // 8 + 2)  # a few are never reached
        if len(deck) < size:
            deck += shuffled_deck(chance)
        faults = plan_round(deck, stages, size, chance)
        chaos = Round(setup, number, faults, say)
        total.add(chaos.play())
        deck[:0] = [(fault.who, fault.point, fault.action) for fault in chaos.waiting.values()]
        if total.problems or len(met) >= kills:
            break
        shutil.rmtree(chaos.home)
    print_table(met, total, number, time.monotonic() - start)
    return total.held and len(met) >= kills


def print_table(met: list[Fault], total: Tally, rounds: int, seconds: float) -> None:
    """Print the numbers of faults and the results."""
    counts = Counter((fault.who, fault.point, fault.action) for fault in met)
    print(f"\n{'':<44}" + "".join(f"{action:>9}" for action in ACTIONS))
    for who, points in POINTS.items():
        for point, (words, actions) in points.items():
            cells = [str(counts[who, point, action]) if action in actions.split() else "-" for action in ACTIONS]
            print(f"{who + ': ' + words:<44}" + "".join(f"{cell:>9}" for cell in cells))
    print(f"{'all':<44}" + "".join(f"{sum(fault.action == action for fault in met):>9}" for action in ACTIONS))
    missing = [" ".join(combination) for combination in COMBINATIONS if not counts[combination]]
    reached = len(COMBINATIONS) - len(missing)
    print(f"\n{len(met)} kills in {rounds} rounds and {seconds:.0f} s; {reached} of {len(COMBINATIONS)} combinations")
    if missing:
        print(f"not among them: {', '.join(missing)}")
    for entry in fields(total):
        if entry.name != "problems":
            value = getattr(total, entry.name)
            wrong = "   <-- must be 0" if value and entry.name in Tally.MUST_BE_ZERO else ""
            print(f"  {entry.name.replace('_', ' '):<44}{value:>8}{wrong}")
    for problem in total.problems:
        print(f"PROBLEM: {problem}")
    print("nothing was lost, and nothing was made twice" if total.held else "FAILED")


def main() -> int:
    """Run the harness. Returns the exit code, which is 0 if all checks passed."""
    parser = argparse.ArgumentParser(prog="scripts/chaos.sh", description="Kill a run again and again, and compare.")
    parser.add_argument("--kills", type=int, default=200, help="how many faults to inject (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="chooses another sequence of faults")
    parser.add_argument("--keep", action="store_true", help="keep the runs, as is done when something is wrong")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set in the runs")
    options = parser.parse_intermixed_args()
    folder = Path(tempfile.mkdtemp(prefix="ratchet-chaos-"))
    held = campaign(folder, options.kills, options.seed, options.overrides)
    if held and not options.keep:
        shutil.rmtree(folder)
    else:
        print(f"everything is in {folder}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
