"""The configuration of a run: one YAML file, sections named like the stages."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from annotation.config import PairsSettings, ScorerSettings
from contracts.config import Section, identity, runtime, validate
from contracts.nested import leaves
from contracts.template import DATE, Day, Variables
from embedded.config import WorldSettings
from generation.config import GenerationSettings
from pipelines.config.changes import merge, require_changeable
from pipelines.config.executor import ExecutorSection
from pipelines.config.sections import (
    NAME,
    CriticSection,
    EnvironmentsSection,
    EvaluationSection,
    HardwareSection,
    HookSettings,
    HubSection,
    PromptsSection,
    RetentionSection,
    RewardModelSection,
)
from pipelines.environments.locked import STAGES
from tracking.config import TrackingSection
from training.config import ExperienceSettings, PolicySettings, SftSettings, require_whole_model
from training.registry import Description, check_settings, describe


class RunConfig(Section):
    """One run of iterative online RLHF."""

    name: str = runtime(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Name of the run and of its directory."""
    directory: Path = runtime(Path("runs"))
    """Directory that holds the runs."""
    iterations: int = runtime(3, ge=0)
    """Iterations to run when --iters does not say."""
    seed: int = identity(0, ge=0)
    """Every seed of the run is derived from this one."""
    policy: str = identity()
    """The policy to start from: a directory, hf:ORG/NAME[@REVISION], or world:model."""
    chat_template_kwargs: Variables = identity({})
    """Variables for the policy's chat template, for example {enable_thinking: false}, wherever it is rendered. Those
    of a scorer are its own: scorers.NAME.chat_template_kwargs."""
    date: Day = identity(None, pattern=DATE)
    """The day (2025-07-31) that chat templates write which ask for today's; by default that on which the run's
    directory was made."""
    prompts: PromptsSection = identity()
    """Training and held-out prompts (`train`, `heldout`), and how many an iteration takes (`per_iteration`)."""
    generation: GenerationSettings = identity({})
    """How answers are sampled: the keys of `python -m generation --help`."""
    scorers: dict[str, ScorerSettings] = identity()
    """Scorers by name. `reward` labels the pairs; `gold`, where there is one, only judges; others are reported."""
    pairs: PairsSettings = identity({})
    """How pairs are chosen: the keys of `python -m annotation pairs --help`."""
    training: PolicySettings = identity({})
    """How the policy is trained: the keys of `python -m training policy --help`."""
    experience: ExperienceSettings = identity({})
    """The KL penalty in the reward, for algorithms that train on samples (`kl_coefficient`, `kl_target`,
    `kl_horizon`): the keys of `python -m training experience --help`."""
    critic: CriticSection | None = identity(None)
    """How the critic is trained, for algorithms that need values, and from what (`start`): the keys of `python -m
    training critic --help`."""
    reference: Literal["initial", "previous", "ema"] = identity("initial")
    """What the training is regularised towards: the initial policy, the one that sampled this iteration, or an
    exponential moving average of all policies so far."""
    ema_decay: float = identity(0.9, ge=0, lt=1)
    """Share of the old average that is kept when a new policy enters it, for reference=ema."""
    start: Literal["previous", "initial"] = identity("previous")
    """Where the training of an iteration starts: at the last policy (warm start), or at the initial one."""
    accumulate: bool = identity(False)
    """Train on the pairs of all iterations so far, not only of this one."""
    evaluation: GenerationSettings = identity({})
    """How held-out answers are sampled; keys that are not set are those of the section `generation`."""
    evaluations: dict[Annotated[str, Field(pattern=NAME)], EvaluationSection] = identity({})
    """Evaluations of your own by names of yours, beside the one on held-out prompts, each a stage for every policy:
    {lm_eval: {function: evals.py:run}}. Their metrics are eval/NAME/..."""
    world: WorldSettings | None = identity(None)
    """Make the toy task (data and an untrained model) first; refer to its files as world:NAME."""
    sft: SftSettings | None = identity(None)
    """Fine-tune `policy` on demonstrations first; the result is the initial policy."""
    reward_model: RewardModelSection | None = identity(None)
    """Train the model of the scorer `reward` first."""
    changes: dict[int, dict[str, Any]] = identity({})
    """Values that hold from an iteration on: {3: {training: {settings: {beta: 0.05}}}}. What another section
    has taken from `generation` stays as it was there."""
    hardware: HardwareSection | None = runtime(None)
    """GPUs that this is written for ({gpus: 8, gib: 80}); --dry-run estimates memory for them where there are none."""
    environments: EnvironmentsSection = runtime(EnvironmentsSection())
    """What `generation`, `annotation` and `training` run in, where it is not their locked environment."""
    executor: ExecutorSection = runtime(ExecutorSection())
    """Where stages run (`kind`: local, slurm or inline), and how many at once (`parallel`)."""
    retention: RetentionSection = runtime(RetentionSection())
    """Whose weights stay on the disk (`keep`: all, best or "last N"), and whether rows are compressed (`compress`)."""
    hub: HubSection | None = runtime(None)
    """Where on the Hugging Face Hub it is pushed to after every iteration (`model`, `pairs`, `rollouts`: ORG/NAME)."""
    tracking: TrackingSection = runtime(TrackingSection())
    """Trackers that show the metrics while the run goes on: wandb, trackio, tensorboard, mlflow."""
    hooks: dict[Annotated[str, Field(pattern=NAME)], HookSettings] = runtime({})
    """Functions of your own by names of yours, which are told what happens: {notify: {function: hooks.py:notify}}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "reward" not in self.scorers:
            raise ValueError(f"scorers must hold `reward`, which labels the pairs; found {sorted(self.scorers)}.")
        taken = sorted({"generation", "reference"} & self.scorers.keys())
        if taken or not all(name.isidentifier() for name in self.scorers):
            raise ValueError(
                f"scorers are named {sorted(self.scorers)}; a name must be letters, digits and _, and not generation "
                "or reference, which are other stages."
            )
        if self.reward_model and self.reward_model.label not in self.scorers:
            raise ValueError(
                f"reward_model.label is {self.reward_model.label!r}, but scorers holds only {sorted(self.scorers)}."
            )
        needed = {"bradley_terry": "reward_model", "pairwise": "pairwise"}
        if self.reward_model and self.scorers["reward"].kind != needed[self.reward_model.training.kind]:
            kind = self.reward_model.training.kind
            raise ValueError(
                f"reward_model.training.kind is {kind}, but scorers.reward.kind is {self.scorers['reward'].kind}, "
                f"which reads other models. Set scorers.reward.kind={needed[kind]}."
            )
        if self.scorers["reward"].kind == "pairwise" and self.generation.k < 2:
            raise ValueError(
                f"generation.k is {self.generation.k}; scorers.reward.kind=pairwise compares the answers to a prompt "
                "with each other, so it needs at least 2."
            )
        self._check_evaluations()
        description = self.description
        check_settings(description, self.training.settings)
        require_whole_model(self.training.algorithm, "reference_model" in description.needs, self.training.parallel)
        if description.reads == "samples":
            self._check_samples(description)
        elif self.generation.k < 2:
            raise ValueError(f"generation.k is {self.generation.k}; pairs need at least 2 answers per prompt.")
        if self.pushes is not None and self.pushes.pairs is not None and description.reads == "samples":
            raise ValueError(
                f"hub.pairs is {self.pushes.pairs}, but training.algorithm={self.training.algorithm} makes no pairs. "
                "Remove it; hub.rollouts pushes the answers with their scores."
            )
        uses_world = any(str(value).startswith("world:") for value in leaves(self.model_dump()))
        if uses_world and self.world is None:
            raise ValueError("a path starts with world:, but there is no section `world`. Add one (`world: {}`).")
        return self

    def _check_evaluations(self) -> None:
        """That names of evaluations stand for one thing each, and their environments for something."""
        if taken := sorted({"generation", "reference", *self.scorers} & self.evaluations.keys()):
            raise ValueError(
                f"evaluations.{taken[0]}: eval/{taken[0]}/... are the metrics of another stage already. Choose another "
                "name."
            )
        for name, section in self.evaluations.items():
            known = [*STAGES, *self.environments.own]
            if section.environment not in known:
                raise ValueError(
                    f"evaluations.{name}.environment is {section.environment!r}, which is none of {', '.join(known)}. "
                    f"Add it: environments.own.{section.environment}."
                )

    def _check_samples(self, description: Description) -> None:
        """What an algorithm that trains on samples asks of the other sections."""
        name, sampling = self.training.algorithm, self.generation
        if (sampling.temperatures, sampling.top_p, sampling.top_k) != ([1.0], 1.0, 0):
            raise ValueError(
                f"generation samples at temperatures={sampling.temperatures}, top_p={sampling.top_p:g}, "
                f"top_k={sampling.top_k}; training.algorithm={name} trains what it sampled from, which "
                "must be the policy's own: leave these at [1.0], 1 and 0."
            )
        if description.compares_answers and sampling.k < 2:
            raise ValueError(
                f"generation.k is {sampling.k}; training.algorithm={name} compares the answers to a prompt with each "
                "other, so it needs at least 2."
            )
        if self.accumulate:
            raise ValueError(
                f"accumulate=true, but training.algorithm={name} trains on samples of the present policy; those of "
                "earlier ones are of no use to it. Only pairs accumulate."
            )
        if self.training.value_head and (self.critic or self.start == "initial"):
            raise ValueError(
                "training.value_head makes the policy its own critic, which goes on from iteration to iteration: leave "
                "the section `critic` out, and start at previous."
            )
        start = self.critic.start if self.critic else None
        if "values" in description.needs and start == "reward_model" and not self.has_reward_model:
            raise ValueError(
                f"critic.start is reward_model, but the scorer `reward` is of the kind {self.scorers['reward'].kind}. "
                "Set critic.start=policy, or a directory."
            )

    @property
    def pushes(self) -> HubSection | None:
        """The section `hub`, with the names of this run's own repos."""
        return self.hub.of(self.name) if self.hub is not None else None

    @property
    def description(self) -> Description:
        """What the algorithm's source says about it."""
        return describe(self.training.algorithm)

    @property
    def has_reward_model(self) -> bool:
        """Whether the rewards are a model's, which a critic can start from."""
        return self.scorers["reward"].kind == "reward_model"

    @property
    def run_directory(self) -> Path:
        """Where everything of this run is."""
        return self.directory / self.name

    def settings(self) -> dict[str, Any]:
        """What the user has set, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)

    def at(self, iteration: int) -> Self:
        """The configuration that holds in an iteration, by `changes`.

        Raises:
            UserError: a change is none that can be made between iterations, or its value is wrong.
        """
        data = self.model_dump(exclude_unset=True, exclude={"changes"})
        due = [start for start in sorted(self.changes) if start <= iteration]
        for start in due:
            require_changeable(self.changes[start], start)
            data = merge(data, self.changes[start])
        if not due:
            return self
        return validate(type(self), data, f"with changes.{due[-1]}")
