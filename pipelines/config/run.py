"""The configuration of a run: one YAML file, sections named like the stages."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from pydantic import create_model, field_validator, model_validator

from annotation.config import PairsConfig, ScoreConfig
from contracts.config import Section, StageConfig, apply_overrides, identity, read_yaml, runtime, validate
from contracts.errors import UserError
from contracts.prompts import PromptsConfig
from contracts.template import DATE, ChatFields, Day, Variables
from embedded.config import WorldConfig
from generation.config import GenerationConfig
from pipelines.config.executor import ExecutorSection
from pipelines.environments.launch import EnvironmentConfig
from training.catalogue import Description, check_settings, describe
from training.config import CriticConfig, ExperienceConfig, PolicyConfig, RewardConfig, SftConfig, require_whole_model


def _section(stage: type[StageConfig], *owned: str) -> Any:
    """A stage's config without the fields that the driver fills in: `output`, inputs, the iteration, the seed."""
    fields: dict[str, Any] = {
        name: (field.annotation, field)
        for name, field in stage.model_fields.items()
        if name not in {"output", "seed", "iteration", *owned}
    }
    name = stage.__name__.removesuffix("Config") + "Section"
    return create_model(name, __base__=Section, __doc__=stage.__doc__, **fields)


if TYPE_CHECKING:  # made at run time below, which a type checker cannot follow
    WorldSection: TypeAlias = Any
    PromptSourceSection: TypeAlias = Any
    GenerationSection: TypeAlias = Any
    ScorerSection: TypeAlias = Any
    PairsSection: TypeAlias = Any
    SftSection: TypeAlias = Any
    RewardSection: TypeAlias = Any
    PolicySection: TypeAlias = Any
    ExperienceSection: TypeAlias = Any
    CriticFields: TypeAlias = Any
else:
    WorldSection = _section(WorldConfig)
    PromptSourceSection = _section(PromptsConfig, "exclude")
    GenerationSection = _section(GenerationConfig, "policy", "prompts", "start", "count", *ChatFields.model_fields)
    ScorerSection = _section(ScoreConfig, "rollouts", "pairs", "name", "against", "date")
    PairsSection = _section(PairsConfig, "rollouts", "scores")
    SftSection = _section(SftConfig, "model", *ChatFields.model_fields)
    RewardSection = _section(RewardConfig, "model", "pairs", *ChatFields.model_fields)
    PolicySection = _section(PolicyConfig, "model", "pairs", "reference", "reference_model", "experience")
    ExperienceSection = _section(
        ExperienceConfig, "algorithm", "settings", "inputs", "rollouts", "rewards", "reference", "values", "greedy",
        "greedy_rollouts", "previous",
    )  # fmt: skip
    CriticFields = _section(CriticConfig, "model", "experience")


DEFAULT_ALGORITHM = PolicyConfig.model_fields["algorithm"].default
CHANGEABLE = frozenset(
    "accumulate critic ema_decay evaluation experience generation pairs prompts reference scorers seed start "
    "training".split()
)
"""Keys of a run whose value may change from one iteration to the next."""


class PromptsSection(Section):
    """Where the prompts come from. No stage trains on the held-out ones."""

    train: PromptSourceSection = identity()
    """Prompts to learn from."""
    heldout: PromptSourceSection = identity()
    """Prompts to judge by."""
    per_iteration: int | None = identity(None, ge=1)
    """Prompts per iteration, taken in turn from the training prompts; all of them by default."""


class RewardModelSection(Section):
    """Train the reward model first, on answers of the initial policy that another scorer labels."""

    prompts: PromptSourceSection = identity()
    """Prompts whose answers are compared."""
    label: str = identity("gold")
    """Scorer that says which answer is better."""
    generation: GenerationSection = identity({})
    """How the answers are sampled; keys that are not set are those of the section `generation`."""
    pairs: PairsSection = identity({})
    """How the pairs are chosen."""
    training: RewardSection = identity({})
    """How the reward model is trained."""


class CriticSection(CriticFields):
    """Train a critic beside the policy, for algorithms that need values."""

    start: str | None = identity(None)
    """What the first critic is: reward_model (the model of the scorer `reward`), policy (the initial policy with a head
    that says 0), or a directory or hf:ORG/NAME of a classifier with one label and the policy's tokenizer. By default
    the reward model if there is one, else the policy."""


