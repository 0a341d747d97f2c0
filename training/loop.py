"""The training loop: one for every algorithm and every parallel layout."""

from collections.abc import Callable
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
from training.algorithm import Figures, Statistics, Step, sum_by_response
from training.batching import MicroBatch, count_steps, divide, global_batches
from training.config import TrainingConfig
from training.engines.base import Outputs, TrainingEngine
from training.schedule import learning_rate
from training.state import Line, TrainingState


@dataclass(frozen=True)
class Totals:
    """What a step's sums are divided by; known from the step's rows, so that nobody has to ask the other processes."""

    rows: int
    responses: int
    tokens: int
    """Response tokens of all rows."""
    first_tokens: int
    """Response tokens of each row's first response: of the demonstration, or of the chosen answer."""

    @classmethod
    def of(cls, rows: list[Row]) -> "Totals":
        """The totals of one global batch."""
        return cls(
            len(rows),
            sum(len(row.responses) for row in rows),
            sum(row.response_tokens for row in rows),
            sum(len(row.responses[0].ids) for row in rows),
        )


@dataclass(frozen=True)
class Part:
    """A micro-batch, as a loss sees it: rows of one optimizer step, in the order in which the model computes them."""

    rows: list[Row]
    batch: Packed
    weight: float
    """1, or 0 where the rows only fill up."""
    totals: Totals
    """Of the whole step."""
    statistics: Statistics
    """Numbers of the whole step that were computed before its loss."""
    places: tuple[int, ...] = ()
    """Place of each row in the step."""
    starts: tuple[int, ...] = ()
    """Place of each row's first response among those of the step."""
    step: int = 0
    """Number of the optimizer step, from 0 on."""
    steps: int = 1
    """Optimizer steps of the training."""
    seed: int = 0
    """What random numbers of this step come from."""

    def numbers(self, name: str) -> Tensor:
        """A number of every response, [S]."""
        values = [response.numbers[name] for row in self.rows for response in row.responses]
        return torch.tensor(values, device=self.batch.lengths.device)

    def tokens(self, name: str) -> Tensor:
        """A number of every response token, [N]."""
        values = [torch.from_numpy(response.tokens[name]) for row in self.rows for response in row.responses]
        return torch.cat(values).to(self.batch.lengths.device)

    def response_seeds(self) -> list[int]:
        """For each response what its random numbers come from: the step and the row alone decide."""
        return [
            derive_seed("response", self.seed, row.row_id, number)
            for row in self.rows
            for number in range(len(row.responses))
        ]

    def weights(self, count: int) -> Tensor:
        """The weight of each of `count` rows or responses."""
        return torch.full((count,), self.weight, device=self.batch.lengths.device)

    def sum_by_response(self, values: Tensor) -> Tensor:
        """[N] -> [S]: the sum over each response's tokens."""
        return sum_by_response(values, self.batch.lengths)


Loss = Callable[[Outputs, Part], Figures]
"""The share that a micro-batch has in each figure of its step, `loss` among them. Every figure is a weighted sum over
rows divided by one of the step's totals, so that adding the shares of all micro-batches and processes gives the figure
of the step, however the step was divided."""


@dataclass(frozen=True)
class Learning:
    """What a training learns from."""

    rows: list[Row]
    loss: Loss
    statistics: Loss | None = None
    """Computed over the whole step, without gradients, before its loss. Vectors may be among its figures."""
    update: Callable[[Step], Statistics] | None = None
    """What is decided once per step, from the statistics, before the loss."""
    state: dict[str, float] = field(default_factory=dict)
    """What `update` keeps from step to step, with its first values; the log has it, and so has the saved state."""


@dataclass(frozen=True)
class FinalReport:
    """What is told of the final model."""

    figures: dict[str, float]
    files: dict[str, list[Any]]
    """Rows to publish beside the checkpoint, by the file's name."""


@dataclass(frozen=True)
class HeldOut:
    """What the final model is measured by."""

    rows: list[Row]
    scores: Callable[[Outputs, Part], Tensor]
    """Two numbers for each of a micro-batch's rows, [rows, 2]."""
    report: Callable[[NDArray[np.float32]], FinalReport]
    """What follows from those of all rows, in their order."""


