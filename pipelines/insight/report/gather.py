"""Gathers the data of a run's report from its artifacts and events. It never fails: what cannot be read is listed."""

import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.manifest import MANIFEST
from contracts.points import METRICS, Point, read_points
from contracts.records import CHECKPOINT, CHECKPOINT_EVALUATION, EVALUATION, PAIRS, ROLLOUTS, SCORES
from contracts.secrets import TOKEN
from pipelines.execution.endings import failure_of, progress_of
from pipelines.graph import Graph, Node
from pipelines.insight.event_text import notable_lines, of_current_config
from pipelines.insight.report.data import JudgeCosts, LedgerLine, RunReport, SampleSet, StageRow, TrainingCurves
from pipelines.insight.report.expected import expected_lines, plan_statement
from pipelines.insight.report.length import TRAINED_ON
from pipelines.insight.report.rows import SetSources
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.insight.report.statements import statements
from pipelines.insight.report.timing import devices_of, set_held_times, stage_row, time_facts
from pipelines.run.directory import RunDirectory
from pipelines.run.events import Event, RunCancelled, RunEnded, RunStarted, StageEvent, StageSubmitted
from pipelines.run.gates import refused, stop_decision
from pipelines.run.points import latest

Curves: TypeAlias = tuple[list[float], dict[str, list[float | None]]]
TRAINING_LOG = "training-log.jsonl"
SELECTED = (TRAINED_ON, "selected/rollouts", "replay/rollouts")
"""Roles of rollouts that an iteration may train on; it trains on the last of them that it has."""
BEFORE_SELECTION = "generation, before selection"
"""The role that is shown for an iteration's other rollouts."""
MAX_CURVES = 6
"""Maximum number of trainings of one role whose curves are shown: the latest."""
MAX_STEPS = 240
"""Points of a training curve."""
MAX_LINES = 200
UNREADABLE = (UserError, OSError, ValueError, KeyError, TypeError, msgspec.MsgspecError)
"""Exceptions of reading damaged files."""


def gather(run: RunDirectory, graph: Graph, cache: SampleCache) -> RunReport:
    """The data of a run's report; `cache` keeps what is read of samples."""
    return _Gatherer(run, graph, cache).report()


