"""The store of profiles in RATCHET_HOME: a file of lines for each device, to which every run appends what its stages
took.

Nobody has to keep it: without it predictions stand on data sheets and on the runs that are named. A line is written
once for a stage, however often it is met; lines that cannot be read are passed over, whoever has left them.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from contracts.files import write_atomically
from contracts.tailing import appending
from pipelines.environments.paths import home
from pipelines.planning.profiles.rows import VERSION, Profile

FOLDER = "RATCHET_PROFILES"
"""Environment variable: where profiles are, if not in RATCHET_HOME; off: none are kept."""
OFF = "off"
PATIENCE = 5.0
"""Seconds that a run waits for another one that appends."""
MOST_BYTES = 8 << 20
"""Size from which a file is cut down to the latest stages of each kind."""
KEPT = 12
"""How many of stages alike in all that counts."""
_DECODER = msgspec.json.Decoder(Profile)


class ProfileStore:
    """The profiles of all runs on this machine, or on all that share its RATCHET_HOME."""

    def __init__(self, folder: Path | None = None) -> None:
        """Where they are: by default where the environment says."""
        given = os.environ.get(FOLDER, "")
        self.folder = folder or (Path(given) if given and given != OFF else home() / "profiles")
        self.is_kept = folder is not None or given != OFF

    def read(self) -> list[Profile]:
        """All of them, of every device; nothing where there is no store, or none that can be read."""
        found: list[Profile] = []
        if self.is_kept and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.jsonl")):
                try:
                    found += decode_profiles(path.read_bytes())
                except OSError:  # of another user, or on a file server that does not answer
                    continue
        return found

    def append(self, profiles: Iterable[Profile]) -> int:
        """Append those that are not there yet; returns how many these were.

        Raises:
            OSError, TransientError: they cannot be written, which is no reason to end anything.
        """
        count = 0
        by_device: dict[str, list[Profile]] = {}
        for profile in profiles if self.is_kept else ():
            by_device.setdefault(profile.device, []).append(profile)
        for device, members in by_device.items():
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{_file_name(device)}.jsonl"
            with appending(path.with_suffix(".lock"), PATIENCE), appending(path, PATIENCE) as file:
                file.seek(0)
                content = file.read()
                new = [profile for profile in members if profile.id.encode() not in content]
                file.write(b"".join(msgspec.json.encode(profile) + b"\n" for profile in new))
                file.flush()
                count += len(new)
                if len(content) > MOST_BYTES:
                    kept = latest_of_each([*decode_profiles(content), *new])
                    write_atomically(path, b"".join(msgspec.json.encode(profile) + b"\n" for profile in kept))
        return count


def decode_profiles(content: bytes) -> list[Profile]:
    """The rows of a file; lines that are torn or of another version are left out."""
    return list(_decoded(content))


def _decoded(content: bytes) -> Iterator[Profile]:
    for line in content.splitlines():
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError):
            continue
        if row.version == VERSION:
            yield row


def latest_of_each(profiles: Iterable[Profile], kept: int = KEPT) -> list[Profile]:
    """The latest ones of stages alike in all that counts, each once, the oldest first."""
    counts: Counter[Any] = Counter()
    found: list[Profile] = []
    for row in sorted({row.id: row for row in profiles}.values(), key=lambda row: row.created, reverse=True):
        counts[row.alike] += 1
        if counts[row.alike] <= kept:
            found.append(row)
    return found[::-1]


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() or "unknown"
