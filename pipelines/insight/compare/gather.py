"""Reads runs and computes their comparison."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.config import Role
from contracts.errors import UserError
from contracts.joining import scorer_of
from contracts.manifest import MANIFEST
from contracts.nested import flatten
from contracts.records import ROLLOUTS, SCORES, Rollout, Score
from pipelines.config.changes import merge
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.insight.compare.data import Change, ComparedAnswers, Comparison, PairedComparison, Series
from pipelines.run.directory import RunDirectory
from pipelines.run.metrics import evaluations, mean_with_interval
from training.registry import check_settings

SHOWN_PROMPTS = 5
"""Number of prompts shown with their answers, for the largest gains and for the largest losses each."""
MAX_CHARACTERS = 2000
"""Characters of a prompt or an answer beyond which it is cut."""
NOT_COMPARED = ("name", "directory", "date")
"""Config keys without influence on what a run computes."""


@dataclass(frozen=True)
class Policy:
    """An evaluated policy, with its answers to the held-out prompts and their scores."""

    label: str
    rollouts: Artifact
    prompts: set[str]
    """Ids of the prompts that it has answered."""
    scorers: dict[str, Any]
    """By scorer, everything that determines its scores."""
    scores: dict[str, dict[str, float]]
    """By scorer and prompt id, the mean score of the prompt's answers."""


def compare(
    runs: list[tuple[RunDirectory, Graph]], iteration: int | None = None, damaged: dict[Path, str] | None = None
) -> Comparison:
    """Compare each run with the first, leaving out damaged runs.

    Args:
        iteration: the iteration whose policies are compared; by default the last evaluated one of each run.
        damaged: further runs, which could not be opened, with the reasons.

    Raises:
        UserError: a run has not evaluated any policy, or not that of this iteration; or all runs are damaged.
    """
    labels = _labels([run.path for run, _ in runs])
    damaged = dict(damaged or {})
    intact: dict[str, tuple[RunDirectory, list[dict[str, Any]], Policy]] = {}
    for label, (run, graph) in zip(labels, runs, strict=True):
        node = _evaluation_node(graph, iteration)
        try:
            intact[label] = run, [metrics for _, metrics in evaluations(graph)], _policy(label, node)
        except UserError as error:
            damaged[run.path] = str(error)
    if not intact:
        raise UserError("\n".join(f"{path} is damaged: {why}" for path, why in damaged.items()))
    notes = [f"{path} is damaged and left out: {why}" for path, why in damaged.items()]
    first, *others = (policy for _, _, policy in intact.values())
    paired = [found for other in others for found in _paired(first, other, notes)]
    changes = _changes([run for run, _, _ in intact.values()])
    metrics = _metrics({label: rows for label, (_, rows, _) in intact.items()})
    return Comparison(list(intact), changes, metrics, paired, notes, [str(path) for path in damaged])


def _labels(paths: list[Path]) -> list[str]:
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [f"{path.parent.name}/{path.name}" for path in paths]


def _evaluation_node(graph: Graph, iteration: int | None) -> Node:
    """The evaluation node of the policy to compare."""
    evaluated = [
        node
        for node in graph.nodes.values()
        if node.stage.name == "evaluation"
        and (node.output / MANIFEST).is_file()
        and iteration in (None, node.iteration)
    ]
    if not evaluated:
        which = "nothing" if iteration is None else f"no iteration {iteration}"
        raise UserError(f"{graph.directory} has evaluated {which} yet. Continue it with `pipeline run`.")
    return max(evaluated, key=lambda node: node.iteration or 0)


def _policy(label: str, node: Node) -> Policy:
    """Read the answers and scores behind an evaluation; UserError where an artifact is damaged."""
    paths: dict[str, Path] = node.config.scores  # type: ignore[attr-defined]
    scores = {name: Artifact.open(path, SCORES) for name, path in paths.items()}
    rollouts = Artifact.open(node.path("rollouts"), ROLLOUTS)
    return Policy(
        label=f"{label} (iteration {node.iteration})",
        rollouts=rollouts,
        prompts={row.prompt_id for row in rollouts.rows(Rollout)},
        scorers={name: scorer_of(artifact) for name, artifact in scores.items()},
        scores={name: _by_prompt(artifact) for name, artifact in scores.items()},
    )


def _by_prompt(scores: Artifact) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in scores.rows(Score):
        found.setdefault(row.prompt_id, []).append(row.score)
    return {prompt: math.fsum(values) / len(values) for prompt, values in found.items()}


