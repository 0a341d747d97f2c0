"""The losses on preference pairs: values and gradients against TRL's own code and against plain formulas."""

import importlib
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.algorithm import Answers, Metrics, Pairs, Step
from training.registry import BUILT_IN, describe

PAIRS = [name for name in BUILT_IN if describe(name).reads == "pairs"]
EDGES = ["random 0", "random 1", "random 2", "empty", "one token", "equal", "chosen", "rejected"]
WIDTH = 6


class Data:
    """Pairs as padded tokens: chosen rows first, then rejected ones, [2P, WIDTH]."""

    def __init__(self, edge: str, dtype: torch.dtype = torch.float32) -> None:
        seed = int(edge.split()[1]) if edge.startswith("random") else 7
        random = torch.Generator().manual_seed(seed)
        pairs = 1 if edge == "one token" else 5
        self.pairs = pairs
        self.state: dict[str, float] = {}
        self.lengths = torch.randint(1, WIDTH + 1, (2 * pairs,), generator=random)
        if edge == "empty":
            self.lengths[:2], self.lengths[pairs + 1 : pairs + 3] = 0, 0  # both empty; one of each
        if edge == "one token":
            self.lengths[:] = 1
        self.mask = torch.arange(WIDTH) < self.lengths[:, None]
        shape = (2 * pairs, WIDTH)
        self.tokens = -torch.rand(shape, generator=random, dtype=torch.float64) * 3 - 0.05
        self.reference = self.tokens + torch.randn(shape, generator=random, dtype=torch.float64)
        self.collision = -torch.rand(shape, generator=random, dtype=torch.float64) * 2
        if edge == "equal":
            for values in (self.lengths, self.mask, self.tokens, self.reference, self.collision):
                values[pairs:] = values[:pairs]
        if edge in ("chosen", "rejected"):  # a margin of 1e4 nats
            rows = slice(0, pairs) if edge == "chosen" else slice(pairs, None)
            self.reference[rows, 0] = self.tokens[rows, 0] - 1e4
        self.scores = torch.randn(2 * pairs, generator=random, dtype=torch.float64)
        self.scores[pairs:] = self.scores[:pairs] - self.scores[pairs:].abs() * (edge != "equal")
        for name in ("tokens", "reference", "collision", "scores"):
            setattr(self, name, getattr(self, name).to(dtype))

    def answers(self, tokens: Tensor, logp: Tensor, rows: Tensor) -> Answers:
        """Answers of some rows."""
        return Answers(
            logp=logp[rows],
            length=self.lengths[rows].to(logp.dtype),
            score=self.scores[rows],
            reference_logp=(self.reference * self.mask).sum(1)[rows],
            log_collision=(self.collision * self.mask).sum(1)[rows],
            truncated=torch.zeros(len(rows), dtype=torch.bool),
            logprobs=tokens[rows][self.mask[rows]],
            reference=self.reference[rows][self.mask[rows]],
            seeds=rows.tolist(),
        )

    def batch(self, tokens: Tensor, logp: Tensor, chosen: list[int], fill: int = 0, **more: Any) -> Pairs:
        """Some of the pairs as a micro-batch of a step of all of them; the last `fill` of them only fill up."""
        weights = torch.ones(len(chosen), dtype=logp.dtype)
        weights[len(chosen) - fill :] = 0
        return Pairs(
            self.answers(tokens, logp, torch.tensor(chosen)),
            self.answers(tokens, logp, torch.tensor(chosen) + self.pairs),
            weights,
            total=self.pairs,
            chosen_tokens=int(self.lengths[: self.pairs].sum()),
            places=torch.tensor(chosen),
            **more,
        )

    def ours(
        self, name: str, tokens: Tensor, micro_batches: list[tuple[list[int], int]] | None = None, **settings: Any
    ) -> tuple[Metrics, Tensor]:
        """The metrics of a step in some micro-batches (rows and how many of them only fill up), and d loss / d logp.

        For algorithms that look at tokens, d loss / d tokens.
        """
        module = importlib.import_module(f"training.algorithms.{name}")
        description = describe(name)
        values = description.defaults | settings
        tokens = tokens.detach().clone().requires_grad_()
        logp = (tokens * self.mask).sum(1)
        logp.retain_grad()
        micro_batches = micro_batches or [(list(range(self.pairs)), 0)]
        statistics: dict[str, Any] = defaultdict(float)
        if "statistics" in description.functions:
            for rows, fill in micro_batches:
                shares = module.statistics(
                    self.batch(tokens, logp, rows, fill), **description.arguments("statistics", values)
                )
                for key, value in shares.items():
                    statistics[key] += value.detach().double() if value.ndim else float(value)
        if "update" in description.functions:
            step = Step(0, 3, dict(statistics), self.state or description.state, torch.Generator().manual_seed(3))
            statistics |= module.update(step, **description.arguments("update", values))
        metrics: Metrics = {}
        for rows, fill in micro_batches:
            batch = self.batch(tokens, logp, rows, fill, statistics=dict(statistics))
            for key, value in module.loss(batch, **description.arguments("loss", values)).items():
                metrics[key] = metrics.get(key, torch.zeros((), dtype=logp.dtype)) + value
        metrics["loss"].backward()
        self.statistics = statistics
        return metrics, tokens.grad if "tokens" in description.needs else logp.grad


