"""Scorers that run in worker processes: the kind `rule`, and built-in kinds with the same interface. Needs no torch."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec

from annotation.samples import Sample
from annotation.scorers.base import NO_ANSWER, Opening, WorkerSettings
from annotation.workers.journal import ShardJournals
from annotation.workers.pool import FunctionPool, FunctionResult, LateError, stall_seconds
from annotation.workers.worker import DetailedScore, TokenRewards
from contracts.errors import UserError
from contracts.faults import Fault, Tolerance
from contracts.records import Score

IMPORT_SECONDS = 60.0
"""Time limit for importing a function in a preflight check."""


class Rule:
    """Calls the configured function in worker processes."""

    def __init__(self, config: WorkerSettings, opening: Opening) -> None:
        stall = stall_seconds()
        limit = stall if config.seconds_per_sample is None else config.seconds_per_sample
        self.pool = FunctionPool(
            config.target, config.user_paths, config.keywords, title=config.title,
            count=config.replicas, batch=config.samples_per_call, limit=limit, load_limit=stall,
        )  # fmt: skip
        self.samples_per_call = config.samples_per_call if self.pool.is_batched else 1
        self.rechecked = config.rechecked
        self.journals = ShardJournals(opening.state, Tolerance(config.fail_on_error, opening.samples))
        self.reads_answer = config.reads_answer
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "unscored" if the function returns None, "no_answer" if it needs an answer and the
        prompt has none."""
        with self.journals.of(samples) as (results, note):
            left = [index for index in range(len(samples)) if not results.keys() >= self._batch_of(index, samples)]
            self.pool.score(
                [samples[index] for index in left],
                lambda found: note({left[place]: value for place, value in found.items()}),
            )
            self._require_same(samples, results)
        return [
            NO_ANSWER
            if self.reads_answer and results[index] is None and not (sample.rollout.answer or "").strip()
            else score_record(sample, results[index])
            for index, sample in enumerate(samples)
        ]

    def close(self) -> None:
        """End the worker processes, which call `close()` of a user's class."""
        self.pool.close()

    def _batch_of(self, index: int, samples: Sequence[Sample]) -> set[int]:
        """The samples that share a call with this one; batches are fixed, so that a kill does not change them."""
        start = index - index % self.samples_per_call
        return set(range(start, min(start + self.samples_per_call, len(samples))))

    def _require_same(self, samples: Sequence[Sample], results: dict[int, FunctionResult]) -> None:
        """Score the first samples again.

        Raises:
            UserError: a score differs.
        """
        count = min(self.rechecked, len(samples))
        again: dict[int, FunctionResult] = {}
        self.pool.score(samples[: math.ceil(count / self.samples_per_call) * self.samples_per_call], again.update)
        for index in range(count):
            before, now = results[index], again[index]
            if not isinstance(before, Fault) and not isinstance(now, Fault) and before != now:
                raise UserError(
                    f"{self.pool.title} scored {samples[index]} twice with different results: {describe(before)}, "
                    f"then {describe(now)}. Remove what is random, or set judge_twice=0 if results may differ."
                )


def check_function(config: WorkerSettings, seconds: float = IMPORT_SECONDS) -> str | None:
    """Import a scorer's function as the stage will, in a process that is killed after `seconds`; instantiate nothing.

    Returns a warning if it was not imported in time; it may have much to load.

    Raises:
        UserError: it cannot be imported, or its signature does not fit.
    """
    read = None if config.user_paths is None else tuple(config.user_paths)
    return _check(config.target, read, msgspec.json.encode(config.keywords, order="sorted"), seconds)


@functools.cache
def _check(path: str, inputs: tuple[Path, ...] | None, settings: bytes, seconds: float) -> str | None:
    try:
        FunctionPool(path, inputs, msgspec.json.decode(settings), load_limit=seconds, instantiates=False)
    except LateError as error:
        return str(error)
    return None


def describe(result: FunctionResult) -> str:
    """A result, for messages."""
    if isinstance(result, DetailedScore):
        return f"{describe(result.score)} with {result.parts | result.extras}"
    return str(result.rewards if isinstance(result, TokenRewards) else result)


def score_record(sample: Sample, result: FunctionResult) -> Score | str | Fault:
    """The score record of a result; "unscored" if it is None."""
    if result is None:
        return "unscored"
    if isinstance(result, Fault):
        return result
    detailed = result if isinstance(result, DetailedScore) else DetailedScore(result, {}, {})
    if isinstance(detailed.score, TokenRewards):
        rewards = tuple(detailed.score.rewards)
        return sample.scored(math.fsum(rewards), parts=detailed.parts, extras=detailed.extras, token_rewards=rewards)
    return sample.scored(detailed.score, parts=detailed.parts, extras=detailed.extras)
