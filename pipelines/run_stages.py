"""Adds single stages to the graph of a run, with inputs that follow from the config and the graph so far."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from annotation.pairing.config import PairsSettings
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.score import SCORE
from contracts.config import Role, Section
from contracts.errors import UserError
from contracts.prompts import PromptsSettings
from contracts.seeds import derive_seed
from contracts.stages.prompts import IMPORT_PROMPTS
from contracts.template import reads_clock
from embedded.config import WORLD_FILES
from generation.config import GenerationSettings
from generation.stages.generation import GENERATION
from pipelines.config.run import RunConfig
from pipelines.config.sections import environment_key
from pipelines.environments.paths import packaged
from pipelines.graph import Graph, name_of


class RunStages:
    """Adds one stage at a time to a run's graph; every method returns the path that its stage will publish."""

    def __init__(self, config: RunConfig) -> None:
        self.run = config
        self.config = config  # the config of the iteration that is being added
        self.graph = Graph(config.run_directory.absolute())
        self.reward_model: Path | None = None  # the reward model that this run trains, if any
        self.initial_answers: Path  # the initial policy's answers to held-out prompts, once they are in the graph
        self.standards: dict[str, Path] = {}  # their scores, by the scorers' settings

    def import_prompts(self, role: str, section: PromptsSettings, exclude: list[Path] | None = None) -> Path:
        """Add the import of a set of prompts."""
        fields = section.model_dump(exclude_unset=True, exclude={"weight"})
        fields |= {"source": self.resolve(fields["source"]), "exclude": exclude or []}
        return self.graph.add(IMPORT_PROMPTS, role, fields)

    def sample(
        self,
        role: str,
        policy: Path,
        prompts: Path,
        iteration: int | None,
        section: GenerationSettings,
        window: dict[str, Any] | None = None,
    ) -> Path:
        """Add the sampling of answers to prompts."""
        fields = {
            **set_fields(section),
            **(window or {}),
            **self.rendering_fields(policy, self.config.chat_template_kwargs),
        }
        fields |= {"policy": policy, "prompts": prompts, "iteration": iteration or 0}
        fields["seed"] = derive_seed(self.config.seed, name_of(iteration, role))
        earlier = (name_of(one, role) for one in range((iteration or 0) - 1, -1, -1))
        known = (self.graph.nodes[name].output for name in earlier if name in self.graph.nodes)
        fields["lengths"] = list(itertools.islice(known, self.config.lag + 1))
        return self.graph.add(GENERATION, role, fields, iteration=iteration)

    def score(
        self, role: str, scorer: str, rollouts: Path, iteration: int | None = None, against: Path | None = None
    ) -> Path:
        """Score rollouts with a configured scorer; a pairwise one compares them with those in `against`.

        The components of a combined scorer are scored as well, in parts/NAME next to it, unless they are scored anyway.
        """
        if (known := self.graph.nodes.get(name_of(iteration, role))) is not None:  # as a component of another scorer
            return known.output
        section = self.config.scorers[scorer]
        fields = section.model_dump(exclude_unset=True, exclude={"environment"}) | {
            "rollouts": rollouts,
            "name": scorer,
        }
        for field, value in section.select(Role.INPUT).items():
            if value is not None:
                fields[field] = (
                    [self.resolve(path) for path in value] if isinstance(value, list) else self.resolve(value)
                )
        if self.reward_model is not None and scorer == self.config.trained_scorer:
            fields["model"] = self.reward_model
        if section.locates_tokens and "tokenizer" not in fields:
            fields["tokenizer"] = self.resolve(self.config.policy)  # it does not change
        if section.renders:
            fields |= self.rendering_fields(fields["model"], fields.get("chat_template_kwargs", {}))
        if section.compares and against is not None:
            fields["against"] = against
        if section.components:
            folder = role.rpartition("/")[0]
            place = Path(folder) if folder.endswith(("heldout", "parts")) else Path(folder, "parts")
            fields["scores"] = {
                part: self.score(f"{place / part}", part, rollouts, iteration, against) for part in section.components
            }
        if section.standardised:
            fields["standards"] = {part: self.initial_scores(part, iteration) for part in section.standardised}
        environment = environment_key(section.runs_in)
        return self.graph.add(SCORE, role, fields, iteration=iteration, environment=environment)

    def initial_scores(self, scorer: str, iteration: int | None) -> Path:
        """A scorer's scores of the initial policy's held-out answers, recomputed only if the scorer has changed since.

        Raises:
            UserError: there are no such answers yet.
        """
        if iteration is None:
            raise UserError(
                f"standard({scorer}) goes by the initial policy's held-out answers, which are judged after the labels "
                "of a reward model. Use zscore or rank in these instead."
            )
        scorers = repr(self.scorers_of(scorer))
        if scorers not in self.standards:
            role = f"heldout/standards/{scorer}"
            self.standards[scorers] = self.score(role, scorer, self.initial_answers, iteration, self.initial_answers)
        return self.standards[scorers]

    def scorers_of(self, scorer: str) -> dict[str, Any]:
        """The settings that determine a scorer's results in the current iteration, and those of its components, by
        name."""
        section = self.config.scorers[scorer]
        found: dict[str, Any] = {scorer: [section.select(Role.IDENTITY), section.select(Role.INPUT)]}
        for part in section.components:
            found |= self.scorers_of(part)
        return found

    def reference(self, role: str, rollouts: Path, model: Path, iteration: int, pairs: Path | None = None) -> Path:
        """Log-probabilities of rollouts under a reference model; only of the completions in `pairs`, if given."""
        fields = {"kind": "logprobs", "name": "reference", "model": model, "rollouts": rollouts, "pairs": pairs}
        return self.graph.add(SCORE, role, fields, iteration=iteration)

    def select_pairs(
        self, role: str, rollouts: Path, scores: Path, section: PairsSettings, iteration: int | None = None
    ) -> Path:
        """Add the selection of preference pairs."""
        seed = derive_seed(self.config.seed, iteration or 0, "pairs")
        fields = set_fields(section) | {"rollouts": rollouts, "scores": scores, "seed": seed}
        return self.graph.add(CHOOSE_PAIRS, role, fields, iteration=iteration)

    def rendering_fields(self, model: Path, variables: dict[str, Any]) -> dict[str, Any]:
        """The fields of a stage that renders conversations: the variables of the model's chat template, and the run's
        date if the template writes one."""
        start, _ = self.graph.origin(model)
        find = partial(_writes_date, start, variables)
        fields = {"chat_template_kwargs": variables} if variables else {}
        return (
            {**fields, "date": self.run.date} if self.graph.cached(("date", start, repr(variables)), find) else fields
        )

    def resolve(self, reference: str | Path) -> Path:
        """Resolve a path of the config: world:NAME is a file of the toy task, ratchet:NAME one that comes with Ratchet;
        other relative paths are the user's."""
        text = str(reference)
        if text.startswith("world:"):
            if text.removeprefix("world:") not in WORLD_FILES:
                raise UserError(f"{text} does not exist; the toy task has {', '.join(WORLD_FILES)}.")
            return self.graph.directory / "setup/world" / text.removeprefix("world:")
        if text.startswith("ratchet:"):
            return packaged(text.removeprefix("ratchet:"))
        return Path(text) if text.startswith("hf:") else Path(text).absolute()


def _writes_date(model: Path, variables: dict[str, Any]) -> bool | None:
    """Whether a model's chat template writes the date; None if the model does not exist yet."""
    return reads_clock(model, variables) if model.is_dir() else None


def set_fields(section: Section) -> dict[str, Any]:
    """The fields of a section that the user has set, so that the stage's own defaults apply to the others."""
    return section.model_dump(exclude_unset=True)
