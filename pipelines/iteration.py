"""The recipe of a run, as a graph of stages. `improve` is the loop's body: one iteration."""

from functools import partial
from pathlib import Path
from typing import Any

from annotation.config import EvaluationConfig, PairsConfig, ScoreConfig
from contracts.config import Section
from contracts.errors import UserError
from contracts.prompts import PromptsConfig
from contracts.seeds import derive_seed
from contracts.template import reads_clock
from embedded.config import WORLD_FILES, WorldConfig
from generation.config import GenerationConfig
from pipelines.config.run import RunConfig
from pipelines.graph import Graph
from pipelines.planning.sizes import start_of
from pipelines.progress import tracked
from training.config import (
    CriticConfig,
    EmaConfig,
    ExperienceConfig,
    PolicyConfig,
    RewardConfig,
    SftConfig,
    ValueHeadConfig,
)

MOST_ITERATIONS = 10_000
"""More are surely a typing error: an iteration takes minutes."""
MOST_ACCUMULATED = 1_000
"""The same where each iteration reads the pairs of all before it."""


def require_iterations(config: RunConfig, asked: int | None) -> int:
    """How many iterations a command wants: `--iters`, or what the config says.

    Raises:
        UserError: the number is negative, or beyond all that a run can have.
    """
    wanted, name = (config.iterations, "iterations") if asked is None else (asked, "--iters")
    if not 0 <= wanted <= MOST_ITERATIONS:
        raise UserError(f"{name} is {wanted}; it must be from 0 to {MOST_ITERATIONS}.")
    if config.accumulate and wanted > MOST_ACCUMULATED:
        raise UserError(
            f"{name} is {wanted} with accumulate=true, by which every iteration reads the pairs of all before it; with "
            f"that it must be from 0 to {MOST_ACCUMULATED}. Lower it, or set accumulate=false."
        )
    return wanted


def build_graph(config: RunConfig, iterations: int) -> Graph:
    """The stages of a run, from what has to be made before the first iteration to the last evaluation."""
    return Recipe(config).build(iterations)