class EnvironmentsSection(Section):
    """What each kind of stage runs in; by default the locked environment of `pipeline env sync`."""

    generation: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m generation`."""
    annotation: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m annotation` and `python -m contracts`."""
    training: EnvironmentConfig = runtime(EnvironmentConfig())
    """For `python -m training` and `python -m embedded`."""


class RetentionSection(Section):
    """What stays on the disk while the run goes on; docs/concepts.md says what is never deleted."""

    keep: str = runtime("all")
    """Whose weights stay: all; best, of the checkpoints so far; or "last N". What is still needed stays in any case."""
    compress: bool = runtime(False)
    """Keep the rollouts and scores of finished iterations compressed."""

    @field_validator("keep", mode="before")
    @classmethod
    def _check_keep(cls, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch("all|best|last [1-9][0-9]*", value):
            raise ValueError('it must be all, best, or "last N" with a number from 1 on, for example "last 3".')
        return value


class HardwareSection(Section):
    """What a configuration is written for."""

    gpus: int = runtime(ge=1)
    """GPUs of one machine."""
    gib: float = runtime(gt=0)
    """Memory of each, in GiB."""


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
    generation: GenerationSection = identity({})
    """How answers are sampled: the keys of `python -m generation --help`."""
    scorers: dict[str, ScorerSection] = identity()
    """Scorers by name. `reward` labels the pairs; `gold`, where there is one, only judges; others are reported."""
    pairs: PairsSection = identity({})
    """How pairs are chosen: the keys of `python -m annotation pairs --help`."""
    training: PolicySection = identity({})
    """How the policy is trained: the keys of `python -m training policy --help`."""
    experience: ExperienceSection = identity({})
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
    evaluation: GenerationSection = identity({})
    """How held-out answers are sampled; keys that are not set are those of the section `generation`."""
    world: WorldSection | None = identity(None)
    """Make the embedded world (data and an untrained model) first; refer to its files as world:NAME."""
    sft: SftSection | None = identity(None)
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
        description = self.description
        check_settings(description, self.training.settings)
        require_whole_model(self.training.algorithm, "reference_model" in description.needs, self.training.parallel)
        if description.reads == "samples":
            self._check_samples(description)
        elif self.generation.k < 2:
            raise ValueError(f"generation.k is {self.generation.k}; pairs need at least 2 answers per prompt.")
        uses_world = any(str(value).startswith("world:") for value in _leaves(self.model_dump()))
        if uses_world and self.world is None:
            raise ValueError("a path starts with world:, but there is no section `world`. Add one (`world: {}`).")
        return self

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
    def description(self) -> Description:
        """What the algorithm's source says about it."""
        return describe(self.training.algorithm)

    @property
    def has_reward_model(self) -> bool:
        """Whether the rewards are a model's, which a critic can start from."""
        return bool(self.scorers["reward"].kind == "reward_model")

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

    def with_inherited(self) -> Self:
        """The same, with what sections take from others filled in: the sampling keys of `generation`, `hardware`."""
        changes: dict[str, Any] = {"evaluation": _inherit(self.generation, self.evaluation)}
        if self.reward_model is not None:
            generation = _inherit(self.generation, self.reward_model.generation)
            changes["reward_model"] = self.reward_model.model_copy(update={"generation": generation})
        if self.executor.uses_slurm and self.hardware is not None and self.executor.slurm.gpus is None:
            slurm = self.executor.slurm.model_copy(update={"gpus": self.hardware.gpus})
            changes["executor"] = self.executor.model_copy(update={"slurm": slurm})
        return self.model_copy(update=changes)


def _inherit(base: Section, section: Section) -> Section:
    """`base` with the keys that the user set in `section`."""
    return base.model_copy(update={name: getattr(section, name) for name in section.model_fields_set})


def refuse_unused(configs: list[RunConfig]) -> None:
    """Raise UserError where something is set that no iteration reads."""
    descriptions = [config.description for config in configs]
    algorithms = ", ".join(dict.fromkeys(description.algorithm for description in descriptions))
    for name, default, used, by in (
        ("pairs", PairsSection(), any(it.reads == "pairs" for it in descriptions), "train on pairs"),
        ("experience", ExperienceSection(), any(it.reads == "samples" for it in descriptions), "train on samples"),
        ("critic", None, any("values" in it.needs for it in descriptions), "need a critic"),
        ("reference", "initial", any(it.needs_reference for it in descriptions), "need a reference policy"),
    ):
        if not used and any(getattr(config, name) != default for config in configs):
            raise UserError(
                f"`{name}` is for algorithms that {by}, but training.algorithm is {algorithms}. Take it "
                "out, or choose another algorithm."
            )


def require_changeable(change: dict[str, Any], iteration: int) -> None:
    """Raise UserError unless these keys may change from `iteration` on."""
    fixed = {name for name in change if name not in CHANGEABLE}
    prompts = change.get("prompts", {})
    fixed |= {f"prompts.{name}" for name in prompts if name != "per_iteration"} if isinstance(prompts, dict) else set()
    critic = change.get("critic")
    fixed |= {"critic.start"} if isinstance(critic, dict) and "start" in critic else set()
    if iteration < 1 or fixed:
        named = f"{min(fixed)} cannot change" if fixed else "nothing can change before iteration 1"
        raise UserError(
            f"changes.{iteration}: {named} within a run. What can: {', '.join(sorted(CHANGEABLE))}, of prompts only "
            "prompts.per_iteration, from iteration 1 on. For anything else start a new run with another name."
        )


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `change`, section by section; another algorithm comes without the settings before."""
    merged = dict(base)
    if "algorithm" in change and change["algorithm"] != base.get("algorithm", DEFAULT_ALGORITHM):
        merged.pop("settings", None)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def load_run_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read, override and validate a run's configuration.

    Raises:
        UserError: anything is wrong with it; lists every mistake.
    """
    config = validate(RunConfig, _overridden(read_yaml(path), overrides), str(path)).with_inherited()
    refuse_unused([config, *(config.at(iteration) for iteration in config.changes)])
    parent = _existing_parent(config.directory)
    if not parent.is_dir():
        raise UserError(f"directory {config.directory} cannot be made: {parent} is no directory. Set directory=PATH.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"directory {config.directory} cannot be written to. Set directory=PATH.")
    return config


def _overridden(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A file's data with the overrides; another algorithm does not take over the settings that the file has.

    `executor=KIND` leaves the rest of the file's section as it is.
    """
    overrides = [re.sub("^executor=(?=[a-z]+$)", "executor.kind=", text) for text in overrides]
    if isinstance(data.get("executor"), str):
        data = {**data, "executor": {"kind": data["executor"]}}
    training = data.get("training")
    wanted = apply_overrides({}, [text for text in overrides if text.startswith("training.algorithm=")])
    if isinstance(training, dict) and wanted:
        data = {**data, "training": merge(training, wanted["training"])}
    return apply_overrides(data, overrides)


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
