"""Judgements of a shard that is not finished, kept so that what was paid for is not paid again after a kill.

They are in the folder `state` of what is being published, which is one stage key's own, so a judgement by another
function, or with other inputs, is never found there. The files of a shard are known by what its samples say. Each
process writes one of its own, and lines that a kill has torn are passed over.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from annotation.judge import TokenRewards
from annotation.samples import Sample
from contracts.files import process_name

WORTH_SECONDS = 0.5
"""Judgements that took less in all are not worth keeping when the stage ends by the user's mistake."""

Known = float | TokenRewards | None
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
        found: dict[int, Known] = {}
        decoder = msgspec.json.Decoder(Entry)
        for path in sorted(self._state.glob(f"{self._name}-*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    found |= [decoder.decode(line)] if line.endswith(b"\n") else []
                except msgspec.DecodeError:
                    continue
        return found

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