def _paired(first: Policy, second: Policy, notes: list[str]) -> Iterator[PairedComparison]:
    if len(first.prompts & second.prompts) < 2:
        notes.append(f"{first.label} and {second.label} have fewer than two held-out prompts in common.")
        return
    for scorer in first.scores:
        if scorer not in second.scores:
            notes.append(f"{second.label} has no scorer {scorer}.")
            continue
        if first.scorers[scorer] != second.scorers[scorer]:
            notes.append(
                f"The scorer {scorer} is not the same in {first.label} and {second.label} (another model, function or "
                "setting), so a difference of its scores means nothing."
            )
            continue
        first_scores, second_scores = first.scores[scorer], second.scores[scorer]
        common = [prompt for prompt in first_scores if prompt in second_scores]
        if len(common) < 2:
            notes.append(f"Fewer than two prompts are scored by {scorer} in both {first.label} and {second.label}.")
            continue
        if len(common) < max(len(first_scores), len(second_scores)):
            notes.append(
                f"{len(common)} of {len(first_scores)} and {len(second_scores)} held-out prompts are scored by "
                f"{scorer} in both {first.label} and {second.label}; the others are left out."
            )
        yield _difference(
            scorer, first, second, {prompt: (first_scores[prompt], second_scores[prompt]) for prompt in common}
        )


def _difference(scorer: str, first: Policy, second: Policy, scores: dict[str, tuple[float, float]]) -> PairedComparison:
    differences = {prompt: second_score - first_score for prompt, (first_score, second_score) in scores.items()}
    values = list(differences.values())
    difference, ci95 = mean_with_interval(values)
    order = sorted(differences, key=lambda prompt: differences[prompt])
    shown = list(dict.fromkeys([*order[-SHOWN_PROMPTS:][::-1], *order[:SHOWN_PROMPTS]]))
    return PairedComparison(
        scorer=scorer,
        first=first.label,
        second=second.label,
        prompts=len(values),
        difference=difference,
        ci95=ci95,
        wins=statistics.fmean((value > 0) + 0.5 * (value == 0) for value in values),
        answers=list(_answers(first, second, shown, scores)),
    )


def _answers(
    first: Policy, second: Policy, prompts: list[str], scores: dict[str, tuple[float, float]]
) -> Iterator[ComparedAnswers]:
    rows = [
        {row.prompt_id: row for row in policy.rollouts.rows(Rollout) if row.prompt_id in scores}
        for policy in (first, second)
    ]
    for prompt in prompts:
        first_row, second_row = (found.get(prompt) for found in rows)
        if first_row is not None and second_row is not None:
            text = "\n".join(message.content or "" for message in first_row.messages)
            first_text, second_text = (row.completions[0].text[:MAX_CHARACTERS] for row in (first_row, second_row))
            yield ComparedAnswers(prompt, text[-MAX_CHARACTERS:], first_text, second_text, *scores[prompt])


def _changes(runs: list[RunDirectory]) -> list[Change]:
    settings = [_settings(run.config) for run in runs]
    rows: list[Change] = []
    for section in dict.fromkeys(name for found in settings for name in found if name not in NOT_COMPARED):
        parts = [found.get(section) for found in settings]
        if not all(isinstance(part, dict) for part in parts):  # a section that some run lacks counts as one change
            rows.append(Change(section, [_shown(part) for part in parts]))
            continue
        inner = [flatten(part, f"{section}.") for part in parts if isinstance(part, dict)]
        for name in dict.fromkeys(name for found in inner for name in found):
            rows.append(Change(name, [_shown(found.get(name)) for found in inner]))
    return [row for row in rows if len(set(row.values)) > 1]


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings that determine what a run computes, with the defaults of its algorithm."""
    found = merge(config.select(Role.IDENTITY), config.select(Role.INPUT))
    settings = check_settings(config.description, config.training.settings)
    return {**found, "training": {**found["training"], "settings": settings}}


def _shown(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _metrics(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[Series]]:
    names = dict.fromkeys(
        name
        for found in rows.values()
        for row in found
        for name, value in row.items()
        if name != "iteration" and isinstance(value, int | float)
    )
    return {
        name: [
            Series(label, [(int(row["iteration"]), row[name]) for row in found if row.get(name) is not None])
            for label, found in rows.items()
        ]
        for name in names
    }
