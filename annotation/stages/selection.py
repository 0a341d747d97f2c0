"""Declares the stages of dynamic sampling, which select answers from several rounds, and their scores."""

from dataclasses import dataclass

from annotation.data.selection import SelectConfig, SelectScoresConfig
from contracts.declaration import Stage
from contracts.outlook import (
    FILE_BYTES,
    ID_BYTES,
    LOGPROB_BYTES,
    SAMPLE_BYTES,
    STAGE_BYTES,
    TEXT_BYTES,
    AnswerStats,
    Outlook,
)
from contracts.records import ROLLOUTS, SCORES


@dataclass(frozen=True)
class Selection(Stage[SelectConfig]):
    """The selection of prompts by the scores of their answers."""

    def answers(self, config: SelectConfig, outlook: Outlook) -> AnswerStats | None:
        """At most as many answers as in the first round."""
        return outlook.answers_of(config.rounds[0])

    def published_bytes(self, config: SelectConfig, outlook: Outlook) -> int | None:
        """Size of the first round."""
        answers = self.answers(config, outlook)
        if answers is None:
            return None
        tokens = answers.longest_answer * (ID_BYTES + LOGPROB_BYTES + TEXT_BYTES)
        return (
            answers.prompt_bytes
            + answers.count * (tokens + SAMPLE_BYTES)
            + len(config.rounds) * FILE_BYTES
            + STAGE_BYTES
        )


@dataclass(frozen=True)
class ScoreSelection(Stage[SelectScoresConfig]):
    """The scores of the answers that were selected."""

    def published_bytes(self, config: SelectScoresConfig, outlook: Outlook) -> int | None:
        """256 bytes per answer."""
        answers = outlook.answers_of(config.rollouts)
        return None if answers is None else answers.count * SAMPLE_BYTES + len(config.scores) * FILE_BYTES + STAGE_BYTES


SELECT = Selection(SelectConfig, ROLLOUTS, "annotation.data.selection:run")
SELECT_SCORES = ScoreSelection(SelectScoresConfig, SCORES, "annotation.data.selection:run_scores")
