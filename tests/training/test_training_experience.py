"""The experience stage: every number belongs to its token, misfits are refused, the coefficient follows the KL."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import EOS, IDS, SPECIAL, run_cli, run_here

from contracts.artifacts import Artifact
from contracts.config import validate
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import (
    EXPERIENCE,
    ROLLOUTS,
    SCORES,
    Completion,
    ExperienceRow,
    ExperienceSample,
    Message,
    Rollout,
    Sampling,
    Schema,
    Score,
)
from training.config import ExperienceConfig

WORDS = range(len(SPECIAL), len(IDS))
SHARD = 3
"""Prompts per shard."""
VOCABULARY = {"vocabulary": "that of the policy"}
OWN = Sampling(1.0, 1.0, 0, 16)


def publish(target: Path, schema: Schema, rows: list[Any], shards: list[int], **known: Any) -> Artifact:
    """Publish records directly, each in the shard of that number."""
    publication = Publication(target, schema, schema.name, target.name)
    publication.begin()
    for number in range(max([*shards, 2]) + 1):
        mine = [row for row, shard in zip(rows, shards, strict=True) if shard == number]
        ledger = Ledger("rows")
        ledger.keep(len(mine))
        publication.write_rows(f"shard-{number:05d}.jsonl", mine, ledger)
    fields = {"key_parts": {}, "inputs": {}, "input_paths": {}, "weights": "policy", "versions": {}, "seconds": {}}
    return publication.publish(unit="rows", **{**fields, "facts": VOCABULARY, **known})


def make_rollouts(prompts: int, k: int, *, seed: int = 0, sampling: Sampling = OWN) -> list[Rollout]:
    """Random answers of uneven length, some of one token, some truncated."""
    chance = random.Random(seed)
    rows = []
    for number in range(prompts):
        completions = []
        for sample in range(k):
            finished = chance.random() < 0.7
            body = chance.choices(WORDS, k=chance.randint(0 if finished else 1, 9))
            ids = (*body, *((EOS,) if finished else ()))
            logprobs = tuple(-chance.uniform(0, 3) for _ in ids)
            reason = "stop" if finished else "length"
            completions.append(Completion(sample, ids, "", reason, logprobs, sample, sampling))
        prompt = (IDS["<s>"], *chance.choices(WORDS, k=1 + number))
        message = (Message("user", f"prompt {number}"),)
        rows.append(Rollout(f"prompt-{number:03d}", message, prompt, tuple(completions), "policy", 3, "processed"))
    return rows


class World:
    """Published rollouts with everything that an algorithm can need; `change` replaces rows of one of them."""

    def __init__(self, folder: Path, prompts: int = 8, k: int = 3, *, reward: Callable[[int], float] | None = None):
        self.folder = folder
        self.rows = make_rollouts(prompts, k)
        self.chance = random.Random(5)
        self.reward = reward
        self.build()

    def build(self, change: Callable[[str, list[Any]], list[Any]] = lambda name, rows: rows, **facts: Any) -> None:
        """Publish all anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        place = {row.prompt_id: number // SHARD for number, row in enumerate(self.rows)}
        rollouts = change("rollouts", self.rows)
        self.rollouts = publish(
            self.folder / "rollouts", ROLLOUTS, rollouts, [place[row.prompt_id] for row in rollouts]
        )
        greedy = change("greedy_rollouts", [self.greedy_answer(row) for row in self.rows])
        self.greedy = publish(
            self.folder / "greedy_rollouts", ROLLOUTS, greedy, [place[row.prompt_id] for row in greedy]
        )
        for name in ("rewards", "reference", "values", "greedy"):
            source = greedy if name == "greedy" else self.rows
            rows = change(name, [self.score(name, row, c) for row in source for c in row.completions])
            self.chance.shuffle(rows)  # scores are joined by their keys, whatever their order in the shard
            made_from = (self.greedy if name == "greedy" else self.rollouts).manifest.digest
            publish(
                self.folder / name,
                SCORES,
                rows,
                [place.get(row.prompt_id, 0) for row in rows],
                inputs={"rollouts": made_from},
                facts=facts.get(name, VOCABULARY),
            )

    @staticmethod
    def greedy_answer(row: Rollout) -> Rollout:
        first = msgspec.structs.replace(row.completions[0], sampling=Sampling(0.0, 1.0, 0, 16))
        return msgspec.structs.replace(row, completions=(first,))

    def score(self, name: str, row: Rollout, completion: Completion) -> Score:
        highest = -2 if name == "reference" else 0
        numbers = tuple(self.chance.uniform(highest - 3, highest) for _ in completion.response_ids)
        tokens = {"reference": "token_logprobs", "values": "token_values"}.get(name)
        reward = self.chance.uniform(-1, 1) if self.reward is None else self.reward(completion.sample)
        return Score(row.prompt_id, completion.sample, reward, **({tokens: numbers} if tokens else {}))

    def settings(self, algorithm: str, output: str, **changes: Any) -> dict[str, Any]:
        """The configuration of an algorithm's experience."""
        needs = {
            "ppo": ("reference", "values"), "grpo": ("reference",), "rloo": ("reference",), "raft": (),
            "remax": ("reference", "greedy", "greedy_rollouts"),
        }.get(algorithm, ())  # fmt: skip
        inputs = {name: self.folder / name for name in ("rollouts", "rewards", *needs)}
        return {"algorithm": algorithm, "output": self.folder / output, **inputs, **changes}

    def run(self, algorithm: str, output: str = "out", **changes: Any) -> Artifact:
        """Run the stage here."""
        return run_here("experience", **self.settings(algorithm, output, **changes))

    def numbers(self, name: str) -> dict[tuple[str, int], Score]:
        """Published scores by their keys."""
        return {(row.prompt_id, row.sample): row for row in Artifact.open(self.folder / name).rows(Score)}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


def samples_of(artifact: Artifact) -> dict[tuple[str, int], ExperienceSample]:
    return {(row.prompt_id, sample.sample): sample for row in artifact.rows(ExperienceRow) for sample in row.samples}


def drop(name: str, *keys: tuple[int, int]) -> Callable[[str, list[Any]], list[Any]]:
    """Leave out the scores of some (prompt number, sample)."""
    gone = {(f"prompt-{prompt:03d}", sample) for prompt, sample in keys}
    return lambda what, rows: [row for row in rows if what != name or (row.prompt_id, row.sample) not in gone]


def test_every_number_belongs_to_its_token(world: World) -> None:
    """PPO's advantages of each sample, computed again from that sample's own published numbers alone."""
    gamma, lam, beta = 0.97, 0.9, 0.3
    made = world.run("ppo", settings={"gamma": gamma, "lam": lam, "whiten": False}, kl_coefficient=beta)
    found = samples_of(made)
    rewards, reference, values = (world.numbers(name) for name in ("rewards", "reference", "values"))
    lengths = set()
    for row in made.rows(ExperienceRow):
        (rollout,) = (rollout for rollout in world.rows if rollout.prompt_id == row.prompt_id)
        assert (row.prompt_ids, row.policy, row.iteration) == (rollout.prompt_ids, "policy", 3)
    for rollout in world.rows:
        for completion in rollout.completions:
            key = (rollout.prompt_id, completion.sample)
            sample = found.pop(key)
            assert sample.response_ids == completion.response_ids
            assert sample.finish_reason == completion.finish_reason
            assert sample.behaviour == completion.logprobs
            assert sample.reference == reference[key].token_logprobs
            assert sample.values == values[key].token_values
            assert sample.reward == rewards[key].score
            length = len(completion.response_ids)
            lengths.add(length)
            following = following_value = 0.0
            expected = [0.0] * length
            for token in reversed(range(length)):
                reward = -beta * (sample.behaviour[token] - sample.reference[token])
                reward += sample.reward if token == length - 1 else 0.0
                delta = reward + gamma * following_value - sample.values[token]
                expected[token] = following = delta + gamma * lam * following
                following_value = sample.values[token]
            assert sample.advantages == pytest.approx(expected, abs=1e-12)
            assert sample.returns == pytest.approx([a + v for a, v in zip(expected, sample.values, strict=True)])
    assert not found
    assert {1} < lengths
    manifest = made.manifest
    assert manifest.schema == EXPERIENCE
    assert manifest.weights == "policy"
    assert manifest.ledger.kept == manifest.ledger.rows_in == 24
    assert manifest.rows == 8


def test_facts(world: World) -> None:
    made = world.run("ppo", kl_coefficient=0.1, settings={"whiten": False})
    found = list(samples_of(made).values())
    facts = made.manifest.facts
    mean = sum(sample.reward for sample in found) / 24
    kl = sum(sum(sample.behaviour) - sum(sample.reference) for sample in found) / 24
    advantages = [number for sample in found for number in sample.advantages]
    assert facts["reward_mean"] == pytest.approx(mean)
    assert facts["reward_std"] == pytest.approx((sum((s.reward - mean) ** 2 for s in found) / 24) ** 0.5)
    assert facts["kl"] == pytest.approx(kl)
    assert facts["kl_coefficient"] == 0.1
    assert facts["samples"] == 24
    assert facts["prompts"] == 8
    assert facts["zero_variance_prompts"] == 0
    assert facts["truncation_rate"] == sum(sample.finish_reason == "length" for sample in found) / 24
    assert facts["response_length_mean"] == pytest.approx(len(advantages) / 24)
    assert facts["advantage_mean"] == pytest.approx(sum(advantages) / len(advantages))
    assert facts["advantage_min"] == min(advantages)
    assert facts["advantage_max"] == max(advantages)
    assert facts["explained_variance"] < 1


def test_prompts_whose_rewards_are_all_equal_are_counted(tmp_path: Path) -> None:
    equal = World(tmp_path / "equal", reward=lambda sample: 0.5).run("grpo")
    assert equal.manifest.facts["zero_variance_prompts"] == 8
    assert equal.manifest.facts["reward_std"] == 0
    single = World(tmp_path / "single", k=1).run("grpo")
    assert single.manifest.facts["zero_variance_prompts"] == 0


def test_samples_without_a_score_or_a_token_are_dropped_and_counted(world: World) -> None:
    """Their prompt may lose all of its samples, and the numbers of the others stay with their tokens."""
    first = world.rows[0]
    empty = msgspec.structs.replace(first.completions[2], response_ids=(), logprobs=())
    world.rows[0] = msgspec.structs.replace(first, completions=(*first.completions[:2], empty))
    gone = drop("rewards", (1, 0), (2, 0), (2, 1), (2, 2))
    world.build(lambda name, rows: drop("values", (4, 1))(name, gone(name, rows)))
    with pytest.raises(UserError, match=r"24 samples in = 18 kept \+ 1 empty \+ 4 no_rewards \+ 1 no_values is more"):
        world.run("ppo")
    made = world.run("ppo", max_dropped=0.5)
    assert made.manifest.ledger.dropped == {"empty": 1, "no_rewards": 4, "no_values": 1}
    assert made.manifest.rows == 7
    rewards, values = world.numbers("rewards"), world.numbers("values")
    found = samples_of(made)
    assert len(found) == 18
    for key, sample in found.items():
        assert sample.reward == rewards[key].score
        assert sample.values == values[key].token_values
    world.build(lambda name, rows: [] if name == "rewards" else rows)
    with pytest.raises(UserError, match=r"no sample of .* can be used: 24 samples in = 0 kept"):
        world.run("raft", "none")


def test_what_the_algorithm_leaves_out_is_counted(world: World) -> None:
    made = world.run("raft")
    best = {row.prompt_id: max(world.rows[0].completions, key=lambda c: 0).sample for row in world.rows}
    rewards = world.numbers("rewards")
    for prompt in best:
        best[prompt] = max(range(3), key=lambda sample: rewards[prompt, sample].score)
    assert samples_of(made).keys() == set(best.items())
    assert made.manifest.ledger.dropped == {"not_kept": 16}
    sample = next(iter(samples_of(made).values()))
    assert (sample.reference, sample.values, sample.returns) == (None, None, None)


def test_the_greedy_answer_is_each_prompts_baseline(world: World) -> None:
    made = world.run("remax", kl_coefficient=0.0)
    greedy, rewards = world.numbers("greedy"), world.numbers("rewards")
    for key, sample in samples_of(made).items():
        difference = rewards[key].score - greedy[key[0], 0].score
        assert sample.advantages == pytest.approx([difference] * len(sample.advantages))
    world.build(drop("greedy", (3, 0)))
    assert world.run("remax", "fewer", max_dropped=0.5).manifest.ledger.dropped == {"no_greedy": 3}


def test_the_coefficient_follows_the_divergence(world: World) -> None:
    """Ziegler et al. 2019, section 2.2, over three iterations: by a fifth at most, in proportion to the samples."""
    kl = world.run("ppo", "first", kl_coefficient=0.1, kl_target=1.0).manifest.facts["kl"]
    assert world.run("ppo", "first", kl_coefficient=0.1, kl_target=1.0).manifest.facts["kl_coefficient"] == 0.1
    for name, target, horizon, factor in (
        ("near", kl * 0.9, 48, 1 + (1 / 0.9 - 1) * 24 / 48),
        ("far", kl * 0.1, 48, 1 + 0.2 * 24 / 48),
        ("below", kl * 10, 24, 1 - 0.2),
        ("long", kl * 10, 1, 1 - 0.2),
    ):
        changes = {"kl_target": target, "kl_horizon": horizon}
        second = world.run("ppo", name, kl_coefficient=7.0, previous=world.folder / "first", **changes)
        assert second.manifest.facts["kl_coefficient"] == pytest.approx(0.1 * factor)
        third = world.run("ppo", f"{name}-third", previous=world.folder / name, **changes)
        assert third.manifest.facts["kl_coefficient"] == pytest.approx(0.1 * factor**2)
    assert kl > 0


def change_row(name: str, number: int, **fields: Any) -> Callable[[str, list[Any]], list[Any]]:
    """Change one row of what is published under `name`."""

    def change(what: str, rows: list[Any]) -> list[Any]:
        if what == name:
            rows = [*rows[:number], msgspec.structs.replace(rows[number], **fields), *rows[number + 1 :]]
        return rows

    return change


def change_completion(**fields: Any) -> Callable[[str, list[Any]], list[Any]]:
    """Change the first answer of the second prompt."""

    def change(what: str, rows: list[Any]) -> list[Any]:
        if what == "rollouts":
            first, *others = rows[1].completions
            completions = (msgspec.structs.replace(first, **fields), *others)
            rows = [rows[0], msgspec.structs.replace(rows[1], completions=completions), *rows[2:]]
        return rows

    return change


@pytest.mark.parametrize(
    ("algorithm", "change", "complaint"),
    [
        ("ppo", change_row("values", 4, token_values=(0.5,) * 30), r"values=.*sample 1 has 30 numbers for \d+ resp"),
        ("ppo", change_row("reference", 0, token_logprobs=()), r"reference=.*prompt-000, sample 0 has 0 numbers"),
        ("ppo", change_row("reference", 0, token_logprobs=None), "has no number per token.*kind logprobs"),
        ("ppo", change_row("values", 5, token_values=None), "has no number per token.*kind values"),
        ("ppo", change_row("rewards", 0, token_logprobs=(-1.0,)), "rewards=.* holds log-probabilities or values"),
        ("ppo", change_row("rewards", 1, sample=0), "prompt-000, sample 0 is scored twice"),
        ("ppo", change_row("values", 1, sample=7), "scores prompt prompt-000, sample 7, which .* does not hold"),
        ("ppo", change_row("reference", 0, prompt_id="other"), "scores prompt other"),
        ("ppo", change_row("rollouts", 1, prompt_id="prompt-000"), "prompt-000 occurs twice"),
        ("ppo", change_completion(logprobs=(-1.0,) * 20), r"logprobs has 20 numbers for \d+ response tokens"),
        ("ppo", change_completion(logprobs=()), "has no log-probabilities of the policy that sampled it"),
        ("ppo", change_completion(sampling=None), "has no log-probabilities of the policy that sampled it"),
        ("ppo", change_row("rollouts", 0, policy="imported"), "as imported answers have none"),
        ("ppo", change_completion(sampling=Sampling(0.7, 1.0, 0, 16)), r"temperature=0\.7.*not from the policy's own"),
        ("raft", change_completion(sampling=Sampling(1.0, 0.9, 0, 16)), r"top_p=0\.9.*Generate with"),
        ("grpo", change_completion(sampling=Sampling(1.0, 1.0, 50, 16)), "top_k=50"),
        (
            "raft",
            lambda name, rows: drop("rewards", (1, 0))(name, change_completion(sample=1)(name, rows)),
            "two samples with the same index",
        ),
        ("remax", change_row("greedy_rollouts", 2, prompt_ids=(1, 2)), "other token ids for prompt prompt-002"),
        ("remax", lambda name, rows: rows if name != "greedy_rollouts" else make_rollouts(8, 1), "exactly one greedy"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_same_tokens_is_refused(
    world: World, algorithm: str, change: Callable[[str, list[Any]], list[Any]], complaint: str
) -> None:
    world.build(change)
    with pytest.raises(UserError, match=complaint):
        world.run(algorithm)
    assert not (world.folder / "out").exists()
    assert not list(world.folder.glob(".out*"))


@pytest.mark.parametrize("name", ["rewards", "reference", "values", "greedy"])
def test_scores_of_other_rollouts_are_refused(world: World, tmp_path: Path, name: str) -> None:
    """The same prompts and samples, of another iteration."""
    other = World(tmp_path / "other")
    other.rows = make_rollouts(8, 3, seed=1)
    other.build()
    algorithm = "remax" if name == "greedy" else "ppo"
    with pytest.raises(UserError, match="was made from other rollouts than"):
        world.run(algorithm, **{name: other.folder / name})
    with pytest.raises(UserError, match=r"holds scores v1; expected rollouts v1"):
        world.run(algorithm, rollouts=world.folder / "rewards")


@pytest.mark.parametrize("name", ["reference", "values"])
def test_models_of_another_or_an_unknown_vocabulary_are_refused(world: World, name: str) -> None:
    for facts in ({}, {"vocabulary": "another"}):
        world.build(**{name: facts})
        with pytest.raises(UserError, match=f"{name}=.* does not say that its model has the vocabulary"):
            world.run("ppo")


def test_greedy_answers_of_another_policy_or_judge_are_refused(world: World, tmp_path: Path) -> None:
    rows = [World.greedy_answer(row) for row in world.rows]
    other = publish(tmp_path / "other", ROLLOUTS, rows, [number // SHARD for number in range(8)], weights="another")
    scores = publish(tmp_path / "scores", SCORES, [], [], inputs={"rollouts": other.manifest.digest})
    with pytest.raises(UserError, match="is of another policy"):
        world.run("remax", greedy=scores.path, greedy_rollouts=other.path)
    parts = {"config": {"kind": "rule", "function": "other.py:score"}}
    made_from = {"rollouts": world.greedy.manifest.digest}
    judged = publish(tmp_path / "judged", SCORES, [], [], inputs=made_from, key_parts=parts)
    with pytest.raises(UserError, match="not by the same scorer"):
        world.run("remax", greedy=judged.path)


ALGORITHM = """
import torch
from training.algorithm import Advantages

READS = "samples"
NEEDS = ()


def advantages(experience, *, scale: float = 1.0):
    ones = torch.ones_like(experience.behaviour)
    return {returned}


def loss(batch):
    return {{"loss": batch.token_mean(-batch.logprobs)}}
"""


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        ("ones", "returned Tensor; it must return"),
        ("Advantages(ones[1:])", r"advantages of shape \(\d+,\); expected \(\d+,\)"),
        ("Advantages(ones / (ones - 1))", "advantages that are not finite, first inf for a token of response 0"),
        ("Advantages(ones, returns=ones)", 'returned `returns`, but NEEDS do not contain "values"'),
        ("Advantages(ones, keep=experience.rewards > 9)", r"keeps no sample of .* \(24 samples in = 0 kept \+ 24 not"),
        ("Advantages(ones, keep=experience.rewards)", r"keep of torch.float64; it must be booleans"),
        ("Advantages(ones, keep=ones > 0)", "returned keep of shape"),
    ],
)
def test_what_a_users_algorithm_returns_is_checked(world: World, tmp_path: Path, returned: str, complaint: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ALGORITHM.format(returned=returned))
    with pytest.raises(UserError, match=complaint):
        world.run(str(file))


def test_a_users_algorithm_is_part_of_the_key(world: World, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(ALGORITHM.format(returned="Advantages(scale * ones)"))
    made = world.run(str(file), settings={"scale": 3.0})
    assert {number for sample in samples_of(made).values() for number in sample.advantages} == {3.0}
    assert made.manifest.key_parts["sources"].keys() == {"algorithm"}
    file.write_text(file.read_text() + "\n# another\n")
    with pytest.raises(UserError, match="was published by another run"):
        world.run(str(file), settings={"scale": 3.0})


@pytest.mark.parametrize(
    ("algorithm", "changes", "complaint"),
    [
        ("dpo", {}, "reads pairs, not samples"),
        ("ppo", {"values": None}, "needs values: set values=PATH"),
        ("remax", {"greedy_rollouts": None}, "needs greedy: set greedy_rollouts=PATH"),
        ("grpo", {"values": "values"}, "needs no values: leave values out"),
        ("raft", {"kl_coefficient": 0.1}, "needs no reference, so there is no KL"),
        ("raft", {"kl_target": 0.1}, "needs no reference, so there is no KL"),
        ("ppo", {"previous": "out"}, "set kl_target, or leave previous out"),
        ("ppo", {"kl_target": 1.0, "kl_coefficient": 0.0}, "must not begin at 0"),
        ("ppo", {"settings": {"lamda": 1.0}}, r"no setting 'lamda'.* Did you mean 'lam'"),
        ("pppo", {}, r"there is no algorithm 'pppo'.* Did you mean 'ppo'"),
    ],
)
def test_mistaken_configurations(world: World, algorithm: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        validate(ExperienceConfig, world.settings(algorithm, "out", **changes), "test")


def test_a_penalty_that_an_algorithm_does_not_have_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="algorithm=grpo puts no KL penalty into the reward"):
        validate(ExperienceConfig, world.settings("grpo", "out", kl_coefficient=0.1), "test")
    own = world.folder / "own.py"
    constants = 'READS = "samples"\nNEEDS = ("reference",)\n'
    own.write_text(f"from training.algorithms.grpo import advantages, loss\n{constants}")
    with pytest.raises(UserError, match=r"own\.py' puts no KL penalty into the reward"):  # which only a run can tell
        world.run(str(own), kl_coefficient=0.1, reference=world.folder / "reference")
    made = world.run("grpo")
    assert made.manifest.facts["kl_coefficient"] is None
    with pytest.raises(UserError, match="has no KL divergence and coefficient to continue from"):
        world.run("ppo", "next", kl_target=1.0, previous=made.path)


def test_the_command_gives_the_same_bytes_again_and_reuses_them(world: World) -> None:
    here = world.run("ppo", "here")
    arguments = [f"{name}={world.folder / name}" for name in ("rollouts", "rewards", "reference", "values")]
    command = ["experience", "algorithm=ppo", *arguments, f"output={world.folder / 'there'}"]
    assert "published" in run_cli(*command).stdout
    assert "reuse" in run_cli(*command).stdout
    assert Artifact.open(world.folder / "there", EXPERIENCE).manifest.digest == here.manifest.digest


def test_settings_of_the_loss_alone_change_no_experience(world: World) -> None:
    made = world.run("ppo", settings={"gamma": 0.9})
    again = world.run("ppo", settings={"gamma": 0.9, "clip": 0.1})
    assert again.manifest.created == made.manifest.created
    with pytest.raises(UserError, match="was published by another run"):
        world.run("ppo", settings={"gamma": 0.8})


@pytest.mark.parametrize("which", ["tied", "gqa"])
def test_a_critic_that_knows_nothing_says_0_and_is_the_model_otherwise(
    models: dict[str, Path], tmp_path: Path, which: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    made = run_here("value-head", model=models[which], output=tmp_path / "critic")
    critic = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    policy = AutoModelForCausalLM.from_pretrained(models[which]).eval()
    ids = torch.tensor([[1, 7, 9, EOS]])
    with torch.no_grad():
        assert critic(ids).logits.tolist() == [[0.0]]
        assert torch.equal(critic.model(ids).last_hidden_state, policy.model(ids).last_hidden_state)
    assert made.manifest.weights is not None
    with pytest.raises(UserError, match="must be a causal language model"):
        run_here("value-head", model=made.path, output=tmp_path / "again")


TOKEN_REWARDS = """\
from training.algorithm import Advantages
READS = "samples"
NEEDS = ("token_rewards",)
def advantages(experience):
    marked = experience.tagged("math").double() + 2 * experience.truncated.double()
    return Advantages(experience.token_rewards + 100 * marked[experience.response_of_token])
def loss(batch): ...
"""


def test_rewards_of_tokens_tags_and_truncation_reach_an_algorithm(world: World) -> None:
    algorithm = world.folder.parent / "mine.py"
    algorithm.write_text(TOKEN_REWARDS)

    def change(name: str, rows: list[Any]) -> list[Any]:
        if name == "rollouts":
            return [
                msgspec.structs.replace(row, tags=("math",) if number % 2 else ()) for number, row in enumerate(rows)
            ]
        if name == "rewards":
            return [msgspec.structs.replace(row, token_rewards=made[row.prompt_id, row.sample]) for row in rows]
        return rows

    chance = random.Random(3)
    completions = {(row.prompt_id, each.sample): each for row in world.rows for each in row.completions}
    made = {key: tuple(chance.uniform(-1, 1) for _ in each.response_ids) for key, each in completions.items()}
    world.build(change)
    found = world.run(str(algorithm))
    tags = {row.prompt_id: row.tags for row in found.rows(ExperienceRow)}
    assert set(tags.values()) == {("math",), msgspec.UNSET}
    for key, sample in samples_of(found).items():
        marked = (tags[key[0]] == ("math",)) + 2 * (completions[key].finish_reason == "length")
        assert sample.advantages == pytest.approx([reward + 100 * marked for reward in made[key]])

    world.build(lambda name, rows: rows)
    with pytest.raises(UserError, match="has no reward per token, which the algorithm needs"):
        world.run(str(algorithm), "without")
    first = next(iter(made))
    made[first] = (*made[first], 0.5)
    world.build(change)
    with pytest.raises(UserError, match=r"has \d+ numbers for \d+ response tokens; there must be one for each"):
        world.run(str(algorithm), "odd")
