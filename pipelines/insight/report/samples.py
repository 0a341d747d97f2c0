"""Reads one set of rollouts with scores and pairs, shard by shard, into statistics and chunks of texts for the page."""

import math
import zlib
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from contracts.jsonl import read_jsonl
from pipelines.insight.report.data import Correlation, GroupColumns, LargestMargin, PairFacts, SampleSet
from pipelines.insight.report.moments import Moments
from pipelines.insight.report.rows import (
    CHUNK_BYTES,
    MAX_GROUPS,
    CompletionFields,
    PairFields,
    RolloutFields,
    ScoreFields,
    SetSources,
    last_user_turn,
    logprobs_in,
    pairs_in,
    scores_in,
    text_of_turn,
)
from pipelines.insight.report.vocabulary import Vocabulary

MAX_POINTS = 300
"""Maximum number of answers whose length and score are drawn."""
EXCERPT_CHARACTERS = 120
MAX_CHARACTERS = 300
"""Characters of the texts on the first screen."""
LEVEL = 4
"""Compression level of zlib: the next two levels save an eighth of the bytes and take three times as long."""


@dataclass
class Chunk:
    """Texts of some prompts, or the log-probabilities of their answers, as base64 of deflated JSON."""

    name: str
    content: str


def read_set(sources: SetSources) -> tuple[SampleSet, list[Chunk]]:
    """Read one set.

    Returns:
        Its statistics, and its chunks: alternately texts and the log-probabilities that belong to them.

    Raises:
        UserError: a file is missing or damaged.
    """
    reader = _Reader(sources)
    for shard in sources.rollouts.shards:
        reader.read(shard)
    return reader.finish()


