"""The scorer kind `pairwise_judge`: asks a model behind an endpoint which of two answers is better.

annotation/models/comparisons.py selects the comparisons, and turns their results into scores.
"""

import msgspec

from annotation.models.comparisons import Comparison, Opponents, Result, all_comparisons, comparison_of, score_of
from annotation.remote.asking import Inquiry, InquiryResult, JudgeClient, question_of
from annotation.remote.parsing import VERDICT, ReplyParser
from annotation.remote.templates import COMPARE
from annotation.samples import Sample
from annotation.scorers.base import Opening
from annotation.scorers.pairwise_judge import PairwiseJudgeConfig
from annotation.scorers.remote import NO_JUDGEMENT
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score

VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""Value of each verdict: the probability that the first answer is better."""


class PairwiseJudge:
    """Asks for a verdict on every two answers, in both orders."""

    def __init__(self, config: PairwiseJudgeConfig, opening: Opening) -> None:
        verdicts = {name: value for name, value in VERDICTS.items() if config.extraction != "logprobs" or name != "tie"}
        parse = ReplyParser(config.extraction, config.pattern or VERDICT, config.json_key, verdicts)
        self.question = question_of(config, COMPARE)
        self.opponents = Opponents(config.opponents, config.against)
        self.judge = JudgeClient(config, parse, opening)
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.unread = ""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample.

        Reasons for which a sample is dropped: "no_judgement" if no comparison has verdicts in both orders (if some do,
        its score is their mean), "no_opponent" if its prompt has no other answer.
        """
        opponents = self.opponents.of(samples)
        faults: dict[Comparison, Fault] = {}
        asked: dict[Comparison, tuple[Inquiry, Inquiry]] = {}
        for comparison, sample in all_comparisons(samples, opponents).items():
            try:
                asked[comparison] = (
                    self._inquiry(sample, *comparison[1:]),
                    self._inquiry(sample, comparison[2], comparison[1]),
                )
            except UserError as error:
                faults[comparison] = Fault(error)
        judged = self.judge.ask([one for both in asked.values() for one in both], samples)
        both_orders = dict(zip(asked, zip(judged[::2], judged[1::2], strict=True), strict=True))
        results: dict[Comparison, Result] = {
            **faults,
            **{comparison: _result(*both) for comparison, both in both_orders.items()},
        }
        known = [both for comparison, both in both_orders.items() if isinstance(results[comparison], float)]
        self.unread = self.judge.unread
        self.counts = self.judge.counts | {
            "comparisons": len(known),
            "consistent": sum(_leaning(one) == -_leaning(other) for one, other in known),
        }
        return [
            _with_explanation(score_of(sample, others, results), sample, others, both_orders)
            for sample, others in zip(samples, opponents, strict=True)
        ]

    def _inquiry(self, sample: Sample, first: str, second: str) -> Inquiry:
        return Inquiry(sample, self.question.messages(sample.rollout, first=first, second=second))


def _result(forwards: InquiryResult, backwards: InquiryResult) -> Result:
    """The probability that the first answer is better."""
    for judged in (forwards, backwards):
        if judged.fault is not None:
            return judged.fault
    if not forwards.values or not backwards.values:
        return NO_JUDGEMENT
    return (forwards.mean + 1 - backwards.mean) / 2


def _leaning(judged: InquiryResult) -> int:
    """1 if the verdicts favour the answer shown first, -1 if they favour the other, 0 for a tie."""
    return (judged.mean > 0.5) - (judged.mean < 0.5)


def _with_explanation(
    found: Score | str | Fault,
    sample: Sample,
    others: list[str],
    judged: dict[Comparison, tuple[InquiryResult, InquiryResult]],
) -> Score | str | Fault:
    """A score with the judge's explanation of the sample's first comparison, in which the sample is answer A."""
    if not isinstance(found, Score):
        return found
    for other in others:
        comparison = comparison_of(sample, other)
        if comparison in judged and (texts := judged[comparison][comparison[1] != sample.completion.text].texts):
            return msgspec.structs.replace(found, extras={"against": other, "explanation": texts[0]})
    return found
