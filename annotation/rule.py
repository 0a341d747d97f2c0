"""The scorer kind `rule`: a Python function of the user's own. Needs no torch."""

from numbers import Real

import msgspec

from annotation.config import ScoreConfig
from annotation.samples import Sample, Scorer
from contracts.callables import load_callable
from contracts.errors import UserError
from contracts.records import Score


def open_rule(config: ScoreConfig) -> Scorer:
    """The scorer that calls `config.function` once per completion."""
    assert config.function is not None
    path = config.function
    function = load_callable(path)

    def judge(sample: Sample) -> Score | str:
        rollout, completion = sample
        try:
            value = function(
                messages=[msgspec.to_builtins(message) for message in rollout.messages],
                response=completion.text,
                finish_reason=completion.finish_reason,
                answer=rollout.answer,
            )
        except Exception as error:
            raise UserError(f"function {path!r} failed on {sample}: {type(error).__name__}: {error}") from error
        if value is None:
            return "unscored"
        if not isinstance(value, Real):
            raise UserError(
                f"function {path!r} returned {value!r} for {sample}; return a number, or None where it cannot judge."
            )
        return sample.scored(float(value))

    return lambda samples: [judge(sample) for sample in samples]
