"""What a trainer sees of its rows: token ids with the place where the response begins. No text, no padding."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import PAIRS, Pair
from training.config import TrainingConfig

Ids: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Response:
    """An answer in token ids. Where it ends is its length, never a token's value."""

    ids: Ids
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the loss needs beside the tokens, for example a reference log-probability."""
    tokens: dict[str, Floats] = field(default_factory=dict)
    """The same for every token, for example advantages; each as long as `ids`."""


@dataclass(frozen=True)
class Row:
    """One unit of a global batch, never split over processes: a demonstration, a pair, or a prompt with its samples."""

    row_id: str
    prompt: Ids
    """At least one token, because a response's first token is predicted by the one before it."""
    responses: tuple[Response, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(len(response.ids) for response in self.responses)

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(len(response.ids) for response in self.responses)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, the prompt counted with each."""
        return self.response_tokens + len(self.prompt) * len(self.responses)


def token_ids(ids: Iterable[int]) -> Ids:
    """Token ids as rows hold them."""
    return np.fromiter(ids, dtype=np.int64)


def float_values(values: Iterable[float]) -> Floats:
    """Numbers of a response's tokens as rows hold them."""
    return np.fromiter(values, dtype=np.float32)


def pair_row(pair: Pair, chosen: Mapping[str, float] | None = None, rejected: Mapping[str, float] | None = None) -> Row:
    """The chosen and the rejected answer to a prompt; truncated answers get no EOS here or anywhere else."""
    return Row(
        pair.pair_id,
        token_ids(pair.prompt_ids),
        (
            Response(token_ids(pair.chosen_ids), {"score": pair.chosen_score, **(chosen or {})}),
            Response(token_ids(pair.rejected_ids), {"score": pair.rejected_score, **(rejected or {})}),
        ),
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
        if not len(row.prompt) or not all(len(response.ids) for response in row.responses):
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
    largest = max(int(ids.max()) for ids in (row.prompt, *(response.ids for response in row.responses)))
    if largest >= vocabulary:
        raise UserError(
            f"row {row.row_id} holds the token id {largest}, but the model's vocabulary has {vocabulary} entries. "
            "The data was made with another tokenizer; make it with this model's."
        )
