"""Estimates, before a run starts, of its amounts of data and sizes of models. Does not import torch.

A stage declares how much it publishes given its inputs (`contracts.declaration`), and asks an `Outlook` about the
outputs of other stages. An estimate that cannot be made yet (a data set on the Hub), or whose data cannot be read, is
None; reporting what is wrong with the data is left to other checks.
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

PROCESS_BYTES = 640 << 20
"""Memory of Python, torch and its kernels in one process."""
TEMPLATE_TOKENS = 64
"""Upper estimate of the tokens that a chat template adds to a prompt."""
FILE_BYTES = 8 << 10
"""Bytes of a small file on the disk, with its receipt and the unused rest of its last block."""
STAGE_BYTES = 64 << 10
"""Bytes of a stage's manifest, logs and small files."""
ID_BYTES, LOGPROB_BYTES, TEXT_BYTES = 7, 24, 9
"""Bytes of a token in JSON: as an id with its comma, as a log-probability, as text."""
SAMPLE_BYTES = 256
"""Bytes of an answer, or of its score, in addition to the tokens."""
ROLLOUT_BYTES = 512
"""Bytes of a prompt with its answers in addition to their tokens."""
LINES = (".jsonl", ".json", ".csv", ".tsv")
"""Suffixes of files with one row per line; a `.json` may also be a single list of rows."""
COMPRESSED = (4, 200)
"""Estimate for Parquet and Arrow files: their size as JSONL relative to the file, and the bytes of a row."""


@dataclass(frozen=True)
class RowStats:
    """The amount of data: number and size of rows."""

    count: int
    bytes: int
    """Total bytes as JSONL."""
    longest: int
    """Bytes of the longest row."""

    @property
    def longest_tokens(self) -> int:
        """Upper estimate of the tokens of the longest row in a chat template, at two bytes per token (usual: four)."""
        return self.longest // 2 + TEMPLATE_TOKENS


@dataclass(frozen=True)
class AnswerStats:
    """The number and the lengths of answers."""

    prompts: RowStats
    k: int
    longest_prompt: int
    """Maximum tokens of a prompt."""
    longest_answer: int
    """Maximum tokens of an answer."""
    shards: int = 1
    """Number of files in which they are published."""

    @property
    def count(self) -> int:
        """Number of answers to all prompts."""
        return self.prompts.count * self.k

    @property
    def mean_prompt(self) -> int:
        """Mean tokens of a prompt."""
        mean = self.prompts.bytes // (BYTES_PER_TOKEN * max(1, self.prompts.count))
        return max(1, min(mean, self.longest_prompt))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return self.longest_prompt + self.longest_answer

    @property
    def question_tokens(self) -> int:
        """Tokens of the longest question to a pairwise model: a prompt with two answers."""
        return self.longest + self.longest_answer + TEMPLATE_TOKENS

    @property
    def prompt_bytes(self) -> int:
        """Bytes of all prompts as rows with token ids, which take at most 7 per byte of text."""
        return (1 + ID_BYTES) * self.prompts.bytes + self.prompts.count * ROLLOUT_BYTES


@dataclass(frozen=True)
class PairStats:
    """The maximum number of preference pairs, and the answers that they are made of."""

    count: int
    answers: AnswerStats


@dataclass(frozen=True)
class Memory:
    """Memory that a stage needs: GPU memory if it runs on GPUs, else main memory."""

    parts: dict[str, int]
    """Bytes of one process, on one device, by purpose."""
    processes: int
    """Number of concurrent processes; each has its own devices, but they share the machine's main memory."""
    share: float = 1.0
    """Share of a device's memory that the stage reserves and does not exceed."""

    @property
    def total(self) -> int:
        """Total bytes of one process."""
        return sum(self.parts.values())

    @property
    def states(self) -> int:
        """Bytes of one process that do not depend on batch sizes."""
        return sum(self.parts.get(name, 0) for name in ("weights", "gradients", "optimizer"))


class Outlook(Protocol):
    """Answers what a path will contain: from the declaration of the stage that publishes there, or from the files."""

    def size_of(self, model: Path) -> Size | None:
        """Dimensions of a model."""

    def rows_of(self, path: Path, split: str = "train") -> RowStats | None:
        """Rows of prompts or demonstrations; `split` applies to data from outside the run."""

    def answers_of(self, path: Path) -> AnswerStats | None:
        """The answers in rollouts, or those that experience is built from."""

    def pairs_of(self, path: Path) -> PairStats | None:
        """The preference pairs."""


def measure(source: Path, split: str = "train") -> RowStats | None:
    """Measure a file, a directory's files of one split, or an artifact; large files are extrapolated from their first
    MiB."""
    if source.is_file():
        files = [source]
    elif (source / MANIFEST).is_file():
        files = sorted(source.glob("shard-*.jsonl"))
    elif source.is_dir():
        files = sorted(source.rglob("*.arrow"))
        try:
            files = files or choose_files(source, split)
        except UserError:  # the stage itself reports it
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
