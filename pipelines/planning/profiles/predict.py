"""Predicts the times of stages from profiles of matching stages, or else from data sheets.

    measured   the median of matching stages: same stage, model, amount of work, layout, device and threads
    scaled     the times of the nearest ones, scaled by the ratio of the analytic costs of both (analytic.py)
    analytic   the analytic costs themselves

The errors of all three are computed from the profiles: each group of matching stages is predicted from the others, as
if it had never run, and analytically.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import msgspec

from contracts.operations import Operations
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.selecting import ARRAY_KINDS
from pipelines.graph import Graph, Node
from pipelines.planning.prediction import Basis, Prediction
from pipelines.planning.profiles import analytic
from pipelines.planning.profiles.analytic import Costs
from pipelines.planning.profiles.datasheets import DataSheet, canonical_name, sheet_of
from pipelines.planning.profiles.rows import Profile, planned_work, start_states
from pipelines.planning.profiles.store import latest_of_each
from pipelines.text import plural

NEAREST = 8
"""Maximum number of runs that a prediction is made from: the nearest, and of equally near ones the latest."""
MIN_COMPARISONS = 3
"""Minimum number of comparisons with measurements from which an error is computed."""
ASSUMED_ERRORS: dict[Basis, float] = {"measured": 0.3, "scaled": 0.5, "analytic": 1.0}
"""The error that is assumed if there are fewer than MIN_COMPARISONS."""
MIN_SPREAD = 1.5
"""Minimum ratio of the largest to the smallest amount of work for fitting a line."""
QUEUE_SECONDS = 60.0
"""Assumed queue time of a scheduler without profiled jobs."""
FINISH_SECONDS = QUEUE_SECONDS + analytic.LIGHT_START_SECONDS
"""Assumed time of the job that finalizes a stage: its queue time, and the start of its process."""


@dataclass(frozen=True)
class StageFeatures:
    """The properties of a stage that decide how long it takes."""

    stage: str
    variant: str
    code: int
    package: str
    executor: str
    device: str
    threads: int
    work: Operations | None
    rows: int | None
    """Rows of a stage without a model; None if not known."""
    bytes: int | None
    """Bytes of the model that such a stage makes; None if it makes none, or not known."""
    first: bool
    """Whether it is the first stage of its environment in its run, so that libraries are imported for it."""
    loaded: bool
    """Whether it loads its model or engine itself, instead of reusing what an earlier stage has left loaded."""
    role: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        """The kind of the stage; only profiles of the same kind are used for its prediction."""
        return self.stage, self.variant


@dataclass(frozen=True)
class _Estimate:
    """Predicted times of a stage by phase."""

    costs: Costs
    basis: Basis
    runs: int
    memory: int | None = None


class ProfilePredictor:
    """Predicts from profiles or, without any, from a data sheet (`pipelines.planning.prediction.Predictor`)."""

    def __init__(
        self,
        profiles: Iterable[Profile],
        device: str,
        *,
        processor: str | None = None,
        sheet: DataSheet | None = None,
        threads: Callable[[Node], int] = lambda node: 0,
        parallel: int = 1,
        warm: bool = True,
        cores: int | None = None,
        detached: bool = False,
    ) -> None:
        """Use some profiles.

        Args:
            profiles: in any order; duplicates count once.
            device: the device of stages with models: a GPU or a processor as profiles name it, or the name of a data
                sheet.
            processor: the processor of other stages on a machine with GPUs; empty if not known.
            sheet: the device's data sheet, if it differs from the standard one, for example in its links.
            threads: threads of each process of a stage on a CPU.
            parallel: maximum number of stages at once; each of them may have to load what a later one reuses.
            warm: whether later stages reuse what earlier ones have loaded (executor.warm).
            cores: cores that the processes of a stage share while they start; None: no contention.
            detached: whether the run has no driver, so that a further job finalizes trainings, too, as one always does
                for arrays.
        """
        self.device = canonical_name(device)
        self.sheet = sheet or sheet_of(device)
        self.processor = processor if processor is not None else "" if self.sheet.is_gpu else self.device
        self._threads = threads
        self._parallel = parallel
        self._warm = warm
        self._cores = cores
        self._finished = (*ARRAY_KINDS, *(("training",) if detached else ()))
        self._rows: dict[tuple[str, str], list[Profile]] = {}
        for row in reversed(latest_of_each(profiles)):
            if row.executor not in LOCAL_KINDS:
                if row.finish is None:
                    continue  # written by an earlier version, whose `start` includes the queue of another job
                row = msgspec.structs.replace(row, first=True, expected=True)  # jobs do not share processes
            row = msgspec.structs.replace(row, device=canonical_name(row.device))
            self._rows.setdefault((row.stage, row.variant), []).append(row)
        self._known: dict[StageFeatures, tuple[_Estimate, float, str] | None] = {}
        self._costs: dict[tuple[Operations, str, int], Costs] = {}
        self._errors: dict[Basis, dict[str, list[float]]] | None = None
        self._start_states: WeakKeyDictionary[Graph, dict[str, tuple[bool, bool]]] = WeakKeyDictionary()

    def predict(self, node: Node, graph: Graph) -> Prediction | None:
        """Predict a placed stage; None if too little is known."""
        features = self.features_of(node, graph)
        if features not in self._known:
            self._known[features] = self._estimate(features)
        if (found := self._known[features]) is None:
            return None
        estimate, error, source = found
        if (
            estimate.basis == "analytic"
            and features.work is None
            and features.bytes is None
            and node.stage.models(node.config)
        ):
            return None  # without the model's shape, the number of rows does not determine the time
        costs, peak = estimate.costs, estimate.memory
        if peak is None:
            peak = planned_work(node, graph, on_gpu=self.sheet.is_gpu).memory
        return Prediction(
            compute=costs.compute,
            load=costs.load,
            start=costs.start,
            handoff=costs.handoff,
            queue=0.0 if features.executor in LOCAL_KINDS else self._queue(features),
            finish=self._finish(features)
            if features.executor not in LOCAL_KINDS and node.workload in self._finished
            else 0.0,
            memory=peak,
            basis=estimate.basis,
            error=error,
            source=source,
        )

    def has_seen(self, executor: str) -> bool:
        """Whether there is a profile of any stage on this executor."""
        return any(row.executor == executor for rows in self._rows.values() for row in rows)

    def features_of(self, node: Node, graph: Graph) -> StageFeatures:
        """The properties of a placed stage that decide how long it takes."""
        amount = planned_work(node, graph, on_gpu=self.sheet.is_gpu)
        executor = node.placement.executor if node.placement is not None else "local"
        if (states := self._start_states.get(graph)) is None:
            states = self._start_states[graph] = start_states(graph, self._parallel)
        first, loaded = states[node.name]
        return StageFeatures(
            stage=node.stage.name,
            variant=amount.variant,
            code=node.config.code_version,
            package=node.package,
            executor=executor,
            device=self.device if amount.work is not None else self.processor,
            threads=0 if self.sheet.is_gpu else self._threads(node),
            work=amount.work,
            rows=amount.rows,
            bytes=amount.bytes,
            first=first or executor not in LOCAL_KINDS,
            loaded=loaded or not self._warm or executor not in LOCAL_KINDS,
        )

    def _estimate(self, features: StageFeatures) -> tuple[_Estimate, float, str] | None:
        estimate = self._from_profiles(features, self._rows.get(features.kind, [])) or self._from_sheet(features)
        if estimate is None:
            return None
        errors = self._all_errors()[estimate.basis]
        own, all_errors = errors.get(features.stage, []), [error for found in errors.values() for error in found]
        known = own if len(own) >= MIN_COMPARISONS else all_errors
        if len(known) < MIN_COMPARISONS:
            error, how = ASSUMED_ERRORS[estimate.basis], "too few runs to compare: its error is assumed"
        else:
            error = math.sqrt(statistics.fmean(error**2 for error in known))
            what = features.stage if known is own else "all stages"
            how = f"its error by {plural(len(known), 'comparison')} of {what} with what was measured"
        if estimate.basis == "analytic":
            said = f"by the data sheet: {self.sheet.source}" if features.work is not None else "by its rows and bytes"
        else:
            of = "alike" if estimate.basis == "measured" else "of other sizes or layouts, by the ratio of their costs"
            said = f"by {plural(estimate.runs, 'run')} {of}"
        return estimate, error, f"{said}; {how}"

    # From profiles

    def _from_profiles(self, features: StageFeatures, rows: Sequence[Profile]) -> _Estimate | None:
        """Predict from the nearest profiles of a kind: the median of their times, each scaled by the ratio of the
        costs."""
        tiers: dict[int, list[Profile]] = {}
        for row in rows:
            if (tier := _tier(features, row)) is not None:
                tiers.setdefault(tier, []).append(row)
        if not tiers:
            return None
        tier = min(tiers)
        near = sorted(tiers[tier], key=lambda row: self._distance(features, row))[:NEAREST]
        ratios = [self._ratios(features, row) for row in near]
        start = (features.first, features.executor in LOCAL_KINDS)
        matching = any((row.first, row.executor in LOCAL_KINDS) == start for row in _same_loading(features, near))
        return _Estimate(
            Costs(
                start=self._start(features, near),
                load=self._load(features, near, [row for key in sorted(tiers) for row in tiers[key]]),
                compute=self._compute(near, ratios, tier),
                handoff=_median(row.handoff * ratio.handoff for row, ratio in zip(near, ratios, strict=True)),
            ),
            "measured" if tier == 0 and matching else "scaled",
            len(near),
            max((row.memory for row in near if row.memory is not None), default=None) if tier == 0 else None,
        )

    @staticmethod
    def _compute(near: Sequence[Profile], ratios: Sequence[Costs], tier: int) -> float:
        """The median of the scaled compute times. If only the amounts of work differ, and differ enough, a line is
        fitted instead, because a part of the time is the same for any amount."""
        amounts = [1 / ratio.compute for ratio in ratios]
        if tier == 1 and max(amounts) > MIN_SPREAD * min(amounts):
            fixed, rate = _line(amounts, [row.compute for row in near])
            return fixed + rate
        return _median(row.compute * ratio.compute for row, ratio in zip(near, ratios, strict=True))

    def _load(self, features: StageFeatures, near: Sequence[Profile], rows: Sequence[Profile]) -> float:
        """The load time of stages that also had to load their model or engine, or that also reused it, like this one.

        Args:
            rows: all profiles that may be used, the most similar first.
        """
        matching = _same_loading(features, near) or _same_loading(features, rows)[:NEAREST]
        load = _median(
            row.load
            * self._ratios(features, row).load
            * self._processes_per_core(features)
            / self._processes_per_core(row)
            for row in matching or near
        )
        if not matching and features.loaded and features.work is not None:  # none of the profiles includes loading
            return max(load, self._cost(features.work, features).load)
        return load

    def _start(self, features: StageFeatures, near: Sequence[Profile]) -> float:
        """The start time of stages that were first in their environment, or were not, like this one.

        A stage with one process is forked from one that has imported its libraries; several processes import them
        themselves. So neither case predicts the other.
        """
        several = _processes(features) > 1
        of_package = [row for rows in self._rows.values() for row in rows if row.package == features.package]
        for rows in (near, of_package):
            same = [row for row in rows if row.executor == features.executor and (_processes(row) > 1) == several]
            if matching := [row.start for row in same if several or row.first == features.first]:
                return _median(matching)
        known = _median(row.start for row in near)
        if features.first or several or features.executor not in LOCAL_KINDS:
            known = max([known, self._default_start(features), *(row.start for row in of_package if row.first)])
        return known * self._processes_per_core(features)

    def _processes_per_core(self, one: StageFeatures | Profile) -> float:
        """The number of processes of a stage per core while they start, at least 1."""
        return 1.0 if self._cores is None else max(1.0, _processes(one) / self._cores)

    def _ratios(self, features: StageFeatures, row: Profile) -> Costs:
        """The ratios of the costs of a stage to those of a profile."""
        if features.work is None or row.work is None:
            if bool(features.rows) != bool(row.rows) or bool(features.bytes) != bool(row.bytes):
                return Costs(1.0, 1.0, 1.0, 1.0)
            mine = analytic.light_costs(features.rows or 0, features.bytes or 0, self.sheet)
            its = analytic.light_costs(row.rows, row.bytes, self.sheet)
            load = mine.load / its.load if its.load else 1.0
            return Costs(1.0, load, mine.compute / its.compute, mine.handoff / its.handoff)
        mine, its = self._cost(features.work, features), self._cost(row.work, replace(features, threads=row.threads))
        return Costs(1.0, mine.load / its.load, mine.compute / its.compute, mine.handoff / its.handoff)

    def _distance(self, features: StageFeatures, row: Profile) -> float:
        ratios = self._ratios(features, row)
        return abs(math.log(max(ratios.compute, 1e-9)))

    def _queue(self, features: StageFeatures) -> float:
        """The median queue time of jobs of the same stage, which request as much; else of all jobs of the scheduler."""
        jobs = [row for rows in self._rows.values() for row in rows if row.executor == features.executor]
        matching = [row for row in jobs if row.stage == features.stage]
        return _median(row.queue for row in matching or jobs) if jobs else QUEUE_SECONDS

    def _finish(self, features: StageFeatures) -> float:
        """The median time of jobs that publish what tasks have made; those that finalize trainings are similar."""
        waits = [
            row.finish
            for rows in self._rows.values()
            for row in rows
            if row.executor == features.executor and row.finish is not None and _is_array(row)
        ]
        return _median(waits) if waits else FINISH_SECONDS

    # From a data sheet

    def _from_sheet(self, features: StageFeatures) -> _Estimate | None:
        if features.work is not None:
            return _Estimate(self._cost(features.work, features), "analytic", 0)
        if features.rows is None and features.bytes is None:
            return None
        return _Estimate(analytic.light_costs(features.rows or 0, features.bytes or 0, self.sheet), "analytic", 0)

    def _default_start(self, features: StageFeatures) -> float:
        return analytic.START_SECONDS.get(features.package, analytic.LIGHT_START_SECONDS)

    def _cost(self, work: Operations, features: StageFeatures) -> Costs:
        key = (work, features.package, features.threads)
        if key not in self._costs:
            self._costs[key] = analytic.model_costs(work, features.package, _with_threads(self.sheet, features.threads))
        return self._costs[key]

    # Prediction errors

    def _all_errors(self) -> dict[Basis, dict[str, list[float]]]:
        """(measured - predicted) / predicted, by basis and stage, each profile predicted from the others."""
        if self._errors is not None:
            return self._errors
        errors: dict[Basis, dict[str, list[float]]] = {"measured": {}, "scaled": {}, "analytic": {}}
        for rows in self._rows.values():
            for number, row in enumerate(rows):
                features = _features_of(row)
                if features.work is not None and row.device != self.device:
                    continue
                others = rows[:number] + rows[number + 1 :]
                unlike = [other for other in others if _tier(features, other) != 0]
                for estimate in (
                    self._from_profiles(features, others),
                    self._from_profiles(features, unlike),
                    self._from_sheet(features),
                ):
                    if estimate is not None:
                        costs = estimate.costs
                        whole = max(costs.start + costs.load + costs.compute + costs.handoff, 1e-9)
                        errors[estimate.basis].setdefault(features.stage, []).append((row.seconds - whole) / whole)
        self._errors = errors
        return errors


def _features_of(row: Profile) -> StageFeatures:
    fields = {name: getattr(row, name) for name in StageFeatures.__dataclass_fields__}
    return StageFeatures(**{**fields, "rows": row.rows or None, "bytes": row.bytes or None})


def _tier(features: StageFeatures, row: Profile) -> int | None:
    """The dissimilarity of a profile: 0, it matches; 1, another amount of work or version of the code, or for stages
    without a model another device; 2, another layout or number of threads; 3, another model; None: it cannot be
    used."""
    if (features.work is None) != (row.work is None):
        return None
    if features.work is None or row.work is None:
        same = features.rows in (row.rows or None, None) and features.bytes in (row.bytes or None, None)
        return 0 if same and features.code == row.code and features.device == row.device else 1
    if row.device != features.device:
        return None
    if features.work.model != row.work.model:
        return 3
    if features.work.layout != row.work.layout or features.threads != row.threads:
        return 2
    return 0 if features.work == row.work and features.code == row.code else 1


def _is_array(row: Profile) -> bool:
    return row.work is not None and row.work.kind != "training"


def _processes(one: StageFeatures | Profile) -> int:
    return 1 if one.work is None else one.work.layout.processes


def _same_loading(features: StageFeatures, rows: Sequence[Profile]) -> list[Profile]:
    """The profiles that loaded their model or engine, or reused it, as this stage will. If there are none, those that
    were expected to: not every engine can be given other weights."""
    found = [row for row in rows if row.loaded == features.loaded]
    return found or [row for row in rows if row.expected == features.loaded]


def _with_threads(sheet: DataSheet, threads: int) -> DataSheet:
    """The data sheet of `threads` CPU cores instead of one; that of a GPU unchanged."""
    if sheet.is_gpu or threads <= 1:
        return sheet
    times = float(threads)
    return replace(sheet, bf16=times * sheet.bf16, fp32=times * sheet.fp32, bandwidth=times * sheet.bandwidth)


def _line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit seconds = fixed + rate * amount, neither below 0, by least squares of the relative errors. Returns (fixed,
    rate)."""
    weights = [1 / max(value, 1e-3) ** 2 for value in seconds]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, x in zip(weights, amounts, strict=True)) / total
    mean_y = math.fsum(w * y for w, y in zip(weights, seconds, strict=True)) / total
    spread = math.fsum(w * (x - mean_x) ** 2 for w, x in zip(weights, amounts, strict=True))
    both = math.fsum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, amounts, seconds, strict=True))
    rate = both / spread
    fixed = mean_y - rate * mean_x
    if rate < 0:
        return mean_y, 0.0
    if fixed < 0:
        squares = math.fsum(w * x * x for w, x in zip(weights, amounts, strict=True))
        return 0.0, math.fsum(w * x * y for w, x, y in zip(weights, amounts, seconds, strict=True)) / squares
    return fixed, rate


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))
