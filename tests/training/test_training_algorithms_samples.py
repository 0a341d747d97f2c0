"""The losses and advantages on scored samples: against TRL's own code, and against formulas written as plain loops."""

import importlib
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.algorithm import Advantages, Experience, Metrics, Samples
from training.algorithms import parts
from training.algorithms import ppo as ppo_module
from training.registry import BUILT_IN, describe

SAMPLES = [name for name in BUILT_IN if describe(name).reads == "samples"]
EDGES = ["random 0", "random 1", "random 2", "one token", "one response", "alone", "far", "fresh"]
ADVANTAGE_EDGES = [*EDGES, "same rewards", "same values"]
PER_TOKEN = (
    "logprobs",
    "entropy",
    "proximal",
    "behaviour",
    "advantages",
    "reference",
    "values",
    "old_values",
    "returns",
)


class Data:
    """Samples of a step, flat: groups of 3 responses to one prompt, of 1 to 7 tokens."""

    def __init__(self, edge: str, dtype: torch.dtype = torch.float64) -> None:
        random = torch.Generator().manual_seed(int(edge.split()[1]) if edge.startswith("random") else 5)
        count = 1 if edge == "one response" else 6
        self.lengths = torch.randint(1, 8, (count,), generator=random)
        if edge == "one token":
            self.lengths[:] = 1
        self.prompts = torch.arange(count) if edge == "alone" else torch.arange(count) // 3
        tokens = int(self.lengths.sum())

        def noise(scale: float, size: int = tokens) -> Tensor:
            return (scale * torch.randn(size, generator=random, dtype=torch.float64)).to(dtype)

        self.proximal = -(torch.rand(tokens, generator=random, dtype=torch.float64) * 3 + 0.05).to(dtype)
        self.logprobs = self.proximal + noise(0.3)
        self.behaviour = self.proximal + noise(0.2)
        self.reference = self.proximal + noise(0.5)
        if edge == "fresh":  # the first step: nothing has moved
            self.logprobs = self.behaviour = self.reference = self.proximal
        if edge == "far":
            self.logprobs = self.proximal + 1e4 * torch.sign(noise(1.0))
            self.reference = self.logprobs + 1e4 * torch.sign(noise(1.0))
            self.behaviour = self.proximal + 1e4 * torch.sign(noise(1.0))
        self.entropy = noise(1.0).abs()
        self.old_values = noise(1.0)
        self.values = self.old_values + noise(0.3)
        self.advantages = noise(1.0)
        self.returns = noise(1.0)
        self.rewards, self.greedy = noise(2.0, count), noise(2.0, count)
        if edge == "same rewards":
            self.rewards[:] = 0.1
        if edge == "same values":
            self.old_values[:] = 0.3

    @property
    def responses(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def rows(self, flat: Tensor) -> list[np.ndarray]:
        """One array per response."""
        return [row.detach().numpy() for row in flat.split(self.lengths.tolist())]

    def padded(self, flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(flat.split(self.lengths.tolist()), batch_first=True)

    @property
    def mask(self) -> Tensor:
        return self.padded(torch.ones(len(self.proximal), dtype=torch.long))

    def experience(self, **changes: Any) -> Experience:
        fields = {"behaviour": self.behaviour, "reference": self.reference, "values": self.old_values}
        return Experience(
            rewards=self.rewards,
            prompts=self.prompts,
            lengths=self.lengths,
            greedy=self.greedy,
            kl_coefficient=0.15,
            **(fields | changes),
        )

    def batch(self, leaves: dict[str, Tensor], chosen: list[int], fill: int) -> Samples:
        tokens = torch.cat([torch.nonzero(self.responses == row).flatten() for row in chosen])
        weights = torch.ones(len(chosen), dtype=self.proximal.dtype)
        weights[len(chosen) - fill :] = 0
        flat = {name: getattr(self, name)[tokens] for name in PER_TOKEN}
        return Samples(
            **(flat | {name: leaf[tokens] for name, leaf in leaves.items()}),
            lengths=self.lengths[chosen],
            weights=weights,
            total=len(self.lengths),
            total_tokens=len(self.proximal),
        )

    def ours(
        self, name: str, split: list[tuple[list[int], int]] | None = None, **settings: Any
    ) -> tuple[Metrics, dict[str, Tensor]]:
        """The metrics of a step in some micro-batches (rows, how many only fill up), and the gradients of the loss."""
        module = importlib.import_module(f"training.algorithms.{name}")
        values = describe(name).defaults | settings
        leaves = {key: getattr(self, key).clone().requires_grad_() for key in ("logprobs", "entropy", "values")}
        metrics: Metrics = {}
        for rows, fill in split or [(list(range(len(self.lengths))), 0)]:
            shares = module.loss(self.batch(leaves, rows, fill), **describe(name).arguments("loss", values))
            for key, value in shares.items():
                metrics[key] = metrics.get(key, 0) + value
        metrics["loss"].backward()
        return metrics, {
            key: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for key, leaf in leaves.items()
        }


def advantages(name: str, experience: Experience, **settings: Any) -> Advantages:
    module = importlib.import_module(f"training.algorithms.{name}")
    values = describe(name).defaults | settings
    found = module.advantages(experience, **describe(name).arguments("advantages", values))
    assert isinstance(found, Advantages)
    return found


def same(found: Any, expected: Any) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(np.asarray(expected)).to(torch.as_tensor(found).dtype)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


# Advantages, as loops over responses and tokens.


def token_rewards(data: Data, coefficient: float = 0.15) -> list[list[float]]:
    found = []
    for pi, reference, reward in zip(data.rows(data.behaviour), data.rows(data.reference), data.rewards, strict=True):
        row = [-coefficient * (p - q) for p, q in zip(pi, reference, strict=True)]
        row[-1] += float(reward)
        found.append(row)
    return found


def estimate(rewards: list[float], values: Any, gamma: float, lam: float) -> list[float]:
    """GAE as the paper defines it: the sum over all later steps of (gamma lam)^l delta_{t+l}."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [
        sum((gamma * lam) ** (later - step) * deltas[later] for later in range(step, len(deltas)))
        for step in range(len(deltas))
    ]


def normalised(values: list[float]) -> np.ndarray:
    array = np.array(values)
    variance = np.var(array, ddof=1) if len(array) > 1 else 0.0
    return (array - array.mean()) / np.sqrt(variance + 1e-8)


def others(data: Data, row: int, values: Any) -> list[float]:
    return [values[i] for i in range(len(values)) if data.prompts[i] == data.prompts[row] and i != row]


@pytest.mark.parametrize("edge", ADVANTAGE_EDGES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("name", ["ppo", "decoupled_ppo"])
def test_ppo_advantages(name: str, gamma: float, lam: float, edge: str) -> None:
    data = Data(edge)
    expected: list[float] = []
    for rewards, values in zip(token_rewards(data), data.rows(data.old_values), strict=True):
        expected += estimate(rewards, values, gamma, lam)
    plain = advantages(name, data.experience(), gamma=gamma, lam=lam, whiten=False)
    same(plain.advantages, expected)
    same(plain.returns, np.array(expected) + data.old_values.numpy())
    whitened = advantages(name, data.experience(), gamma=gamma, lam=lam)
    same(whitened.advantages, normalised(expected))
    same(whitened.returns, plain.returns)


@pytest.mark.parametrize("edge", ADVANTAGE_EDGES)
def test_ppo_on_rewards_of_tokens(edge: str) -> None:
    data = Data(edge)
    given = torch.sin(torch.arange(len(data.behaviour), dtype=data.behaviour.dtype))
    expected: list[float] = []
    rows = zip(
        data.rows(data.behaviour), data.rows(data.reference), data.rows(given), data.rows(data.old_values), strict=True
    )
    for pi, reference, rewards, values in rows:
        expected += estimate([float(r - 0.15 * (p - q)) for p, q, r in zip(pi, reference, rewards, strict=True)],
                             values, 0.9, 0.8)  # fmt: skip
    found = advantages("process_ppo", data.experience(token_rewards=given), gamma=0.9, lam=0.8, whiten=False)
    same(found.advantages, expected)
    same(found.returns, np.array(expected) + data.old_values.numpy())


@pytest.mark.parametrize("edge", ADVANTAGE_EDGES)
def test_advantages_within_groups(edge: str) -> None:
    data = Data(edge)
    rewards = data.rewards.tolist()
    returns = [sum(row) for row in token_rewards(data)]
    count = len(rewards)
    relative, normal, left_out = [], [], []
    for row in range(count):
        group = [*others(data, row, rewards), rewards[row]]
        relative.append(rewards[row] - np.mean(group))
        deviation = np.std(group, ddof=1) if len(group) > 1 else 0.0
        normal.append((rewards[row] - np.mean(group)) / (deviation + 1e-4))
        rest = others(data, row, returns)
        left_out.append(returns[row] - np.mean(rest) if rest else 0.0)
    for name, expected in (("dr_grpo", relative), ("grpo", normal), ("rloo", left_out)):
        same(advantages(name, data.experience()).advantages, np.repeat(expected, data.lengths.tolist()))


@pytest.mark.parametrize("edge", ADVANTAGE_EDGES)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_advantages_from_returns(gamma: float, edge: str) -> None:
    data = Data(edge)
    plus, minus = [], []
    for rewards, greedy in zip(token_rewards(data), data.greedy.tolist(), strict=True):
        plus += [sum(gamma ** (j - i) * rewards[j] for j in range(i, len(rewards))) for i in range(len(rewards))]
        minus += [sum(rewards[i:]) - greedy for i in range(len(rewards))]
    same(advantages("reinforce_pp", data.experience(), gamma=gamma).advantages, normalised(plus))
    same(advantages("remax", data.experience()).advantages, minus)


@pytest.mark.parametrize("edge", ADVANTAGE_EDGES)
def test_raft_keeps_the_first_of_the_best(edge: str) -> None:
    data = Data(edge)
    if edge == "random 1":  # a tie
        data.rewards[1] = data.rewards[2] = data.rewards[0] + 1
    rewards = data.rewards.tolist()
    best: dict[int, int] = {}
    for row, prompt in enumerate(data.prompts.tolist()):
        if prompt not in best or rewards[row] > rewards[best[prompt]]:
            best[prompt] = row
    found = advantages("raft", data.experience())
    assert found.keep is not None
    assert torch.nonzero(found.keep).flatten().tolist() == sorted(best.values())
    assert (edge != "random 1") or found.keep.tolist()[:3] == [False, True, False]


# Losses against TRL's trainers.


def trl_stub(data: Data, leaf: Tensor, entropy: Tensor, **attributes: Any) -> SimpleNamespace:
    def same(value: Tensor, *_: Any, **__: Any) -> Tensor:
        return value

    def per_token(*_: Any, **__: Any) -> tuple[Tensor, Tensor, None]:
        return data.padded(leaf), data.padded(entropy), None

    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1, gather=same, reduce=same),
        _metrics=metrics,
        _get_per_token_logps_and_entropies=per_token,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        **attributes,
    )


def trl_inputs(data: Data) -> dict[str, Tensor]:
    mask = data.mask
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    return {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask}


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "far"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", {"beta": 0.0}),
        ("grpo", {"beta": 0.3, "clip_high": 0.28}),
        ("grpo", {"beta": 0.3, "clip": 0.1, "importance_cap": 1.1, "entropy_coefficient": 0.2}),
        ("dr_grpo", {"max_tokens": 9}),
        ("dr_grpo", {"max_tokens": 9, "clip_high": 0.28, "importance_cap": 1.1}),
        ("cispo", {"clip_high": 0.1}),
        ("cispo", {"clip_high": 0.3, "importance_cap": 1.1, "entropy_coefficient": 0.2}),
    ],
)
def test_grpo_dr_grpo_and_cispo_equal_trl(name: str, settings: dict[str, Any], edge: str) -> None:
    from trl import GRPOTrainer

    data = Data(edge)
    # One advantage per response.
    data.advantages = data.advantages[data.lengths.cumsum(0) - 1].repeat_interleave(data.lengths)
    metrics, gradients = data.ours(name, **settings)
    leaf, entropy = (getattr(data, key).clone().requires_grad_() for key in ("logprobs", "entropy"))
    clip, cap = settings.get("clip", 0.2), settings.get("importance_cap", 0.0)
    trainer = trl_stub(
        data,
        leaf,
        entropy,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        loss_type=name,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        beta=settings.get("beta", 0.0),
        epsilon_low=clip,
        epsilon_high=settings.get("clip_high", clip) + (name == "cispo"),  # there, the greatest weight itself
        use_vllm=bool(cap),
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        max_completion_length=settings.get("max_tokens"),
        _entropy_bonus_enabled="entropy_coefficient" in settings,
        use_adaptive_entropy=False,
        entropy_coef=settings.get("entropy_coefficient"),
    )
    trainer.accelerator.sync_gradients = True
    inputs = trl_inputs(data) | {
        "advantages": data.advantages[data.lengths.cumsum(0) - 1],
        "num_items_in_batch": torch.tensor(float(len(data.proximal))),
        "old_per_token_logps": data.padded(data.proximal),
        "ref_per_token_logps": data.padded(data.reference),
        "importance_sampling_ratio": (data.padded(data.proximal) - data.padded(data.behaviour)).exp().clamp(max=cap),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    same(metrics["loss"].detach(), loss.detach())
    same(gradients["logprobs"], leaf.grad)
    same(gradients["entropy"], torch.zeros_like(leaf) if entropy.grad is None else entropy.grad)
    if name != "cispo":  # TRL counts tokens of negative advantages apart
        same(metrics["clip_fraction"], trainer._metrics["train"]["clip_ratio/region_mean"][0])
    same(metrics["entropy"], trainer._metrics["train"]["entropy"][0])
    if settings.get("beta"):
        same(metrics["kl"], trainer._metrics["train"]["kl"][0])


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge != "far"])
@pytest.mark.parametrize("clip", [0.2, 0.5])
def test_rloo_equals_trl(clip: float, edge: str) -> None:
    from trl import RLOOTrainer

    data = Data(edge)
    data.advantages = data.advantages[data.lengths.cumsum(0) - 1].repeat_interleave(data.lengths)
    metrics, gradients = data.ours("rloo", clip=clip)
    leaf = data.logprobs.clone().requires_grad_()
    trainer = trl_stub(data, leaf, data.entropy, epsilon_low=clip, epsilon_high=clip)
    inputs = trl_inputs(data) | {
        "advantages": data.advantages[data.lengths.cumsum(0) - 1],
        "old_logps": data.padded(data.proximal).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    same(metrics["loss"].detach(), loss.detach())
    same(gradients["logprobs"], leaf.grad)
    same(metrics["clip_fraction"], trainer._metrics["train"]["clip_ratio/region_mean"][0])


# Losses against formulas in numpy, their gradients by central differences.


def clipped(ratio: Any, advantage: Any, clip: float) -> Any:
    return -np.minimum(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)


def value_loss(c: Any, values: Any, clip: float) -> Any:
    near = np.clip(values, c.old_values - clip, c.old_values + clip)
    return 0.5 * np.mean(np.maximum((values - c.returns) ** 2, (near - c.returns) ** 2))


def ppo(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    policy = np.mean(clipped(np.exp(logprobs - c.proximal), c.advantages, 0.15))
    return policy - 0.3 * np.mean(entropy) + 0.6 * value_loss(c, values, 0.25)


def corrected_ppo(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    weights = np.minimum(np.exp(c.proximal - c.behaviour), 1.1)
    policy = np.mean(weights * clipped(np.exp(logprobs - c.proximal), c.advantages, 0.15))
    return policy + 0.6 * value_loss(c, values, 0.25)


def decoupled_ppo(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    weights = np.exp(c.proximal - c.behaviour)
    weights = np.where(weights > 1.1, 0, weights)
    policy = np.mean(weights * clipped(np.exp(logprobs - c.proximal), c.advantages, 0.15))
    return policy - 0.3 * np.mean(entropy) + 0.6 * value_loss(c, values, 0.25)


def reinforce_pp(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    policy = clipped(np.exp(logprobs - c.proximal), c.advantages, 0.15)
    return np.mean(policy * np.minimum(np.exp(c.proximal - c.behaviour), 1.1)) - 0.3 * np.mean(entropy)


def rloo(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    losses = []
    for start, end in c.bounds:
        ratio = np.exp(np.sum(logprobs[start:end] - c.proximal[start:end]))
        weight = min(np.exp(np.sum(c.proximal[start:end] - c.behaviour[start:end])), 1.1)
        losses.append(weight * clipped(ratio, c.advantages[end - 1], 0.15))
    return np.mean(losses)


def remax(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    weights = np.minimum(np.exp(c.proximal - c.behaviour), 1.1)
    return -sum(np.sum((weights * c.advantages * logprobs)[start:end]) for start, end in c.bounds) / len(c.bounds)


def raft(c: Any, logprobs: Any, entropy: Any, values: Any) -> Any:
    return -np.mean(logprobs)


ACTOR_CRITIC = {"clip": 0.15, "entropy_coefficient": 0.3, "value_coefficient": 0.6, "value_clip": 0.25}


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge not in ("far", "fresh")])
@pytest.mark.parametrize(
    ("name", "formula", "settings"),
    [
        ("ppo", ppo, ACTOR_CRITIC),
        ("process_ppo", ppo, ACTOR_CRITIC),
        ("ppo", corrected_ppo, ACTOR_CRITIC | {"entropy_coefficient": 0.0, "importance_cap": 1.1}),
        ("decoupled_ppo", decoupled_ppo, ACTOR_CRITIC | {"behaviour_cap": 1.1}),
        ("reinforce_pp", reinforce_pp, {"clip": 0.15, "entropy_coefficient": 0.3, "importance_cap": 1.1}),
        ("rloo", rloo, {"clip": 0.15, "importance_cap": 1.1}),
        ("remax", remax, {"importance_cap": 1.1}),
        ("raft", raft, {}),
    ],
)
def test_equals_the_formula_of_the_paper(name: str, formula: Any, settings: dict[str, Any], edge: str) -> None:
    data = Data(edge)
    metrics, gradients = data.ours(name, **settings)
    ends = data.lengths.cumsum(0).tolist()
    constants = SimpleNamespace(
        **{key: getattr(data, key).numpy() for key in PER_TOKEN}, bounds=list(zip([0, *ends], ends, strict=False))
    )
    point = [getattr(data, key).numpy() for key in ("logprobs", "entropy", "values")]
    same(metrics["loss"].detach(), formula(constants, *point))
    for number, key in enumerate(("logprobs", "entropy", "values")):
        for token in range(len(data.proximal)):
            slopes = []
            for step in (1e-6, -1e-6):
                moved = [array.copy() for array in point]
                moved[number][token] += step
                slopes.append(formula(constants, *moved))
            same(gradients[key][token], (slopes[0] - slopes[1]) / 2e-6)


def test_the_first_step_of_ppo_is_reinforce() -> None:
    """Where nothing has moved, half of the gradient must not be lost at the tie of both branches."""
    data = Data("fresh")
    metrics, gradients = data.ours("ppo")
    same(gradients["logprobs"], -data.advantages / len(data.advantages))
    same(metrics["clip_fraction"], 0.0)
    same(metrics["ratio"], 1.0)
    same(metrics["approx_kl"], 0.0)


def test_figures() -> None:
    data = Data("random 2")
    metrics, _ = data.ours("ppo", clip=0.1)
    log_ratio = (data.logprobs - data.proximal).numpy()
    free = -np.exp(log_ratio) * data.advantages.numpy()
    bound = -np.clip(np.exp(log_ratio), 0.9, 1.1) * data.advantages.numpy()
    assert 0 < np.mean(bound > free) < 1
    same(metrics["clip_fraction"], np.mean(bound > free))
    same(metrics["ratio"], np.mean(np.exp(log_ratio)))
    same(metrics["approx_kl"], np.mean(np.exp(log_ratio) - 1 - log_ratio))
    same(metrics["entropy"], data.entropy.mean())
    stale, _ = data.ours("decoupled_ppo", behaviour_cap=1.1)
    weights = np.exp((data.proximal - data.behaviour).numpy())
    assert 0 < np.mean(weights > 1.1) < 1
    same(stale["left_out"], np.mean(weights > 1.1))
    same(stale["behaviour_weight"], np.mean(np.where(weights > 1.1, 0, weights)))


def test_without_values_there_is_no_value_loss() -> None:
    data = Data("random 0")
    batch = data.batch({}, [0, 1, 2], 0)
    alone = ppo_module.loss(replace(batch, values=None))
    assert "value_loss" not in alone
    same(alone["loss"], alone["policy_loss"])
    assert ppo_module.loss(batch)["loss"] != alone["loss"]


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", SAMPLES)
def test_every_loss_and_gradient_is_finite_in_single_precision(name: str, edge: str) -> None:
    data = Data(edge, torch.float32)
    settings = {"importance_cap": 2.0} if "importance_cap" in describe(name).settings else {}
    metrics, gradients = data.ours(name, **settings)
    assert all(torch.isfinite(value).all() for value in metrics.values()), metrics
    assert all(torch.isfinite(value).all() for value in gradients.values())


SPLITS = [[[0, 1, 2, 3, 4, 5]], [[5], [1], [0], [3], [2], [4]], [[3, 0], [5, 1, 2, 4]], [[0], [1, 2, 3, 4, 5]]]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("edge", ["random 1", "one token"])
@pytest.mark.parametrize("name", SAMPLES)
def test_shares_add_up_and_fillers_add_nothing(name: str, edge: str, split: list[list[int]]) -> None:
    data = Data(edge)
    settings = {"importance_cap": 1.1} if "importance_cap" in describe(name).settings else {}
    expected, gradient = data.ours(name, **settings)
    found, mine = data.ours(name, [(rows, 0) for rows in split], **settings)
    filled, again = data.ours(name, [([*rows, 2, 2], 2) for rows in split], **settings)
    assert found.keys() == expected.keys() == filled.keys()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(filled, expected)
    torch.testing.assert_close(mine, gradient)
    torch.testing.assert_close(again, gradient)


def test_value_loss_by_hand() -> None:
    old, returns = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 0.0])
    values = torch.tensor([1.1, 1.9, 1.9], requires_grad=True)
    losses = parts.clipped_value_loss(values, old, returns, 0.2)
    # Inside the clip; clipped, since it went too far in the right direction; not clipped, since it went the wrong way.
    same(losses.detach(), [0.9**2 / 2, 0.8**2 / 2, 1.9**2 / 2])
    losses.sum().backward()
    same(values.grad, [-0.9, 0.0, 1.9])


@pytest.mark.parametrize("count", [1, 4])
def test_whitening_equal_values(count: int) -> None:
    same(parts.whiten(torch.full((count,), 0.5, dtype=torch.float64)), [0.0] * count)


def test_discounted_sums_of_many_responses() -> None:
    lengths = torch.randint(1, 513, (4096,), generator=torch.Generator().manual_seed(0))
    rewards = torch.ones(int(lengths.sum()), dtype=torch.float64)
    sums = parts.discounted_sums(rewards, lengths, 1.0)
    same(sums[lengths.cumsum(0) - lengths], lengths.double())
