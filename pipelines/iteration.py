"""The recipe of a run, as a graph of stages. `improve` is the loop's body: one iteration."""

from functools import partial
from pathlib import Path
from typing import Any

from annotation.config import PairsSettings
from annotation.stages.checkpoint_evaluation import EVALUATE_CHECKPOINT
from annotation.stages.evaluation import EVALUATE
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.score import SCORE
from contracts.config import Section
from contracts.errors import UserError
from contracts.prompts import PromptsSettings
from contracts.seeds import derive_seed
from contracts.stages.prompts import IMPORT_PROMPTS
from contracts.template import reads_clock
from embedded.config import WORLD_FILES
from embedded.stages.world import MAKE_WORLD
from generation.config import GenerationSettings
from generation.stages.generation import GENERATION
from pipelines.config.run import RunConfig
from pipelines.environments.paths import packaged
from pipelines.graph import Graph, folder_of, name_of
from pipelines.progress import tracked
from training.stages.critic import CRITIC
from training.stages.ema import EMA
from training.stages.experience import MAKE_EXPERIENCE
from training.stages.policy import POLICY
from training.stages.reward import REWARD
from training.stages.sft import SFT
from training.stages.value_head import VALUE_HEAD

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
    """The stages of a run, from what has to be made before the first iteration to the last evaluation.

    Nothing in it depends on devices; `pipelines.planning.placement` gives each stage its own.
    """
    return Recipe(config).build(iterations)


