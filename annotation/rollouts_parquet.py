"""Rollouts with their scores as Parquet: `python -m annotation.rollouts_parquet ROLLOUTS TARGET [SCORER=SCORES ...]`.

A row is a prompt with its answers, as in the JSONL, and `scores`: of each scorer one number for each answer, null where
it has none. What a table cannot hold, such as tools, is its JSON text, as in the Parquet file of pairs.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from annotation.parquet import IDS, TOOLS, further_of, plain, turn_of
from contracts.artifacts import Artifact
from contracts.errors import as_user_error
from contracts.records import ROLLOUTS, SCORES, Rollout, Score

ROWS_PER_GROUP = 1_000
_SAMPLING = {"temperature": pa.float64(), "top_p": pa.float64(), "top_k": pa.int32(), "max_tokens": pa.int32()}
_COMPLETION = {
    "sample": pa.int32(),
    "response_ids": IDS,
    "text": pa.string(),
    "finish_reason": pa.string(),
    "logprobs": pa.list_(pa.float64()),
    "seed": pa.int64(),
    "sampling": pa.struct(_SAMPLING),
}


def write(rollouts: Path, scores: Mapping[str, Path], target: Path) -> None:
    """Write a Parquet file; the same artifacts give the same bytes.

    Args:
        rollouts: an artifact.
        scores: artifacts with scores of it, by scorer.
        target: the file.
    """
    artifact = Artifact.open(rollouts, ROLLOUTS)
    found = {name: _scores(path) for name, path in scores.items()}
    further: set[str] = set()
    for rollout in artifact.rows(Rollout):
        further |= further_of(rollout)
    schema = schema_of(further, list(found))
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for rows in _groups(artifact, found):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def schema_of(further: set[str], scorers: list[str]) -> pa.Schema:
    """The columns of rollouts in which `further` occurs (fields of messages, the tools), scored by these."""
    tools = {TOOLS: pa.string()} if TOOLS in further else {}
    lists = {name: pa.list_(pa.float64()) for name in scorers}
    return pa.schema(
        {
            "prompt_id": pa.string(),
            "messages": pa.list_(turn_of(further)),
            "prompt_ids": IDS,
            "completions": pa.list_(pa.struct(_COMPLETION)),
            "policy": pa.string(),
            "iteration": pa.int32(),
            "logprob_mode": pa.string(),
            "answer": pa.string(),
            "tags": pa.list_(pa.string()),
            **tools,
            **({"scores": pa.struct(lists)} if lists else {}),
        }
    )


def _groups(artifact: Artifact, scores: dict[str, dict[tuple[str, int], float]]) -> Iterator[list[dict[str, Any]]]:
    rows = []
    for rollout in artifact.rows(Rollout):
        row = plain(msgspec.to_builtins(rollout))
        keys = [(rollout.prompt_id, completion.sample) for completion in rollout.completions]
        row["scores"] = {name: [found.get(key) for key in keys] for name, found in scores.items()}
        rows.append(row)
        if len(rows) == ROWS_PER_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _scores(path: Path) -> dict[tuple[str, int], float]:
    return {(row.prompt_id, row.sample): row.score for row in Artifact.open(path, SCORES).rows(Score)}


def _main(rollouts: str, target: str, *scores: str) -> int:
    try:
        named = (text.partition("=") for text in scores)
        write(Path(rollouts), {name: Path(path) for name, _, path in named}, Path(target))
    except Exception as error:
        mistake = as_user_error(error)
        if mistake is None:
            raise
        print(mistake, file=sys.stderr)
        return mistake.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
