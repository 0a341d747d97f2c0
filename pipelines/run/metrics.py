"""Derives the metrics of iterations from published evaluations alone."""

import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from annotation.gating.decision import ranking_metric as ranking_metric
from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST
from pipelines.graph import Graph, Node

Z95 = 1.96
"""Half-width of a 95 % confidence interval in standard errors, as in evaluations."""
COLUMNS = {
    "reward_mean": "reward",
    "reward_ci95": "± 95 %",
    "gold_reward_mean": "gold reward",
    "win_rate": "win rate",
    "kl": "KL",
    "response_length": "length",
    "stop_rate": "stop rate",
}
"""Metrics of an evaluation, with their titles in tables."""


def evaluations(graph: Graph) -> list[tuple[Path, dict[str, Any]]]:
    """The published evaluations of the graph, by iteration: the policy's directory and its metrics."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for node in graph.nodes.values():
        if node.stage.name == "evaluation" and (node.output / MANIFEST).is_file():
            metrics = Artifact.open(node.output).manifest.facts["metrics"]
            found.append((policy_of(node, graph), metrics))
    return sorted(found, key=lambda item: int(item[1]["iteration"]))


def policy_of(evaluation: Node, graph: Graph) -> Path:
    """The policy that an evaluation node evaluates."""
    sampler = graph.sampler(evaluation.path("rollouts"))
    assert sampler is not None
    return sampler.path("policy")


def best_of(rows: list[tuple[Path, dict[str, Any]]], refused: Collection[int] = ()) -> tuple[Path, dict[str, Any]]:
    """The best of `evaluations` among the policies that no gate refused; the initial one never is."""
    metric = ranking_metric(rows[0][1])
    allowed = [row for row in rows if row[1]["iteration"] not in refused]
    return max(allowed or rows, key=lambda item: float(item[1][metric]))


def is_further_scorer(name: str) -> bool:
    """Whether a metric is the mean of a scorer other than `reward` and `gold`."""
    return name.endswith("_mean") and name not in COLUMNS


def mean_with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values (e.g. one difference per prompt) and half the width of its 95 % interval, which is
    infinite for a single value."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.fmean(values), Z95 * statistics.stdev(values) / math.sqrt(len(values))