def trl_stub(**attributes: Any) -> SimpleNamespace:
    """What TRL's loss methods ask of their trainer."""

    def same(value: Tensor, *_: Any, **__: Any) -> Tensor:
        return value

    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same)
    metrics: Any = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        accelerator=accelerator,
        _metrics=metrics,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )


def trl_dpo(data: Data, kind: str, beta: float, label_smoothing: float = 0.0, weighted: bool = False) -> Any:
    """Loss of TRL's DPOTrainer, its gradient with respect to the tokens' log-probabilities, and what TRL logs."""
    from trl import DPOTrainer

    tokens = data.tokens.clone().requires_grad_()
    zeros = torch.zeros_like(data.tokens)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=tokens * data.mask,
            log_sum_sq_probs=data.collision * data.mask,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    trainer = trl_stub(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=weighted,
    )
    prompt = torch.zeros(2 * data.pairs, 1, dtype=torch.long)  # one prompt token, whose own log-probability counts not
    mask = torch.cat([prompt, data.mask.long()], 1)
    chosen, rejected = (data.reference * data.mask).sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.cat([prompt + 1, data.mask.long()], 1),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    return loss, tokens.grad, trainer._metrics["train"]


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(torch.as_tensor(found)).all()


def same_rewards(metrics: Metrics, logged: Any) -> None:
    names = {"chosen": "chosen_reward", "rejected": "rejected_reward", "margins": "margin", "accuracies": "accuracy"}
    for theirs, mine in names.items():
        value = logged[f"rewards/{theirs}"]
        same(metrics[mine].double(), torch.as_tensor(value[0] if isinstance(value, list) else value).double())


def by_token(data: Data, gradient: Tensor) -> Tensor:
    return gradient[:, None] * data.mask


@pytest.mark.slow
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    ("name", "kind", "smoothing", "settings"),
    [
        ("dpo", "sigmoid", 0.0, {}),
        ("hinge", "hinge", 0.0, {}),
        ("ipo", "ipo", 0.0, {}),
        ("robust", "robust", 0.2, {"label_smoothing": 0.2}),
        ("exo", "exo_pair", 0.01, {"label_smoothing": 0.01}),
        ("nca", "nca_pair", 0.0, {}),
        ("bco", "bco_pair", 0.0, {"reward_shift": False}),
        ("sppo", "sppo_hard", 0.0, {}),
        ("apo_zero", "apo_zero", 0.0, {}),
        ("apo_down", "apo_down", 0.0, {}),
        ("dpo_norm", "sigmoid_norm", 0.0, {}),
        ("wpo", "sigmoid", 0.0, {"cap": 0.0}),
    ],
)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_equals_the_dpo_trainer_of_trl(
    name: str, kind: str, smoothing: float, settings: dict[str, Any], beta: float, edge: str
) -> None:
    data = Data(edge)
    loss, gradient, logged = trl_dpo(data, kind, beta, smoothing, weighted=name == "wpo")
    metrics, mine = data.ours(name, data.tokens, beta=beta, **settings)
    same(metrics["loss"], loss)
    same(by_token(data, mine), gradient)
    if name != "dpo_norm":  # TRL logs its rewards without the normalisation
        same_rewards(metrics, logged)


