"""What one stage took, as a row of the profiles: what it was, what it ran on, and where its time went."""

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
from pipelines.config.executor import HERE
from pipelines.graph import Graph, Node
from pipelines.planning.estimates import GraphOutlook, memory
from pipelines.planning.profiles.datasheets import device_here, matching

VERSION = 1
"""Of the rows; others are not read."""
VARIANTS = ("kind", "function", "algorithm", "engine")
"""Fields that tell stages of one name apart that compute something else."""
COUNTS = ("completions", "prompt_tokens", "response_tokens", "tokens", "steps", "resumed_steps")
"""Facts of manifests that count what was computed."""
LIBRARIES = ("ratchet", "torch", "vllm", "transformers", "deepspeed")


@dataclass(frozen=True)
class Timing:
    """What the driver and a supervisor saw of an attempt, in seconds."""

    queue: float
    """Until its first process was started."""
    life: float
    """From then to the end of its last one, without the job that publishes what tasks have made."""
    lag: float
    """From then until it counted as published."""
    tasks: int = 1
    """Jobs that shared its shards."""
    is_array: bool = False
    """Whether a job of its own has published what the tasks made."""
    threads: int = 0
    """OMP_NUM_THREADS; 0: not known."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One published stage."""

    version: int
    id: str
    """The manifest's checksum: the same stage counts once, wherever it is met."""
    created: str
    stage: str
    variant: str = ""
    code: int = 0
    """Version of what it computes."""
    role: str = ""
    package: str = ""
    executor: str = "local"
    device: str = ""
    """A GPU or a processor as its driver names it."""
    threads: int = 0
    """Of each process on a CPU; 0 on a GPU, and where it is not known."""
    versions: dict[str, str] = {}
    work: Operations | None = None
    """What it was planned to compute with a model."""
    rows: int = 0
    """What it was planned to work through, of stages that compute with no model."""
    bytes: int = 0
    """Of the model that such a stage makes."""
    counts: dict[str, int] = {}
    """What it did compute."""
    first: bool = False
    """Whether no other stage of its environment came before it in its run, so that libraries were imported for it."""
    loaded: bool = True
    """Whether it loaded what it computes with, and found nothing that an earlier stage had left."""
    expected: bool = True
    """Whether it was expected to, by the stages that came before it."""
    queue: float = 0.0
    start: float = 0.0
    load: float = 0.0
    compute: float = 0.0
    handoff: float = 0.0
    finish: float | None = None
    """Of a stage that was a scheduler's jobs: from the end of those that worked until it counted as published, and so
    the queue and the work of the job that finished it, if there was one."""
    wait: float = 0.0
    """For a stage that it followed."""
    cpu: float | None = None
    """Seconds of processors: without what other programs took of the wall's."""
    memory: int | None = None
    """Bytes at the peak, of the fullest device or, on a CPU, process."""

    @property
    def seconds(self) -> float:
        """In which it had its devices."""
        return self.start + self.load + self.compute + self.handoff

    @property
    def alike(self) -> tuple[Any, ...]:
        """What stages have in common that are expected to take as long."""
        what = (self.stage, self.variant, self.code, self.executor, self.device, self.threads)
        return *what, self.work, self.rows, self.bytes, self.first, self.loaded


def variant_of(config: StageConfig) -> str:
    """What tells stages of one name apart."""
    return " ".join(str(value) for name in VARIANTS if (value := getattr(config, name, None)) is not None)


def planned_rows(node: Node, outlook: Outlook) -> int | None:
    """What a stage has to work through: the most that is known of what it makes and reads; None where nothing is."""
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
class Amount:
    """What a stage has to do, wherever it does it."""

    variant: str
    work: Operations | None
    rows: int | None
    """Of stages that compute with no model; None where that is not known."""
    bytes: int | None
    """Of the model that such a stage makes; None where it makes none, or that is not known."""
    memory: int | None
    """Bytes that it is estimated to take on a device; None where that is little, or not known."""


