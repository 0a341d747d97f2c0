"""Judgements of a shard that is not finished, kept so that what was paid for is not paid again after a kill.

They are in the folder `state` of what is being published, which is one stage key's own, so a judgement by another
function, or with other inputs, is never found there. The files of a shard are known by what its samples say. Each
process writes one of its own, and lines that a kill has torn are passed over.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from annotation.samples import Sample
from annotation.workers.pool import Judgement, Note
from annotation.workers.worker import TokenRewards, Told
from contracts.attempt import report_within
from contracts.errors import UserError
from contracts.faults import Fault, Tolerance
from contracts.files import process_name

WORTH_SECONDS = 0.5
"""Judgements that took less in all are not worth keeping when the stage ends by the user's mistake."""

Known = float | TokenRewards | Told | None
Entry = tuple[int, Known]
"""The sample's index in its shard, and its score; None: the function cannot judge."""


class Journal:
    """What is known of one shard's samples, and a file to which more is added."""

    def __init__(self, state: Path, samples: Sequence[Sample]) -> None:
        content = [(rollout.prompt_id, completion.sample, completion.text) for rollout, completion in samples]
        self._state, self._name = state, f"judged-{hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:16]}"
        self._path = state / f"{self._name}-{process_name()}.jsonl"
        self._began = self._added = time.monotonic()

    def known(self) -> dict[int, Known]:
        """Judgements by index that this or an earlier process has left."""
        return dict(whole_lines(self._state, f"{self._name}-*.jsonl", Entry))

    def add(self, judgements: Mapping[int, Known]) -> None:
        """Write judgements down: they survive this process from here on."""
        if judgements:
            with self._path.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in judgements.items()))
            self._added = time.monotonic()

    def forget(self) -> None:
        """What this process has written is in a finished shard by now."""
        self._path.unlink(missing_ok=True)

    def forget_cheap(self) -> None:
        """Leave nothing of judgements that are sooner made again than looked for."""
        if self._added - self._began < WORTH_SECONDS:
            self.forget()


class ShardJournals:
    """The judgements of one shard after another: what is known of it, and what comes, written down as it comes."""

    def __init__(self, state: Path, tolerance: Tolerance) -> None:
        self._state, self._tolerance = state, tolerance
        self._last: Journal | None = None

    @contextlib.contextmanager
    def of(self, samples: Sequence[Sample]) -> Iterator[tuple[dict[int, Judgement], Note]]:
        """Judgements by index, and the function that adds to them; that it is called says that the one before is over.

        Raises:
            UserError, TransientError: more samples have failed than may.
        """
        if self._last is not None:  # its shard is finished
            self._last.forget()
        self._last = journal = Journal(self._state, samples)
        results: dict[int, Judgement] = dict(journal.known())

        def note(found: dict[int, Judgement]) -> None:
            journal.add({index: value for index, value in found.items() if not isinstance(value, Fault)})
            results.update(found)
            report_within(len(results), len(samples), "samples")
            for value in found.values():
                if isinstance(value, Fault):
                    self._tolerance.bear(value)

        try:
            yield results, note
        except UserError:
            journal.forget_cheap()
            raise


def whole_lines(folder: Path, pattern: str, kind: Any) -> Iterator[Any]:
    """The lines of some JSONL files that processes have added to, but for those that a kill has torn."""
    decoder = msgspec.json.Decoder(kind)
    for path in sorted(folder.glob(pattern)):
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(msgspec.DecodeError):
                if line.endswith(b"\n"):
                    yield decoder.decode(line)
