"""The training loop, the same for every algorithm and every parallel layout."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contracts import stopping
from contracts.errors import UserError
from contracts.seeds import derive_seed
from contracts.stage import Context
from modeling.packing import Packed, Packing, pack
from modeling.rows import Row
from modeling.tracing import traced
from training.algorithm import Metrics, Statistics, Step, sum_by_response
from training.batching import MicroBatchRows, count_steps, divide, global_batches
from training.config import TrainingConfig
from training.engines.base import Outputs, TrainingEngine
from training.schedule import learning_rate
from training.state import Line, TrainingState


@dataclass(frozen=True)
class Totals:
    """The normalizers of an optimizer step, computed from its rows alone: no collective is needed."""

    rows: int
    responses: int
    tokens: int
    """Response tokens of all rows."""
    first_tokens: int
    """Tokens of each row's first response: the demonstration, or the chosen answer."""

    @classmethod
    def of(cls, rows: list[Row]) -> "Totals":
        """Compute the totals of a global batch."""
        return cls(
            len(rows),
            sum(len(row.responses) for row in rows),
            sum(row.response_tokens for row in rows),
            sum(len(row.responses[0].ids) for row in rows),
        )


@dataclass(frozen=True)
class MicroBatch:
    """The input of a loss besides the model's outputs: rows of one optimizer step, in the order of packing."""

    rows: list[Row]
    batch: Packed
    weight: float
    """1, or 0 for a filler (`training/batching.py`)."""
    totals: Totals
    """Normalizers of the whole step."""
    statistics: Statistics
    """Step-wide values computed before the loss."""
    places: tuple[int, ...] = ()
    """Index of each row within the step."""
    starts: tuple[int, ...] = ()
    """Index of each row's first response among the step's responses."""
    step: int = 0
    """Optimizer step, counted from 0."""
    steps: int = 1
    """Optimizer steps of the training."""
    seed: int = 0
    """Seed of this step's random numbers."""

    def numbers(self, name: str) -> Tensor:
        """One number per response, [S]."""
        values = [response.numbers[name] for row in self.rows for response in row.responses]
        return torch.tensor(values, device=self.batch.lengths.device)

    def tokens(self, name: str) -> Tensor:
        """One number per response token, [N]."""
        values = [torch.from_numpy(response.tokens[name]) for row in self.rows for response in row.responses]
        return torch.cat(values).to(self.batch.lengths.device)

    def response_seeds(self) -> list[int]:
        """A seed per response, derived from the step and the row alone, so that the layout does not matter."""
        return [
            derive_seed("response", self.seed, row.row_id, number)
            for row in self.rows
            for number in range(len(row.responses))
        ]

    def weights(self, count: int) -> Tensor:
        """This micro-batch's weight, repeated for `count` rows or responses."""
        return torch.full((count,), self.weight, device=self.batch.lengths.device)

    def sum_by_response(self, values: Tensor) -> Tensor:
        """The sum over each response's tokens, [N] -> [S]."""
        return sum_by_response(values, self.batch.lengths)


Loss = Callable[[Outputs, MicroBatch], Metrics]
"""A micro-batch's share of each metric of its step, `loss` among them. Every metric is a weighted sum over rows divided
by one of the step's totals, so the shares of all micro-batches and processes add up to the step's metric, however the
step was divided."""


@dataclass(frozen=True)
class Learning:
    """The data and the loss of a training."""

    rows: list[Row]
    loss: Loss
    statistics: Loss | None = None
    """Computes metrics over the whole step, without gradients, before the loss; they may be vectors."""
    update: Callable[[Step], Statistics] | None = None
    """Computes further step-wide values; called once per step, between `statistics` and the loss."""
    state: dict[str, float] = field(default_factory=dict)
    """Initial values of what `update` carries from step to step; logged and checkpointed."""


