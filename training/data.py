"""Reads training rows from published artifacts; checks and counts them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.models import ModelInfo
from contracts.records import PAIRS, FinishReason, Pair
from modeling.rows import Floats, Response, Row, token_ids
from training.config import TrainingConfig

AnswerInputs = tuple[Mapping[str, float], dict[str, Floats]]
"""Additional inputs of an answer: numbers, and columns with one number per token."""


def pair_row(pair: Pair, chosen: AnswerInputs = ({}, {}), rejected: AnswerInputs = ({}, {})) -> Row:
    """A row with the chosen and the rejected answer to a prompt. Truncated answers never get an EOS."""

    def response(ids: tuple[int, ...], score: float, finish_reason: FinishReason, known: AnswerInputs) -> Response:
        numbers, tokens = known
        return Response(
            token_ids(ids), {"score": score, "truncated": float(finish_reason == "length"), **numbers}, tokens
        )

    return Row(
        pair.pair_id,
        token_ids(pair.prompt_ids),
        (
            response(pair.chosen_ids, pair.chosen_score, pair.chosen_finish_reason, chosen),
            response(pair.rejected_ids, pair.rejected_score, pair.rejected_finish_reason, rejected),
        ),
        pair.tags or (),
    )


def read_pairs(path: Path) -> list[Pair]:
    """Read all pairs of a published artifact."""
    return list(Artifact.open(path, PAIRS).rows(Pair))


def length_limit(config: TrainingConfig, info: ModelInfo) -> int | None:
    """Maximum sequence length in tokens: the config's, by default the model's context; None without a limit.

    Raises:
        UserError: `max_length` exceeds the context.
    """
    if config.max_length is not None:
        info.require_length(config.max_length, "max_length")
    return config.max_length or info.context_length


def usable_rows(
    rows: Iterable[Row], ledger: Ledger, *, limit: int | None, vocabulary: int, max_dropped: float, what: str
) -> list[Row]:
    """The rows to train on; the others are dropped and counted in `ledger` as too_long or empty.

    Args:
        rows: all rows.
        ledger: counts the rows; it may already contain dropped ones.
        limit: maximum sequence length in tokens.
        vocabulary: size of the model's vocabulary.
        max_dropped: maximum share of dropped rows, including those already in the ledger.
        what: name of the data for messages.

    Raises:
        UserError: too many rows are dropped, none is left, or a row has a token id outside of the vocabulary.
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
