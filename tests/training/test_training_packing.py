"""Packed = padded = shared prompts; log-probabilities against full logits; a whole step against TRL."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EOS, make_pairs, make_reference
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from contracts.errors import UserError
from modeling import logprobs as logprobs_module
from modeling import packing as packing_module
from modeling.attention import use_packed_attention
from modeling.heads import logit_scaling
from modeling.logprobs import PLAIN, LogitScaling, LogprobHead
from modeling.modules import SequenceScores, TokenLogprobs, TokenValues
from modeling.packing import pack
from modeling.rows import Response, Row, token_ids
from training.config import PolicyConfig
from training.data import pair_row
from training.loop import MicroBatch, Totals
from training.policy import learning
from training.registry import describe
from training.reward import bradley_terry

LAYOUTS = ("padded", "flat", "shared")


def random_rows(count: int = 7, seed: int = 0, vocabulary: int = 19) -> list[Row]:
    """Prompts with one to four responses; some prompts and some responses have one token."""
    rng = np.random.default_rng(seed)

    def ids(longest: int) -> Any:
        return rng.integers(0, vocabulary, rng.integers(1, longest + 1))

    return [
        Row(str(n), ids(20 if n else 1), tuple(Response(ids(15 if k else 1)) for k in range(1 + n % 4)))
        for n in range(count)
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def prepared(model: Any, packing: str) -> Any:
    model = copy.deepcopy(model).eval()
    if packing != "padded":
        use_packed_attention(model)
    return model


@pytest.mark.parametrize("module", [SequenceScores, TokenValues])
def test_classifiers_packed(module: type[Any], models: dict[str, Path]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(models["gqa"], num_labels=1)
    found = [next(iter(module(prepared(model, packing))(pack(random_rows(), packing)).values())) for packing in LAYOUTS]  # type: ignore[arg-type]
    for value in found[1:]:
        torch.testing.assert_close(value, found[0], atol=1e-5, rtol=0)


def test_groups_of_attention_change_nothing(monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]) -> None:
    model = prepared(AutoModelForCausalLM.from_pretrained(models["gqa"]), "shared")
    rows, found, counts = random_rows(), [], []
    for share in (1.0, 1.25, 100.0):
        monkeypatch.setattr(packing_module, "PADDING_SHARE", share)
        batch = pack(rows, "shared")
        assert batch.plan is not None
        counts.append(len(batch.plan.groups))
        found.append(TokenLogprobs(model)(batch)["logprobs"])
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 1
    for value in found[1:]:
        torch.testing.assert_close(value, found[0], atol=1e-5, rtol=0)


def test_a_packed_batch_by_hand() -> None:
    rows = [Row("a", token_ids([1, 5]), (Response(token_ids([EOS, EOS])), Response(token_ids([7]))))]
    shared, flat, padded = (pack(rows, packing) for packing in ("shared", "flat", "padded"))
    assert shared.input_ids.tolist() == [[1, 5, EOS, EOS, 7]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert shared.positions.tolist() == [1, 2, 1]
    assert shared.last.tolist() == [3, 4]
    assert flat.input_ids.tolist() == [[1, 5, EOS, EOS, 1, 5, 7]]
    assert flat.positions.tolist() == [1, 2, 5]
    assert padded.input_ids.tolist() == [[1, 5, EOS, EOS], [1, 5, 7, 0]]
    assert padded.positions.tolist() == [1, 2, 5]
    assert padded.last.tolist() == [3, 6]
    for batch in (shared, flat, padded):
        assert batch.targets.tolist() == [EOS, EOS, 7]
        assert batch.lengths.tolist() == [2, 1]


def test_a_head_that_does_more_than_is_known_is_refused() -> None:
    for model_type, scaling in (("llama", PLAIN), ("gemma2", LogitScaling(1.0, 3.0)), ("cohere", LogitScaling(0.5))):
        assert logit_scaling(tiny_model(tiny_config(model_type))) == scaling
    model = tiny_model(tiny_config("llama"))
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden).sinh()
    with pytest.raises(UserError, match="in an unsupported way"):
        logit_scaling(model)


@pytest.mark.parametrize("which", ["tied", "gqa"])
@pytest.mark.parametrize("packing", LAYOUTS)
def test_logprobs_equal_those_of_full_logits(which: str, packing: Any, models: dict[str, Path]) -> None:
    """Sequence by sequence; an EOS inside or at the end counts like any token."""
    model = AutoModelForCausalLM.from_pretrained(models[which]).eval()
    rows = [pair_row(pair) for pair in make_pairs(5, seed=7)]
    rows.append(Row("eos", token_ids([1, 4, 7]), (Response(token_ids([EOS, 8, EOS, EOS])),)))
    batch = pack(rows, packing)
    found = TokenLogprobs(prepared(model, packing), entropy=True)(batch)
    place = 0
    for row in rows:
        for response in row.responses:
            ids = torch.from_numpy(np.concatenate([row.prompt, response.ids]))[None]
            logits = model(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
            part = slice(place, place + len(response.ids))
            place = part.stop
            expected = logits.gather(-1, torch.from_numpy(response.ids)[:, None]).squeeze(-1)
            torch.testing.assert_close(found["logprobs"][part], expected, atol=1e-5, rtol=0)
            entropy = -(logits.exp() * logits).sum(-1)
            torch.testing.assert_close(found["entropy"][part], entropy, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    "scaling", [PLAIN, LogitScaling(0.5), LogitScaling(2.0, 1.5)], ids=["plain", "scaled", "capped"]
)
def test_head_gradients(
    scaling: LogitScaling, bias: bool, chunk: int, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 11, bias=bias)
    targets = torch.randint(0, 11, (7,))
    upstream, other = torch.randn(2, 7)
    results: list[list[Any]] = []
    for mine in (True, False):
        linear.zero_grad()
        hidden = torch.linspace(-1, 1, 35).view(7, 5).requires_grad_()
        if mine:
            found = LogprobHead(linear, scaling, entropy=True, collision=True)(hidden, targets)
            values, entropies, collisions = found
        else:
            logits = scaling.scale * linear(hidden)
            logp = (logits if scaling.cap is None else scaling.cap * (logits / scaling.cap).tanh()).log_softmax(-1)
            values = logp.gather(-1, targets[:, None]).squeeze(-1)
            entropies, collisions = -(logp.exp() * logp).sum(-1), (2 * logp).logsumexp(-1)
        assert entropies is not None
        assert collisions is not None
        loss = (values * upstream).sum() + ((entropies * other).sum() if entropy else 0)
        loss.backward()
        weights = [parameter.grad.clone() for parameter in linear.parameters() if parameter.grad is not None]
        results.append([values.detach(), entropies.detach(), collisions.detach(), hidden.grad, *weights])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_head_is_exact_where_probabilities_underflow() -> None:
    linear = torch.nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0], [200.0], [-300.0]]))
    hidden = torch.ones(3, 1, requires_grad=True)
    found = LogprobHead(linear, entropy=True)(hidden, torch.tensor([0, 1, 2]))
    assert found.logprobs.tolist() == [-200.0, 0.0, -500.0]
    assert found.entropy is not None
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert bool(torch.isfinite(hidden.grad).all())  # type: ignore[arg-type]


def referenced_rows(count: int) -> list[Row]:
    pairs = make_pairs(count, seed=7)
    known = {(score.prompt_id, score.sample): score.score for score in make_reference(pairs)}
    return [
        pair_row(
            pair,
            ({"reference": known[pair.prompt_id, pair.chosen_sample]}, {}),
            ({"reference": known[pair.prompt_id, pair.rejected_sample]}, {}),
        )
        for pair in pairs
    ]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tied", "gqa"])
@pytest.mark.parametrize(
    ("algorithm", "kind", "nll"), [("dpo", "sigmoid", 0.0), ("ipo", "ipo", 0.0), ("dpo", "sigmoid", 0.5)]
)
def test_a_step_equals_trl(
    which: str, algorithm: str, kind: str, nll: float, models: dict[str, Path], tmp_path: Path
) -> None:
    """Loss and every gradient of a packed step with shared prompts, against TRL's trainer on the same ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = referenced_rows(6)
    config = PolicyConfig(
        model=models[which], pairs=[tmp_path], reference=[tmp_path], output=tmp_path, algorithm=algorithm,
        nll_coefficient=nll,
    )  # fmt: skip
    ours = prepared(AutoModelForCausalLM.from_pretrained(models[which]), "shared")
    micro_batch = MicroBatch(rows, pack(rows, "shared"), 1.0, Totals.of(rows), {})
    shares = learning(config, describe(algorithm), rows).loss(TokenLogprobs(ours)(micro_batch.batch), micro_batch)
    shares["loss"].backward()

    theirs = AutoModelForCausalLM.from_pretrained(models[which])
    theirs.config.attention_dropout = 0.0
    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        loss_type=[kind, "sft"] if nll else [kind],
        loss_weights=[1.0, nll] if nll else None,
        beta=0.1,
    )
    texts = [{"prompt": "review", "chosen": " great", "rejected": " bad"}]  # only to construct the trainer
    trainer = DPOTrainer(theirs, args=arguments, train_dataset=Dataset.from_list(texts))
    trainer.precompute_ref_logps = True
    trainer.model.eval()
    loss = trainer._compute_loss(trainer.model, trl_batch(rows), return_outputs=False)
    loss.backward()

    assert float(shares["loss"]) == pytest.approx(float(loss), abs=1e-5)
    mine, trl = gradients(ours), gradients(theirs)
    assert mine.keys() == trl.keys()
    assert max(float(value.abs().max()) for value in trl.values()) > 1e-3
    for name, value in mine.items():
        torch.testing.assert_close(
            value, trl[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def trl_batch(rows: list[Row]) -> dict[str, torch.Tensor]:
    """The batch that TRL's collator would make of the same ids: chosen answers first, masks by length."""
    sequences = [(row.prompt, row.responses[side].ids) for side in (0, 1) for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids, mask, completion = (torch.zeros((len(sequences), width), dtype=torch.long) for _ in range(3))
    for index, (prompt, answer) in enumerate(sequences):
        size = len(prompt) + len(answer)
        ids[index, :size] = torch.from_numpy(np.concatenate([prompt, answer]))
        mask[index, :size] = 1
        completion[index, len(prompt) : size] = 1
    reference = torch.tensor([[response.numbers["reference"] for response in row.responses] for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": completion,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }


def test_bradley_terry_by_hand() -> None:
    found = bradley_terry(torch.tensor([1.0, 1e4, -1e4]), torch.tensor([-1.0, 0.0, 0.0]))
    assert found.tolist() == pytest.approx([np.log1p(np.exp(-2)), 0.0, 1e4])
