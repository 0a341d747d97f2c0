"""Collects the metrics that stages report and publish into the run's metrics.jsonl.

The names of metrics are grouped by prefixes:

    train/        each optimizer step of the policy; sft/, reward-model/ and critic/ for the other trainings
    eval/         the evaluations (eval/reward_mean; eval/NAME/... for your own), and the stages that sample and score
                  responses to held-out prompts
    data/         counts and means of what was sampled, scored, chosen and dropped
    system/       seconds, rows and tokens per second of each stage
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST, Manifest
from contracts.points import KEY_LENGTH, REPORTS, Point, Report, decode_reports
from contracts.tailing import complete_lines
from pipelines.execution.attempts import decision_of
from pipelines.graph import Graph, Node, name_of
from pipelines.run.directory import RunDirectory
from pipelines.run.points import PointStream

SPEED_SUFFIX = "_per_second"
HELD_OUT_PREFIX = "held_out_"
"""Prefix of the metrics that a training measures once after its last step: they belong to the stage, not to a step."""
OWN_EVALUATIONS_PREFIX = "evaluations"
"""Prefix of the roles of the user's own evaluations."""


class Collector:
    """Collects the points of a run's stages. All its state is on the disk, so any process can continue at any time."""

    def __init__(self, run: RunDirectory, graph: Graph) -> None:
        self._run = run
        self._graph = graph
        self._stream = PointStream(run.path)
        self._read: dict[Path, int] = {}
        self._steps: dict[int, int] = {}
        self._newest = _newest_trainings(graph)

    def collect(self, stage: str) -> None:
        """Record the points that the attempts at a stage have reported since the last call."""
        self._stream.record(list(self._reported(self._graph.nodes[stage])))

    def finish(self, stage: str) -> None:
        """Record the points that a stage has reported and, once it has published, those of its manifest."""
        node = self._graph.nodes[stage]
        if not (node.output / MANIFEST).is_file():
            self.collect(stage)
            return
        manifest = Artifact.open(node.output).manifest
        if (stage, manifest.key[:KEY_LENGTH], "stage", 0) in self._stream.known:
            return
        points = list(self._reported(node, manifest.key))
        if node.stage.step_log:
            points += self._logged(node, manifest.key)
        time = (node.output / MANIFEST).stat().st_mtime
        summary = Report("stage", 0, round(time, 3), {})
        self._stream.record([*points, self._point(node, manifest.key, summary, dict(_published(node, manifest)))])

    def _reported(self, node: Node, published: str | None = None) -> Iterator[Point]:
        """The reported points that were not read yet.

        An attempt that streams from another stage does not know its stage key while it runs; its points are read once
        the stage has published.

        Args:
            published: the stage key of the published artifact; None: the stage has not published.
        """
        attempts = self._run.attempts(node.name)
        last = decision_of(attempts[-1]) if attempts else None
        for attempt in attempts:
            decision = decision_of(attempt)
            if decision is not None and decision.follows:
                if published is None or last is None or last.hidden_key != decision.hidden_key:
                    continue
                decision = replace(decision, key=published)
            for file in sorted(attempt.rglob(REPORTS)):
                begin = self._read.get(file, 0)
                whole = complete_lines(file, begin) if file.stat().st_size > begin else b""
                if not whole:
                    continue
                self._read[file] = begin + len(whole)
                if decision is None:  # the attempt's logs are damaged
                    continue
                for report in decode_reports(whole):
                    yield self._point(node, decision.key, report, _with_prefixes(node, report.metrics))

    def _logged(self, node: Node, key: str) -> Iterator[Point]:
        """The points of a published training log: those that were reported, also where an attempt's logs were lost."""
        time = (node.output / MANIFEST).stat().st_mtime
        log = node.output / node.stage.step_log
        for line in log.read_bytes().splitlines() if log.exists() else ():  # `verify` reports a lost one
            found = msgspec.json.decode(line, type=dict[str, float])
            metrics = {name: value for name, value in found.items() if not name.startswith(HELD_OUT_PREFIX)}
            yield self._point(
                node, key, Report("step", int(metrics["step"]), round(time, 3), metrics), _with_prefixes(node, metrics)
            )

    def _point(self, node: Node, key: str, report: Report, metrics: Mapping[str, float]) -> Point:
        done = self._steps_of(node)
        is_step_of_policy = report.unit == "step" and group_of(node) == "train"
        if group_of(node) == "train" and report.unit == "stage":
            done = self._steps_until(node.iteration or 0)
        return Point(
            point=0,
            time=report.time,
            stage=node.name,
            key=key[:KEY_LENGTH],
            unit=report.unit,
            number=report.number,
            iteration=node.iteration or 0,
            global_step=done + report.number if is_step_of_policy else done,
            metrics=dict(metrics),
        )

    def _steps_of(self, node: Node) -> int:
        """Total optimizer steps of the newest policy that a stage depends on."""
        return self._steps_until(self._newest[node.name])

    def _steps_until(self, iteration: int) -> int:
        """Total optimizer steps of the policy at the end of an iteration's training."""
        if iteration < 1:
            return 0
        if iteration not in self._steps:
            training = self._graph.nodes.get(name_of(iteration, "training"))
            if training is None or not (training.output / MANIFEST).is_file():
                return self._steps_until(iteration - 1)
            own = int(Artifact.open(training.output).manifest.facts.get("steps", 0))
            self._steps[iteration] = self._steps_until(iteration - 1) + own
        return self._steps[iteration]


