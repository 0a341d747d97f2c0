"""What the gates of a run have decided, from what is published."""

from collections.abc import Collection, Iterator

from annotation.gating.config import GateConfig
from annotation.gating.decision import GateDecision, published_decision
from pipelines.graph import Graph, Node


def decision_after(node: Node) -> GateDecision | None:
    """What a stage that decides by gates has published; None for any other, and for one that is to decide anew."""
    return published_decision(node.config) if isinstance(node.config, GateConfig) else None


def decisions(graph: Graph) -> Iterator[tuple[Node, GateDecision]]:
    """All decisions of a run so far, in order."""
    for node in graph.nodes.values():
        if (decision := decision_after(node)) is not None:
            yield node, decision


def stop_of(graph: Graph, reused: Collection[str] | None = None) -> GateDecision | None:
    """The decision that has stopped a run, if one has; of the stages `reused`, where some are to be made anew."""
    stops = ((node.name, decision) for node, decision in decisions(graph) if decision.action == "stop")
    return next((decision for name, decision in stops if reused is None or name in reused), None)


def refused(graph: Graph) -> set[int]:
    """The iterations whose policies a gate holds for that stops or rolls back: none of them is the best."""
    return {decision.iteration for _, decision in decisions(graph) if decision.refused}
