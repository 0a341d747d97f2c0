"""Builds the graph of a run from its config. `improve` is the loop's body: one iteration."""

from pathlib import Path
from typing import Any

from annotation.gating.config import GateConfig
from annotation.gating.decision import published_decision
from annotation.pairing.config import PairsSettings
from annotation.stages.checkpoint_evaluation import EVALUATE_CHECKPOINT
from annotation.stages.evaluation import EVALUATE
from annotation.stages.gate import DECIDE
from annotation.stages.mixing import IMPORT_PREFERENCES, PREFERENCES_SCORES, SAMPLE_PAIRS
from annotation.stages.score import SCORE
from annotation.stages.selection import SELECT, SELECT_SCORES
from contracts.seeds import derive_seed
from contracts.stages.draw import DRAW
from contracts.template import TemplateSettings
from embedded.stages.world import MAKE_WORLD
from pipelines.config.gates import condition
from pipelines.config.run import RunConfig
from pipelines.config.sections import OfflineSection, ReplaySection
from pipelines.graph import Graph, folder_of, name_of, sampled_from
from pipelines.progress import tracked
from pipelines.run_stages import RunStages, set_fields
from training.stages.critic import CRITIC
from training.stages.ema import EMA
from training.stages.experience import MAKE_EXPERIENCE
from training.stages.policy import POLICY
from training.stages.reward import REWARD
from training.stages.sft import SFT
from training.stages.value_head import VALUE_HEAD


def build_graph(config: RunConfig, iterations: int) -> Graph:
    """Build the graph of a run, from the stages before the first iteration to the last evaluation.

    After a rollback, recorded in published gate decisions, the graph continues from the policy that the run went back
    to.

    Nothing in the graph depends on devices; `pipelines.planning.placement` assigns them.
    """
    return Recipe(config).build(iterations)


CARRIED_OVER = ("average", "answers", "pairs", "experience", "critic", "has_value_head", "heldout_answers")
"""The attributes of a recipe that an iteration passes on to the next one, in addition to its policy."""


