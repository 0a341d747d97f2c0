"""`pipeline profile`: shows the predicted durations of a run's stages, and sets up a short run to measure more."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.planning.memory import format_bytes, shorten
from pipelines.planning.prediction import Prediction, Predictor
from pipelines.planning.profiles.rows import Profile
from pipelines.text import echo

PROMPTS = 64
"""Prompts of each kind in a short run."""
STEPS = 8
"""Optimizer steps of each of its trainings but SFT."""
SFT_FACTOR = 16
"""Factor by which SFT has more steps: no pairs can be chosen from the responses of a model that has learned nothing."""


@dataclass(frozen=True)
class StagePredictions:
    """Stages that share one prediction."""

    stages: list[str]
    stage: str
    basis: str
    """The basis of the prediction; empty: there is none."""
    seconds: float | None
    error: float | None
    memory: int | None
    source: str
    short_seconds: float | None
    """The predicted seconds of one of them in a short run; None where that is not known."""

    @property
    def is_hole(self) -> bool:
        """Whether no run has measured their duration on such a device."""
        return self.basis in ("", "analytic")


def predict_stages(graph: Graph, short_graph: Graph, predictor: Predictor) -> list[StagePredictions]:
    """Predict a run's stages, and group those with the same prediction.

    Args:
        graph: the placed graph of the run.
        short_graph: the placed graph of a short run with the same config.
        predictor: predicts the stages of both.
    """
    groups: dict[tuple[str, Prediction | None], list[Node]] = {}
    for node in graph.nodes.values():
        groups.setdefault((node.stage.name, predictor.predict(node, graph)), []).append(node)
    found = []
    for (stage, prediction), nodes in groups.items():
        short_node = short_graph.nodes.get(nodes[0].name)
        short_prediction = predictor.predict(short_node, short_graph) if short_node is not None else None
        found.append(
            StagePredictions(
                stages=[node.name for node in nodes],
                stage=stage,
                basis=prediction.basis if prediction is not None else "",
                seconds=prediction.seconds if prediction is not None else None,
                error=prediction.error if prediction is not None else None,
                memory=prediction.memory if prediction is not None else None,
                source=prediction.source if prediction is not None else "the amount of its work is not known",
                short_seconds=short_prediction.seconds if short_prediction is not None else None,
            )
        )
    return found


def short_overrides(config: RunConfig, prompts: int, steps: int) -> list[str]:
    """Overrides that make a run of one iteration short: few prompts, few optimizer steps."""
    # Half as many held-out prompts: measuring two amounts shows how much of the time does not depend on the amount.
    found = [f"prompts.heldout.limit={_limited(max(1, prompts // 2), config.prompts.heldout.limit)}"]
    found.append(f"prompts.per_iteration={_limited(prompts, config.prompts.per_iteration)}")
    found.append(f"training.max_steps={_limited(steps, config.training.max_steps)}")
    if config.sft is not None:
        found.append(f"sft.max_steps={_limited(SFT_FACTOR * steps, config.sft.max_steps)}")
    if config.critic is not None:
        found.append(f"critic.max_steps={_limited(steps, config.critic.max_steps)}")
    if config.reward_model is not None:
        found.append(f"reward_model.prompts.limit={_limited(prompts, config.reward_model.prompts.limit)}")
        found.append(f"reward_model.training.max_steps={_limited(steps, config.reward_model.training.max_steps)}")
    return found


def _limited(value: int, limit: int | None) -> int:
    return value if limit is None else min(value, limit)


def with_dependencies(graph: Graph, names: Iterable[str]) -> Graph:
    """Some stages of a graph, with all their dependencies."""
    wanted: set[str] = set()
    left = [name for name in names if name in graph.nodes]
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += graph.nodes[name].needs
    return graph.with_nodes({name: node for name, node in graph.nodes.items() if name in wanted})


def print_predictions(console: Console, known: list[StagePredictions]) -> None:
    """Print the predictions as a table, and how many kinds of stages were never measured."""
    table = Table("stages", "known by", "seconds", "error", "memory", "short run")
    for group in known:
        table.add_row(
            shorten(group.stages),
            group.basis or "nothing",
            "" if group.seconds is None else f"{group.seconds:.1f}",
            "" if group.error is None else f"{group.error:.0%}",
            "" if group.memory is None else format_bytes(group.memory),
            f"{group.short_seconds:.1f} s" if group.is_hole and group.short_seconds is not None else "",
        )
    console.print(table)
    unmeasured = [group for group in known if group.is_hole]
    if not unmeasured:
        echo(console, "Runs have shown how long all of these take.")
        return
    echo(console, f"{len(unmeasured)} kinds of stages have not been run on such a device.")


def print_profiles(console: Console, profiles: list[Profile]) -> None:
    """Print stored profiles as a table."""
    table = Table("when", "stage", "of", "device", "queue", "start", "load", "compute", "hand-off", "memory")
    for row in sorted(profiles, key=lambda row: row.created):
        times = (f"{value:.1f}" for value in (row.queue, row.start, row.load, row.compute, row.handoff))
        what = " ".join(filter(None, (row.stage, row.variant)))
        peak = "" if row.memory is None else format_bytes(row.memory)
        table.add_row(row.created, what, row.role, row.device, *times, peak)
    console.print(table)


def as_json(known: list[StagePredictions], overrides: list[str]) -> str:
    """The predictions as one JSON object, with the overrides of a short run."""
    stages: list[dict[str, Any]] = [{**asdict(group), "is_hole": group.is_hole} for group in known]
    return json.dumps({"stages": stages, "short_run": overrides}, indent=1)
