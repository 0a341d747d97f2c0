"""The training loop: one for every algorithm, number of processes and ZeRO stage."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from contracts import stopping
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.stage import Context
from training.batching import count_steps, divide, global_batches
from training.config import TrainingConfig
from training.data import Row
from training.distributed import add_up, zero_stage
from training.schedule import learning_rate
from training.state import Line, TrainingState


@dataclass(frozen=True)
class Totals:
    """What a step's sums are divided by; known from the step's rows, so that nobody has to ask the other processes."""

    rows: int
    tokens: int
    """Response tokens of each row's first sequence: of the demonstration, or of the chosen answer."""

    @classmethod
    def of(cls, rows: list[Row]) -> "Totals":
        """The totals of one global batch."""
        return cls(len(rows), sum(row.sequences[0].response_length for row in rows))


Loss = Callable[[Any, list[Row], Tensor, Totals], dict[str, Tensor]]
"""`loss(model, rows, weights, totals)`: the share that some rows of a global batch have in each of its figures, `loss`
among them. Every figure is a weighted sum over rows divided by one of `totals`, so that adding the shares of all
micro-batches and processes gives the figure of the step, however the step was divided."""


def train(
    config: TrainingConfig,
    context: Context,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    rows: list[Row],
    held_out: list[Row],
    loss: Loss,
    state: TrainingState,
) -> list[Line]:
    """Train `model` (prepared by `accelerator`) in place and return one line of figures per optimizer step.

    The last line has the figures of the final model over `held_out` as well, if there are such rows. A training that is
    asked to stop saves its state after the step in hand, and leaves.
    """
    total = count_steps(len(rows), config.global_batch, config.epochs, config.max_steps)
    batches = global_batches(
        len(rows),
        global_batch=config.global_batch,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )
    log = state.read()
    if log:
        if zero_stage(accelerator):
            # DeepSpeed makes the optimizer's moments in its first step. What this one computes is replaced.
            _add_gradients(config, accelerator, model, rows, (0,), 0, loss)
        state.restore(log)
    with stopping.deferred():
        for step, batch in enumerate(batches):
            if step < len(log):
                continue
            rate = learning_rate(
                step, total, peak=config.learning_rate, shape=config.schedule, warmup_ratio=config.warmup_ratio
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            figures = _add_gradients(config, accelerator, model, rows, batch, step, loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            # DeepSpeed has clipped and stepped in `backward`: there this stops before anything is saved.
            _require_finite(norm, step, [rows[index].row_id for index in batch])
            optimizer.step()
            optimizer.zero_grad()
            # Whether to save and whether to leave has to be the same for all processes: it travels with the figures.
            sums = add_up(accelerator, {**figures, "due": float(state.due), "stop": float(stopping.requested())})
            due, stop = sums.pop("due") > 0, sums.pop("stop") > 0
            log.append({"step": step + 1, **sums, "learning_rate": rate, "grad_norm": float(norm)})
            context.progress(step + 1, total, "steps")
            if stop:
                _leave(accelerator, state, log)
            if due and step + 1 < total:  # behind the last step follows the checkpoint
                state.save(log)
        if held_out:
            figures = _evaluate(config, accelerator, model, held_out, loss)
            sums = add_up(accelerator, {**figures, "stop": float(stopping.requested())})
            if sums.pop("stop") > 0:
                _leave(accelerator, state, log)
            log[-1].update({f"held_out_{name}": value for name, value in sums.items()})
    return log


def _leave(accelerator: Accelerator, state: TrainingState, log: list[Line]) -> NoReturn:
    """Save and end. All processes end together, because a launcher ends the others as soon as one is gone."""
    state.save(log)
    accelerator.wait_for_everyone()
    stopping.leave()


def _add_gradients(
    config: TrainingConfig,
    accelerator: Accelerator,
    model: Any,
    rows: list[Row],
    batch: tuple[int, ...],
    step: int,
    loss: Loss,
) -> dict[str, Any]:
    """Compute the gradients of a step, which DeepSpeed then takes; return this process's share of its figures."""
    figures: dict[str, Any] = {}
    for shares in _shares(config, accelerator, model, rows, batch, loss):
        _require_finite(shares["loss"], step, shares.pop("ids"))
        # DDP and ZeRO average the gradients of the processes; the loss is a sum.
        accelerator.backward(shares["loss"] * accelerator.num_processes)
        for name, share in shares.items():
            figures[name] = figures.get(name, 0.0) + share.detach().double()
    return figures


@torch.no_grad()
def _evaluate(
    config: TrainingConfig, accelerator: Accelerator, model: Any, rows: list[Row], loss: Loss
) -> dict[str, Any]:
    """This process's share of the figures of `loss` over all of `rows`."""
    figures: dict[str, Any] = {}
    for shares in _shares(config, accelerator, model, rows, tuple(range(len(rows))), loss):
        del shares["ids"]
        for name, share in shares.items():
            figures[name] = figures.get(name, 0.0) + share.double()
    return figures


def _shares(
    config: TrainingConfig, accelerator: Accelerator, model: Any, rows: list[Row], batch: tuple[int, ...], loss: Loss
) -> Iterator[dict[str, Any]]:
    """The shares of this process's micro-batches one by one; gradients are exchanged with the last."""
    totals = Totals.of([rows[index] for index in batch])
    divided = divide(batch, rows, processes=accelerator.num_processes, budget=config.micro_batch_tokens)
    micro_batches = divided[accelerator.process_index]
    for number, micro in enumerate(micro_batches):
        chosen = [rows[index] for index in micro.rows]
        weights = torch.full((len(chosen),), micro.weight, device=accelerator.device)
        beat()
        with _exchange(accelerator, model, last=number == len(micro_batches) - 1):
            yield {**loss(model, chosen, weights, totals), "ids": [row.row_id for row in chosen]}


def _exchange(accelerator: Accelerator, model: Any, last: bool) -> Any:
    """Exchange gradients, clip and step with the last micro-batch only: for DDP (no_sync) and for DeepSpeed."""
    accelerator.sync_gradients = last
    return contextlib.nullcontext() if last or zero_stage(accelerator) else accelerator.no_sync(model)


def _require_finite(value: Any, step: int, ids: list[str]) -> None:
    if not bool(torch.isfinite(torch.as_tensor(value))):
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise UserError(
            f"step {step + 1}: the loss or its gradient is {float(value)} for the rows {shown}. Look at these rows, or "
            "lower learning_rate; nothing of this training is published."
        )
