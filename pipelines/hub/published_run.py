"""Reads from a run's manifests what the cards on the Hub need."""

import functools
from collections.abc import Iterator
from typing import Any

import msgspec

from annotation.gating.decision import GateDecision
from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST
from pipelines.config.run import RunConfig
from pipelines.config.sections import HubSection
from pipelines.graph import name_of
from pipelines.run.directory import RunDirectory
from pipelines.run.metrics import best_of


def without_directories(value: Any) -> Any:
    """A value of a config with every absolute path reduced to its last part, so that no directory is published."""
    if isinstance(value, dict):
        return {name: without_directories(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_directories(inner) for inner in value]
    return value.rpartition("/")[2] if isinstance(value, str) and value.startswith("/") else value


class PublishedRun:
    """Access to the published artifacts of a run, by iteration."""

    def __init__(self, run: RunDirectory, section: HubSection) -> None:
        self.run = run
        self.section = section
        self.name = run.path.name

    @functools.cached_property
    def config(self) -> RunConfig:
        """The config of the run's last command."""
        return self.run.config

    def metrics(self, last: int) -> Iterator[dict[str, Any]]:
        """The evaluation metrics of each iteration's policy up to `last`, where they are published."""
        for iteration in range(last + 1):
            evaluation = self.find(name_of(iteration, "evaluation"))
            if evaluation is not None:
                yield evaluation.manifest.facts["metrics"]

    def gate_decision(self, iteration: int) -> GateDecision | None:
        """The decision of the gates after an iteration; None without gates, or before they have decided."""
        gate = self.find(name_of(iteration, "gate")) if self.config.gates else None
        return None if gate is None else msgspec.convert(gate.manifest.facts["gate"], GateDecision)

    def best(self, last: int) -> int:
        """The iteration with the best policy up to `last`, among those that no gate has refused."""
        decided = filter(None, (self.gate_decision(iteration) for iteration in range(1, last + 1)))
        refused = {decision.iteration for decision in decided if decision.refused}
        return int(best_of([(self.run.path, metrics) for metrics in self.metrics(last)], refused)[1]["iteration"])

    def scores_of(self, iteration: int) -> dict[str, Artifact]:
        """The scores of the rollouts that an iteration trained on, by scorer."""
        found = {}
        for name in self.config.scorers:
            artifact = self.find(name_of(iteration, f"selected/{name}" if self.selects_rollouts else name))
            if artifact is not None:
                found[name] = artifact
        return found

    @property
    def selects_rollouts(self) -> bool:
        """Whether iterations train on rollouts that dynamic sampling has selected."""
        return self.config.prompts.dynamic_sampling is not None

    @property
    def rollouts_stage(self) -> str:
        """The name, within an iteration, of the stage that publishes the rollouts it trains on."""
        return "selected/rollouts" if self.selects_rollouts else "generation"

    def stages(self, iteration: int) -> Iterator[tuple[str, Artifact]]:
        """The artifacts of an iteration in the order of its stages, each with its name within the iteration."""
        made_of_answers = ("selected/rollouts", "reference", "values", "pairs", "experience", "training")
        for name in ("generation", *self.config.scorers, *made_of_answers):
            artifact = self.find(name_of(iteration, name))
            if artifact is not None:
                yield name, artifact

    def setup(self) -> Iterator[tuple[str, Artifact]]:
        """The artifacts of the stages before the first iteration, with their names."""
        prompts = (*self.config.prompts.import_roles.values(), "prompts/heldout")
        for name in (*prompts, "setup/sft", "setup/reward-model/training"):
            artifact = self.find(name)
            if artifact is not None:
                yield name, artifact

    def find(self, name: str) -> Artifact | None:
        """The artifact of a stage; None where it has not published."""
        return self.artifact(name) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Whether a stage has published its artifact."""
        return (self.run.path / name / MANIFEST).is_file()

    def artifact(self, name: str) -> Artifact:
        """The artifact of a stage that has published one."""
        return Artifact.open(self.run.path / name)