class _Reader:
    """Accumulates the statistics, holding one shard's scores and one chunk's texts in memory at a time."""

    def __init__(self, sources: SetSources) -> None:
        self.sources = sources
        self.scorers = list(sources.scores)
        self.columns = GroupColumns()
        self.excerpts: dict[str, list[Any]] = {}
        self.chunks: list[Chunk] = []
        self.sizes: list[int] = []
        self.text: list[bytes] = []
        self.tokens: list[Any] = []
        self.pending = 0
        self.vocabulary = Vocabulary(sources.policy)
        self.prompts = self.samples = self.truncated = self.length = self.left_out = 0
        self.sums = {name: [0.0, 0] for name in self.scorers}
        self.scored = self.with_gradient = 0
        self.within, self.across = Moments(), Moments()
        self.points: list[list[float]] = []
        self.stride = max(1, sources.rollouts.manifest.facts.get("completions", 0) // MAX_POINTS)
        self.gap, self.gap_tokens = 0.0, 0
        self.encoder = msgspec.json.Encoder(decimal_format="number")
        self.pairs = pairs_in(sources.pairs)
        self.pair_sums = [0.0] * 5
        self.pair_count = 0
        self.largest: LargestMargin | None = None
        same = sources.reference is not None and (
            sources.reference.manifest.weights == sources.rollouts.manifest.weights
        )
        self.reference = sources.reference if same else None

    def read(self, shard: Path) -> None:
        """Read one shard of rollouts with the same shard of every scorer."""
        scores = [scores_in(artifact, shard.name) for artifact in self.sources.scores.values()]
        logprobs = logprobs_in(self.reference, shard.name) if self.reference else {}
        for row in read_jsonl(shard, RolloutFields):
            self._add(row, [column.get(row.prompt_id, {}) for column in scores])
            if logprobs:
                self._compare(row, logprobs)

    def _add(self, row: RolloutFields, scores: list[dict[int, ScoreFields]]) -> None:
        lengths = [len(answer.response_ids) for answer in row.completions]
        cut = sum(answer.finish_reason == "length" for answer in row.completions)
        self.prompts += 1
        self.samples += len(lengths)
        self.truncated += cut
        self.length += sum(lengths)
        for name, column in zip(self.scorers, scores, strict=True):
            self.sums[name][0] += math.fsum(found.score for found in column.values())
            self.sums[name][1] += len(column)
        first = scores[0] if scores else {}
        scored = [
            (float(length), first[answer.sample].score)
            for answer, length in zip(row.completions, lengths, strict=True)
            if answer.sample in first
        ]
        self._correlate(scored)
        pairs = self.pairs.get(row.prompt_id, [])
        best = max(pairs, key=lambda pair: pair.margin, default=None)
        if best is not None and (self.largest is None or best.margin > self.largest.margin):
            self.largest = _largest(self.sources, row, best)
        by_sample = dict(zip((answer.sample for answer in row.completions), lengths, strict=True))
        for pair in pairs:
            found = (by_sample.get(pair.chosen_sample, 0), by_sample.get(pair.rejected_sample, 0))
            figures = (*found, pair.chosen_score, pair.rejected_score, pair.margin)
            self.pair_sums = [total + value for total, value in zip(self.pair_sums, figures, strict=True)]
            self.pair_count += 1
        if self.prompts > MAX_GROUPS:
            self.left_out += 1
            return
        values = [score for _, score in scored]
        columns = self.columns
        columns.prompt.append(row.prompt_id)
        columns.mean.append(_rounded(math.fsum(values) / len(values)) if values else None)
        columns.best.append(_rounded(max(values)) if values else None)
        columns.worst.append(_rounded(min(values)) if values else None)
        columns.margin.append(_rounded(best.margin) if best else None)
        columns.length.append(_rounded(sum(lengths) / len(lengths)) if lengths else 0.0)
        columns.longest.append(max(lengths, default=0))
        columns.samples.append(len(lengths))
        columns.truncated.append(cut)
        if row.prompt_id not in self.excerpts:
            self.excerpts[row.prompt_id] = [last_user_turn(row)[:EXCERPT_CHARACTERS], row.tags]
        self._add_to_chunk(row, scores, pairs)

    def _correlate(self, scored: list[tuple[float, float]]) -> None:
        for length, score in scored:
            self.across.add(length, score)
            if self.across.count % self.stride == 0 and len(self.points) < MAX_POINTS:
                self.points.append([length, _rounded(score)])
        if len(scored) > 1:
            self.scored += 1
            self.with_gradient += any(score != scored[0][1] for _, score in scored)
            middle = [math.fsum(values) / len(scored) for values in zip(*scored, strict=True)]
            for length, score in scored:
                self.within.add(length - middle[0], score - middle[1])

    def _compare(self, row: RolloutFields, logprobs: dict[tuple[str, int], list[float]]) -> None:
        for answer in row.completions:
            reference = logprobs.get((row.prompt_id, answer.sample))
            if reference and len(reference) == len(answer.logprobs):
                self.gap += math.fsum(abs(a - b) for a, b in zip(answer.logprobs, reference, strict=True))
                self.gap_tokens += len(reference)

    def _add_to_chunk(self, row: RolloutFields, scores: list[dict[int, ScoreFields]], pairs: list[PairFields]) -> None:
        """Add a row to the chunk: [prompt id, messages, known answer, answers, pairs]. Score details end an answer."""
        answers = [
            [
                answer.sample,
                answer.text,
                answer.finish_reason,
                len(answer.response_ids),
                [_rounded(column[answer.sample].score) if answer.sample in column else None for column in scores],
                *_score_details(answer, scores),
            ]
            for answer in row.completions
        ]
        chosen = [[pair.chosen_sample, pair.rejected_sample, _rounded(pair.margin)] for pair in pairs]
        messages = [[message.role, text_of_turn(message)] for message in row.messages]
        self.text.append(self.encoder.encode([row.prompt_id, messages, row.answer, answers, chosen]))
        self.tokens.append(
            [[answer.response_ids, [round(-100 * value) for value in answer.logprobs]] for answer in row.completions]
        )
        self.pending += len(self.text[-1])
        if self.pending >= CHUNK_BYTES:
            self._close_chunk()

    def _close_chunk(self) -> None:
        if not self.text:
            return
        number = len(self.sizes)
        texts = b"[" + b",".join(self.text) + b"]"
        used = {id for group in self.tokens for ids, _ in group for id in ids}
        tokens = self.encoder.encode([self.vocabulary.texts(used), self.tokens])
        self.chunks.append(Chunk(f"{self.sources.key}-{number}", _packed(texts)))
        self.chunks.append(Chunk(f"{self.sources.key}-{number}t", _packed(tokens)))
        self.sizes.append(len(self.text))
        self.text, self.tokens, self.pending = [], [], 0

    def finish(self) -> tuple[SampleSet, list[Chunk]]:
        """The statistics and the chunks of everything that was read."""
        self._close_chunk()
        pairs = None
        if self.pair_count:
            means = [total / self.pair_count for total in self.pair_sums]
            pairs = PairFacts(
                count=self.pair_count,
                chosen_length=means[0],
                rejected_length=means[1],
                chosen_score=means[2],
                rejected_score=means[3],
                margin=means[4],
                strategy=self.sources.strategy,
            )
        found = SampleSet(
            key=self.sources.key,
            name=self.sources.name,
            role=self.sources.role,
            iteration=self.sources.iteration,
            scorers=self.scorers,
            prompts=self.prompts,
            samples=self.samples,
            truncated=self.truncated,
            mean_length=self.length / self.samples if self.samples else None,
            means={name: total / count if count else None for name, (total, count) in self.sums.items()},
            groups_scored=self.scored,
            groups_with_gradient=self.with_gradient,
            correlation=Correlation(
                across=self.across.correlation,
                within=self.within.correlation,
                freedom=self.within.count - self.scored,
                slope=self.within.slope,
            ),
            points=self.points,
            pairs=pairs,
            largest=self.largest,
            gap=self.gap / self.gap_tokens if self.gap_tokens else None,
            gap_tokens=self.gap_tokens,
            columns=self.columns,
            excerpts=self.excerpts,
            chunks=self.sizes,
            bytes=[len(chunk.content) for chunk in self.chunks[::2]],
            token_bytes=[len(chunk.content) for chunk in self.chunks[1::2]],
            left_out=self.left_out,
        )
        return found, self.chunks


def _score_details(answer: CompletionFields, scores: list[dict[int, ScoreFields]]) -> list[list[list[Any] | None]]:
    """The parts and extras of an answer's scores: one list with [parts, extras] or null for each scorer; an empty list
    if no scorer has any."""
    found = [column.get(answer.sample) for column in scores]
    if not any(score is not None and (score.parts or score.extras) for score in found):
        return []
    return [
        [
            [{name: _rounded(value) for name, value in (score.parts or {}).items()}, score.extras or {}]
            if score is not None and (score.parts or score.extras)
            else None
            for score in found
        ]
    ]


def _largest(sources: SetSources, row: RolloutFields, pair: PairFields) -> LargestMargin:
    texts = {answer.sample: answer.text[:MAX_CHARACTERS] for answer in row.completions}
    return LargestMargin(
        stage=sources.name,
        iteration=sources.iteration,
        prompt_id=row.prompt_id,
        prompt=last_user_turn(row)[:MAX_CHARACTERS],
        chosen=texts.get(pair.chosen_sample, ""),
        rejected=texts.get(pair.rejected_sample, ""),
        chosen_score=pair.chosen_score,
        rejected_score=pair.rejected_score,
        margin=pair.margin,
    )


def _rounded(value: float) -> float:
    """A number rounded to four digits; 0 if it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0


def _packed(content: bytes) -> str:
    return b64encode(zlib.compress(content, LEVEL)).decode()