class Recipe(RunStages):
    """Adds all stages of a run to its graph; every method returns the paths that its stages will publish."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.taken = 0  # training prompts used by earlier iterations
        self.policies: list[Path] = []  # the initial policy, and that of every iteration so far
        self.drawn: Path | None = None  # the prompts drawn last, if prompts are drawn
        self.evaluations: list[Path] = []  # evaluations of `policies`
        self.heldout_answers: Path | None = None  # the last policy's answers to held-out prompts
        self.heldout_rewards: dict[Path, tuple[dict[str, Any], Path]] = {}  # by answers: the scorers, and their scores
        self.rewards: list[list[Path]] = []  # by iteration, the scores of each sampling round
        self.answers: list[tuple[Path, Path]] = []  # by iteration, the answers to train on, and their scores
        self.pairs: list[Path] = []
        self.references: dict[tuple[Path, Path], Path] = {}
        self.experience: Path | None = None
        self.critic: Path | None = None
        self.has_value_head = False  # whether the policy was trained as its own critic
        self.states: list[dict[str, Any]] = []  # the state after every iteration, which a rollback restores

    def build(self, iterations: int) -> Graph:
        """Set up, then improve the policy `iterations` times; evaluate the initial policy and every later one."""
        self.prepare()
        self.average = self.initial
        self.policies = [self.initial]
        self.evaluate(0, self.initial)
        self.save_state()
        for iteration in tracked(range(1, iterations + 1), "planning the iterations"):
            if iteration in self.run.changes:
                self.config = self.run.at(iteration)
            if self.run.gates and (known := sampled_from(iteration, self.config.lag)):
                self.graph.gates[iteration] = name_of(known, "gate")
            self.policies.append(self.improve(iteration))
            self.evaluate(iteration, self.policies[-1])
            self.save_state()
            if self.run.gates:
                self.decide(iteration)
        later = (self.run.at(start).lag for start in self.run.changes if start > iterations)
        self.graph.lag = max([self.config.lag, *later])
        return self.graph

    def save_state(self) -> None:
        """Record the state after an iteration, so that a rollback can restore it."""
        self.states.append({name: getattr(self, name) for name in CARRIED_OVER} | {"policy": self.policies[-1]})

    def decide(self, iteration: int) -> None:
        """Add an iteration's gate stage. If its decision is already published and is a rollback, restore that state."""
        conditions = {name: condition(gate) for name, gate in self.run.gates.items()}
        fields: dict[str, Any] = {"conditions": conditions, "iteration": iteration}
        fields |= {"initial": self.evaluations[0], "evaluation": self.evaluations[iteration]}
        for field, number in (("evaluations", iteration), ("initial_evaluations", 0)):
            if own := self.own_evaluations(number):
                fields[field] = own
        if iteration > 1:
            fields["earlier"] = self.graph.directory / name_of(iteration - 1, "gate")
        self.graph.add(DECIDE, "gate", fields, iteration=iteration)
        name = name_of(iteration, "gate")
        config = self.graph.nodes[name].config
        assert isinstance(config, GateConfig)
        decision = published_decision(config)
        if decision is None or decision.action != "rollback":
            return
        self.graph.rollbacks[name] = decision.start
        state = dict(self.states[decision.start])
        # With a lag, later iterations would also sample from the abandoned policies.
        abandoned = slice(decision.start + 1, iteration + 1)
        self.policies[abandoned] = [state.pop("policy")] * (iteration - decision.start)
        vars(self).update(state)
        assert decision.gate is not None
        self.run = self.run.with_change(iteration + 1, self.run.gates[decision.gate].changes)

    def own_evaluations(self, iteration: int) -> dict[str, Path]:
        """The user's own evaluations of an iteration's policy that gates refer to, by name."""
        names = sorted({gate.evaluation for gate in self.run.gates.values() if gate.evaluation is not None})
        nodes = {name: self.graph.nodes.get(name_of(iteration, f"evaluations/{name}")) for name in names}
        return {name: node.output for name, node in nodes.items() if node is not None}

    def improve(self, iteration: int) -> Path:
        """Add one iteration: sample, score, build the algorithm's training data, train. Returns the next policy.

        With a lag the policy that samples is older than the one that is trained, so that its answers can be sampled
        while the policies of the last iterations are still in training.
        """
        config = self.config
        policy, sampler = self.policies[-1], self.policies[sampled_from(iteration, config.lag)]
        prompts, window = self.prompts_of(iteration)

        rollouts = self.sample("generation", sampler, prompts, iteration, config.generation, window)
        rewards = self.score("reward", "reward", rollouts, iteration)
        self.rewards.append([rewards])
        if config.prompts.dynamic_sampling is not None:
            rollouts, rewards = self.replace_prompts(iteration, sampler, prompts, rollouts, rewards)
        self.answers = [*self.answers, (rollouts, rewards)]
        if config.replay is not None and config.description.reads == "samples":
            rollouts, rewards = self.replay_answers(config.replay, iteration)
        reference_model = {"initial": self.initial, "previous": policy, "ema": self.average}[config.reference]
        if config.description.reads == "pairs":
            data = self.pair_data(iteration, rollouts, rewards, reference_model)
        else:
            data = self.sample_data(iteration, rollouts, rewards, reference_model, sampler, prompts, window)
        if "reference_model" in config.description.needs:
            data["reference_model"] = reference_model
        data["model"] = policy if config.start == "previous" else self.initial
        data["seed"] = derive_seed(config.seed, iteration, "training")
        fields = set_fields(config.training) | self.inputs() | data
        gate = name_of(iteration - 1, "gate") if self.run.gates and iteration > 1 else None
        trained = self.graph.add(POLICY, "training", fields, iteration=iteration, after=gate)
        self.has_value_head = config.training.value_head
        if config.reference == "ema":
            mean = {"average": self.average, "model": trained, "decay": config.ema_decay}
            self.average = self.graph.add(EMA, "ema", mean, iteration=iteration)
        return trained

    def prompts_of(self, iteration: int) -> tuple[Path, dict[str, Any]]:
        """The path of an iteration's prompts, and which of them to take: the next ones in order, unless they are drawn.

        A curriculum reads only the scores of iterations whose training the sampling waits for anyway.
        """
        section = self.config.prompts
        count = section.per_iteration
        if not section.is_drawn:
            window = {"start": self.taken, "count": count} if count else {}
            self.taken += count or 0
            return self.train_prompts["train"], window
        return self.draw("prompts", iteration), {}

    def draw(self, role: str, iteration: int, **further: Any) -> Path:
        """Add a draw of prompts, which continues after the last one."""
        section = self.config.prompts
        fields: dict[str, Any] = {"sources": self.train_prompts, "count": section.per_iteration, "after": self.drawn}
        if section.mixture:
            fields["weights"] = {name: source.weight for name, source in section.mixture.items()}
        if (curriculum := section.curriculum) is not None:
            scored = self.rewards[: sampled_from(iteration, self.config.lag)]
            scored = scored[-(curriculum.iterations or len(scored)) :]
            fields |= {"curriculum": set_fields(curriculum), "history": [path for rounds in scored for path in rounds]}
        self.drawn = self.graph.add(DRAW, role, {**fields, **further}, iteration=iteration)
        return self.drawn

    def replace_prompts(
        self, iteration: int, sampler: Path, prompts: Path, rollouts: Path, rewards: Path
    ) -> tuple[Path, Path]:
        """Add rounds of dynamic sampling: each samples and scores as many further prompts as lack a training signal.

        A round in which no prompt lacks one is empty, and costs nothing. Returns the answers that have a signal, and
        their scores.
        """
        section = self.config.prompts.dynamic_sampling
        assert section is not None
        draws, rounds, scores = [prompts], [rollouts], self.rewards[-1]
        for number in range(2, section.rounds + 2):
            further = {"replaces": list(draws), "judged": list(scores), "margin": section.margin}
            draws.append(self.draw(f"round-{number}/prompts", iteration, **further))
            role = f"round-{number}/generation"
            rounds.append(self.sample(role, sampler, draws[-1], iteration, self.config.generation))
            scores.append(self.score(f"round-{number}/reward", "reward", rounds[-1], iteration))
        fields = {"rounds": rounds, "scores": scores, "margin": section.margin}
        return self.select("selected", iteration, fields)

    def select(self, role: str, iteration: int, fields: dict[str, Any]) -> tuple[Path, Path]:
        """Select some of the answers in several rollouts. Returns them, and their scores."""
        selected = self.graph.add(SELECT, f"{role}/rollouts", fields, iteration=iteration)
        gather = {
            "rollouts": selected,
            "rounds": [*fields["rounds"], *fields.get("earlier", [])],
            "scores": [*fields["scores"], *fields.get("earlier_scores", [])],
        }
        return selected, self.graph.add(SELECT_SCORES, f"{role}/reward", gather, iteration=iteration)

    def replay_answers(self, section: ReplaySection, iteration: int) -> tuple[Path, Path]:
        """An iteration's answers together with some of earlier iterations, and their scores."""
        rollouts, rewards = self.answers[-1]
        earlier = self.answers[:-1][::-1][: section.iterations]
        if not earlier:
            return rollouts, rewards
        fields = {
            "rounds": [rollouts],
            "scores": [rewards],
            "earlier": [path for path, _ in earlier],
            "earlier_scores": [path for _, path in earlier],
            "shares": [section.share(age) for age in range(1, len(earlier) + 1)],
            "seed": derive_seed(self.config.seed, "replay"),
        }
        return self.select("replay", iteration, fields)

    def inputs(self) -> dict[str, Any]:
        """The extra inputs of the user's own algorithm, for every stage that runs it."""
        paths = self.config.training.inputs
        return {"inputs": [self.resolve(path) for path in paths]} if paths else {}

    def pair_data(self, iteration: int, rollouts: Path, rewards: Path, reference_model: Path) -> dict[str, Any]:
        """The training data of an algorithm that reads pairs: the pairs, and reference log-probabilities if needed."""
        config = self.config
        pairs = self.select_pairs("pairs", rollouts, rewards, config.pairs, iteration)
        self.pairs = [*self.pairs, pairs] if config.accumulate or config.replay else [pairs]
        chosen = self.pairs if config.replay is None else [*self.replay(config.replay, iteration), pairs]
        needs_reference = "reference" in config.description.needs
        if needs_reference:
            self.references[pairs, reference_model] = self.reference(
                "reference", rollouts, reference_model, iteration, pairs
            )
        if config.offline is not None:
            chosen = [*chosen, self.offline_pairs(config.offline, iteration, pairs)]
        if not needs_reference:
            return {"pairs": chosen}
        return {"pairs": chosen, "reference": [self.reference_of(made, reference_model, iteration) for made in chosen]}

    def replay(self, section: ReplaySection, iteration: int) -> list[Path]:
        """A share of the pairs of each earlier iteration, oldest first; the pairs themselves if the share is 1."""
        found = []
        for made in self.pairs[:-1]:
            earlier = self.graph.producer(made)
            assert earlier is not None
            assert earlier.iteration is not None
            age = iteration - earlier.iteration
            if section.iterations is not None and age > section.iterations:
                continue
            if section.decay == 1:
                found.append(made)
                continue
            # The seed does not depend on `iteration`, so that a smaller share later is a subset of a larger one before.
            fields = {"rollouts": earlier.path("rollouts"), "pairs": made, "share": section.share(age)}
            fields["seed"] = derive_seed(self.config.seed, earlier.iteration, "replay")
            role = f"replay-of-{folder_of(earlier.iteration)}"
            found.append(self.graph.add(SAMPLE_PAIRS, role, fields, iteration=iteration))
        return found

    def reference_of(self, pairs: Path, reference_model: Path, iteration: int) -> Path:
        """Reference log-probabilities of pairs, recomputed only if the reference model has changed since.

        For a sample of an iteration's pairs, the log-probabilities of all its pairs are used if they exist.
        """
        chosen = self.graph.producer(pairs)
        assert chosen is not None
        assert chosen.iteration is not None
        whole = chosen.path("pairs") if chosen.stage is SAMPLE_PAIRS else pairs
        if (found := self.references.get((whole, reference_model))) is not None:
            return found
        if (pairs, reference_model) not in self.references:
            role = f"reference-of-{folder_of(chosen.iteration) if pairs == whole else chosen.role}"
            self.references[pairs, reference_model] = self.reference(
                role, chosen.path("rollouts"), reference_model, iteration, pairs
            )
        return self.references[pairs, reference_model]

    def offline_pairs(self, section: OfflineSection, iteration: int, pairs: Path) -> Path:
        """Sample offline pairs, as many as it takes for their share next to an iteration's own."""
        assert self.offline is not None
        rollouts, imported = self.offline
        fields = {"rollouts": rollouts, "pairs": imported, "share": section.share, "beside": pairs}
        fields["seed"] = derive_seed(self.config.seed, iteration, "offline")
        return self.graph.add(SAMPLE_PAIRS, "offline", fields, iteration=iteration)

    def import_offline(self, section: OfflineSection) -> tuple[Path, Path]:
        """Import the offline pairs. Returns their answers as rollouts, and the pairs."""
        data = section.model_dump(exclude_unset=True, exclude={"share"})
        data["source"] = self.resolve(section.source)
        fields = {**data, **self.rendering_fields(self.initial, self.config.chat_template_kwargs)}
        # The tokenizer of the config's policy: it never changes, and so mistakes in the pairs show before training.
        fields |= {"tokenizer": self.resolve(self.config.policy), "exclude": [self.heldout_prompts]}
        rollouts = self.graph.add(IMPORT_PREFERENCES, "setup/offline/rollouts", fields)
        scores = self.graph.add(PREFERENCES_SCORES, "setup/offline/scores", {**data, "rollouts": rollouts})
        return rollouts, self.select_pairs("setup/offline/pairs", rollouts, scores, PairsSettings())

    def sample_data(
        self,
        iteration: int,
        rollouts: Path,
        rewards: Path,
        reference_model: Path,
        sampler: Path,
        prompts: Path,
        window: dict[str, Any],
    ) -> dict[str, Any]:
        """The training data of an algorithm that reads samples: experience, with all inputs that the algorithm needs.

        Also adds the training of the critic on this experience, which runs in parallel with that of the policy.
        """
        config = self.config
        needs = config.description.needs
        inputs: dict[str, Path] = {"rollouts": rollouts, "rewards": rewards}
        if "reference" in needs:
            inputs["reference"] = self.reference("reference", rollouts, reference_model, iteration)
        if "greedy" in needs:
            section = config.generation.model_copy(update={"k": 1, "temperatures": [0.0]})
            role = "greedy/generation"
            inputs["greedy_rollouts"] = self.sample(role, sampler, prompts, iteration, section, window)
            inputs["greedy"] = self.score(
                "greedy/reward", "reward", inputs["greedy_rollouts"], iteration, against=rollouts
            )
        if "values" in needs:
            critic = self.latest_critic()
            fields = {"kind": "values", "name": "values", "model": critic, "rollouts": rollouts}
            inputs["values"] = self.graph.add(SCORE, "values", fields, iteration=iteration)
        if config.experience.kl_target is not None and self.experience and not self.resets_kl_coefficient(iteration):
            inputs["previous"] = self.experience
        algorithm = {"algorithm": config.training.algorithm, "settings": config.training.settings}
        fields = set_fields(config.experience) | self.inputs() | algorithm | inputs
        experience = self.graph.add(MAKE_EXPERIENCE, "experience", fields, iteration=iteration)
        self.experience = experience
        if "values" in needs and not config.training.value_head:
            fields = config.critic.model_dump(exclude_unset=True, exclude={"start"}) if config.critic else {}
            fields |= {"model": critic, "experience": experience, "seed": derive_seed(config.seed, iteration, "critic")}
            self.critic = self.graph.add(CRITIC, "critic", fields, iteration=iteration)
        return {"experience": experience}

    def latest_critic(self) -> Path:
        """The model that predicts values: the last policy, if it has a value head, else the last critic; without
        one yet, what critic.start names."""
        if self.config.training.value_head:
            return self.policies[-1] if self.has_value_head else self.untrained_critic()
        if self.critic is not None:
            return self.critic
        start = self.config.critic.start if self.config.critic else None
        start = start or ("reward_model" if self.config.has_reward_model else "policy")
        if start == "policy":
            return self.untrained_critic()
        if start == "reward_model":
            model = self.reward_model or self.config.scorers["reward"].model_path
            assert model is not None  # otherwise the scorer's stage, which was added before, has been refused
            return self.resolve(model)
        return self.resolve(start)

    def untrained_critic(self) -> Path:
        """The initial policy with a zero-initialized value head."""
        name = "setup/critic"
        if name in self.graph.nodes:
            return self.graph.nodes[name].output
        return self.graph.add(VALUE_HEAD, name, {"model": self.initial})

    def resets_kl_coefficient(self, iteration: int) -> bool:
        """Whether `changes` set the KL coefficient in this iteration, so that an adaptive one starts from it again."""
        return "kl_coefficient" in (self.run.changes.get(iteration, {}).get("experience") or {})

    def evaluate(self, iteration: int, policy: Path) -> None:
        """Evaluate a policy on the held-out prompts."""
        heldout = self.heldout_prompts
        rollouts = self.sample("heldout/generation", policy, heldout, iteration, self.config.evaluation)
        if iteration == 0:
            self.initial_answers = rollouts
            paths = {name: self.graph.directory / name_of(0, f"heldout/{name}") for name in self.config.scorers}
            self.standards = {repr(self.scorers_of(name)): path for name, path in paths.items()}
        scores = {
            name: self.score(f"heldout/{name}", name, rollouts, iteration, against=self.initial_answers)
            for name in self.config.scorers
        }
        fields: dict[str, Any] = {"rollouts": rollouts, "scores": scores, "iteration": iteration}
        if self.run.diagnostics or self.run.gates:
            fields["diagnostics"] = True
            if ensemble := self.config.scorers["reward"].ensemble:
                fields["ensemble"] = ensemble
            if self.heldout_answers is not None and not self.config.scorers["reward"].compares:
                fields["previous"] = self.rewards_of(self.heldout_answers, "heldout/previous/reward", iteration)
        self.heldout_answers = rollouts
        self.heldout_rewards[rollouts] = self.scorers_of("reward"), scores["reward"]
        if iteration:
            fields["baseline"] = self.rewards_of(self.initial_answers, "heldout/baseline/reward", iteration)
            fields["reference"] = self.reference("heldout/reference", rollouts, self.initial, iteration)
        self.evaluate_checkpoint(iteration, policy)
        self.evaluations.append(self.graph.add(EVALUATE, "evaluation", fields, iteration=iteration))

    def rewards_of(self, answers: Path, role: str, iteration: int) -> Path:
        """The current reward's scores of earlier held-out answers, recomputed only if the scorers have changed."""
        scorers = self.scorers_of("reward")
        if self.heldout_rewards[answers][0] != scorers:
            rewards = self.score(role, "reward", answers, iteration, against=self.initial_answers)
            self.heldout_rewards[answers] = scorers, rewards
        return self.heldout_rewards[answers][1]

    def evaluate_checkpoint(self, iteration: int, policy: Path) -> None:
        """Evaluate a policy by the user's own evaluations."""
        for name, section in self.config.evaluations.items():
            if iteration % section.every:
                continue
            fields = section.model_dump(exclude_unset=True, exclude={"environment", "every"})
            fields["checkpoint"] = policy
            if section.inputs is not None:
                fields["inputs"] = [self.resolve(path) for path in section.inputs]
            gates = self.run.gates.values()
            if needed := sorted({gate.metric.partition("/")[2] for gate in gates if gate.evaluation == name}):
                fields["needed"] = needed
            role = f"evaluations/{name}"
            self.graph.add(EVALUATE_CHECKPOINT, role, fields, iteration=iteration, environment=section.environment_key)

    def prepare(self) -> None:
        """Add the stages before the first iteration: prompts, and the initial policy and reward model if they are
        trained here."""
        config = self.config
        if config.world is not None:
            self.graph.add(MAKE_WORLD, "setup/world", set_fields(config.world) | {"seed": config.seed})
        self.heldout_prompts = self.import_prompts("prompts/heldout", config.prompts.heldout)
        self.train_prompts = {
            name: self.import_prompts(role, config.prompts.sources[name], [self.heldout_prompts])
            for name, role in config.prompts.import_roles.items()
        }
        self.initial = self.resolve(config.policy)
        if config.sft is not None:
            section = set_fields(config.sft)
            section["demonstrations"] = self.resolve(section["demonstrations"])
            section |= self.rendering_fields(self.initial, config.chat_template_kwargs)
            section |= {"model": self.initial, "seed": derive_seed(config.seed, 0, "sft")}
            self.initial = self.graph.add(SFT, "setup/sft", section)
        self.reward_model = self.train_reward_model() if config.reward_model is not None else None
        self.offline = self.import_offline(config.offline) if config.offline is not None else None

    def train_reward_model(self) -> Path:
        """Sample answers of the initial policy, label them, and train the reward model on the pairs."""
        section = self.config.reward_model
        assert section is not None
        prompts = self.import_prompts("setup/reward-model/prompts", section.prompts, [self.heldout_prompts])
        rollouts = self.sample("setup/reward-model/generation", self.initial, prompts, None, section.generation)
        labels = self.score("setup/reward-model/labels", section.label, rollouts)
        pairs = self.select_pairs("setup/reward-model/pairs", rollouts, labels, section.pairs)
        fields = set_fields(section.training)
        scorer = self.config.scorers[self.config.trained_scorer or "reward"]
        if section.training.kind == "pairwise" and isinstance(scorer, TemplateSettings):
            fields |= self.rendering_fields(self.initial, scorer.chat_template_kwargs)
        fields |= {"model": self.initial, "pairs": [pairs], "seed": derive_seed(self.config.seed, 0, "reward")}
        return self.graph.add(REWARD, "setup/reward-model/training", fields)
