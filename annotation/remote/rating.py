"""The scorer kind `judge`: asks a model behind an endpoint to rate each answer."""

from annotation.remote.asking import Inquiry, InquiryResult, JudgeClient, question_of
from annotation.remote.parsing import RATING, ReplyParser
from annotation.remote.templates import RATE
from annotation.samples import Sample
from annotation.scorers.base import Opening
from annotation.scorers.judge import RatingSettings
from annotation.scorers.remote import NO_JUDGEMENT
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.records import Score


class RatingJudge:
    """Asks a judge to rate each answer."""

    def __init__(self, config: RatingSettings, opening: Opening) -> None:
        scale = (config.lowest, config.highest)
        parse = ReplyParser(config.extraction, config.pattern or RATING, config.json_key, scale)
        self.question = question_of(config, RATE, low=config.lowest, high=config.highest)
        self.judge = JudgeClient(config, parse, opening)
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.unread = ""

    def __call__(self, samples: list[Sample]) -> list[Score | str | Fault]:
        """One score per sample: the mean of its votes; "no_judgement" if none of them has a rating."""
        faults: dict[int, Fault] = {}
        inquiries: dict[int, Inquiry] = {}
        for index, sample in enumerate(samples):
            response = sample.completion.text
            try:
                messages = self.question.messages(
                    sample.rollout, response=response, finish_reason=sample.completion.finish_reason
                )
            except UserError as error:
                faults[index] = Fault(error)
            else:
                inquiries[index] = Inquiry(sample, messages)
        judged = dict(zip(inquiries, self.judge.ask(list(inquiries.values()), samples), strict=True))
        self.counts, self.unread = self.judge.counts, self.judge.unread
        return [
            faults[index] if index in faults else _score(sample, judged[index]) for index, sample in enumerate(samples)
        ]


def _score(sample: Sample, judged: InquiryResult) -> Score | str | Fault:
    if judged.fault is not None:
        return judged.fault
    if not judged.values:
        return NO_JUDGEMENT
    several = len(judged.votes) > 1
    parts = {f"vote_{number}": vote[0] for number, vote in enumerate(judged.votes, 1) if vote is not None and several}
    return sample.scored(judged.mean, parts=parts, extras={"explanation": judged.texts[0]})