@dataclass(frozen=True)
class FinalReport:
    """Evaluation of the final model on held-out rows."""

    metrics: dict[str, float]
    files: dict[str, list[Any]]
    """Rows of further files to publish with the checkpoint, by file name."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, and the evaluation of the final model on them."""

    rows: list[Row]
    scores: Callable[[Outputs, MicroBatch], Tensor]
    """Computes two scores for each row of a micro-batch, [rows, 2]."""
    report: Callable[[NDArray[np.float32]], FinalReport]
    """Builds the report from the scores of all rows, in row order, [rows, 2]."""


def train(
    config: TrainingConfig,
    context: Context,
    engine: TrainingEngine,
    learning: Learning,
    packing: Packing,
    state: TrainingState,
) -> list[Line]:
    """Train the engine's model in place and return one line of metrics per optimizer step.

    On a stop request it saves its state after the current step and exits; the caller defers the signal
    (`contracts.stopping.deferred`).
    """
    rows = learning.rows
    total = count_steps(len(rows), config.global_batch, config.epochs, config.max_steps)
    batches = global_batches(
        len(rows),
        global_batch=config.global_batch,
        epochs=config.epochs,
        seed=config.seed,
        max_steps=config.max_steps,
    )
    split = partial(make_micro_batches, engine=engine, budget=config.micro_batch_tokens, packing=packing)

    def add_gradients(batch: tuple[int, ...], step: int) -> tuple[Metrics, Statistics]:
        """Accumulate the gradients of one step; the algorithm's state comes from the previous step's log line."""
        seed = derive_seed("algorithm", config.seed, step)
        micro_batches = [replace(micro_batch, step=step, steps=total, seed=seed) for micro_batch in split(rows, batch)]
        before = {name: log[step - 1][name] for name in learning.state} if step else learning.state
        return _add_gradients(engine, learning, micro_batches, Step(step, total, {}, before, _generator(seed)))

    log = state.read()
    if log:
        if engine.needs_step_before_write:
            add_gradients((0,), 0)
        state.restore(log)
    for step, batch in enumerate(batches):
        if step < len(log):
            continue
        rate = learning_rate(
            step, total, peak=config.learning_rate, shape=config.schedule, warmup_ratio=config.warmup_ratio
        )
        engine.set_learning_rate(rate)
        with _profiled(context, step + 1) if step + 1 in config.profile_steps else nullcontext():
            metrics, updated = add_gradients(batch, step)
            norm = engine.clip(config.max_grad_norm)
            # DeepSpeed has already stepped here; the check still comes before the bad weights are saved.
            _require_finite(norm, step, [rows[index].row_id for index in batch])
            engine.step()
        # All processes must agree on saving and stopping: the flags are reduced together with the metrics.
        sums = engine.all_reduce_metrics(
            {**metrics, "due": float(state.due), "stop": float(bool(stopping.requested()))}
        )
        due, stop = sums.pop("due") > 0, sums.pop("stop") > 0
        if taken := updated.keys() & sums.keys():
            raise UserError(f"the algorithm's loss and its update both return a metric {min(taken)!r}. Rename one.")
        kept = {name: value for name, value in updated.items() if isinstance(value, float)}
        log.append({"step": step + 1, **sums, **kept, "learning_rate": rate, "grad_norm": norm})
        context.report_step(step + 1, log[-1])
        context.progress(step + 1, total, "steps")
        if stop:
            _save_and_exit(engine, state, log)
        if due and step + 1 < total:  # after the last step the final checkpoint is published instead
            state.save(log)
    return log


def _profiled(context: Context, step: int) -> AbstractContextManager[None]:
    return traced(context.traces / f"step-{step:05d}-rank-{context.rank}.json.gz")