class _Gatherer:
    def __init__(self, run: RunDirectory, graph: Graph, cache: SampleCache) -> None:
        self.run = run
        self.graph = graph
        self.cache = cache
        self.missing: list[str] = []
        self.artifacts: dict[str, Artifact] = {}
        self.events: list[Event] = self.try_read("events.jsonl", run.events, [])
        self.by_stage: dict[str, list[StageEvent]] = {}
        for event in self.events:
            if isinstance(event, StageEvent):
                self.by_stage.setdefault(event.stage, []).append(event)

    def try_read(self, what: str, read: Any, default: Any) -> Any:
        """The result of `read`; if it fails to read something, note `what` as missing and return `default`."""
        try:
            return read()
        except UNREADABLE as error:
            self.missing.append(f"{what}: {_first_line(error)}")
            return default

    def report(self) -> RunReport:
        state = self.state()
        for name, node in self.graph.nodes.items():
            if (node.output / MANIFEST).is_file() and (
                found := self.try_read(name, lambda path=node.output: self.cache.artifact(path), None)
            ):
                self.artifacts[name] = found
        waiting = [name for name in self.graph.nodes if name not in self.artifacts]
        rows = [self.stage(node) for node in self.graph.nodes.values()]
        set_held_times(rows, {name: node.needs for name, node in self.graph.nodes.items()}, self.events)
        sets = list(self.sets())
        stop = stop_decision(self.graph)
        report = RunReport(
            name=self.run.path.name,
            path=str(self.run.path),
            made=round(time.time(), 1),
            state=state,
            iterations=max((node.iteration or 0 for node in self.graph.nodes.values()), default=0),
            notes=notable_lines(of_current_config(self.events, self.run.config))[-MAX_LINES:],
            evaluations=self.evaluations(),
            refused=sorted(refused(self.graph)),
            stopped=(stop.reason or "") if stop is not None else "",
            own_evaluations=self.own_evaluations(),
            paid=self.paid(),
            scorers=list(self.run.config.scorers),
            sets=sets,
            ledgers=list(self.ledgers()),
            stages=rows,
            time=time_facts(rows, self.events),
            expected=expected_lines(self.run.config, rows),
            training=list(self.training()),
            facts=list(self.facts()),
            config=self.try_read(
                "config.resolved.yaml", lambda: (self.run.path / "config.resolved.yaml").read_text("utf-8"), ""
            ),
            config_of=self.run.config.model_dump(mode="json"),
        )
        self.reward_models(report)
        candidates = [one.largest for one in sets if one.largest is not None and one.iteration is not None]
        report.largest = max(candidates, key=lambda largest: largest.margin, default=None)
        if waiting:
            report.missing.append(_unpublished_sentence(waiting, len(self.graph.nodes)))
        report.missing += self.missing[:MAX_LINES]
        for row in report.stages:
            row.detail = _without_secrets(row.detail)
        report.missing = [_without_secrets(line) for line in report.missing]
        report.notes = [_without_secrets(line) for line in report.notes]
        report.statements = [*statements(report), *plan_statement(report, self.run.config)]
        return report

    def state(self) -> str:
        """The state of the run by its last events. For a detached run, only its scheduler knows more."""
        kinds = (RunEnded, RunStarted, RunCancelled, StageSubmitted)
        last = next((event for event in reversed(self.events) if isinstance(event, kinds)), None)
        if isinstance(last, RunEnded):
            return last.outcome
        if isinstance(last, RunCancelled):
            return "cancelled"
        if isinstance(last, StageSubmitted):
            return "under way"
        return "running" if self.try_read("lock", self.run.holder, None) else "not finished"

    def stage(self, node: Node) -> StageRow:
        """The row of a stage, from its manifest, its events and its latest attempt."""
        artifact = self.artifacts.get(node.name)
        row = stage_row(node, artifact.manifest if artifact else None, self.by_stage.get(node.name, []))
        attempts = self.try_read(node.name, lambda: self.run.attempts(node.name), [])
        if artifact is not None and row.wait is not None:
            row.devices = devices_of(node, artifact.manifest, attempts[-1] if attempts else None)
        if artifact is None:
            row.attempts = len(attempts)
            failure = self.try_read(node.name, lambda: failure_of(attempts[-1]), None) if attempts else None
            if failure is not None:
                text = str(failure.get("text", "")).strip().splitlines()
                row.state = "stopped" if failure.get("kind") == "stopped" else "failed"
                row.detail = text[-1] if text else ""
            elif attempts:
                row.state, row.detail = "begun", progress_of(attempts[-1]) or ""
        return row

    def evaluations(self) -> list[dict[str, Any]]:
        found = []
        for name, artifact in self.artifacts.items():
            if artifact.manifest.schema == EVALUATION:
                metrics = artifact.manifest.facts.get("metrics")
                if isinstance(metrics, dict) and isinstance(metrics.get("iteration"), int):
                    found.append(metrics)
                else:
                    self.missing.append(f"{name}: its manifest has no metrics")
        return sorted(found, key=lambda metrics: int(metrics["iteration"]))

    def own_evaluations(self) -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for name, artifact in self.artifacts.items():
            node = self.graph.nodes[name]
            if artifact.manifest.schema == CHECKPOINT_EVALUATION and node.iteration is not None:
                row = found.setdefault(node.iteration, {"iteration": node.iteration})
                own = node.role.partition("/")[2] or node.role
                row |= {f"{own}/{key}": value for key, value in artifact.manifest.facts.get("metrics", {}).items()}
        return [found[iteration] for iteration in sorted(found)]

    def paid(self) -> list[JudgeCosts]:
        found: dict[str, JudgeCosts] = {}
        for artifact in self.artifacts.values():
            facts = artifact.manifest.facts
            if artifact.manifest.schema != SCORES or "answers_paid" not in facts:
                continue
            name = str(facts.get("scorer"))
            line = found.setdefault(
                name, JudgeCosts(scorer=name, stages=0, answers=0, prompt_tokens=0, completion_tokens=0, cost=None)
            )
            line.stages += 1
            line.answers += facts["answers_paid"]
            line.prompt_tokens += facts.get("prompt_tokens_paid", 0)
            line.completion_tokens += facts.get("completion_tokens_paid", 0)
            if "cost" in facts:
                line.cost = (line.cost or 0.0) + facts["cost"]
        return [found[name] for name in sorted(found)]

    def ledgers(self) -> Iterable[LedgerLine]:
        for name, artifact in self.artifacts.items():
            node, ledger = self.graph.nodes[name], artifact.manifest.ledger
            yield LedgerLine(
                stage=name,
                iteration=node.iteration,
                role=node.role,
                unit=ledger.unit,
                rows_in=ledger.rows_in,
                kept=ledger.kept,
                dropped=ledger.dropped,
            )

    def facts(self) -> Iterable[dict[str, Any]]:
        """Numbers, texts and the drift from the manifests of an iteration's main stages."""
        for name, artifact in self.artifacts.items():
            node = self.graph.nodes[name]
            if node.iteration is not None and node.role in ("training", "experience", "pairs", "generation"):
                yield {
                    "stage": name,
                    "iteration": node.iteration,
                    "role": node.role,
                    **{
                        key: value
                        for key, value in artifact.manifest.facts.items()
                        if isinstance(value, int | float | str) or key in ("drift", "settings", "final")
                    },
                }

    def sets(self) -> Iterable[SampleSet]:
        for sources in self.sources():
            found = self.try_read(f"answers of {sources.name}", lambda sources=sources: self.cache.read(sources), None)
            if found is not None:
                yield found

    def sources(self) -> Iterable[SetSources]:
        """The published rollouts, each with the scores and pairs that were computed from them."""
        readers: dict[Path, list[Node]] = {}
        for node in self.graph.nodes.values():
            if node.name in self.artifacts and "rollouts" in type(node.config).model_fields:
                readers.setdefault(node.path("rollouts"), []).append(node)
        sampled = {name: it for name, it in self.artifacts.items() if it.manifest.schema == ROLLOUTS}
        roles = roles_of([self.graph.nodes[name] for name in sampled])
        for name, artifact in sampled.items():
            yield self.sources_of(self.graph.nodes[name], roles[name], artifact, readers.get(artifact.path, []))

    def sources_of(self, node: Node, role: str, rollouts: Artifact, readers: list[Node]) -> SetSources:
        sources = SetSources(node.name, role, node.iteration, rollouts)
        for reader in readers:
            output = self.artifacts[reader.name]
            if output.manifest.inputs.get("rollouts") != rollouts.manifest.digest:
                self.missing.append(f"{reader.name}: computed from other answers than {node.name} has now")
            elif output.manifest.schema == SCORES:
                kind = getattr(reader.config, "kind", None)
                if kind == "logprobs":
                    sources.reference = output
                elif kind != "values":
                    sources.scores[str(getattr(reader.config, "name", reader.role))] = output
            elif output.manifest.schema == PAIRS and "strategy" in type(reader.config).model_fields:  # not mixed
                sources.pairs, sources.strategy = output, str(getattr(reader.config, "strategy", ""))
        order = ["reward", *self.run.config.scorers]
        sources.scores = dict(
            sorted(sources.scores.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order))
        )
        sampler = self.graph.sampler(node.output)
        if sampler is not None and "policy" in type(sampler.config).model_fields:
            sources.policy = sampler.path("policy")
        return sources

    def training(self) -> Iterable[TrainingCurves]:
        """The logs of published checkpoints, and the reported steps of trainings in progress."""
        latest_of: dict[str, int] = {}
        for name in self.artifacts:
            latest_of[self.graph.nodes[name].role] = self.graph.nodes[name].iteration or 0
        for name, artifact in self.artifacts.items():
            node, file = self.graph.nodes[name], artifact.path / TRAINING_LOG
            recent = (node.iteration or 0) > latest_of[node.role] - MAX_CURVES
            if artifact.manifest.schema == CHECKPOINT and recent and file.is_file():
                read = partial(self.cache.compute_once, artifact, partial(_log_of, file))
                yield from self.curves_of(name, self.try_read(name, read, None))
        for name, points in latest(self.try_read(METRICS, lambda: read_points(self.run.path), [])).items():
            if name in self.graph.nodes and name not in self.artifacts:
                lines = ({"step": point.number, **_without_prefixes(point)} for point in points if point.unit == "step")
                yield from self.curves_of(name, downsample(lines))

    def curves_of(self, name: str, found: Curves | None) -> Iterable[TrainingCurves]:
        if found is not None and found[0]:
            node, (steps, series) = self.graph.nodes[name], found
            yield TrainingCurves(stage=name, iteration=node.iteration, role=node.role, steps=steps, series=series)

    def reward_models(self, report: RunReport) -> None:
        for name, artifact in self.artifacts.items():
            file = artifact.path / "calibration.jsonl"
            if file.is_file():
                report.calibration[name] = self.try_read(name, lambda file=file: list(read_jsonl(file, dict)), [])
                final = artifact.manifest.facts.get("final") or {}
                if isinstance(accuracy := final.get("held_out_accuracy"), int | float):
                    report.held_out_accuracy[name] = float(accuracy)