class Recipe:
    """Adds a run's stages to a graph; every method returns the paths of what its stages will publish."""

    def __init__(self, config: RunConfig) -> None:
        self.run = config
        self.config = config  # what holds in the iteration that is being added
        self.taken = 0  # training prompts that earlier iterations have taken
        self.graph = Graph(config.run_directory.absolute())
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
        config = self.config
        count = config.prompts.per_iteration
        window = {"start": self.taken, "count": count} if count else {}
        self.taken += count or 0

        rollouts = self.sample("generation", policy, self.train_prompts, iteration, config.generation, window)
        rewards = self.score("reward", "reward", rollouts, iteration)
        anchor = {"initial": self.initial, "previous": policy, "ema": self.average}[config.reference]
        if config.description.reads == "pairs":
            data = self.pair_data(iteration, rollouts, rewards, anchor)
        else:
            data = self.sample_data(iteration, rollouts, rewards, anchor, policy, window)
        if "reference_model" in config.description.needs:
            data["reference_model"] = anchor
        data["model"] = policy if config.start == "previous" else self.initial
        data["seed"] = derive_seed(config.seed, iteration, "training")
        fields = keys(config.training) | self.inputs() | data
        trained = self.graph.add(POLICY, "training", fields, iteration=iteration)
        self.has_value_head = config.training.value_head
        if config.reference == "ema":
            mean = {"average": self.average, "model": trained, "decay": config.ema_decay}
            self.average = self.graph.add(EMA, "ema", mean, iteration=iteration)
        return trained

    def inputs(self) -> dict[str, Any]:
        """What the user's own algorithm reads beside its modules, wherever a stage runs it."""
        paths = self.config.training.inputs
        return {"inputs": [self.locate(path) for path in paths]} if paths else {}

    def pair_data(self, iteration: int, rollouts: Path, rewards: Path, anchor: Path) -> dict[str, Any]:
        """Preference pairs, with their reference if the algorithm needs one: what the policy is trained on."""
        config = self.config
        pairs = self.choose("pairs", rollouts, rewards, config.pairs, iteration)
        self.pairs = [*self.pairs, pairs] if config.accumulate else [pairs]
        if "reference" not in config.description.needs:
            return {"pairs": self.pairs}
        self.references[pairs, anchor] = self.reference("reference", rollouts, anchor, iteration, pairs)
        return {"pairs": self.pairs, "reference": [self.reference_of(made, anchor, iteration) for made in self.pairs]}

    def sample_data(
        self, iteration: int, rollouts: Path, rewards: Path, anchor: Path, policy: Path, window: dict[str, Any]
    ) -> dict[str, Any]:
        """Experience, made of all that the algorithm needs; beside the policy, the critic is trained on it here."""
        config = self.config
        needs = config.description.needs
        inputs: dict[str, Path] = {"rollouts": rollouts, "rewards": rewards}
        if "reference" in needs:
            inputs["reference"] = self.reference("reference", rollouts, anchor, iteration)
        if "greedy" in needs:
            section = config.generation.model_copy(update={"k": 1, "temperatures": [0.0]})
            role = "greedy/generation"
            inputs["greedy_rollouts"] = self.sample(role, policy, self.train_prompts, iteration, section, window)
            inputs["greedy"] = self.score(
                "greedy/reward", "reward", inputs["greedy_rollouts"], iteration, against=rollouts
            )
        if "values" in needs:
            critic = self.critic_of(policy)
            fields = {"kind": "values", "name": "values", "model": critic, "rollouts": rollouts}
            inputs["values"] = self.graph.add(SCORE, "values", fields, iteration=iteration)
        if config.experience.kl_target is not None and self.experience and not self.restarts(iteration):
            inputs["previous"] = self.experience
        algorithm = {"algorithm": config.training.algorithm, "settings": config.training.settings}
        fields = keys(config.experience) | self.inputs() | algorithm | inputs
        experience = self.graph.add(MAKE_EXPERIENCE, "experience", fields, iteration=iteration)
        self.experience = experience
        if "values" in needs and not config.training.value_head:
            fields = config.critic.model_dump(exclude_unset=True, exclude={"start"}) if config.critic else {}
            fields |= {"model": critic, "experience": experience, "seed": derive_seed(config.seed, iteration, "critic")}
            self.critic = self.graph.add(CRITIC, "critic", fields, iteration=iteration)
        return {"experience": experience}

    def critic_of(self, policy: Path) -> Path:
        """What predicts the values of a policy's answers: its own head or the last critic, at first critic.start."""
        if self.config.training.value_head:
            return policy if self.has_value_head else self.untrained_critic()
        if self.critic is not None:
            return self.critic
        start = self.config.critic.start if self.config.critic else None
        start = start or ("reward_model" if self.config.has_reward_model else "policy")
        if start == "policy":
            return self.untrained_critic()
        if start == "reward_model":
            model = self.reward_model or self.config.scorers["reward"].model
            assert model is not None  # else the scorer's own stage, which came before, was refused
            return self.locate(model)
        return self.locate(start)

    def untrained_critic(self) -> Path:
        """The initial policy with a head that says 0."""
        name = "setup/critic"
        if name in self.graph.nodes:
            return self.graph.nodes[name].output
        return self.graph.add(VALUE_HEAD, name, {"model": self.initial})

    def restarts(self, iteration: int) -> bool:
        """Whether `changes` set a coefficient in this iteration, from which an adaptive one begins anew."""
        return "kl_coefficient" in (self.run.changes.get(iteration, {}).get("experience") or {})

    def evaluate(self, iteration: int, policy: Path) -> Path:
        """Judge a policy on the held-out prompts."""
        heldout = self.heldout_prompts
        rollouts = self.sample("heldout/generation", policy, heldout, iteration, self.config.evaluation)
        if iteration == 0:
            self.first_answers = rollouts
        scores = {
            name: self.score(f"heldout/{name}", name, rollouts, iteration, against=self.first_answers)
            for name in self.config.scorers
        }
        fields: dict[str, Any] = {"rollouts": rollouts, "scores": scores, "iteration": iteration}
        if iteration == 0:
            self.baseline = scores["reward"]
        else:
            fields["baseline"] = self.baseline
            fields["reference"] = self.reference("heldout/reference", rollouts, self.initial, iteration)
        self.evaluate_checkpoint(iteration, policy)
        return self.graph.add(EVALUATE, "evaluation", fields, iteration=iteration)

    def evaluate_checkpoint(self, iteration: int, policy: Path) -> None:
        """Have the user's own evaluations judge a policy."""
        for name, section in self.config.evaluations.items():
            if iteration % section.every:
                continue
            fields = section.model_dump(exclude_unset=True, exclude={"environment", "every"})
            fields["checkpoint"] = policy
            if section.inputs is not None:
                fields["inputs"] = [self.locate(path) for path in section.inputs]
            role = f"evaluations/{name}"
            self.graph.add(EVALUATE_CHECKPOINT, role, fields, iteration=iteration, environment=section.environment_key)

    def prepare(self) -> None:
        """What stands before the first iteration: prompts, and the initial policy and reward model if they are made
        here."""
        config = self.config
        if config.world is not None:
            self.graph.add(MAKE_WORLD, "setup/world", keys(config.world) | {"seed": config.seed})
        self.heldout_prompts = self.import_prompts("prompts/heldout", config.prompts.heldout)
        self.train_prompts = self.import_prompts("prompts/train", config.prompts.train, [self.heldout_prompts])
        self.initial = self.locate(config.policy)
        if config.sft is not None:
            section = keys(config.sft)
            section["demonstrations"] = self.locate(section["demonstrations"])
            section |= self.rendering(self.initial, config.chat_template_kwargs)
            section |= {"model": self.initial, "seed": derive_seed(config.seed, 0, "sft")}
            self.initial = self.graph.add(SFT, "setup/sft", section)
        self.reward_model = self.train_reward_model() if config.reward_model is not None else None

    def train_reward_model(self) -> Path:
        """Sample answers of the initial policy, label them, and train the reward model on the pairs."""
        section = self.config.reward_model
        assert section is not None
        prompts = self.import_prompts("setup/reward-model/prompts", section.prompts, [self.heldout_prompts])
        rollouts = self.sample("setup/reward-model/generation", self.initial, prompts, None, section.generation)
        labels = self.score("setup/reward-model/labels", section.label, rollouts)
        pairs = self.choose("setup/reward-model/pairs", rollouts, labels, section.pairs)
        fields = keys(section.training)
        if section.training.kind == "pairwise":
            fields |= self.rendering(self.initial, self.config.scorers["reward"].chat_template_kwargs)
        fields |= {"model": self.initial, "pairs": [pairs], "seed": derive_seed(self.config.seed, 0, "reward")}
        return self.graph.add(REWARD, "setup/reward-model/training", fields)

    # The stages.

    def import_prompts(self, role: str, section: PromptsSettings, exclude: list[Path] | None = None) -> Path:
        """Import prompts from where they are."""
        fields = keys(section)
        fields |= {"source": self.locate(fields["source"]), "exclude": exclude or []}
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
        """Sample answers to prompts."""
        fields = {**keys(section), **(window or {}), **self.rendering(policy, self.config.chat_template_kwargs)}
        fields |= {"policy": policy, "prompts": prompts, "iteration": iteration or 0}
        fields["seed"] = derive_seed(self.config.seed, name_of(iteration, role))
        return self.graph.add(GENERATION, role, fields, iteration=iteration)

    def score(
        self, role: str, scorer: str, rollouts: Path, iteration: int | None = None, against: Path | None = None
    ) -> Path:
        """Judge rollouts with one of the configured scorers; a pairwise one compares them with those in `against`."""
        fields = keys(self.config.scorers[scorer]) | {"rollouts": rollouts, "name": scorer}
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
        return self.graph.add(SCORE, role, fields, iteration=iteration)

    def reference(self, role: str, rollouts: Path, model: Path, iteration: int, pairs: Path | None = None) -> Path:
        """Log-probabilities of rollouts under a reference; only of the completions in `pairs`, if given."""
        fields = {"kind": "logprobs", "name": "reference", "model": model, "rollouts": rollouts, "pairs": pairs}
        return self.graph.add(SCORE, role, fields, iteration=iteration)

    def choose(
        self, role: str, rollouts: Path, scores: Path, section: PairsSettings, iteration: int | None = None
    ) -> Path:
        """Choose preference pairs."""
        seed = derive_seed(self.config.seed, iteration or 0, "pairs")
        fields = keys(section) | {"rollouts": rollouts, "scores": scores, "seed": seed}
        return self.graph.add(CHOOSE_PAIRS, role, fields, iteration=iteration)

    def reference_of(self, pairs: Path, anchor: Path, iteration: int) -> Path:
        """Reference log-probabilities of pairs, made anew only where the reference has changed since."""
        if (pairs, anchor) not in self.references:
            chosen = self.graph.maker(pairs)
            assert chosen is not None
            assert chosen.iteration is not None
            role, rollouts = f"reference-of-{folder_of(chosen.iteration)}", chosen.path("rollouts")
            self.references[pairs, anchor] = self.reference(role, rollouts, anchor, iteration, pairs)
        return self.references[pairs, anchor]

    def rendering(self, model: Path, variables: dict[str, Any]) -> dict[str, Any]:
        """What a stage is told that renders conversations for a model: the variables of its chat template, and the
        run's date if the template writes it."""
        start, _ = self.graph.origin(model)
        find = partial(_writes_date, start, variables)
        fields = {"chat_template_kwargs": variables} if variables else {}
        return {**fields, "date": self.run.date} if self.graph.known(("date", start, repr(variables)), find) else fields

    def locate(self, reference: str | Path) -> Path:
        """A path in the config as a real one: world:NAME is a file of the toy task, ratchet:NAME one that comes
        with Ratchet, and relative paths are the user's."""
        text = str(reference)
        if text.startswith("world:"):
            if text.removeprefix("world:") not in WORLD_FILES:
                raise UserError(f"{text} does not exist; the toy task has {', '.join(WORLD_FILES)}.")
            return self.graph.directory / "setup/world" / text.removeprefix("world:")
        if text.startswith("ratchet:"):
            return packaged(text.removeprefix("ratchet:"))
        return Path(text) if text.startswith("hf:") else Path(text).absolute()


def _writes_date(model: Path, variables: dict[str, Any]) -> bool | None:
    """Whether a model's template writes the date; None where the model is not there yet."""
    return reads_clock(model, variables) if model.is_dir() else None


def keys(section: Section) -> dict[str, Any]:
    """The keys that the user set in a section, so that the stage's own defaults hold for the others."""
    return section.model_dump(exclude_unset=True)
