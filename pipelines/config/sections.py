"""Defines the sections of a run's config that are not a stage's own settings."""

import re
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from annotation.config import CheckpointEvaluationSettings
from annotation.data.mixing import PreferenceSettings
from annotation.gating.config import GateSettings
from annotation.pairing.config import PairsSettings
from contracts.config import PathText, Section, described_pattern, identity, runtime
from contracts.mixture import CurriculumSettings
from contracts.prompts import PromptsSettings
from generation.config import GenerationSettings
from pipelines.environments.launch import OWN, EnvironmentConfig
from pipelines.environments.locked import NAMES, STAGES
from training.config import CriticSettings, RewardSettings

NAME = described_pattern("^[A-Za-z][A-Za-z0-9_-]{0,49}$", "a letter, then letters, digits, _ and -, at most 50 in all")
"""The pattern of names that users choose, of hooks, gates, evaluations and environments."""


class MixedPromptsSettings(PromptsSettings):
    """One of several sets of training prompts."""

    weight: float = identity(1.0, gt=0)
    """Weight of this set in an iteration's prompts, relative to those of the others."""


class DynamicSamplingSection(Section):
    """Replaces prompts whose responses give no training signal."""

    rounds: int = identity(2, ge=1, le=20)
    """Maximum number of further draws in an iteration. Prompts that are still missing then are left out."""
    margin: float = identity(0.0, ge=0)
    """Minimum difference between the best and the worst score of a prompt's responses; with 0 any difference counts."""


class PromptsSection(Section):
    """Where the prompts come from. No stage trains on the held-out ones."""

    train: PromptsSettings | None = identity(None)
    """Training prompts."""
    mixture: dict[Annotated[str, Field(pattern=NAME)], MixedPromptsSettings] | None = identity(None, min_length=1)
    """Several sets of training prompts instead of `train`, by name, each with a share of every iteration: {maths:
    {source: maths.jsonl, weight: 2}, chat: {source: hf:ORG/NAME}}. docs/data.md."""
    heldout: PromptsSettings = identity()
    """Held-out prompts, for evaluation."""
    per_iteration: int | None = identity(None, ge=1)
    """Prompts per iteration, taken in order from the training prompts; all of them by default."""
    curriculum: CurriculumSettings | None = identity(None)
    """Repeat prompts that were neither too hard nor too easy in earlier iterations, by their scores."""

    dynamic_sampling: DynamicSamplingSection | None = identity(None)
    """Replace prompts whose responses all score the same by further ones: {rounds: 2}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.train is None) == (self.mixture is None):
            raise ValueError(
                "the training prompts are either one set (`train`) or several (`mixture`), "
                f"{'and here are neither' if self.train is None else 'not both'}. Set one of the two."
            )
        for name, is_set in (
            ("mixture", self.mixture),
            ("curriculum", self.curriculum),
            ("dynamic_sampling", self.dynamic_sampling),
        ):
            if is_set is not None and self.per_iteration is None:
                raise ValueError(
                    f"with {name} the prompts of each iteration are drawn, but per_iteration does not say how many. "
                    "Set it, for example to 512."
                )
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether each iteration draws its prompts, instead of taking the next ones of one set."""
        return any(section is not None for section in (self.mixture, self.curriculum, self.dynamic_sampling))

    @property
    def import_roles(self) -> dict[str, str]:
        """The role of each set's import in the graph."""
        return {name: "prompts/train" + (f"/{name}" if self.mixture else "") for name in self.sources}

    @property
    def sources(self) -> dict[str, PromptsSettings]:
        """The sets of training prompts by name; a single one is named train."""
        return {**self.mixture} if self.train is None and self.mixture else {"train": cast(PromptsSettings, self.train)}