def _log_of(file: Path) -> Curves:
    return downsample(read_jsonl(file, dict))


def _without_prefixes(point: Point) -> dict[str, float]:
    """The metrics of a point without their prefixes, as in the training's log."""
    return {name.partition("/")[2]: value for name, value in point.metrics.items()}


def downsample(lines: Iterable[dict[str, Any]]) -> Curves:
    """Steps and series of a training log, as means of neighbouring steps where it has more than MAX_STEPS."""
    rows = [
        {name: value for name, value in line.items() if _is_number(value)}
        for line in lines
        if isinstance(line.get("step"), int)
    ]
    size = -(-len(rows) // MAX_STEPS) or 1
    names = sorted({name for row in rows for name in row} - {"step"})
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    steps = [float(part[len(part) // 2]["step"]) for part in parts]
    series = {name: [_mean([row[name] for row in part if name in row]) for part in parts] for name in names}
    return steps, series


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300


def _mean(values: list[float]) -> float | None:
    return float(f"{sum(values) / len(values):.5g}") if values else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _without_secrets(line: str) -> str:
    """A line of a log without tokens, for a page that may be passed on."""
    return TOKEN.sub("(hidden)", line)


def _unpublished_sentence(names: list[str], total: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} of {total} stages are not published: {shown}"


def roles_of(nodes: Iterable[Node]) -> dict[str, str]:
    """The role of each stage that publishes rollouts, by name. The rollouts that an iteration trains on have the role
    `TRAINED_ON`; with dynamic sampling or replay these are the selected ones, and the sampled ones have another."""
    found = {node.name: node.role for node in nodes}
    last = {
        node.iteration: node.name for role in SELECTED for node in nodes if node.role == role
    }  # later roles override earlier ones
    for node in nodes:
        if node.role in SELECTED:
            found[node.name] = TRAINED_ON if last[node.iteration] == node.name else BEFORE_SELECTION
    return found