def train(
    config: TrainingConfig,
    context: Context,
    engine: TrainingEngine,
    learning: Learning,
    packing: Packing,
    state: TrainingState,
) -> list[Line]:
    """Train the engine's model in place and return one line of figures per optimizer step.

    A training that is asked to stop saves its state after the step in hand, and leaves; the caller defers the request.
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
    split = partial(parts, engine=engine, budget=config.micro_batch_tokens, packing=packing)

    def add_gradients(batch: tuple[int, ...], step: int) -> tuple[Figures, Statistics]:
        """Those of a step, which begins with what the one before has left."""
        seed = derive_seed("algorithm", config.seed, step)
        made = [replace(part, step=step, steps=total, seed=seed) for part in split(rows, batch)]
        before = {name: log[step - 1][name] for name in learning.state} if step else learning.state
        return _add_gradients(engine, learning, made, Step(step, total, {}, before, _generator(seed)))

    log = state.read()
    if log:
        if engine.needs_a_step_before_write:
            add_gradients((0,), 0)
        state.restore(log)
    for step, batch in enumerate(batches):
        if step < len(log):
            continue
        rate = learning_rate(
            step, total, peak=config.learning_rate, shape=config.schedule, warmup_ratio=config.warmup_ratio
        )
        engine.set_rate(rate)
        figures, decided = add_gradients(batch, step)
        norm = engine.clip(config.max_grad_norm)
        # DeepSpeed has stepped by now: there this stops before anything is saved.
        _require_finite(norm, step, [rows[index].row_id for index in batch])
        engine.step()
        # Whether to save and whether to leave has to be the same for all processes: it travels with the figures.
        sums = engine.add_up({**figures, "due": float(state.due), "stop": float(stopping.requested())})
        due, stop = sums.pop("due") > 0, sums.pop("stop") > 0
        if taken := decided.keys() & sums.keys():
            raise UserError(f"the algorithm's loss and its update both return a figure {min(taken)!r}. Rename one.")
        kept = {name: value for name, value in decided.items() if isinstance(value, float)}
        log.append({"step": step + 1, **sums, **kept, "learning_rate": rate, "grad_norm": norm})
        context.progress(step + 1, total, "steps")
        if stop:
            _leave(engine, state, log)
        if due and step + 1 < total:  # behind the last step follows the checkpoint
            state.save(log)
    return log


def measure(
    config: TrainingConfig,
    engine: TrainingEngine,
    held_out: HeldOut,
    packing: Packing,
    state: TrainingState,
    log: list[Line],
) -> FinalReport:
    """Measure the trained model; its figures are added to the last line of `log`. A stop is answered as by `train`."""
    rows = held_out.rows
    places = {id(row): place for place, row in enumerate(rows)}
    found = torch.zeros(len(rows), 2)
    for part in parts(rows, engine=engine, budget=config.micro_batch_tokens, packing=packing):
        scores = held_out.scores(engine.forward(part.batch), part).float().cpu()
        if part.weight:
            found[[places[id(row)] for row in part.rows]] = scores
    if engine.add_up({"stop": float(stopping.requested())})["stop"] > 0:
        _leave(engine, state, log)
    whole = engine.sum(found)
    if not whole.isfinite().all():
        bad = [row.row_id for row, values in zip(rows, whole, strict=True) if not values.isfinite().all()]
        raise UserError(
            f"the trained model's scores of the held-out rows {', '.join(bad[:8])} are not finite. Look at these rows, "
            "or lower learning_rate; nothing of this training is published."
        )
    report = held_out.report(whole.numpy())
    log[-1].update({f"held_out_{name}": value for name, value in report.figures.items()})
    return report


def parts(
    rows: list[Row], batch: tuple[int, ...] | None = None, *, engine: TrainingEngine, budget: int, packing: Packing
) -> list[Part]:
    """This replica's micro-batches of one optimizer step, or of all rows."""
    batch = tuple(range(len(rows))) if batch is None else batch
    totals = Totals.of([rows[index] for index in batch])
    counts = [len(rows[index].responses) for index in batch]
    starts = [0, *accumulate(counts)]
    places = {index: (place, starts[place]) for place, index in enumerate(batch)}
    divided = divide(batch, rows, processes=engine.replicas, budget=budget, packing=packing)
    return [_part(micro, rows, totals, places, engine, packing) for micro in divided[engine.replica]]


def _part(
    micro: MicroBatch,
    rows: list[Row],
    totals: Totals,
    places: dict[int, tuple[int, int]],
    engine: TrainingEngine,
    packing: Packing,
) -> Part:
    chosen = [rows[index] for index in micro.rows]
    own, starts = zip(*(places[index] for index in micro.rows), strict=True)
    return Part(chosen, pack(chosen, packing, engine.device), micro.weight, totals, {}, own, starts)


def evaluate(engine: TrainingEngine, made: list[Part], loss: Loss) -> Figures:
    """This replica's share of the figures of `loss`, without gradients."""
    return engine.evaluate([part.batch for part in made], lambda outputs, number: loss(outputs, made[number]))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _add_gradients(
    engine: TrainingEngine, learning: Learning, made: list[Part], step: Step
) -> tuple[Figures, Statistics]:
    """Compute the gradients of a step; return this replica's share of its figures, and what was decided before."""
    decided: Statistics = {}
    if learning.statistics is not None:
        step.statistics.update(engine.add_up(evaluate(engine, made, learning.statistics)))
    if learning.update is not None:
        decided = learning.update(step)
    for part in made:
        part.statistics.update({**step.statistics, **decided})

    def share(outputs: Outputs, number: int) -> Figures:
        figures = learning.loss(outputs, made[number])
        _require_finite(float(figures["loss"].detach()), step.step, [row.row_id for row in made[number].rows])
        return figures

    return engine.accumulate([part.batch for part in made], share), decided


def _leave(engine: TrainingEngine, state: TrainingState, log: list[Line]) -> NoReturn:
    """Save and end. All processes end together, because a launcher ends the others as soon as one is gone."""
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