class ReplaySection(Section):
    """Data of earlier iterations to train on as well."""

    iterations: int | None = identity(None, ge=1)
    """Number of earlier iterations; all by default."""
    decay: float = identity(0.5, gt=0, le=1)
    """Share of the pairs of the previous iteration (or of its prompts with their samples). From the iteration n before,
    this to the power of n is taken. 1 takes all of them."""

    def share(self, age: int) -> float:
        """The share that is taken from the iteration `age` iterations ago."""
        return self.decay**age


class OfflineSection(PreferenceSettings):
    """Offline preference pairs that every iteration trains on in addition to its own."""

    share: float = identity(0.25, gt=0, lt=1)
    """Share of offline pairs among the training pairs of an iteration; they are drawn again for each iteration."""


class RewardModelSection(Section):
    """Train the reward model first, on responses of the initial policy labelled by another scorer."""

    prompts: PromptsSettings = identity()
    """Prompts whose responses are compared."""
    label: str = identity("gold")
    """Scorer that labels which response is better."""
    generation: GenerationSettings = identity({})
    """How the responses are sampled; unset keys are those of the section `generation`."""
    pairs: PairsSettings = identity({})
    """How the pairs are selected."""
    training: RewardSettings = identity({})
    """How the reward model is trained."""


class CriticSection(CriticSettings):
    """Train a critic in parallel with the policy, for algorithms that need values."""

    start: PathText | None = identity(None)
    """Initialization of the first critic: reward_model (the model of the scorer `reward`), policy (the initial policy
    with a zero-initialized head), or a directory or hf:ORG/NAME of a classifier with one label and the policy's
    tokenizer. By default the reward model if there is one, else the policy."""


class EnvironmentsSection(Section):
    """The environment of each kind of stage; by default the locked one of `pipeline env sync`."""

    generation: EnvironmentConfig = runtime(EnvironmentConfig())
    """Environment of `python -m generation`."""
    annotation: EnvironmentConfig = runtime(EnvironmentConfig())
    """Environment of `python -m annotation` and `python -m contracts`."""
    training: EnvironmentConfig = runtime(EnvironmentConfig())
    """Environment of `python -m training` and `python -m embedded`."""
    tracking: EnvironmentConfig = runtime(EnvironmentConfig())
    """Environment of the processes that send metrics to trackers."""
    own: dict[Annotated[str, Field(pattern=NAME)], EnvironmentConfig] = runtime({})
    """Your own environments, by name, for `scorers` and `evaluations`: {lm-eval: {conda: lm-eval}}."""

    @field_validator("own")
    @classmethod
    def _check_own(cls, value: dict[str, EnvironmentConfig]) -> dict[str, EnvironmentConfig]:
        for name, environment in value.items():
            if name in NAMES:
                raise ValueError(f"{name} is an environment already. Choose another name.")
            if not (environment.python or environment.conda or environment.container):
                raise ValueError(f"{name} has no python, conda or container; your own environment needs one of them.")
        return value

    def of(self, name: str) -> EnvironmentConfig:
        """An environment by its key: training, or own.NAME."""
        if name.startswith(OWN):
            return self.own[name.removeprefix(OWN)]
        found: EnvironmentConfig = getattr(self, name)
        return found


class RetentionSection(Section):
    """What stays on disk during a run; docs/concepts.md says what is never deleted."""

    keep: str = runtime("all")
    """Whose weights stay: all; best, of the checkpoints so far; or "last N". Weights that are still needed always
    stay."""
    compress: bool = runtime(False)
    """Compress the rollouts and scores of finished iterations."""

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch("all|best|last [1-9][0-9]*", value):
            raise ValueError('it must be all, best, or "last N" with a number from 1 on, for example "last 3".')
        return value


HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")


RUN_NAME = "{name}"
"""Placeholder for the run's name in the name of a repo."""


