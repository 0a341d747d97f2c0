"""Writes rollouts with their scores as Parquet: `python -m annotation.rollouts_parquet`.

Each line of stdin is a request, {"rollouts": ARTIFACT, "scores": {SCORER: ARTIFACT}, "target": FILE}. When the file is
written, the reply is printed to stdout as one line: null, or the message of an error that the user has to fix.

A row is a prompt with its answers, as in the JSONL, plus `scores`: for each scorer, one number per answer, null if the
answer has no score. If scores have parts, `score_parts` holds the same for each part of each scorer. Values that a
table cannot hold, such as tools, are stored as JSON text, as in the Parquet file of pairs.
"""

import contextlib
import importlib.abc
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from annotation.data.parquet import IDS, TOOLS, flat_row, optional_fields_of, turn_type
from contracts.artifacts import Artifact
from contracts.errors import as_user_error
from contracts.records import ROLLOUTS, SCORES, Rollout, Score

ROWS_PER_GROUP = 1_000
_SAMPLING = {"temperature": pa.float64(), "top_p": pa.float64(), "top_k": pa.int32(), "max_tokens": pa.int32()}
_OPTIONAL_SAMPLING = {
    "min_p": pa.float64(),
    "min_tokens": pa.int32(),
    "repetition_penalty": pa.float64(),
    "presence_penalty": pa.float64(),
    "frequency_penalty": pa.float64(),
    "stop": pa.list_(pa.string()),
    "guided": pa.string(),
    "thinking_tokens": pa.int32(),
}
"""Sampling parameters that get a column only if a completion has them."""
_COMPLETION = {
    "sample": pa.int32(),
    "response_ids": IDS,
    "text": pa.string(),
    "finish_reason": pa.string(),
    "logprobs": pa.list_(pa.float64()),
    "seed": pa.int64(),
}


def write(rollouts: Path, scores: Mapping[str, Path], target: Path) -> None:
    """Write a Parquet file; the same artifacts give the same bytes.

    Args:
        rollouts: a rollouts artifact.
        scores: score artifacts of these rollouts, by scorer.
        target: the file to write.
    """
    artifact = Artifact.open(rollouts, ROLLOUTS)
    found = {name: _scores(path) for name, path in scores.items()}
    optional: set[str] = set()
    for rollout in artifact.rows(Rollout):
        optional |= optional_fields_of(rollout) | {
            name
            for completion in rollout.completions
            if completion.sampling is not None
            for name in _OPTIONAL_SAMPLING
            if getattr(completion.sampling, name) is not msgspec.UNSET
        }
    schema = schema_of(optional, list(found), {name: _parts_of(rows.values()) for name, rows in found.items()})
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for rows in _groups(artifact, found):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def schema_of(optional: set[str], scorers: list[str], parts: Mapping[str, Sequence[str]] | None = None) -> pa.Schema:
    """The columns for rollouts with the optional fields `optional` (of messages, of sampling, and the tools), with
    scores by `scorers` that have these `parts`."""
    sampling = {**_SAMPLING, **{name: held for name, held in _OPTIONAL_SAMPLING.items() if name in optional}}
    tools = {TOOLS: pa.string()} if TOOLS in optional else {}
    numbers = pa.list_(pa.float64())
    lists = dict.fromkeys(scorers, numbers)
    made_of = {name: pa.struct(dict.fromkeys(own, numbers)) for name, own in (parts or {}).items() if own}
    return pa.schema(
        {
            "prompt_id": pa.string(),
            "messages": pa.list_(turn_type(optional)),
            "prompt_ids": IDS,
            "completions": pa.list_(pa.struct({**_COMPLETION, "sampling": pa.struct(sampling)})),
            "policy": pa.string(),
            "iteration": pa.int32(),
            "logprob_mode": pa.string(),
            "answer": pa.string(),
            "tags": pa.list_(pa.string()),
            **tools,
            **({"scores": pa.struct(lists)} if lists else {}),
            **({"score_parts": pa.struct(made_of)} if made_of else {}),
        }
    )


Scores = Mapping[tuple[str, int], Score]
"""Scores by prompt id and sample index."""


def _groups(artifact: Artifact, scores: Mapping[str, Scores]) -> Iterator[list[dict[str, Any]]]:
    parts = {name: _parts_of(found.values()) for name, found in scores.items()}
    rows = []
    for rollout in artifact.rows(Rollout):
        row = flat_row(msgspec.to_builtins(rollout))
        keys = [(rollout.prompt_id, completion.sample) for completion in rollout.completions]
        own = {name: [found.get(key) for key in keys] for name, found in scores.items()}
        row["scores"] = {name: [None if one is None else one.score for one in found] for name, found in own.items()}
        row["score_parts"] = {
            name: {part: [_part(one, part) for one in found] for part in parts[name]} for name, found in own.items()
        }
        rows.append(row)
        if len(rows) == ROWS_PER_GROUP:
            yield rows
            rows = []
    if rows:
        yield rows


def _scores(path: Path) -> Scores:
    return {(row.prompt_id, row.sample): row for row in Artifact.open(path, SCORES).rows(Score)}


def _parts_of(scores: Iterable[Score]) -> list[str]:
    return sorted({name for score in scores if score.parts is not msgspec.UNSET for name in score.parts})


def _part(score: Score | None, name: str) -> float | None:
    return None if score is None or score.parts is msgspec.UNSET else score.parts.get(name)


class WithoutPandas(importlib.abc.MetaPathFinder):
    """Import hook that hides pandas, which pyarrow would import only to check whether a list is a DataFrame."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """Raise ModuleNotFoundError for pandas."""
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not needed here", name=name)


def main() -> None:
    """Answer requests until stdin ends."""
    sys.meta_path.insert(0, WithoutPandas())
    for line in sys.stdin:
        request = json.loads(line)
        scores = {name: Path(path) for name, path in request["scores"].items()}
        answer = None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                write(Path(request["rollouts"]), scores, Path(request["target"]))
        except Exception as error:
            answer = as_user_error(error)
            if answer is None:
                raise
        print(json.dumps(None if answer is None else str(answer)), flush=True)


if __name__ == "__main__":
    main()
