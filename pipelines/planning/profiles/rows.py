"""Builds the profile of a published stage: what it computed, on which device, and where its time went."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from contracts.config import StageConfig
from contracts.hardware import processor
from contracts.manifest import Manifest
from contracts.operations import Operations
from contracts.outlook import Outlook
from pipelines.config.executor import LOCAL_KINDS
from pipelines.graph import Graph, Node
from pipelines.planning.estimates import GraphOutlook, memory
from pipelines.planning.profiles.datasheets import device_here, matching_sheet

VERSION = 1
"""Version of the profiles' format; profiles of other versions are not read."""
VARIANTS = ("kind", "function", "algorithm", "engine")
"""Config fields that distinguish stages of one name with different computations."""
COUNTS = ("completions", "prompt_tokens", "response_tokens", "tokens", "steps", "resumed_steps")
"""Facts in manifests that count what was computed."""
LIBRARIES = ("ratchet", "torch", "vllm", "transformers", "deepspeed")


@dataclass(frozen=True)
class Timing:
    """Times of an attempt as the driver and a supervisor measured them, in seconds."""

    queue: float
    """Time from its submission to the start of its first process."""
    life: float
    """Time from that start to the end of its last process, without the job that publishes the output of tasks."""
    lag: float
    """Time from that end until it was recorded as published."""
    tasks: int = 1
    """Number of jobs that shared its shards."""
    is_array: bool = False
    """Whether a separate job published what the tasks made."""
    threads: int = 0
    """OMP_NUM_THREADS; 0: not known."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The profile of one published stage; times in seconds."""

    version: int
    id: str
    """The manifest's checksum, so that the same stage counts once."""
    created: str
    stage: str
    variant: str = ""
    code: int = 0
    """Version of the stage's code."""
    role: str = ""
    package: str = ""
    executor: str = "local"
    device: str = ""
    """The GPU as its driver names it, or the processor."""
    threads: int = 0
    """Threads of each process on a CPU; 0 on a GPU, and if not known."""
    versions: dict[str, str] = {}
    work: Operations | None = None
    """The planned computation with a model."""
    rows: int = 0
    """The planned number of rows, of stages without a model."""
    bytes: int = 0
    """Bytes of the model that such a stage makes."""
    counts: dict[str, int] = {}
    """Counts of what it actually computed."""
    first: bool = False
    """Whether it was the first stage of its environment in its run, so that libraries were imported for it."""
    loaded: bool = True
    """Whether it loaded its model or engine itself, instead of reusing one that an earlier stage had left in its
    process."""
    expected: bool = True
    """Whether it was expected to load it, given the stages before it."""
    queue: float = 0.0
    start: float = 0.0
    load: float = 0.0
    compute: float = 0.0
    handoff: float = 0.0
    finish: float | None = None
    """For stages run as a scheduler's jobs, the time from the end of the working jobs to the publication, including the
    queue and work of the job that finalized it, if there was one."""
    wait: float = 0.0
    """Time it waited for shards of the stage that it streams from."""
    cpu: float | None = None
    """CPU seconds of the stage's own processes."""
    memory: int | None = None
    """Peak bytes of the fullest device or, on a CPU, process."""

    @property
    def seconds(self) -> float:
        """Time in which it held its devices."""
        return self.start + self.load + self.compute + self.handoff

    @property
    def match_key(self) -> tuple[Any, ...]:
        """The fields that are equal for stages that are expected to take equally long."""
        what = (self.stage, self.variant, self.code, self.executor, self.device, self.threads)
        return *what, self.work, self.rows, self.bytes, self.first, self.loaded


def variant_of(config: StageConfig) -> str:
    """The values that distinguish stages of one name with different computations."""
    return " ".join(str(value) for name in VARIANTS if (value := getattr(config, name, None)) is not None)


def planned_rows(node: Node, outlook: Outlook) -> int | None:
    """The number of rows that a stage processes: the largest number known of its output and inputs; None if none is
    known."""
    made = [node.stage.answers(node.config, outlook), node.stage.pairs(node.config, outlook)]
    counts = [found.count for found in made if found is not None]
    if (rows := node.stage.rows(node.config, node.output, outlook)) is not None:
        counts.append(rows.count)
    for path in node.inputs:
        if (answers := outlook.answers_of(path)) is not None:
            counts.append(answers.count)
        elif (pairs := outlook.pairs_of(path)) is not None:
            counts.append(pairs.count)
    if not counts:
        counts = [rows.count for path in node.inputs if (rows := outlook.rows_of(path)) is not None]
    return max(counts, default=None)


@dataclass(frozen=True)
class PlannedWork:
    """The work of a stage, independent of where it runs."""

    variant: str
    work: Operations | None
    rows: int | None
    """Rows of a stage without a model; None if not known."""
    bytes: int | None
    """Bytes of the model that such a stage makes; None if it makes none, or not known."""
    memory: int | None
    """Estimated bytes on a device; None if small or not known."""


def planned_work(node: Node, graph: Graph, *, on_gpu: bool) -> PlannedWork:
    """The work of a stage, cached by layout for a graph and its copies."""
    seen = graph.cached(("amounts", node.name, on_gpu), dict[str, PlannedWork])
    assert seen is not None
    text = node.config.model_dump_json()  # a search tries thousands of layouts of one stage
    if (known := seen.get(text)) is not None:
        return known
    outlook = GraphOutlook(graph)
    work = node.stage.operations(node.config, outlook, on_gpu=on_gpu)
    rows = planned_rows(node, outlook) or None if work is None else None
    estimate = memory(node, graph, on_gpu=on_gpu)
    makes_model = node.stage.origin(node.config) is not None or node.stage.size(node.config) is not None
    written = node.stage.published_bytes(node.config, outlook) if work is None and makes_model else None
    found = PlannedWork(variant_of(node.config), work, rows, written, None if estimate is None else estimate.total)
    seen[text] = found
    return found