class HubSection(Section):
    """What is pushed to the Hugging Face Hub after every iteration, and to which repos. Missing repos are created."""

    model: str | None = runtime(None)
    """Repo (ORG/NAME) for the checkpoints: a commit and a tag iteration-N for each iteration. {name} in it stands for
    the run's name."""
    pairs: str | None = runtime(None)
    """Data set (ORG/NAME) for the preference pairs: a split iteration_N for each iteration."""
    rollouts: str | None = runtime(None)
    """Data set (ORG/NAME) for all responses with their scores: a split iteration_N for each iteration."""
    report: bool = runtime(True)
    """Push the run's report, when the run has ended, to the first of these repos that is set."""
    private: bool = runtime(True)
    """Whether new repos are private."""
    patience_seconds: float = runtime(600.0, ge=0)
    """How long a push is retried, while the Hub is unreachable or overloaded, before that is reported."""
    wait_seconds: float = runtime(600.0, ge=0)
    """How long a finished run waits for pending uploads."""

    @field_validator("model", "pairs", "rollouts")
    @classmethod
    def _check_id(cls, value: str | None) -> str | None:
        tried = (value or "a/b").replace(RUN_NAME, "run")
        if not HUB_ID.fullmatch(tried) or tried.endswith((".git", "-", ".")):
            raise ValueError(
                f"{value!r} is not a valid name of a repo on the Hub. Write it ORG/NAME, for example alice/mine."
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pairs is not None and self.pairs == self.rollouts:
            raise ValueError(f"pairs and rollouts are both {self.pairs}; each needs a repo of its own.")
        return self

    def of(self, run: str) -> "HubSection":
        """Copy the section with a run's name in the names of the repos."""
        return HubSection(
            **{
                key: value.replace(RUN_NAME, run) if isinstance(value, str) else value
                for key, value in self.model_dump(exclude_unset=True).items()
            }
        )


class HookSettings(Section):
    """The user's own function, called when something happens in the run. It cannot affect the run."""

    function: PathText = runtime()
    """file.py:function or package.module:function, called as function(happening, run, **settings): what happened, as
    plain data, and the run's directory. It runs in the driver's own Python."""
    kinds: list[Literal["run", "iteration", "stage", "step", "shard"]] = runtime(
        ["run", "iteration", "stage"], min_length=1
    )
    """The events that it is called for: of the run (started, finished, failed, stopped, interrupted, cancelled), of
    every iteration whose policy is evaluated, of stages (started, published, failed), of optimizer steps, of shards of
    rows."""
    settings: dict[str, Any] = runtime({})
    """Further keyword arguments of the function."""
    grace_seconds: float = runtime(60.0, ge=0)
    """How long a command waits at its end for the function to return. The next command makes the remaining calls."""


class EvaluationSection(CheckpointEvaluationSettings):
    """An evaluation of every policy by the user's own function, as a stage that publishes the metrics."""

    environment: str = runtime("annotation")
    """The environment that it runs in: annotation, generation or training, or the name of one in environments.own."""
    every: int = runtime(1, ge=1)
    """Evaluate the initial policy, and every this many iterations."""

    @property
    def environment_key(self) -> str:
        """The key of the environment in the section `environments`."""
        return environment_key(self.environment)


def environment_key(name: str) -> str:
    """The key in `environments` of an environment that a scorer or an evaluation names."""
    return name if name in STAGES else f"{OWN}{name}"


class GateSection(GateSettings):
    """A condition on a held-out metric, its action, and the changes of a rollback."""

    changes: dict[str, Any] = identity({})
    """Values that apply after a rollback, as in the run's `changes`: {training: {settings: {beta: 0.3}}}."""

    @model_validator(mode="after")
    def _check_changes(self) -> Self:
        if self.changes and self.do != "rollback":
            raise ValueError(f"changes are made by do=rollback, and do is {self.do}.")
        return self


class HardwareSection(Section):
    """The hardware that a configuration is written for."""

    gpus: int = runtime(ge=1)
    """GPUs per machine."""
    gib: float = runtime(gt=0)
    """Memory of each GPU, in GiB."""
