"""What a trainer sees of its rows: token ids with the place where the response begins. No text, no padding."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import PAIRS, Pair
from training.config import TrainingConfig


@dataclass(frozen=True)
class Sequence:
    """A prompt and a response, in token ids. Where the response ends is its length, never a token's value."""

    ids: tuple[int, ...]
    start: int
    """Position of the first response token; at least 1, because position 0 is predicted by nothing."""

    @property
    def response_length(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Row:
    """One unit of a global batch, never split over processes: a demonstration, or both answers of a pair."""

    row_id: str
    sequences: tuple[Sequence, ...]
    constants: tuple[float, ...] = ()
    """Numbers that the loss needs beside the tokens, for example reference log-probabilities."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)


def pair_sequences(pair: Pair) -> tuple[Sequence, Sequence]:
    """The chosen and the rejected answer behind the prompt; truncated answers get no EOS here or anywhere else."""
    start = len(pair.prompt_ids)
    return (
        Sequence(pair.prompt_ids + pair.chosen_ids, start),
        Sequence(pair.prompt_ids + pair.rejected_ids, start),
    )


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a published stage."""
    return list(Artifact.open(path, PAIRS).rows(Pair))


def length_limit(config: TrainingConfig, info: ModelInfo) -> int | None:
    """The longest usable sequence, from the config or the model's context.

    Raises:
        UserError: `max_length` is beyond the context.
    """
    if config.max_length is not None:
        info.require_length(config.max_length, "max_length")
    return config.max_length or info.context_length


def usable(
    rows: Iterable[Row], ledger: Ledger, *, limit: int | None, vocabulary: int, max_dropped: float, what: str
) -> list[Row]:
    """The rows that can be trained on; the others are counted in `ledger` as too_long or empty.

    Args:
        limit: longest sequence in tokens.
        vocabulary: number of token ids that the model knows.
        max_dropped: highest share of dropped rows, reasons counted before included.
        what: name of the data for messages.

    Raises:
        UserError: too many rows are dropped, none is left, or a row holds a token that the model does not know.
    """
    kept: list[Row] = []
    for row in rows:
        if any(sequence.start < 1 or sequence.response_length < 1 for sequence in row.sequences):
            ledger.drop("empty")
        elif limit is not None and row.longest > limit:
            ledger.drop("too_long")
        else:
            _check_tokens(row, vocabulary)
            ledger.keep()
            kept.append(row)
    if not kept:
        raise UserError(f"{what}: no usable row ({ledger}). Give data that fits max_length={limit}.")
    ledger.stop_above(max_dropped, what)
    return kept


def _check_tokens(row: Row, vocabulary: int) -> None:
    largest = max(max(sequence.ids) for sequence in row.sequences)
    if largest >= vocabulary:
        raise UserError(
            f"row {row.row_id} holds the token id {largest}, but the model's vocabulary has {vocabulary} entries. "
            "The data was made with another tokenizer; make it with this model's."
        )
