"""Stores profiles in RATCHET_HOME: one JSON Lines file per device, to which every run appends its stages.

The store is a cache: without it, predictions use data sheets and the runs that are named. A stage is written once, even
if it is seen again; unreadable lines are skipped.
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
"""Environment variable: the directory of the profiles, if not in RATCHET_HOME; off: keep none."""
OFF = "off"
PATIENCE = 5.0
"""Seconds that a run waits while another one appends."""
MAX_BYTES = 8 << 20
"""Size above which a file is reduced to the latest profiles of each kind."""
MAX_PER_GROUP = 12
"""Number of profiles of equal stages (`Profile.match_key`) that are kept."""
_DECODER = msgspec.json.Decoder(Profile)


class ProfileStore:
    """The profiles of all runs on this machine, or on all that share its RATCHET_HOME."""

    def __init__(self, folder: Path | None = None) -> None:
        """Use a directory; by default the one that the environment says."""
        given = os.environ.get(FOLDER, "")
        self.folder = folder or (Path(given) if given and given != OFF else home() / "profiles")
        self.is_kept = folder is not None or given != OFF

    def read(self) -> list[Profile]:
        """Read all profiles of every device; empty if there is no readable store."""
        found: list[Profile] = []
        if self.is_kept and self.folder.is_dir():
            for path in sorted(self.folder.glob("*.jsonl")):
                try:
                    found += decode_profiles(path.read_bytes())
                except OSError:  # another user's, or on a file server that does not respond
                    continue
        return found

    def append(self, profiles: Iterable[Profile]) -> int:
        """Append profiles that are not in the store yet. Returns the number that were not.

        Raises:
            OSError, TransientError: they cannot be written; callers should go on without them.
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
                if len(content) > MAX_BYTES:
                    kept = latest_of_each([*decode_profiles(content), *new])
                    write_atomically(path, b"".join(msgspec.json.encode(profile) + b"\n" for profile in kept))
        return count


def decode_profiles(content: bytes) -> list[Profile]:
    """The profiles in a file; incomplete lines and those of another version are skipped."""
    return list(_decoded(content))


def _decoded(content: bytes) -> Iterator[Profile]:
    for line in content.splitlines():
        try:
            row = _DECODER.decode(line)
        except (ValueError, RecursionError):
            continue
        if row.version == VERSION:
            yield row


def latest_of_each(profiles: Iterable[Profile], kept: int = MAX_PER_GROUP) -> list[Profile]:
    """The latest `kept` profiles of each group of equal stages, without duplicates, the oldest first."""
    counts: Counter[Any] = Counter()
    found: list[Profile] = []
    for row in sorted({row.id: row for row in profiles}.values(), key=lambda row: row.created, reverse=True):
        counts[row.match_key] += 1
        if counts[row.match_key] <= kept:
            found.append(row)
    return found[::-1]


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower() or "unknown"