def start_states(graph: Graph, parallel: int) -> dict[str, tuple[bool, bool]]:
    """By stage: whether it is the first of its environment, and whether it has to load its model or engine.

    It does not have to if a stage that it waits for leaves it loaded, or at least as many stages with the same label
    come before as run at once.
    """
    firsts: dict[str, str] = {}
    left: dict[str, frozenset[str]] = {}
    earlier: Counter[str] = Counter()
    labels = {name: node.stage.label(node.config) for name, node in graph.nodes.items()}
    for node in graph.nodes.values():
        firsts.setdefault(node.environment, node.name)
        left[node.name] = frozenset().union(*(left.get(need, frozenset()) for need in node.needs), {labels[node.name]})
    found = {}
    for node in graph.by_urgency():
        label = labels[node.name]
        inherits = any(label in left.get(need, ()) for need in node.needs) or earlier[label] >= parallel
        found[node.name] = firsts[node.environment] == node.name, not (label and inherits)
        earlier[label] += 1
    return found


def profile_of(
    node: Node, graph: Graph, manifest: Manifest, timing: Timing, executor: str, start_state: tuple[bool, bool]
) -> Profile | None:
    """The profile of a published stage; None if its times do not cover all of its work.

    Args:
        node: the stage as it was placed.
        executor: the executor that ran it.
        start_state: the entry of the stage in `start_states`.
    """
    first, expected = start_state
    seconds, facts = manifest.seconds, manifest.facts
    if facts.get("resumed_steps") or facts.get("resumed_from"):
        return None
    on_gpu = _on_gpu(node, manifest)
    amount = planned_work(node, graph, on_gpu=on_gpu)
    work = amount.work
    spent = _spent(
        seconds, timing, 1 if work is None or work.kind == "training" else work.layout.dp, executor in LOCAL_KINDS
    )
    if spent is None:
        return None
    device = _device(manifest, on_gpu=on_gpu)
    return Profile(
        version=VERSION,
        id=manifest.checksum[:32],
        created=manifest.created,
        stage=node.stage.name,
        variant=amount.variant,
        code=node.config.code_version,
        role=node.role,
        package=node.package,
        executor=executor,
        device=device,
        threads=0 if on_gpu else timing.threads,
        versions={name: manifest.versions[name] for name in LIBRARIES if name in manifest.versions},
        work=work,
        rows=amount.rows or 0,
        bytes=amount.bytes or 0,
        counts={"rows_in": manifest.ledger.rows_in, "kept": manifest.ledger.kept, **_counts(facts)},
        first=first,
        loaded=facts.get("start", "loaded") == "loaded",
        expected=expected,
        cpu=manifest.hardware.get("cpu_seconds"),
        memory=manifest.hardware.get("gpu_peak_bytes" if on_gpu else "peak_bytes"),
        **{name: round(value, 3) for name, value in spent.items()},
    )


def _counts(facts: Mapping[str, Any]) -> dict[str, int]:
    return {name: facts[name] for name in COUNTS if isinstance(facts.get(name), int)}


def _on_gpu(node: Node, manifest: Manifest) -> bool:
    """Whether a stage computed on a GPU: by its own facts, else by its machine."""
    if manifest.facts.get("device") is not None:
        return str(manifest.facts["device"]) != "cpu"
    return bool(manifest.hardware.get("gpu")) and bool(node.stage.models(node.config))


def _device(manifest: Manifest, *, on_gpu: bool) -> str:
    reported = manifest.hardware.get("gpu" if on_gpu else "processor")
    if reported:
        return str(reported)
    here = device_here()
    if on_gpu == (matching_sheet(here) is not None):
        return here
    return processor() or str(manifest.hardware.get("machine", ""))


def _spent(seconds: Mapping[str, float], timing: Timing, copies: int, here: bool) -> dict[str, float] | None:
    """Seconds by phase; None if they include receipts of a killed attempt.

    Times that several copies or tasks measure are sums over them. Among the copies of one process, waiting for the
    slowest one counts as computing; among tasks, which start when a scheduler starts them, it counts as starting.
    """
    sharing = max(1, copies, timing.tasks)
    total, wait = seconds.get("total", 0.0), seconds.get("wait", 0.0)
    before = seconds.get("prepare", 0.0) + seconds.get("import", 0.0)
    load, save = seconds.get("load", 0.0) / sharing, seconds.get("save", 0.0) / sharing
    check, measured = seconds.get("check", 0.0), seconds.get("compute", 0.0)
    handoff = save + check
    if timing.tasks > 1 or timing.is_array:
        compute = measured / sharing
        handoff = save  # the check is done by the job that publishes
        start = max(0.0, timing.life - load - compute - save - wait)
    else:
        if measured > 1.02 * sharing * total + 0.1:
            return None
        compute = max(0.0, total - wait - before - load - save - check)
        start = max(0.0, timing.life - total) + before
    spent = {"load": load, "compute": compute, "wait": wait}
    if here:
        return {**spent, "start": start + timing.queue, "handoff": handoff + timing.lag}
    return {**spent, "queue": timing.queue, "start": start, "handoff": handoff, "finish": timing.lag}