def _newest_trainings(graph: Graph) -> dict[str, int]:
    """By stage, the last iteration whose training it depends on; 0 for none."""
    found: dict[str, int] = {}
    for node in graph.nodes.values():
        needed = [graph.nodes[name] for name in node.needs]
        own = (one.iteration or 0 if one.role == "training" else found[one.name] for one in needed)
        found[node.name] = max(own, default=0)
    return found


def group_of(node: Node) -> str:
    """The prefix of a stage's metrics."""
    role = _short(node.role)
    if node.workload == "training":
        return "train" if role == "training" else role
    if role == "evaluation":
        return "eval"
    folder, _, name = role.rpartition("/")
    return f"eval/{name}" if folder in ("heldout", OWN_EVALUATIONS_PREFIX) else f"data/{role}"


def _short(role: str) -> str:
    return role.removeprefix("setup/").removesuffix("/training")


def _with_prefixes(node: Node, metrics: Mapping[str, float]) -> dict[str, float]:
    system = f"system/{node.role}"
    return {
        f"{system if name.endswith(SPEED_SUFFIX) else group_of(node)}/{name}": value
        for name, value in metrics.items()
        if name != "step"
    }


def _published(node: Node, manifest: Manifest) -> Iterator[tuple[str, float]]:
    """The metrics of a stage as a whole, from its manifest."""
    group, system = group_of(node), f"system/{node.role}"
    own = node.role.startswith(f"{OWN_EVALUATIONS_PREFIX}/")
    for name, value in manifest.facts.get("metrics", {}).items():
        if _is_number(value) and name != "iteration":
            yield f"{group}/{name}", value
    if node.workload == "training":
        for name, value in manifest.facts.get("final", {}).items():
            if name.startswith(HELD_OUT_PREFIX):
                yield f"{group}/{name}", value
    else:
        for name, value in manifest.facts.items():
            if _is_number(value) and not name.endswith("_id"):
                yield f"{group}/{name}", value
    rows = f"data/{_short(node.role)}" if node.workload == "training" or group == "eval" or own else group
    yield f"{rows}/kept_{manifest.ledger.unit}", manifest.ledger.kept
    for reason, count in manifest.ledger.dropped.items():
        yield f"{rows}/dropped_{reason}", count
    for name, value in manifest.seconds.items():
        yield f"{system}/{name}_seconds", value
    tokens = manifest.facts.get("response_tokens", manifest.facts.get("tokens"))
    if tokens and manifest.seconds.get("compute"):
        yield f"{system}/tokens{SPEED_SUFFIX}", tokens / manifest.seconds["compute"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
