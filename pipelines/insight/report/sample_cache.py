"""Caches what was read of a run's samples, so that the next report of the run reads only what is new.

The chunks of texts are scripts, since scripts are all that a page opened from a file can load from other files.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from contracts.artifacts import Artifact
from contracts.files import write_atomically
from contracts.manifest import MANIFEST
from pipelines.insight.report.data import SampleSet
from pipelines.insight.report.rows import SetSources
from pipelines.insight.report.samples import Chunk, read_set

T = TypeVar("T")
_OWN = re.compile(r"[0-9a-f]{16}(-\d+t?\.js|\.json)")


class SampleCache:
    """Reads sets of answers, each once.

    With a folder, the results are kept there: NAME.js for each chunk, and KEY.json for each set. Without one they are
    kept in memory, and nothing is written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._sets: dict[str, SampleSet] = {}
        self._chunks: dict[str, str] = {}
        self._artifacts: dict[Path, tuple[int, Artifact]] = {}
        self._derived: dict[str, Any] = {}

    def artifact(self, path: Path) -> Artifact:
        """The artifact in a directory, opened again only if its manifest has changed."""
        changed = (path / MANIFEST).stat().st_mtime_ns
        known = self._artifacts.get(path)
        if known is None or known[0] != changed:
            known = self._artifacts[path] = changed, Artifact.open(path)
        return known[1]

    def compute_once(self, artifact: Artifact, read: Callable[[], T]) -> T:
        """The result of `read`, which is called once for an artifact."""
        digest = artifact.manifest.digest
        if digest not in self._derived:
            self._derived[digest] = read()
        return cast(T, self._derived[digest])

    def read(self, sources: SetSources) -> SampleSet:
        """Read a set, or take it from the cache; UserError where something of it is missing or damaged."""
        found = self._sets.get(sources.key) or self._load(sources.key)
        if found is None:
            found, chunks = read_set(sources)
            self._store(found, chunks)
        self._sets[sources.key] = found
        return found

    def _load(self, key: str) -> SampleSet | None:
        if self._folder is None:
            return None
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = msgspec.json.decode((self._folder / f"{key}.json").read_bytes(), type=SampleSet)
            if all((self._folder / f"{name}.js").is_file() for name in chunk_names(found)):
                return found
        return None

    def _store(self, found: SampleSet, chunks: list[Chunk]) -> None:
        if self._folder is None:
            self._chunks |= {chunk.name: chunk.content for chunk in chunks}
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for chunk in chunks:
            script = f'ratchetChunk("{chunk.name}","{chunk.content}")\n'
            write_atomically(self._folder / f"{chunk.name}.js", script.encode(), durable=False)
        write_atomically(self._folder / f"{found.key}.json", msgspec.json.encode(found), durable=False)

    def chunk(self, name: str) -> str:
        """The content of a chunk of a set that has been read."""
        if self._folder is None:
            return self._chunks[name]
        return (self._folder / f"{name}.js").read_text().split('"')[3]

    def prune(self, sets: list[SampleSet]) -> None:
        """Delete everything that belongs to none of these sets: their artifacts have changed since."""
        known = {f"{found.key}.json" for found in sets} | {
            f"{name}.js" for found in sets for name in chunk_names(found)
        }
        keys = {found.key for found in sets}
        self._sets = {key: found for key, found in self._sets.items() if key in keys}
        self._chunks = {name: content for name, content in self._chunks.items() if name.rpartition("-")[0] in keys}
        for path in self._folder.iterdir() if self._folder and self._folder.is_dir() else []:
            if _OWN.fullmatch(path.name) and path.name not in known:
                path.unlink(missing_ok=True)


def chunk_names(found: SampleSet) -> list[str]:
    """The names of a set's chunks: of texts, and of log-probabilities."""
    return [f"{found.key}-{number}{kind}" for number in range(len(found.chunks)) for kind in ("", "t")]
