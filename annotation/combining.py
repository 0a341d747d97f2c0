"""The scorer kind `combined`: joins published scores and evaluates an expression over them. Needs no torch."""

import itertools
import math
import statistics

from annotation.samples import Sample
from annotation.scorers.base import Opening
from annotation.scorers.combined import CombinedConfig, missing_reason, part_name
from annotation.scorers.expression import Expression
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.faults import Fault
from contracts.joining import scores_of_shard
from contracts.records import SCORES, Score

ScoreOrReason = Score | str | Fault


class Combined:
    """Evaluates the expression for the answers to each prompt."""

    def __init__(self, config: CombinedConfig, opening: Opening) -> None:
        self.expression = Expression(config.expression)
        self.name = config.name
        self.shard = opening.shard
        self.scores = {name: Artifact.open(config.scores[name], SCORES) for name in self.expression.scorers}
        self.standards = {name: _mean_and_spread(config, name) for name in self.expression.standardised}
        self.facts: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, samples: list[Sample]) -> list[ScoreOrReason]:
        """One score per sample, with the values of the expression's names as parts; "no_NAME" if a scorer has no score
        for the sample."""
        columns = {name: scores_of_shard(artifact, self.shard()) for name, artifact in self.scores.items()}
        found: list[ScoreOrReason] = []
        for prompt, group in itertools.groupby(samples, key=lambda sample: sample.rollout.prompt_id):
            scores = {name: column.get(prompt, {}) for name, column in columns.items()}
            found += self._evaluate(list(group), scores)
        return found

    def _evaluate(self, samples: list[Sample], scores: dict[str, dict[int, Score]]) -> list[ScoreOrReason]:
        rows = [self._row(sample, scores) for sample in samples]
        complete = [row for row in rows if not isinstance(row, str)]
        if not complete:
            return [row for row in rows if isinstance(row, str)]
        columns = {name: [row[name] for row in complete] for name in complete[0]}
        values = enumerate(self.expression.compute(columns, self.standards))
        found: list[ScoreOrReason] = []
        for sample, row in zip(samples, rows, strict=True):
            if isinstance(row, str):
                found.append(row)
                continue
            place, value = next(values)
            if math.isfinite(value):
                found.append(sample.scored(value, parts={part_name(name): row[name] for name in self.expression.names}))
                continue
            why = self.expression.explain(columns, self.standards, place)
            text = f"scorer {self.name!r}, expression {self.expression.text!r}: for {sample}, {why}."
            found.append(Fault(UserError(f"{text} Guard against it, as in a / max(b, 0.01) or a / b if b > 0 else 0.")))
        return found

    def _row(self, sample: Sample, scores: dict[str, dict[int, Score]]) -> dict[str, float] | str:
        """The values of the expression's names for one sample, or the reason for which one has no value."""
        completion = sample.completion
        row = {"tokens": float(len(completion.response_ids)), "truncated": float(completion.finish_reason == "length")}
        for written, (name, part) in self.expression.names.items():
            score = scores[name].get(completion.sample)
            value = None if score is None else score.score if part is None else (score.parts or {}).get(part)
            if value is None:
                return missing_reason(written)
            row[written] = value
        return row


def _mean_and_spread(config: CombinedConfig, name: str) -> tuple[float, float]:
    """Mean and standard deviation of published scores.

    Raises:
        UserError: all scores are equal.
    """
    scores = Artifact.open(config.standards[name], SCORES)
    values = [score.score for score in scores.rows(Score)]
    spread = statistics.pstdev(values) if values else 0.0
    if spread == 0:
        raise UserError(
            f"standard({name}) is measured by the standard deviation of the scores in {scores.path}, which has "
            f"{len(values)} scores that do not differ. Take it out of the expression."
        )
    return statistics.fmean(values), spread