def trl_without_reference(data: Data, method: str, **attributes: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Loss, logits with their gradient, answers, and what is logged by TRL's CPOTrainer or ORPOTrainer."""
    from trl.experimental import cpo, orpo

    kind = cpo.CPOTrainer if method == "cpo" else orpo.ORPOTrainer
    random = torch.Generator().manual_seed(len(method))
    shape = (2 * data.pairs, WIDTH + 1)
    ids = torch.randint(0, 9, shape, generator=random)
    logits = torch.randn(*shape, 9, generator=random, requires_grad=True)
    mask = torch.cat([torch.ones(2 * data.pairs, 1), data.mask], 1).long()  # a prompt of one token
    labels = ids.masked_fill(torch.cat([torch.zeros(2 * data.pairs, 1), data.mask], 1) == 0, -100)
    batch = {}
    for side, rows in (("chosen", slice(0, data.pairs)), ("rejected", slice(data.pairs, None))):
        batch |= {f"{side}_input_ids": ids[rows], f"{side}_attention_mask": mask[rows], f"{side}_labels": labels[rows]}
    trainer = trl_stub(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **attributes)
    for own in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, own, getattr(kind, own))
    for own in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
        if hasattr(kind, own):
            setattr(trainer, own, getattr(kind, own).__get__(trainer))
    loss, logged = kind.get_batch_loss_metrics(trainer, lambda *_, **__: SimpleNamespace(logits=logits), batch)
    loss.backward()
    return loss.detach(), logits, ids, logged


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge not in ("empty", "chosen", "rejected")])
@pytest.mark.parametrize(
    ("name", "settings", "attributes"),
    [
        ("simpo", {"gamma": 0.6}, {"loss_type": "simpo", "simpo_gamma": 0.6, "cpo_alpha": 0.0, "label_smoothing": 0.0}),
        ("cpo", {"alpha": 0.5}, {"loss_type": "sigmoid", "cpo_alpha": 0.5, "label_smoothing": 0.0}),
        ("cpo", {"label_smoothing": 0.1}, {"loss_type": "sigmoid", "cpo_alpha": 1.0, "label_smoothing": 0.1}),
        ("orpo", {}, {}),
    ],
)
def test_equals_the_cpo_and_orpo_trainers_of_trl(
    name: str, settings: dict[str, Any], attributes: dict[str, Any], edge: str
) -> None:
    data = Data(edge)
    method = "orpo" if name == "orpo" else "cpo"
    loss, logits, ids, logged = trl_without_reference(data, method, beta=0.3, alpha=0.0, **attributes)
    logprobs = logits.detach().requires_grad_()
    tokens = logprobs[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    scale = {"lam" if name == "orpo" else "beta": 0.3}
    metrics, mine = data.ours(name, tokens, **scale, **settings)
    same(metrics["loss"], loss)
    (tokens * by_token(data, mine)).sum().backward()
    same(logprobs.grad, logits.grad)
    same_rewards(metrics, logged)


@pytest.mark.parametrize("edge", EDGES)
def test_kto_equals_trl(edge: str) -> None:
    """With the mean log-ratio of the step's own answers in the place of those that TRL mismatches."""
    from trl import KTOTrainer

    data = Data(edge)
    tokens = data.tokens.clone().requires_grad_()
    rows, zeros = 2 * data.pairs, torch.zeros_like(data.tokens)
    logp, reference = (tokens.detach() * data.mask).sum(1), (data.reference * data.mask).sum(1)

    def model(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(
            log_probs=tokens * data.mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), logits=zeros
        )

    trainer = trl_stub(
        loss_type="kto",
        calculate_KL=True,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.9,
        _compute_kl_logps=lambda *_: logp,
    )
    mask = torch.cat([torch.zeros(rows, 1), data.mask], 1).long()
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.arange(rows) < data.pairs,
        "ref_logps": reference,
        "ref_KL_logps": reference,
    }
    loss = KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    metrics, mine = data.ours("kto", data.tokens, beta=0.3, lambda_d=1.2, lambda_u=0.9)
    same(metrics["loss"], loss)
    same(by_token(data, mine), tokens.grad)
    logged = trainer._metrics["train"]
    same(metrics["z"], torch.tensor(logged["kl"][0]))
    same(metrics["chosen_reward"], torch.tensor(logged["rewards/chosen"][0]))
    same(metrics["rejected_reward"], torch.tensor(logged["rewards/rejected"][0]))


# Formulas of the papers in numpy. w, l: log-probabilities; everything else is a constant of the batch.


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0.0, -x)


Formula = Callable[[Any, Any, Any], Any]


def smoothed_dpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    d = (w - c.rw) - (l - c.rl)
    return np.mean(-0.8 * log_sigmoid(0.4 * d) - 0.2 * log_sigmoid(-0.4 * d))


def rpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    return np.mean(-log_sigmoid(0.4 * (w - c.rw - l + c.rl)) - 0.7 * w / np.maximum(c.nw, 1))


def simpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    return np.mean(-log_sigmoid(2 / np.maximum(c.nw, 1) * w - 2 / np.maximum(c.nl, 1) * l - 0.9))


def cpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    return np.mean(-log_sigmoid(0.4 * (w - l))) - 0.7 * w.sum() / c.nw.sum()


def orpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    p, q = (np.minimum(x / np.maximum(n, 1), -1e-6) for x, n in ((w, c.nw), (l, c.nl)))  # their logarithms
    odds, other = p - np.log1p(-np.exp(p)), q - np.log1p(-np.exp(q))
    return -w.sum() / c.nw.sum() - 0.3 * np.mean(log_sigmoid(odds - other))


def odpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    offset = 0.6 * np.log(np.maximum(c.sw - c.sl, 1e-6))
    return np.mean(-log_sigmoid(0.4 * (w - c.rw - l + c.rl) - offset))


def odpo_identity(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    return np.mean(-log_sigmoid(0.4 * (w - c.rw - l + c.rl) - 0.6 * (c.sw - c.sl)))


def bco(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    delta = 0.4 * np.mean(np.concatenate([c.w0 - c.rw, c.l0 - c.rl]))
    return np.mean(-log_sigmoid(0.4 * (w - c.rw) - delta) - log_sigmoid(delta - 0.4 * (l - c.rl)))


def wpo(c: Any, w: Any, l: Any) -> Any:  # noqa: E741
    weight = np.exp((c.w0 - c.cw) / np.maximum(c.nw, 1)) * np.exp((c.l0 - c.cl) / np.maximum(c.nl, 1))
    return np.mean(-np.minimum(weight, 1) * log_sigmoid(0.4 * (w - c.rw - l + c.rl)))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(
    ("name", "formula", "settings"),
    [
        ("dpo", smoothed_dpo, {"beta": 0.4, "label_smoothing": 0.2}),
        ("rpo", rpo, {"beta": 0.4, "alpha": 0.7}),
        ("simpo", simpo, {"beta": 2.0, "gamma": 0.9}),
        ("cpo", cpo, {"beta": 0.4, "alpha": 0.7}),
        ("orpo", orpo, {"lam": 0.3}),
        ("odpo", odpo, {"beta": 0.4, "alpha": 0.6}),
        ("odpo", odpo_identity, {"beta": 0.4, "alpha": 0.6, "f": "identity"}),
        ("bco", bco, {"beta": 0.4}),
        ("wpo", wpo, {"beta": 0.4}),
    ],
)
def test_equals_the_formula_of_the_paper(name: str, formula: Formula, settings: dict[str, Any], edge: str) -> None:
    data = Data(edge, torch.float64)
    if edge in ("chosen", "rejected") and not describe(name).needs:  # a margin without a reference: an unlikely answer
        rows = slice(data.pairs, None) if edge == "chosen" else slice(0, data.pairs)
        data.tokens[rows, 0] -= 1e4
    metrics, gradient = data.ours(name, data.tokens, **settings)
    w, l = (data.tokens * data.mask).sum(1).numpy().reshape(2, -1)  # noqa: E741
    rw, rl = (data.reference * data.mask).sum(1).numpy().reshape(2, -1)
    cw, cl = (data.collision * data.mask).sum(1).numpy().reshape(2, -1)
    nw, nl = data.lengths.double().numpy().reshape(2, -1)
    sw, sl = data.scores.numpy().reshape(2, -1)
    constants = SimpleNamespace(w0=w, l0=l, rw=rw, rl=rl, cw=cw, cl=cl, nw=nw, nl=nl, sw=sw, sl=sl)
    same(metrics["loss"].detach(), formula(constants, w, l))
    slopes = []
    for place in range(2 * data.pairs):
        if data.lengths[place] == 0:  # of an empty answer nothing can be learned
            slopes.append(0.0)
            continue
        step = np.zeros((2, data.pairs))
        step.flat[place] = 1e-5
        high, low = (formula(constants, w + s * step[0], l + s * step[1]) for s in (1, -1))
        slopes.append((high - low) / 2e-5)
    same(by_token(data, gradient)[:, 0], torch.tensor(slopes, dtype=torch.float64))


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_loss_and_gradient_is_finite_in_single_precision(name: str, edge: str) -> None:
    data = Data(edge)
    metrics, gradient = data.ours(name, data.tokens)
    assert all(torch.isfinite(value).all() for value in metrics.values()), metrics
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", PAIRS)
def test_all_answers_empty(name: str) -> None:
    data = Data("random 0")
    data.lengths[:], data.mask[:] = 0, False
    metrics, gradient = data.ours(name, data.tokens)
    assert all(torch.isfinite(value).all() for value in metrics.values()), metrics
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "micro_batches", [[[0, 1, 2, 3, 4]], [[4], [1], [0], [3], [2]], [[3, 0], [1, 2, 4]], [[0], [1, 2, 3, 4]]]
)
@pytest.mark.parametrize("name", PAIRS)
def test_shares_add_up_and_fillers_add_nothing(name: str, micro_batches: list[list[int]]) -> None:
    data = Data("random 1", torch.float64)
    expected, gradient = data.ours(name, data.tokens)
    found, mine = data.ours(name, data.tokens, [(rows, 0) for rows in micro_batches])
    filled, again = data.ours(name, data.tokens, [([*rows, 2, 2], 2) for rows in micro_batches])
    assert found.keys() == expected.keys() == filled.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])
        torch.testing.assert_close(filled[key], expected[key])
    torch.testing.assert_close(mine, gradient)
    torch.testing.assert_close(again, gradient)