class Recipe:
    """Adds a run's stages to a graph; every method returns the paths of what its stages will publish."""

    def __init__(self, config: RunConfig) -> None:
        self.run = config
        self.config = config  # what holds in the iteration that is being added
        self.taken = 0  # training prompts that earlier iterations have taken
        self.graph = Graph(config.run_directory.absolute(), config.executor)
        self.pairs: list[Path] = []
        self.references: dict[tuple[Path, Path], Path] = {}
        self.experience: Path | None = None
        self.critic: Path | None = None
        self.has_value_head = False  # whether the policy was trained as its own critic

    def build(self, iterations: int) -> Graph:
        """Set up, then improve the policy `iterations` times; judge the initial policy and every later one."""
        self.prepare()
        policy = self.average = self.initial
        self.evaluate(0, policy)
        for iteration in tracked(range(1, iterations + 1), "planning the iterations"):
            if iteration in self.run.changes:
                self.config = self.run.at(iteration)
            policy = self.improve(iteration, policy)
            self.evaluate(iteration, policy)
        return self.graph

    def improve(self, iteration: int, policy: Path) -> Path:
        """One iteration: sample, score, make of it what the algorithm reads, train. Returns the next policy."""
        config, here = self.config, f"iteration-{iteration:03d}"
        count = config.prompts.per_iteration
        window = {"start": self.taken, "count": count} if count else {}
        self.taken += count or 0

        rollouts = self.sample(f"{here}/generation", policy, self.train_prompts, iteration, config.generation, window)
        rewards = self.score(f"{here}/reward", "reward", rollouts)
        anchor = {"initial": self.initial, "previous": policy, "ema": self.average}[config.reference]
        if config.description.reads == "pairs":
            data = self.pair_data(iteration, rollouts, rewards, anchor)
        else:
            data = self.sample_data(iteration, rollouts, rewards, anchor, policy, window)
        if "reference_model" in config.description.needs:
            data["reference_model"] = anchor
        trained = self.graph.add(
            f"{here}/training",
            PolicyConfig,
            "training policy",
            keys(config.training) | self.inputs(),
            model=policy if config.start == "previous" else self.initial,
            seed=derive_seed(config.seed, iteration, "training"),
            **data,
        )
        self.has_value_head = config.training.value_head
        if config.reference == "ema":
            mean = {"average": self.average, "model": trained, "decay": config.ema_decay}
            self.average = self.graph.add(f"{here}/ema", EmaConfig, "training ema", mean)
        return trained

    def inputs(self) -> dict[str, Any]:
        """What the user's own algorithm reads beside its modules, wherever a stage runs it."""
        paths = self.config.training.inputs
        return {"inputs": [self.locate(path) for path in paths]} if paths else {}

    def pair_data(self, iteration: int, rollouts: Path, rewards: Path, anchor: Path) -> dict[str, Any]:
        """Preference pairs, with their reference if the algorithm needs one: what the policy is trained on."""
        config, here = self.config, f"iteration-{iteration:03d}"
        pairs = self.choose(f"{here}/pairs", rollouts, rewards, config.pairs, iteration)
        self.pairs = [*self.pairs, pairs] if config.accumulate else [pairs]
        if "reference" not in config.description.needs:
            return {"pairs": self.pairs}
        self.references[pairs, anchor] = self.log_probabilities(f"{here}/reference", rollouts, anchor, pairs)
        return {"pairs": self.pairs, "reference": [self.reference_of(made, anchor, here) for made in self.pairs]}

    def sample_data(
        self, iteration: int, rollouts: Path, rewards: Path, anchor: Path, policy: Path, window: dict[str, Any]
    ) -> dict[str, Any]:
        """Experience, made of all that the algorithm needs; beside the policy, the critic is trained on it here."""
        config, here = self.config, f"iteration-{iteration:03d}"
        needs = config.description.needs
        inputs: dict[str, Path] = {"rollouts": rollouts, "rewards": rewards}
        if "reference" in needs:
            inputs["reference"] = self.log_probabilities(f"{here}/reference", rollouts, anchor)
        if "greedy" in needs:
            section = config.generation.model_copy(update={"k": 1, "temperatures": [0.0]})
            name = f"{here}/greedy/generation"
            inputs["greedy_rollouts"] = self.sample(name, policy, self.train_prompts, iteration, section, window)
            inputs["greedy"] = self.score(f"{here}/greedy/reward", "reward", inputs["greedy_rollouts"], rollouts)
        if "values" in needs:
            critic = self.critic_of(policy)
            fields = {"kind": "values", "name": "values", "model": critic, "rollouts": rollouts}
            inputs["values"] = self.graph.add(f"{here}/values", ScoreConfig, "annotation score", fields)
        if config.experience.kl_target is not None and self.experience and not self.restarts(iteration):
            inputs["previous"] = self.experience
        experience = self.graph.add(
            f"{here}/experience",
            ExperienceConfig,
            "training experience",
            keys(config.experience) | self.inputs(),
            algorithm=config.training.algorithm,
            settings=config.training.settings,
            **inputs,
        )
        self.experience = experience
        if "values" in needs and not config.training.value_head:
            self.critic = self.graph.add(
                f"{here}/critic",
                CriticConfig,
                "training critic",
                without(keys(config.critic), "start") if config.critic else {},
                model=critic,
                experience=experience,
                seed=derive_seed(config.seed, iteration, "critic"),
            )
        return {"experience": experience}

    def critic_of(self, policy: Path) -> Path:
        """What says the values of a policy's answers: the last critic or, in a policy of its own, the head of that."""
        if self.config.training.value_head:
            return policy if self.has_value_head else self.untrained_critic()
        return self.critic or self.first_critic()

    def untrained_critic(self) -> Path:
        """The initial policy with a head that says 0."""
        name = "setup/critic"
        if name in self.graph.nodes:
            return self.graph.nodes[name].output
        return self.graph.add(name, ValueHeadConfig, "training value-head", model=self.initial)

    def first_critic(self) -> Path:
        """What the critic is before any training."""
        start = self.config.critic.start if self.config.critic else None
        start = start or ("reward_model" if self.config.has_reward_model else "policy")
        if start == "policy":
            return self.untrained_critic()
        if start == "reward_model":
            return self.reward_model or self.locate(self.config.scorers["reward"].model)
        return self.locate(start)

    def restarts(self, iteration: int) -> bool:
        """Whether `changes` set a coefficient in this iteration, from which an adaptive one begins anew."""
        return "kl_coefficient" in (self.run.changes.get(iteration, {}).get("experience") or {})

    def evaluate(self, iteration: int, policy: Path) -> Path:
        """Judge a policy on the held-out prompts."""
        here = f"iteration-{iteration:03d}"
        heldout = self.heldout_prompts
        rollouts = self.sample(f"{here}/heldout/generation", policy, heldout, iteration, self.config.evaluation)
        if iteration == 0:
            self.first_answers = rollouts
        scores = {
            name: self.score(f"{here}/heldout/{name}", name, rollouts, self.first_answers)
            for name in self.config.scorers
        }
        against: dict[str, Any] = {}
        if iteration == 0:
            self.baseline = scores["reward"]
        else:
            against["baseline"] = self.baseline
            against["reference"] = self.log_probabilities(f"{here}/heldout/reference", rollouts, self.initial)
        return self.graph.add(
            f"{here}/evaluation",
            EvaluationConfig,
            "annotation evaluate",
            rollouts=rollouts,
            scores=scores,
            iteration=iteration,
            **against,
        )

    def prepare(self) -> None:
        """What stands before the first iteration: prompts, and the initial policy and reward model if they are made
        here."""
        config = self.config
        if config.world is not None:
            self.graph.add("setup/world", WorldConfig, "embedded world", keys(config.world), seed=config.seed)
        self.heldout_prompts = self.import_prompts("prompts/heldout", config.prompts.heldout)
        self.train_prompts = self.import_prompts("prompts/train", config.prompts.train, [self.heldout_prompts])
        self.initial = self.locate(config.policy)
        if config.sft is not None:
            section = keys(config.sft)
            section["demonstrations"] = self.locate(section["demonstrations"])
            section |= self.rendering(self.initial, config.chat_template_kwargs)
            seed = derive_seed(config.seed, 0, "sft")
            self.initial = self.graph.add(
                "setup/sft", SftConfig, "training sft", section, model=self.initial, seed=seed
            )
        self.reward_model = self.train_reward_model() if config.reward_model is not None else None

    def train_reward_model(self) -> Path:
        """Sample answers of the initial policy, label them, and train the reward model on the pairs."""
        section = self.config.reward_model
        assert section is not None
        prompts = self.import_prompts("setup/reward-model/prompts", section.prompts, [self.heldout_prompts])
        rollouts = self.sample("setup/reward-model/generation", self.initial, prompts, 0, section.generation)
        labels = self.score("setup/reward-model/labels", section.label, rollouts)
        pairs = self.choose("setup/reward-model/pairs", rollouts, labels, section.pairs, 0)
        rendering: dict[str, Any] = {}
        if section.training.kind == "pairwise":
            rendering = self.rendering(self.initial, self.config.scorers["reward"].chat_template_kwargs)
        return self.graph.add(
            "setup/reward-model/training",
            RewardConfig,
            "training reward",
            keys(section.training) | rendering,
            model=self.initial,
            pairs=[pairs],
            seed=derive_seed(self.config.seed, 0, "reward"),
        )

    # The stages.

    def import_prompts(self, name: str, section: Any, exclude: list[Path] | None = None) -> Path:
        """Import prompts from where they are."""
        fields = keys(section)
        fields["source"] = self.locate(fields["source"])
        return self.graph.add(name, PromptsConfig, "contracts prompts", fields, exclude=exclude or [])

    def sample(
        self, name: str, policy: Path, prompts: Path, iteration: int, section: Any, window: dict[str, Any] | None = None
    ) -> Path:
        """Sample answers to prompts."""
        return self.graph.add(
            name,
            GenerationConfig,
            "generation",
            {**keys(section), **(window or {}), **self.rendering(policy, self.config.chat_template_kwargs)},
            policy=policy,
            prompts=prompts,
            iteration=iteration,
            seed=derive_seed(self.config.seed, name),
        )

    def score(self, name: str, scorer: str, rollouts: Path, against: Path | None = None) -> Path:
        """Judge rollouts with one of the configured scorers; a pairwise one compares them with those in `against`."""
        fields = keys(self.config.scorers[scorer])
        if scorer == "reward" and self.reward_model is not None:
            fields["model"] = self.reward_model
        elif fields.get("model") is not None:
            fields["model"] = self.locate(fields["model"])
        if fields.get("inputs") is not None:
            fields["inputs"] = [self.locate(path) for path in fields["inputs"]]
        if fields["kind"] in ("reward_model", "pairwise"):
            fields |= self.rendering(fields["model"], fields.get("chat_template_kwargs", {}))
        if fields["kind"] == "pairwise" and against is not None:
            fields["against"] = against
        return self.graph.add(name, ScoreConfig, "annotation score", fields, rollouts=rollouts, name=scorer)

    def log_probabilities(self, name: str, rollouts: Path, model: Path, pairs: Path | None = None) -> Path:
        """Log-probabilities of rollouts under a model; only of the completions in `pairs`, if given."""
        fields = {"kind": "logprobs", "name": "reference", "model": model, "rollouts": rollouts, "pairs": pairs}
        return self.graph.add(name, ScoreConfig, "annotation score", fields)

    def choose(self, name: str, rollouts: Path, scores: Path, section: Any, iteration: int) -> Path:
        """Choose preference pairs."""
        seed = derive_seed(self.config.seed, iteration, "pairs")
        return self.graph.add(
            name, PairsConfig, "annotation pairs", keys(section), rollouts=rollouts, scores=scores, seed=seed
        )

    def reference_of(self, pairs: Path, anchor: Path, here: str) -> Path:
        """Reference log-probabilities of pairs, made anew only where the reference has changed since."""
        if (pairs, anchor) not in self.references:
            origin = pairs.parent
            name = f"{here}/reference-of-{origin.name}"
            self.references[pairs, anchor] = self.log_probabilities(name, origin / "generation", anchor, pairs)
        return self.references[pairs, anchor]

    def rendering(self, model: Path, variables: dict[str, Any]) -> dict[str, Any]:
        """What a stage is told that renders conversations for a model: the variables of its chat template, and the
        run's date if the template writes it."""
        start, _ = start_of(model, self.graph)
        find = partial(_writes_date, start, variables)
        fields = {"chat_template_kwargs": variables} if variables else {}
        return {**fields, "date": self.run.date} if self.graph.known(("date", start, repr(variables)), find) else fields

    def locate(self, reference: str | Path) -> Path:
        """A path in the config as a real one: world:NAME is a file of the embedded world, relative paths are the
        user's."""
        text = str(reference)
        if text.startswith("world:"):
            if text.removeprefix("world:") not in WORLD_FILES:
                raise UserError(f"{text} does not exist; the embedded world has {', '.join(WORLD_FILES)}.")
            return self.graph.directory / "setup/world" / text.removeprefix("world:")
        return Path(text) if text.startswith("hf:") else Path(text).absolute()


def _writes_date(model: Path, variables: dict[str, Any]) -> bool | None:
    """Whether a model's template writes the date; None where the model is not there yet."""
    return reads_clock(model, variables) if model.is_dir() else None


def without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """The fields but one."""
    return {key: value for key, value in fields.items() if key != name}


def keys(section: Section) -> dict[str, Any]:
    """The keys that the user set in a section, so that the stage's own defaults hold for the others."""
    return section.model_dump(exclude_unset=True)