def amount_of(node: Node, graph: Graph, *, on_gpu: bool) -> Amount:
    """What a stage has to do; found once for each of its layouts, in a graph and in others of the same stages."""
    seen = graph.known(("amounts", node.name, on_gpu), dict[str, Amount])
    assert seen is not None
    text = node.config.model_dump_json()  # a search has thousands of layouts of one stage
    if (known := seen.get(text)) is not None:
        return known
    outlook = GraphOutlook(graph)
    work = node.stage.operations(node.config, outlook, on_gpu=on_gpu)
    rows = planned_rows(node, outlook) or None if work is None else None
    estimate = memory(node, graph, on_gpu=on_gpu)
    makes_model = node.stage.origin(node.config) is not None or node.stage.size(node.config) is not None
    written = node.stage.published_bytes(node.config, outlook) if work is None and makes_model else None
    found = Amount(variant_of(node.config), work, rows, written, None if estimate is None else estimate.total)
    seen[text] = found
    return found


def beginnings(graph: Graph, parallel: int) -> dict[str, tuple[bool, bool]]:
    """Of each stage whether it is the first of its environment, and whether it has to load what it computes with: where
    no stage that it waits for leaves that to it, and no more have come before than run at once."""
    firsts: dict[str, str] = {}
    left: dict[str, frozenset[str]] = {}
    had: Counter[str] = Counter()
    labels = {name: node.stage.label(node.config) for name, node in graph.nodes.items()}
    for node in graph.nodes.values():
        firsts.setdefault(node.environment, node.name)
        left[node.name] = frozenset().union(*(left.get(need, frozenset()) for need in node.needs), {labels[node.name]})
    found = {}
    for node in graph.by_urgency():
        label = labels[node.name]
        inherits = any(label in left.get(need, ()) for need in node.needs) or had[label] >= parallel
        found[node.name] = firsts[node.environment] == node.name, not (label and inherits)
        had[label] += 1
    return found


def profile_of(
    node: Node, graph: Graph, manifest: Manifest, timing: Timing, executor: str, begun: tuple[bool, bool]
) -> Profile | None:
    """The row of a published stage; None where its times are not those of the whole of it.

    Args:
        node: as it was placed.
        executor: where it ran.
        begun: what `beginnings` says of it.
    """
    first, expected = begun
    seconds, facts = manifest.seconds, manifest.facts
    if facts.get("resumed_steps") or facts.get("resumed_from"):
        return None
    on_gpu = _on_gpu(node, manifest)
    amount = amount_of(node, graph, on_gpu=on_gpu)
    work = amount.work
    spent = _spent(seconds, timing, 1 if work is None or work.kind == "training" else work.layout.dp, executor in HERE)
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
    """Whether it computed on a GPU: by its own facts, else by what its machine had."""
    if manifest.facts.get("device") is not None:
        return str(manifest.facts["device"]) != "cpu"
    return bool(manifest.hardware.get("gpu")) and bool(node.stage.models(node.config))


def _device(manifest: Manifest, *, on_gpu: bool) -> str:
    told = manifest.hardware.get("gpu" if on_gpu else "processor")
    if told:
        return str(told)
    here = device_here()
    if on_gpu == (matching(here) is not None):
        return here
    return processor() or str(manifest.hardware.get("machine", ""))


def _spent(seconds: Mapping[str, float], timing: Timing, copies: int, here: bool) -> dict[str, float] | None:
    """Seconds by what they were for; None where receipts of an attempt that was killed have a part in them.

    What several copies or tasks measured is a sum over them. Among the copies of one process the slowest one's wait is
    a part of computing; among tasks, which start when a scheduler lets them, a part of their start.
    """
    sharing = max(1, copies, timing.tasks)
    total, wait = seconds.get("total", 0.0), seconds.get("wait", 0.0)
    before = seconds.get("prepare", 0.0) + seconds.get("import", 0.0)
    load, save = seconds.get("load", 0.0) / sharing, seconds.get("save", 0.0) / sharing
    check, measured = seconds.get("check", 0.0), seconds.get("compute", 0.0)
    handoff = save + check
    if timing.tasks > 1 or timing.is_array:
        compute = measured / sharing
        handoff = save  # what checks is the job that publishes
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