def test_other_figures() -> None:
    data = Data("random 2")
    metrics, _ = data.ours("dpo_norm", data.tokens, beta=0.5)
    ratios = ((data.tokens - data.reference) * data.mask).sum(1) * 0.5 / data.lengths
    chosen, rejected = ratios.chunk(2)
    same(metrics["chosen_reward"], chosen.mean())
    same(metrics["rejected_reward"], rejected.mean())
    mean = (data.tokens * data.mask).sum(1) / data.lengths
    same(data.ours("rpo", data.tokens)[0]["nll"], -mean[: data.pairs].mean())
    total = (data.tokens * data.mask).sum(1)[: data.pairs].sum() / data.lengths[: data.pairs].sum()
    for name in ("cpo", "orpo"):
        same(data.ours(name, data.tokens)[0]["nll"], -total)
    gap = data.scores[: data.pairs] - data.scores[data.pairs :]
    same(data.ours("odpo", data.tokens, alpha=0.5)[0]["offset"], 0.5 * gap.log().mean())
    weights = ((data.tokens - data.collision) * data.mask).sum(1) / data.lengths
    same(data.ours("wpo", data.tokens)[0]["weight"], sum(weights.chunk(2)).exp().clamp(max=1).mean())


def decoupled(data: Data, tokens: Any, alpha: float) -> Any:
    """LD-DPO's sum of an answer's tokens as a loop, [2P]."""
    found = []
    for row in range(2 * data.pairs):
        own, other = int(data.lengths[row]), int(data.lengths[(row + data.pairs) % (2 * data.pairs)])
        found.append(sum((1.0 if place < other else alpha) * tokens[row, place] for place in range(own)))
    return found


def check_gradient(data: Data, found: Tensor, formula: Callable[[Any], Any]) -> None:
    """The gradient with respect to every token, against central differences of a formula of all tokens."""
    base, slopes = data.tokens.numpy(), torch.zeros_like(found)
    for place in np.ndindex(base.shape):
        step = np.zeros_like(base)
        step[place] = 1e-5
        if data.mask[place]:
            slopes[place] = float(formula(base + step) - formula(base - step)) / 2e-5
    same(found, slopes)


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge not in ("chosen", "rejected")])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_equals_its_formula(alpha: float, edge: str) -> None:
    data = Data(edge, torch.float64)

    def formula(tokens: Any) -> Any:
        ratios = decoupled(data, tokens - data.reference.numpy(), alpha)
        w, l = np.array(ratios).reshape(2, -1)  # noqa: E741
        return np.mean(-log_sigmoid(0.4 * (w - l)))

    metrics, gradient = data.ours("ld_dpo", data.tokens, beta=0.4, alpha=alpha)
    same(metrics["loss"].detach(), formula(data.tokens.numpy()))
    check_gradient(data, gradient, formula)
    if alpha == 1.0:
        expected, by_answer = data.ours("dpo", data.tokens, beta=0.4)
        same(metrics["loss"].detach(), expected["loss"].detach())
        same(gradient, by_token(data, by_answer))


