"""Defines the config of a run: one YAML file, with sections named like the stages."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from annotation.pairing.config import PairsSettings
from annotation.scorers import SETTINGS, AnyScorer
from annotation.scorers.expression import ANSWER_NAMES, cycle_in
from contracts.config import PathText, Section, described_pattern, identity, runtime, validate
from contracts.nested import leaves
from contracts.template import DATE, Day, Variables
from embedded.config import WorldSettings
from generation.config import GenerationSettings
from pipelines.config.changes import merge, require_changeable
from pipelines.config.executor import ExecutorSection
from pipelines.config.placement import PlacementSection
from pipelines.config.sections import (
    NAME,
    CriticSection,
    EnvironmentsSection,
    EvaluationSection,
    GateSection,
    HardwareSection,
    HookSettings,
    HubSection,
    OfflineSection,
    PromptsSection,
    ReplaySection,
    RetentionSection,
    RewardModelSection,
)
from pipelines.environments.locked import STAGES
from tracking.config import TrackingSection
from training.config import ExperienceSettings, PolicySettings, SftSettings, require_correctable, require_whole_model
from training.registry import BUILT_IN, Description, check_settings, describe

RUN = described_pattern(
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", "a letter or a digit, then also ., _ and -, at most 100 in all"
)


class RunConfig(Section):
    """One run of iterative online RLHF."""

    name: str = runtime(pattern=RUN)
    """Name of the run and of its directory."""
    directory: Path = runtime(Path("runs"))
    """Directory of the runs."""
    iterations: int = runtime(3, ge=0)
    """Number of iterations, unless --iters sets it."""
    seed: int = identity(0, ge=0)
    """Every seed of the run is derived from this one."""
    policy: PathText = identity()
    """The policy to start from: a directory, hf:ORG/NAME[@REVISION], or world:model."""
    chat_template_kwargs: Variables = identity({})
    """Variables for the policy's chat template, for example {enable_thinking: false}, wherever it is rendered. Those
    of a scorer are its own: scorers.NAME.chat_template_kwargs."""
    date: Day = identity(None, pattern=DATE)
    """The date (2025-07-31) for chat templates that write today's; by default the day the run's directory was
    created."""
    prompts: PromptsSection = identity()
    """Training and held-out prompts (`train`, `heldout`), and the number per iteration (`per_iteration`)."""
    generation: GenerationSettings = identity({})
    """How responses are sampled: the keys of `python -m generation --help`."""
    scorers: dict[str, AnyScorer] = identity()
    """Scorers by name. `reward` labels the pairs; `gold`, if there is one, only evaluates; others are reported."""
    pairs: PairsSettings = identity({})
    """How pairs are selected: the keys of `python -m annotation pairs --help`."""
    training: PolicySettings = identity({})
    """How the policy is trained: the keys of `python -m training policy --help`."""
    experience: ExperienceSettings = identity({})
    """The KL penalty in the reward, for algorithms that train on samples (`kl_coefficient`, `kl_target`,
    `kl_horizon`): the keys of `python -m training experience --help`."""
    critic: CriticSection | None = identity(None)
    """How the critic is trained, for algorithms that need values, and its initialization (`start`): the keys of `python
    -m training critic --help`."""
    reference: Literal["initial", "previous", "ema"] = identity("initial")
    """The reference model: the initial policy, the previous one (which with lag=0 is the one that sampled), or an
    exponential moving average of all policies so far."""
    ema_decay: float = identity(0.9, ge=0, lt=1)
    """Decay of the moving average (the share of the old average that is kept), for reference=ema."""
    start: Literal["previous", "initial"] = identity("previous")
    """Where the training of an iteration starts: from the last policy (warm start), or from the initial one."""
    lag: int = identity(0, ge=0)
    """How many policies behind the last one an iteration samples from: iteration i from policy i - 1 - lag, or from the
    initial one. With 1 it samples while the previous iteration is still training; docs/lag.md."""
    accumulate: bool = identity(False)
    """Train on the pairs of all iterations so far, not only of this one."""
    replay: ReplaySection | None = identity(None)
    """Also train on some pairs (or samples) of earlier iterations, with a decaying share: {iterations: 3, decay: 0.5}.
    docs/data.md."""
    offline: OfflineSection | None = identity(None)
    """Also train on offline preference pairs: {source: hf:ORG/NAME, share: 0.25}. docs/data.md."""
    evaluation: GenerationSettings = identity({})
    """How held-out responses are sampled; unset keys are those of the section `generation`."""
    evaluations: dict[Annotated[str, Field(pattern=NAME)], EvaluationSection] = identity({})
    """Your own evaluations by name, in addition to the one on held-out prompts, each a stage for every policy:
    {lm_eval: {function: evals.py:run}}. Their metrics are eval/NAME/..."""
    diagnostics: bool = identity(False)
    """Also publish the diversity of the responses, the agreement of the scorers and the win rate against the previous
    policy in evaluations; gates always do: docs/gates.md."""
    gates: dict[Annotated[str, Field(pattern=NAME)], GateSection] = identity({})
    """Conditions on held-out metrics, by name, that warn, stop the run or roll it back to its best policy: {length:
    {metric: response_length, above: 1.5, relative_to: initial, do: stop}}."""
    world: WorldSettings | None = identity(None)
    """Generate the toy task (data and an untrained model) first; refer to its files as world:NAME."""
    sft: SftSettings | None = identity(None)
    """Fine-tune `policy` on demonstrations first; the result is the initial policy."""
    reward_model: RewardModelSection | None = identity(None)
    """Train the model of the scorer `reward` first, or of a component of a combined `reward`."""
    changes: dict[int, dict[str, Any]] = identity({})
    """Values that apply from an iteration on: {3: {training: {settings: {beta: 0.05}}}}. Sections that have inherited
    values from `generation` keep the old ones."""
    hardware: HardwareSection | None = runtime(None)
    """GPUs that this config is written for ({gpus: 8, gib: 80}); --dry-run estimates memory for them on machines
    without GPUs."""
    environments: EnvironmentsSection = runtime(EnvironmentsSection())
    """Environments for `generation`, `annotation` and `training`, instead of their locked ones."""
    executor: ExecutorSection = runtime(ExecutorSection())
    """Where stages run (`kind`: local, slurm or inline), and how many at once (`parallel`)."""
    placement: PlacementSection = runtime(PlacementSection())
    """Which devices each stage uses, and which stages run at the same time (`strategy`: flattening, interleaving,
    separation, async or colocated). Or the path of a YAML file with these keys."""
    retention: RetentionSection = runtime(RetentionSection())
    """Whose weights stay on disk (`keep`: all, best or "last N"), and whether rows are compressed (`compress`)."""
    hub: HubSection | None = runtime(None)
    """Hugging Face Hub repos to push to after every iteration (`model`, `pairs`, `rollouts`: ORG/NAME)."""
    tracking: TrackingSection = runtime(TrackingSection())
    """Trackers for the metrics during the run: wandb, trackio, tensorboard, mlflow."""
    hooks: dict[Annotated[str, Field(pattern=NAME)], HookSettings] = runtime({})
    """Your own functions, by name, that are called when something happens: {notify: {function: hooks.py:notify}}."""

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
        self._check_parts()
        reward = self.scorers["reward"]
        if self.reward_model and self.trained_scorer is None:
            trained = self.reward_model.training.kind
            needed = next(kind for kind, settings in SETTINGS.items() if settings.trained_as == trained)
            raise ValueError(
                f"reward_model.training.kind is {trained}, but scorers.reward.kind is {reward.kind}, "
                f"which reads other models. Set scorers.reward.kind={needed}."
            )
        for name in self.with_components("reward"):
            if self.scorers[name].compares and self.generation.k < 2:
                raise ValueError(
                    f"generation.k is {self.generation.k}; scorers.{name}.kind={self.scorers[name].kind} compares the "
                    "answers to a prompt with each other, so it needs at least 2."
                )
        if self.placement.strategy == "colocated" and not self.executor.warm:
            raise ValueError(
                "placement.strategy is colocated, so engine and trainer stay loaded and take turns on the same "
                "devices, but executor.warm is false. Set executor.warm=true, or placement=flattening."
            )
        self._check_evaluations()
        description = self.description
        check_settings(description, self.training.settings)
        require_correctable(description, self.training)
        self._check_lag(description)
        require_whole_model(self.training.algorithm, "reference_model" in description.needs, self.training.parallel)
        if description.reads == "samples":
            self._check_samples(description)
        elif self.generation.k < 2:
            raise ValueError(f"generation.k is {self.generation.k}; pairs need at least 2 answers per prompt.")
        if self.hub_repos is not None and self.hub_repos.pairs is not None and description.reads == "samples":
            raise ValueError(
                f"hub.pairs is {self.hub_repos.pairs}, but training.algorithm={self.training.algorithm} makes no "
                "pairs. Remove it; hub.rollouts pushes the answers with their scores."
            )
        if self.prompts.dynamic_sampling is not None and (self.generation.k < 2 or "greedy" in description.needs):
            raise ValueError(
                "prompts.dynamic_sampling replaces prompts whose answers all score the same, so that comparing them "
                f"gives no signal; but generation.k is {self.generation.k} and training.algorithm="
                f"{description.algorithm}{' compares them with a greedy one' if self.generation.k > 1 else ''}. "
                "Leave it out."
            )
        if self.accumulate and self.replay is not None:
            raise ValueError(
                "accumulate trains on all pairs of all iterations so far, replay on a part of them: set one of the two."
            )
        uses_world = any(str(value).startswith("world:") for value in leaves(self.model_dump()))
        if uses_world and self.world is None:
            raise ValueError("a path starts with world:, but there is no section `world`. Add one (`world: {}`).")
        return self

    def _check_parts(self) -> None:
        """Require that combined scorers refer to existing scorers, and do not contain themselves."""
        for name, scorer in self.scorers.items():
            if unknown := [part for part in scorer.components if part not in self.scorers]:
                near = difflib.get_close_matches(unknown[0], self.scorers, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"scorers.{name}.expression names {unknown[0]}, which is not a scorer of this run.{hint} Known: "
                    f"{', '.join([*sorted(self.scorers.keys() - {name}), *ANSWER_NAMES])}."
                )
        if cycle := cycle_in({name: scorer.components for name, scorer in self.scorers.items()}):
            raise ValueError(f"scorers.{cycle[0]} is made of itself: {' of '.join(cycle)}. Take one of them out.")
        if taken := sorted(set(ANSWER_NAMES) & self.scorers.keys()):
            raise ValueError(f"scorers.{taken[0]}: {taken[0]} is a built-in name in expressions; rename it.")

    def with_components(self, scorer: str) -> list[str]:
        """A scorer and all its components."""
        found = [scorer]
        for name in found:
            found += [part for part in self.scorers[name].components if part not in found]
        return found

    def _check_lag(self, description: Description) -> None:
        """Require an algorithm that can train on answers of older policies, if there will be any."""
        if self.lag and self.start == "initial":
            raise ValueError(
                f"lag={self.lag} with start=initial: a policy would come neither from the last one nor from its "
                "answers, so that the iterations would not build on each other. Set start=previous, or lag=0."
            )
        is_older = self.lag or (self.replay is not None and description.reads == "samples")
        if not is_older or description.off_policy or self.training.correction is not None:
            return
        name = f"lag={self.lag}" if self.lag else "replay is set"
        others = [name for name in BUILT_IN if (known := describe(name)).off_policy and known.reads == "samples"]
        ways = [
            "set lag=0" if self.lag else "leave it out",
            f"choose an algorithm that takes older answers ({', '.join(others)}, or one on pairs)",
        ]
        if description.corrections:
            ways.append(
                "correct for it, for example training.correction="
                f"{{level: {description.corrections[0]}, treatment: truncate, high: 2}}"
            )
        raise ValueError(
            f"{name}, but training.algorithm={description.algorithm} expects samples of the policy that it trains; "
            f"{'with a lag they come' if self.lag else 'with it some come'} from older policies, which biases the "
            f"gradient. Either {', or '.join(ways)}."
        )

    def _check_evaluations(self) -> None:
        """Require that names of evaluations are unique, and that the environments of scorers and evaluations exist."""
        if taken := sorted({"generation", "reference", *self.scorers} & self.evaluations.keys()):
            raise ValueError(
                f"evaluations.{taken[0]}: eval/{taken[0]}/... are the metrics of another stage already. Choose another "
                "name."
            )
        known = [*STAGES, *self.environments.own]
        asked = {f"scorers.{name}": section.environment for name, section in self.scorers.items()}
        asked |= {f"evaluations.{name}": section.environment for name, section in self.evaluations.items()}
        for key, environment in asked.items():
            if environment not in known:
                raise ValueError(
                    f"{key}.environment is {environment!r}, which is not one of {', '.join(known)}. Add it: "
                    f"environments.own.{environment}."
                )

    def _check_samples(self, description: Description) -> None:
        """Check what an algorithm that trains on samples requires of the other sections."""
        name, sampling = self.training.algorithm, self.generation
        if changed := sampling.departures:
            shown = ", ".join(f"{key}={json.dumps(value)}" for key, value in changed.items())
            raise ValueError(
                f"generation samples at {shown}; training.algorithm={name} trains what it sampled from, which must be "
                f"the policy's own, or its ratios would be wrong: leave {' and '.join(changed)} out."
            )
        if description.compares_answers and sampling.k < 2:
            raise ValueError(
                f"generation.k is {sampling.k}; training.algorithm={name} compares the answers to a prompt with each "
                "other, so it needs at least 2."
            )
        if self.offline is not None:
            raise ValueError(
                f"offline is about pairs, but training.algorithm={name} trains on samples of the policy. Leave it out, "
                "or choose an algorithm that reads pairs."
            )
        if self.replay is not None and "greedy" in description.needs:
            raise ValueError(
                f"replay trains on answers of earlier iterations, too, but training.algorithm={name} compares answers "
                "with a greedy one, which those have not. Leave it out."
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
        reward = self.scorers["reward"]
        if "token_rewards" in description.needs and not reward.can_reward_tokens:
            raise ValueError(
                f"training.algorithm={name} learns from a reward for each token, but scorers.reward.kind={reward.kind} "
                "gives one for the whole answer. Take kind=process_reward, or a rule that rewards tokens."
            )
        start = self.critic.start if self.critic else None
        if "values" in description.needs and start == "reward_model" and not self.has_reward_model:
            raise ValueError(
                f"critic.start is reward_model, but the scorer `reward` is of the kind {self.scorers['reward'].kind}. "
                "Set critic.start=policy, or a directory."
            )

    @property
    def hub_repos(self) -> HubSection | None:
        """The section `hub`, with this run's name in the names of the repos."""
        return self.hub.of(self.name) if self.hub is not None else None

    @property
    def description(self) -> Description:
        """The description of the algorithm, read from its source."""
        return describe(self.training.algorithm)

    @property
    def has_reward_model(self) -> bool:
        """Whether the reward is a model that a critic can start from."""
        return self.scorers["reward"].starts_critic

    @property
    def trained_scorer(self) -> str | None:
        """The scorer whose model the section `reward_model` trains: `reward`, or a component of it without a model;
        None if there is none."""
        kind = self.reward_model.training.kind if self.reward_model is not None else None
        parts = {name: self.scorers[name] for name in self.with_components("reward")}
        fitting = (name for name, one in parts.items() if name == "reward" or one.model_path is None)
        return next((name for name in fitting if kind is not None and parts[name].trained_as == kind), None)

    @property
    def run_directory(self) -> Path:
        """The run's directory."""
        return self.directory / self.name

    def settings(self) -> dict[str, Any]:
        """The fields that the user has set, as plain data."""
        return self.model_dump(mode="json", exclude_unset=True)

    def at(self, iteration: int) -> Self:
        """The config of an iteration, according to `changes`.

        Raises:
            UserError: a key cannot change between iterations, or its value is invalid.
        """
        data = self.model_dump(exclude_unset=True, exclude={"changes"})
        due = [start for start in sorted(self.changes) if start <= iteration]
        for start in due:
            require_changeable(self.changes[start], start)
            data = merge(data, self.changes[start])
        if not due:
            return self
        return validate(type(self), data, f"with changes.{due[-1]}")

    def with_change(self, iteration: int, change: dict[str, Any]) -> Self:
        """Copy the config with further changes from an iteration on, which override those that `changes` has for it."""
        changes = {**self.changes, iteration: merge(self.changes.get(iteration, {}), change)}
        return self.model_copy(update={"changes": changes}) if change else self
