"""The scorer kind `rule`: a Python function of the user's own. Needs no torch."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from annotation.config import ScoreConfig
from annotation.journal import Journal
from annotation.judge import TokenRewards
from annotation.judges import Judgement, Judges, LateError, stall_seconds
from annotation.samples import Sample
from contracts.attempt import report_within
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score


class Rule:
    """Has the configured function called once per completion, in processes of its own."""

    def __init__(self, config: ScoreConfig, state: Path, count: Callable[[], int]) -> None:
        """`state`: a folder that outlives a kill (`Publication.state`); `count`: the stage's number of samples."""
        assert config.function is not None
        stall = stall_seconds()
        limit = stall if config.seconds_per_sample is None else config.seconds_per_sample
        self.judges = Judges(config.function, config.inputs, count=config.replicas, limit=limit, load_limit=stall)
        self.state = state
        self.journal: Journal | None = None
        self.limit = config.fail_on_error
        self.count = functools.cache(count)
        self.failed = 0
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "unscored" where the function returns None."""
        if self.journal is not None:  # of a shard that is finished
            self.journal.forget()
        self.journal = journal = Journal(self.state, samples)
        results: dict[int, Judgement] = dict(journal.known())
        left = [index for index in range(len(samples)) if index not in results]

        def note(found: dict[int, Judgement]) -> None:
            kept = {left[place]: value for place, value in found.items() if not isinstance(value, Fault)}
            journal.add(kept)
            results.update(kept)
            report_within(len(results), len(samples), "samples")
            for place, value in found.items():
                if isinstance(value, Fault):
                    results[left[place]] = value
                    self._bear(value)

        try:
            self.judges.judge([samples[index] for index in left], note)
        except UserError:
            journal.forget_cheap()
            raise
        return [_result(sample, results[index]) for index, sample in enumerate(samples)]

    def _bear(self, fault: Fault) -> None:
        """Take note of a failure, or end the stage: each may cost `seconds_per_sample`, so not only at the end."""
        if self.limit == 0:
            raise fault.error
        self.failed += 1
        total = self.count()
        if self.failed > self.limit * total:
            raise UserError(
                f"{self.failed} of {total} samples failed so far, more than fail_on_error={self.limit:g} allows. "
                f"The last: {fault.error}"
            )


def check_function(path: str, inputs: Sequence[Path] | None, seconds: float) -> str | None:
    """Import a rule's function as the stage will, in a process that is ended after `seconds`.

    Returns a warning where it was not imported by then; it may have much to load.

    Raises:
        UserError: it cannot be imported, or not be called as it will be.
    """
    try:
        Judges(path, inputs, load_limit=seconds)
    except LateError as error:
        return str(error)
    return None


def _result(sample: Sample, judgement: Judgement) -> Score | str | Fault:
    if judgement is None:
        return "unscored"
    if isinstance(judgement, TokenRewards):
        return sample.scored(math.fsum(judgement.rewards), token_rewards=tuple(judgement.rewards))
    return judgement if isinstance(judgement, Fault) else sample.scored(judgement)