@pytest.mark.parametrize("edge", [edge for edge in EDGES if edge not in ("chosen", "rejected")])
def test_sampo_counts_as_many_tokens_of_both_answers(edge: str) -> None:
    data = Data(edge, torch.float64)
    metrics, gradient = data.ours("sampo", data.tokens, beta=0.4)
    used = gradient != 0
    counts = used.sum(1).view(2, -1)
    shorter = data.lengths.view(2, -1).amin(0)
    assert counts.tolist() == [shorter.tolist()] * 2
    ratios = ((data.tokens - data.reference) * used).sum(1).numpy()
    w, l = ratios.reshape(2, -1)  # noqa: E741
    same(metrics["loss"].detach(), np.mean(-log_sigmoid(0.4 * (w - l))))


def test_sampo_draws_every_token_equally_often() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(600):
        seeds = torch.randint(0, 1 << 40, (2,), generator=random).tolist()
        tokens = torch.zeros(6, requires_grad=True)
        long = Answers(
            tokens.sum()[None],
            torch.tensor([6.0]),
            torch.zeros(1),
            logprobs=tokens,
            reference=torch.zeros(6),
            seeds=seeds[:1],
        )
        short = Answers(
            torch.zeros(1),
            torch.tensor([2.0]),
            torch.zeros(1),
            logprobs=torch.zeros(2),
            reference=torch.zeros(2),
            seeds=seeds[1:],
        )
        importlib.import_module("training.algorithms.sampo").sampled(long, short).sum().backward()
        assert float(tokens.grad.sum()) == 2  # type: ignore[union-attr]
        counts += tokens.grad  # type: ignore[arg-type]
    assert ((counts / 600 - 1 / 3).abs() < 0.06).all(), counts


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("filtering", [0.0, 0.4])
def test_beta_dpo_equals_its_formula(filtering: float, edge: str) -> None:
    data = Data(edge, torch.float64)
    data.state = {"gap_mean": 0.7, "gap_std": 1.3}
    w, l = (data.tokens * data.mask).sum(1).numpy().reshape(2, -1)  # noqa: E741
    rw, rl = (data.reference * data.mask).sum(1).numpy().reshape(2, -1)
    gaps = w - rw - l + rl
    settings = {"beta": 0.4, "alpha": 0.6, "filtering": filtering, "momentum": 0.8}
    metrics, gradient = data.ours("beta_dpo", data.tokens, **settings)
    found, used = data.statistics, data.statistics["used"].bool().numpy()
    spread = np.std(gaps, ddof=1) if len(gaps) > 1 else 0.0
    assert found["gap_mean"] == pytest.approx(0.8 * 0.7 + 0.2 * gaps.mean())
    assert found["gap_std"] == pytest.approx(0.8 * 1.3 + 0.2 * spread)
    assert used.sum() == max(1, int(len(gaps) * (1 - filtering))) == found["pairs_used"]
    beta = max(0.4 * (1 + 0.6 * (gaps[used].mean() - found["gap_mean"])), 1e-3)
    assert found["beta"] == pytest.approx(beta)
    same(metrics["loss"].detach(), np.mean(-log_sigmoid(beta * gaps[used])))
    slopes = np.where(used, -beta * np.exp(log_sigmoid(-beta * gaps)), 0.0) / used.sum()
    expected = np.concatenate([slopes, -slopes]) * (data.lengths > 0).numpy()
    same(gradient * (data.lengths > 0), expected)


def test_beta_dpo_leaves_out_by_the_gaussian_of_the_moving_averages() -> None:
    module = importlib.import_module("training.algorithms.beta_dpo")
    gaps, log_weights = torch.tensor([0.0, 1.0, 2.0, 8.0], dtype=torch.float64), torch.tensor([0.0, -0.5, -2.0, -32.0])
    counts = torch.zeros(4)
    for seed in range(2000):
        drawn = module.gumbel_top(log_weights.double(), 1, torch.Generator().manual_seed(seed))
        counts[drawn] += 1
    expected = log_weights.softmax(0)
    assert ((counts / 2000 - expected).abs() < 0.03).all()
    step = Step(5, 9, {"gaps": gaps}, {"gap_mean": 0.0, "gap_std": 1.0}, torch.Generator().manual_seed(0))
    found = module.update(step, filtering=0.25, momentum=0.99)
    assert found["used"].tolist() == [1.0, 1.0, 1.0, 0.0]
