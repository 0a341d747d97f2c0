"""Losses and log-probabilities against plain formulas and against TRL."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, make_pairs, make_reference
from transformers import AutoModelForCausalLM

from training import logprobs as logprobs_module
from training.config import DpoConfig
from training.data import Row, Sequence, pair_sequences
from training.dpo import dpo_loss
from training.logprobs import LogprobHead, TokenLogprobs, collate, sum_by_sequence
from training.loop import Totals
from training.losses import bradley_terry, dpo


def pair_rows(count: int) -> list[Row]:
    pairs = make_pairs(count, seed=7)
    known = {(score.prompt_id, score.sample): score.score for score in make_reference(pairs)}
    return [
        Row(
            pair.pair_id,
            pair_sequences(pair),
            (known[pair.prompt_id, pair.chosen_sample], known[pair.prompt_id, pair.rejected_sample]),
        )
        for pair in pairs
    ]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("which", ["tied", "gqa"])
@pytest.mark.parametrize(
    ("kind", "nll"), [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("sigmoid", 0.5)], ids=lambda value: str(value)
)
def test_dpo_equals_trl(which: str, kind: str, nll: float, models: dict[str, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = pair_rows(6)
    config = DpoConfig(
        model=models[which], pairs=[tmp_path], reference=[tmp_path], output=tmp_path, loss=kind, nll_coefficient=nll
    )
    ours = AutoModelForCausalLM.from_pretrained(models[which]).eval()
    shares = dpo_loss(config)(TokenLogprobs(ours), rows, torch.ones(len(rows)), Totals.of(rows))
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
        beta=config.beta,
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
    sequences = [row.sequences[index] for index in (0, 1) for row in rows]
    width = max(len(sequence.ids) for sequence in sequences)
    shape = (len(sequences), width)
    ids, mask, completion = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for index, sequence in enumerate(sequences):
        ids[index, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[index, : len(sequence.ids)] = 1
        completion[index, sequence.start : len(sequence.ids)] = 1
    reference = torch.tensor([row.constants for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": completion,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }


def test_label_smoothing_by_hand() -> None:
    values = [torch.tensor([value]) for value in (-3.0, -5.0, -4.0, -4.0, 2.0, 2.0)]
    result = dpo(*values, beta=0.5, kind="sigmoid", label_smoothing=0.1)
    logit = 0.5 * ((-3 + 4) - (-5 + 4))
    expected = 0.9 * math.log(1 + math.exp(-logit)) + 0.1 * math.log(1 + math.exp(logit))
    assert float(result.loss) == pytest.approx(expected, abs=1e-6)
    assert (float(result.chosen_reward), float(result.rejected_reward)) == (0.5, -0.5)


def test_bradley_terry_by_hand() -> None:
    assert float(bradley_terry(torch.tensor([1.0]), torch.tensor([-1.0]))) == pytest.approx(math.log(1 + math.exp(-2)))


@pytest.mark.parametrize("which", ["tied", "gqa"])
def test_logprobs_equal_those_of_full_logits_sequence_by_sequence(which: str, models: dict[str, Path]) -> None:
    """Padding, the choice of positions and chunks change nothing; an EOS inside or at the end counts like any token."""
    model = AutoModelForCausalLM.from_pretrained(models[which]).eval()
    sequences = [sequence for row in pair_rows(5) for sequence in row.sequences]
    sequences.append(Sequence((1, 4, 7, EOS, 8, EOS, EOS), 3))
    batch = collate(sequences)
    found = sum_by_sequence(TokenLogprobs(model)(batch.input_ids, batch.positions, batch.targets), batch.lengths)
    for sequence, value in zip(sequences, found.tolist(), strict=True):
        logits = model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        steps = range(sequence.start, len(sequence.ids))
        expected = sum(float(logits[step - 1, sequence.ids[step]]) for step in steps)
        assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_head_gradients(bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "CHUNK", chunk)
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 11, bias=bias)
    targets = torch.randint(0, 11, (7,))
    upstream = torch.randn(7)
    results: list[list[Any]] = []
    for mine in (True, False):
        linear.zero_grad()
        hidden = torch.linspace(-1, 1, 35).view(7, 5).requires_grad_()
        if mine:
            values = LogprobHead(linear)(hidden, targets)
        else:
            values = linear(hidden).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        (values * upstream).sum().backward()
        results.append([values.detach(), hidden.grad, *(parameter.grad.clone() for parameter in linear.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
