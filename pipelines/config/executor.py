"""Defines the section `executor`: where the stages of a run are executed, and the resources that they request."""

import math
import pkgutil
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeAlias

from pydantic import AfterValidator, field_validator, model_validator

from contracts.config import Section, described_pattern, runtime
from contracts.declaration import Workload
from contracts.errors import did_you_mean
from contracts.stopping import DEFAULT_GRACE
from pipelines.config.selecting import ARRAY_KINDS, KINDS, SelectableStage, matching_entries

EXECUTORS = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "execution" / "executors")])
    if module.name != "base"
)
"""Names of the executors: the modules of pipelines/execution/executors, listed without importing them."""
LOCAL_KINDS = ("inline", "local")
"""Executors on this machine; every other one submits stages to a scheduler."""


def _check_kind(kind: str) -> str:
    if kind not in EXECUTORS:
        raise ValueError(f"there is no such executor.{did_you_mean(kind, EXECUTORS)} Known: {', '.join(EXECUTORS)}.")
    return kind


ExecutorKind: TypeAlias = Annotated[str, AfterValidator(_check_kind)]

KINDS_WITH_KEY: dict[str, tuple[Workload, ...]] = {"nodes": ("training",), "tasks": ARRAY_KINDS}
"""Keys that apply only to some kinds of stages."""

DEFAULT_TASKS = 4
"""Default number of tasks of a job array."""

DIRECTIVE_KEYS = {
    "partition": "partition", "account": "account", "qos": "qos", "time": "time", "nodes": "nodes",
    "gpus": "gpus", "gpus-per-node": "gpus", "gpus-per-task": "gpus", "gpus-per-socket": "gpus",
    "cpus-per-task": "cpus", "cpus-per-gpu": "cpus", "mem": "memory", "mem-per-cpu": "memory", "mem-per-gpu": "memory",
    "array": "tasks", "ntasks": "tasks", "ntasks-per-node": "tasks", "requeue": "requeue", "no-requeue": "requeue",
}  # fmt: skip
"""Options of sbatch that have their own config key."""
RESERVED_DIRECTIVES = frozenset(
    "begin chdir cluster clusters comment dependency error export export-file hold input job-name "
    "kill-on-invalid-dep ntasks-per-core ntasks-per-gpu ntasks-per-socket open-mode output parsable quiet signal "
    "test-only wait wrap".split()
)
"""Options of sbatch that Ratchet sets itself, or that would prevent it from tracking its jobs."""


