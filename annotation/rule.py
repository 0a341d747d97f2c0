"""The scorer kind `rule`: a Python function of the user's own. Needs no torch."""

import traceback
from numbers import Real

import msgspec

from annotation.config import ScoreConfig
from annotation.samples import Sample
from contracts.callables import load_callable
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score


class Rule:
    """Calls the configured function once per completion."""

    def __init__(self, config: ScoreConfig) -> None:
        assert config.function is not None
        self.path = config.function
        self.function = load_callable(config.function)
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample; "unscored" where the function returns None."""
        return [self._judge_or_fault(sample) for sample in samples]

    def _judge_or_fault(self, sample: Sample) -> Score | str | Fault:
        try:
            return self._judge(sample)
        except UserError as error:
            return Fault(error)

    def _judge(self, sample: Sample) -> Score | str:
        rollout, completion = sample
        try:
            value = self.function(
                messages=[msgspec.to_builtins(message) for message in rollout.messages],
                response=completion.text,
                finish_reason=completion.finish_reason,
                answer=rollout.answer,
            )
        except (Exception, SystemExit) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"function {self.path!r} failed on {sample}: {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})."
            ) from error
        if value is None:
            return "unscored"
        if not isinstance(value, Real):
            raise UserError(
                f"function {self.path!r} returned {value!r} for {sample}; return a number, or None where it cannot "
                "judge."
            )
        try:
            return sample.scored(float(value))
        except OverflowError as error:
            raise UserError(f"function {self.path!r} returned a number too large for a float for {sample}.") from error
