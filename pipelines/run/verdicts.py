"""Predicts what a command will do with each stage, as far as that is known in advance."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from contracts.manifest import MANIFEST
from pipelines.config.run import RunConfig
from pipelines.environments.launch import probe_versions
from pipelines.graph import Graph
from pipelines.progress import tracked
from pipelines.run.decisions import decide, superseded_path
from pipelines.run.retention import stages_to_rebuild


@dataclass(frozen=True)
class Verdict:
    """Whether a stage is reused or runs, and why."""

    reuse: bool
    reason: str
    rebuild: bool = False
    """Whether it runs only because its weights were deleted and are needed."""


def reused(plan: Mapping[str, Verdict]) -> set[str]:
    """The stages that are reused."""
    return {name for name, verdict in plan.items() if verdict.reuse}


def verdicts(graph: Graph, config: RunConfig, forced: list[str]) -> dict[str, Verdict]:
    """Whether each stage is reused or runs, and why. A stage after one that runs may turn out to be reused."""
    certain: set[str] = set()
    runs: list[str] = []
    found: dict[str, Verdict] = {}
    moved: dict[str, Path] = {}  # present place of the outputs in superseded/ that would be restored

    def where(path: Path) -> Path:
        owner = graph.producer_name(path) if moved else None
        place = moved.get(owner) if owner else None
        return place / path.relative_to(graph.nodes[owner].output) if owner and place else path

    for node in tracked(graph.nodes.values(), "deciding about the stages"):
        unknown = [name for name in node.needs if name not in certain]
        sure = True
        if node.name in forced:
            verdict = Verdict(False, "forced")
        elif unknown:
            reason = f"after {', '.join(unknown)}"
            if (node.output / MANIFEST).is_file():
                sure, reason = False, f"{reason}; reused if these come out the same"
            verdict = Verdict(False, reason)
        else:
            environment = config.environments.of(node.environment)
            decision = decide(node, probe_versions(environment, node.environment), graph.directory, where)
            verdict = Verdict(decision.reuse, decision.reason)
            if decision.reuse:
                certain.add(node.name)
            if (place := superseded_path(graph.directory, node, decision.key)).exists():
                moved[node.name] = place
        if not verdict.reuse and sure:
            runs.append(node.name)
        found[node.name] = verdict
    rebuilt = stages_to_rebuild(graph, runs, where)
    return found | {name: Verdict(False, reason, rebuild=True) for name, reason in rebuilt.items()}
