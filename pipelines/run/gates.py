"""Reads the published decisions of a run's gates."""

from collections.abc import Collection, Iterator

from annotation.gating.config import GateConfig
from annotation.gating.decision import GateDecision, published_decision
from pipelines.graph import Graph, Node


def decision_after(node: Node) -> GateDecision | None:
    """The published gate decision of a node; None if it is no gate, or has not decided or has to decide again."""
    return published_decision(node.config) if isinstance(node.config, GateConfig) else None


def decisions(graph: Graph) -> Iterator[tuple[Node, GateDecision]]:
    """All gate decisions of a run so far, in order."""
    for node in graph.nodes.values():
        if (decision := decision_after(node)) is not None:
            yield node, decision


def stop_decision(graph: Graph, reused: Collection[str] | None = None) -> GateDecision | None:
    """The decision that stopped the run, or None. With `reused`, only the decisions of these stages count."""
    stops = ((node.name, decision) for node, decision in decisions(graph) if decision.action == "stop")
    return next((decision for name, decision in stops if reused is None or name in reused), None)


def refused(graph: Graph) -> set[int]:
    """The iterations whose policies a gate that stops or rolls back has rejected; none of them is the best."""
    return {decision.iteration for _, decision in decisions(graph) if decision.refused}