class ResourcesSection(Section):
    """Resources that jobs request from the scheduler; an unset key has the default of the stage's kind.

    The kinds: generation; scoring (with a model); training (policy, sft, reward model, critic); light (all others). A
    generation or a scoring is a job array, a training is one job over one or several nodes.
    """

    partition: str | None = runtime(None, min_length=1)
    """Partition, or several with commas; the cluster's default partition if not set."""
    account: str | None = runtime(None, min_length=1)
    """Account to charge; the user's default account if not set."""
    qos: str | None = runtime(None, min_length=1)
    """Quality of service; the cluster's default if not set."""
    time: str | None = runtime(None)
    """Time limit of a job, as Slurm reads it: "2:00:00", "1-12:00:00", or "90" for minutes. By default 4 hours for
    generation and scoring, 24 for training, 30 minutes for light stages. A stage that reaches its limit saves its state
    and resumes in another job."""
    nodes: int | None = runtime(None, ge=1)
    """Nodes of a training; 1 by default. Other stages run on one."""
    gpus: int | None = runtime(None, ge=0)
    """GPUs: for a training per node, for generation and scoring per task of the array. In the section for all stages:
    per node of a training (by default as many as `hardware` says, else none), and if there are any, a task gets those
    of one replica of its model: tensor_parallel, or 1. Light stages have none unless their own entry says so."""
    gpu_type: str | None = runtime(None, pattern=described_pattern("^[A-Za-z0-9_.-]+$", "letters, digits, _, . and -"))
    """GPU type, on clusters that name them, for example h100; any if not set."""
    cpus: int | None = runtime(None, ge=1)
    """CPU cores per task or, in a training, per node. By default 8 per GPU; without GPUs 1 for each of the stage's
    processes there. Without GPUs their number changes the last bits of results, because the order of summation depends
    on the threads."""
    memory: str | None = runtime(None)
    """Memory per task or node: "64G", "512M", "0" for all of the node's. By default 4G for light stages, or the
    estimate for those that load a model, and the cluster's default for all others."""
    tasks: int | None = runtime(None, ge=1)
    """Tasks of the job array of a generation or a scoring, which share its shards; 4 by default."""
    setup: list[str] = runtime([])
    """Lines of bash at the beginning of every job, before Python starts, for example [module load cuda]."""
    directives: dict[str, str | int | float | bool | None] = runtime({})
    """Further sbatch options by their long names: {constraint: ib, exclusive: true, mail-type: END}; true is an option
    without a value, false removes one of a less specific entry."""
    requeue: bool = runtime(True)
    """Let Slurm requeue a job after a preemption or a node failure. Without it Ratchet submits a new one."""

    @property
    def minutes(self) -> int | None:
        """The time limit in minutes, rounded up as Slurm does."""
        return None if self.time is None else minutes_of(self.time)

    @field_validator("time", mode="before")
    @classmethod
    def _check_time(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and not minutes_of(value):
            raise ValueError('it must be a time limit of Slurm: "HH:MM:SS", "D-HH:MM:SS" or minutes, more than 0')
        return value

    @field_validator("memory", mode="before")
    @classmethod
    def _check_memory(cls, value: Any) -> Any:
        if value is not None and not re.fullmatch("0|[1-9][0-9]*[KMGTkmgt]", str(value)):
            raise ValueError('it must be a number with its unit, for example "64G" or "512M", or "0" for all')
        return None if value is None else str(value)

    @field_validator("directives", mode="before")
    @classmethod
    def _check_directives(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        directives = {str(name).removeprefix("--").replace("_", "-"): option for name, option in value.items()}
        for name, option in directives.items():
            if not re.fullmatch("[a-z][a-z0-9-]+", name):
                raise ValueError(f"{name!r} is not the long name of an sbatch option, such as constraint")
            if name in DIRECTIVE_KEYS:
                raise ValueError(f"{name} has its own key next to `directives`: set `{DIRECTIVE_KEYS[name]}`")
            if name in ("gres", "tres-per-task") and re.search(r"\bgpu\b", str(option)):
                raise ValueError(f"{name}={option} asks for GPUs, which have keys of their own: `gpus` and `gpu_type`")
            if name in RESERVED_DIRECTIVES:
                raise ValueError(f"{name} is set by Ratchet itself; take it out")
        return directives


class StageSection(ResourcesSection):
    """Resources of some stages, and the executor that runs them."""

    kind: ExecutorKind | None = runtime(None)
    """local, slurm or inline, if these stages run elsewhere than the others."""

    @model_validator(mode="before")
    @classmethod
    def _read_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value


LIGHT_KEYS = frozenset("partition account qos setup directives requeue".split())
"""Keys of `resources` that also apply to light stages: account and placement, but not amounts."""


def minutes_of(text: str) -> int | None:
    """A time limit in minutes, rounded up; None if Slurm would reject the text or read it differently."""
    days, dash, clock = text.strip().rpartition("-")
    words = clock.split(":")
    if len(words) > 3 or not all(word.isascii() and word.isdecimal() for word in [*words, *([days] if dash else [])]):
        return None
    numbers = [int(word) for word in words]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        hours += 24 * int(days)
    else:  # minutes, minutes:seconds or hours:minutes:seconds
        hours, minutes, seconds = ([0, *numbers, 0] if len(numbers) < 3 else numbers)[:3]
    return 60 * hours + minutes + math.ceil(seconds / 60)


MAX_PAUSE_SECONDS = 600.0


def retry_pause(tries: int, backoff: float, rng: random.Random) -> float:
    """Seconds until the retry of a stage that has failed `tries` times.

    The pause doubles with every failure, with jitter from 50 % to 150 %, so that stages that failed together are not
    retried together.
    """
    doubled: float = backoff * 2 ** min(tries - 1, 10)
    return min(doubled, MAX_PAUSE_SECONDS) * rng.uniform(0.5, 1.5)


class ExecutorSection(Section):
    """Where stages run. A word is short for its `kind`: `executor: slurm`."""

    kind: ExecutorKind = runtime("local")
    """local: each stage is a process on this machine; slurm: it is a job of a Slurm cluster, or a job array; inline:
    run by the driver itself, for debugging."""
    resources: ResourcesSection = runtime(ResourcesSection(), was="slurm")
    """Resources that all stages request from the scheduler: {partition: gpu, account: rlhf, gpus: 8}. Light stages only
    use `partition`, `account`, `qos`, `setup`, `directives` and `requeue` of these."""
    stages: dict[str, StageSection] = runtime({})
    """Resources of some stages, and `kind` if they run elsewhere: {training: {nodes: 2, gpus: 8}, light: local,
    "iteration-*/heldout/*": {partition: cpu}}. A key is generation, scoring, training or light, the role of a stage in
    its iteration (reference), its name, or a pattern with *. If several entries match a stage, the later one wins, key
    by key."""
    parallel: int | None = runtime(None, ge=1)
    """Maximum number of independent stages that run at once. By default, if every stage has all devices: 1 with GPUs,
    else one per two cores, at least 2; if a strategy divides the devices, or on Slurm: all that are ready and have
    devices."""
    warm: bool = runtime(True)
    """Reuse processes on this machine: stages of a locked environment are forked from a process that has imported its
    libraries, and engines and scoring models stay loaded for the next stage that can use them. Results are the same
    without it."""
    retries: int = runtime(3, ge=0)
    """Retries of a stage after a transient failure (a killed process, a lost connection, a stall). A preempted stage is
    restarted without limit; a user's mistake or a bug ends the run at once."""
    backoff_seconds: float = runtime(10.0, ge=0)
    """Pause before the first retry; it doubles with each further one, up to ten minutes, with 50 % jitter."""
    stall_seconds: float = runtime(3600.0, gt=0)
    """A stage without output for this long is killed and retried."""
    grace_seconds: float = runtime(DEFAULT_GRACE, ge=0)
    """How long a stage that has to stop may take to finish the current shard or step."""
    check_space: bool = runtime(True)
    """Start a stage only if the disk has room for its estimated output."""

    @model_validator(mode="before")
    @classmethod
    def _read_word(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, entry in self.stages.items():
            for key, kinds in KINDS_WITH_KEY.items():
                if name in KINDS and name not in kinds and getattr(entry, key) is not None:
                    raise ValueError(
                        f"stages.{name}.{key} is {getattr(entry, key)}, but only {' and '.join(kinds)} stages can have "
                        f"`{key}`. Take it out."
                    )
        return self

    @property
    def uses_scheduler(self) -> bool:
        """Whether any stage may run on a scheduler."""
        return any(
            kind not in LOCAL_KINDS
            for kind in (self.kind, *(entry.kind or self.kind for entry in self.stages.values()))
        )

    @property
    def requests_gpus(self) -> bool:
        """Whether any stage requests GPUs from a scheduler."""
        return self.uses_scheduler and any(section.gpus for section in (self.resources, *self.stages.values()))

    @property
    def is_remote(self) -> bool:
        """Whether all heavy stages run on a scheduler."""
        kinds = {entry.kind for name, entry in self.stages.items() if name != "light" and entry.kind}
        return not {self.kind, *kinds} & set(LOCAL_KINDS)

    def entry(self, stage: SelectableStage) -> StageSection:
        """The merged settings of a stage, with its executor (`kind`), without keys that do not apply to its
        workload."""
        return self._merged(stage.workload, matching_entries(stage, self.stages), stage.gpus)

    def finalizing_entry(self) -> StageSection:
        """The settings of the small jobs that Ratchet adds to finalize stages: those of light stages. Patterns do not
        match them."""
        return self._merged("light", [self.stages["light"]] if "light" in self.stages else [], 0)

    def _merged(self, kind: Workload, entries: Iterable[StageSection], gpus: int) -> StageSection:
        """Merge the entries over `resources`, key by key; `directives` are merged option by option."""
        include = set(LIGHT_KEYS) if kind == "light" else None
        settings = self.resources.model_dump(exclude_unset=True, include=include)
        if kind in ARRAY_KINDS and settings.get("gpus"):
            settings["gpus"] = gpus
        directives = settings.get("directives", {})
        for entry in entries:
            own = entry.model_dump(exclude_unset=True)
            directives = {**directives, **own.get("directives", {})}
            settings |= own
        settings = {name: value for name, value in settings.items() if kind in KINDS_WITH_KEY.get(name, KINDS)}
        settings["directives"] = {name: it for name, it in directives.items() if it is not None and it is not False}
        return StageSection(**{**settings, "kind": settings.get("kind") or self.kind})
