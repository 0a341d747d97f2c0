"""What a run will make, before it is made: how much data, how large models. No torch.

A stage declares how much it makes of what it reads (`contracts.declaration`), and asks an `Outlook` for what other
stages make. What cannot be known yet (a data set on the Hub), or cannot be read, is None; what is wrong with it is for
others to say.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from contracts.errors import UserError
from contracts.files import matches
from contracts.manifest import MANIFEST
from contracts.model_size import Size
from contracts.operations import BYTES_PER_TOKEN
from contracts.splits import choose_files

PROCESS = 640 << 20
"""Memory of Python, torch and its kernels in one process."""
TEMPLATE_TOKENS = 64
"""Tokens that a chat template adds to a prompt, generously."""
FILE = 8 << 10
"""A small file on the disk, with its receipt and the rest of its last block."""
STAGE = 64 << 10
"""Manifest, logs and the small files of a stage."""
ID, LOGPROB, TEXT = 7, 24, 9
"""Bytes of a token in JSON: as an id with its comma, as a log-probability, and as text."""
SAMPLE = 256
"""Bytes that an answer, or the score of one, has beside its tokens."""
ROLLOUT = 512
"""The same for a prompt with its answers."""
LINES = (".jsonl", ".json", ".csv", ".tsv")
"""Files with a row a line; a `.json` may also be one list of many."""
COMPRESSED = (4, 200)
"""A Parquet or Arrow file stands for so many times its size as JSONL, in rows of so many bytes."""


@dataclass(frozen=True)
class RowStats:
    """How much data there is."""

    count: int
    bytes: int
    """As JSONL."""
    longest: int
    """Bytes of the longest row."""

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row in a chat template: of two bytes each, where four are usual."""
        return self.longest // 2 + TEMPLATE_TOKENS


@dataclass(frozen=True)
class AnswerStats:
    """How many answers there are, and how long."""

    prompts: RowStats
    k: int
    longest_prompt: int
    """Tokens, and so is:"""
    longest_answer: int
    shards: int = 1
    """Files that they are published in."""

    @property
    def count(self) -> int:
        """Answers to all prompts."""
        return self.prompts.count * self.k

    @property
    def mean_prompt(self) -> int:
        """Tokens of a prompt in the mean."""
        mean = self.prompts.bytes // (BYTES_PER_TOKEN * max(1, self.prompts.count))
        return max(1, min(mean, self.longest_prompt))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return self.longest_prompt + self.longest_answer

    @property
    def question_tokens(self) -> int:
        """Tokens of the longest question which of two answers is better."""
        return self.longest + self.longest_answer + TEMPLATE_TOKENS

    @property
    def prompt_bytes(self) -> int:
        """Bytes of all prompts as rows with token ids: these take 7 for each byte of text at most."""
        return (1 + ID) * self.prompts.bytes + self.prompts.count * ROLLOUT


@dataclass(frozen=True)
class PairStats:
    """How many preference pairs there are at most, and of which answers."""

    count: int
    answers: AnswerStats


@dataclass(frozen=True)
class Memory:
    """Memory that a stage takes, of a GPU where there is one, of the machine elsewhere."""

    parts: dict[str, int]
    """Bytes of one process, on one device, by what they are for."""
    processes: int
    """Processes at the same time; each has its devices for itself, but they share the machine's memory."""
    share: float = 1.0
    """The part of a device that the stage takes for itself and stays within."""

    @property
    def total(self) -> int:
        """Bytes of one process."""
        return sum(self.parts.values())

    @property
    def states(self) -> int:
        """The part that no batch size changes."""
        return sum(self.parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))


class Outlook(Protocol):
    """What is known of what a path will hold, whichever stage makes it; of what is there already, by looking."""

    def size_of(self, model: Path) -> Size | None:
        """A model's measures."""

    def rows_of(self, path: Path, split: str = "train") -> RowStats | None:
        """Rows of prompts or demonstrations; `split` of data from outside of the run."""

    def answers_of(self, path: Path) -> AnswerStats | None:
        """The answers in rollouts, or of which an experience is made."""

    def pairs_of(self, path: Path) -> PairStats | None:
        """Preference pairs."""


def measure(source: Path, split: str = "train") -> RowStats | None:
    """Rows in a file, a directory's files of one split or a published artifact, of a large file by its first MiB."""
    if source.is_file():
        files = [source]
    elif (source / MANIFEST).is_file():
        files = sorted(source.glob("shard-*.jsonl"))
    elif source.is_dir():
        files = sorted(source.rglob("*.arrow"))
        try:
            files = files or choose_files(source, split)
        except UserError:  # which the stage tells
            return None
    elif not (files := matches(source)):
        return None
    try:
        parts = [_measure_file(file) for file in files]
    except OSError:
        return None
    return RowStats(
        sum(part.count for part in parts),
        sum(part.bytes for part in parts),
        max((part.longest for part in parts), default=0),
    )


def _measure_file(file: Path, sample: int = 1 << 20) -> RowStats:
    size = file.stat().st_size
    with file.open("rb") as stream:
        lines = stream.read(sample).splitlines(keepends=True)
    document = file.suffix == ".json" and lines and not lines[0].strip().endswith(b"}")
    if document or file.suffix not in LINES:
        times, row = (1, COMPRESSED[1]) if document else COMPRESSED
        return RowStats(-(-times * size // row), times * size, times * size)
    if size > sample and len(lines) > 1:
        lines.pop()  # cut off
    if not lines:
        return RowStats(0, 0, 0)
    read = sum(map(len, lines))
    count = len(lines) if size <= sample else -(-size * len(lines) // read)
    return RowStats(count, size, max(map(len, lines)))
