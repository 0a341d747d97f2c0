"""Journals the scores of an unfinished shard, so that a stage does not recompute (or pay for) them after a kill.

A journal lies in the folder `state` of the artifact that is being published. That folder belongs to one stage key, so
scores of another function, or with other inputs, are never found there. A shard's files are named by a hash of its
samples. Each process writes its own file, and lines that a kill has truncated are skipped.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from annotation.samples import Sample
from annotation.workers.pool import FunctionResult, Note
from annotation.workers.worker import DetailedScore, TokenRewards
from contracts.attempt import report_within
from contracts.errors import UserError
from contracts.faults import Fault, Tolerance
from contracts.files import process_name

CHEAP_SECONDS = 0.5
"""When the stage ends with a user's mistake, a journal that took less time than this to fill is deleted."""

Known = float | TokenRewards | DetailedScore | None
Entry = tuple[int, Known]
"""The sample's index in its shard, and its score; None: the function cannot score it."""


class Journal:
    """The known scores of one shard's samples, and a file to which new ones are appended."""

    def __init__(self, state: Path, samples: Sequence[Sample]) -> None:
        content = [(rollout.prompt_id, completion.sample, completion.text) for rollout, completion in samples]
        self._state, self._name = state, f"judged-{hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:16]}"
        self._path = state / f"{self._name}-{process_name()}.jsonl"
        self._began = self._added = time.monotonic()

    def known(self) -> dict[int, Known]:
        """Scores by sample index that this process or an earlier one has journaled."""
        return dict(complete_lines(self._state, f"{self._name}-*.jsonl", Entry))

    def add(self, scores: Mapping[int, Known]) -> None:
        """Append scores to the file; from then on they survive this process."""
        if scores:
            with self._path.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in scores.items()))
            self._added = time.monotonic()

    def delete(self) -> None:
        """Delete this process's file, when its shard is finished."""
        self._path.unlink(missing_ok=True)

    def delete_if_cheap(self) -> None:
        """Delete this process's file if its scores are quick to recompute."""
        if self._added - self._began < CHEAP_SECONDS:
            self.delete()


class ShardJournals:
    """The journals of one shard after another."""

    def __init__(self, state: Path, tolerance: Tolerance) -> None:
        self._state, self._tolerance = state, tolerance
        self._last: Journal | None = None

    @contextlib.contextmanager
    def of(self, samples: Sequence[Sample]) -> Iterator[tuple[dict[int, FunctionResult], Note]]:
        """Open a shard's journal, and delete that of the previous shard, which is finished.

        Yields the known scores by sample index, and a function that adds new ones and journals them.

        Raises:
            UserError, TransientError: more samples have failed than are tolerated.
        """
        if self._last is not None:
            self._last.delete()
        self._last = journal = Journal(self._state, samples)
        results: dict[int, FunctionResult] = dict(journal.known())

        def note(found: dict[int, FunctionResult]) -> None:
            journal.add({index: value for index, value in found.items() if not isinstance(value, Fault)})
            results.update(found)
            report_within(len(results), len(samples), "samples")
            for value in found.values():
                if isinstance(value, Fault):
                    self._tolerance.record(value)

        try:
            yield results, note
        except UserError:
            journal.delete_if_cheap()
            raise


def complete_lines(folder: Path, pattern: str, kind: Any) -> Iterator[Any]:
    """The decoded lines of all JSONL files in `folder` that match `pattern`, except lines that a kill has truncated."""
    decoder = msgspec.json.Decoder(kind)
    for path in sorted(folder.glob(pattern)):
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(msgspec.DecodeError):
                if line.endswith(b"\n"):
                    yield decoder.decode(line)