def measure(
    config: TrainingConfig,
    engine: TrainingEngine,
    held_out: HeldOut,
    packing: Packing,
    state: TrainingState,
    log: list[Line],
) -> FinalReport:
    """Evaluate the trained model and add its metrics to the last line of `log`. Stop requests: as in `train`."""
    rows = held_out.rows
    places = {id(row): place for place, row in enumerate(rows)}
    found = torch.zeros(len(rows), 2)
    for micro_batch in make_micro_batches(rows, engine=engine, budget=config.micro_batch_tokens, packing=packing):
        scores = held_out.scores(engine.forward(micro_batch.batch), micro_batch).float().cpu()
        if micro_batch.weight:
            found[[places[id(row)] for row in micro_batch.rows]] = scores
    if engine.all_reduce_metrics({"stop": float(bool(stopping.requested()))})["stop"] > 0:
        _save_and_exit(engine, state, log)
    whole = engine.all_reduce(found)
    if not whole.isfinite().all():
        bad = [row.row_id for row, values in zip(rows, whole, strict=True) if not values.isfinite().all()]
        raise UserError(
            f"the trained model's scores of the held-out rows {', '.join(bad[:8])} are not finite. Look at these rows, "
            "or lower learning_rate; nothing of this training is published."
        )
    report = held_out.report(whole.numpy())
    log[-1].update({f"held_out_{name}": value for name, value in report.metrics.items()})
    return report


def make_micro_batches(
    rows: list[Row], batch: tuple[int, ...] | None = None, *, engine: TrainingEngine, budget: int, packing: Packing
) -> list[MicroBatch]:
    """Build this replica's micro-batches of one optimizer step, or of all rows."""
    batch = tuple(range(len(rows))) if batch is None else batch
    totals = Totals.of([rows[index] for index in batch])
    counts = [len(rows[index].responses) for index in batch]
    starts = [0, *accumulate(counts)]
    places = {index: (place, starts[place]) for place, index in enumerate(batch)}
    divided = divide(batch, rows, processes=engine.replicas, budget=budget, packing=packing)
    return [_make_micro_batch(micro, rows, totals, places, engine, packing) for micro in divided[engine.replica]]


def _make_micro_batch(
    micro: MicroBatchRows,
    rows: list[Row],
    totals: Totals,
    places: dict[int, tuple[int, int]],
    engine: TrainingEngine,
    packing: Packing,
) -> MicroBatch:
    chosen = [rows[index] for index in micro.rows]
    own, starts = zip(*(places[index] for index in micro.rows), strict=True)
    return MicroBatch(chosen, pack(chosen, packing, engine.device), micro.weight, totals, {}, own, starts)


def evaluate(engine: TrainingEngine, micro_batches: list[MicroBatch], loss: Loss) -> Metrics:
    """This replica's share of the metrics of `loss`, without gradients."""
    return engine.evaluate(
        [micro_batch.batch for micro_batch in micro_batches],
        lambda outputs, number: loss(outputs, micro_batches[number]),
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _add_gradients(
    engine: TrainingEngine, learning: Learning, micro_batches: list[MicroBatch], step: Step
) -> tuple[Metrics, Statistics]:
    """Accumulate the gradients of a step; returns this replica's share of its metrics, and the result of `update`."""
    updated: Statistics = {}
    if learning.statistics is not None:
        step.statistics.update(engine.all_reduce_metrics(evaluate(engine, micro_batches, learning.statistics)))
    if learning.update is not None:
        updated = learning.update(step)
    for micro_batch in micro_batches:
        micro_batch.statistics.update({**step.statistics, **updated})

    def share(outputs: Outputs, number: int) -> Metrics:
        metrics = learning.loss(outputs, micro_batches[number])
        _require_finite(float(metrics["loss"].detach()), step.step, [row.row_id for row in micro_batches[number].rows])
        return metrics

    return engine.accumulate([micro_batch.batch for micro_batch in micro_batches], share), updated


def _save_and_exit(engine: TrainingEngine, state: TrainingState, log: list[Line]) -> NoReturn:
    """Save and exit. All processes exit together: the launcher kills the others as soon as one has exited."""
    state.save(log)
    engine.barrier()
    stopping.leave()


def _require_finite(value: float, step: int, ids: list[str]) -> None:
    if not torch.isfinite(torch.tensor(value)):
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise UserError(
            f"step {step + 1}: the loss or its gradient is {value} for the rows {shown}. Look at these rows, or "
            "lower learning_rate; nothing of this training is published."
        )
