"""Files and directories that rows are read from: every format, damage told by file and row, splits by name.

Parquet and datasets are read in the environment of the stage: tests/annotation/test_annotation_prompt_sources.py.
"""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from contracts.artifacts import input_digest
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.records import Message
from contracts.sources import hub_parts, read_rows
from contracts.splits import split_of

ROWS = [{"prompt": "Hi"}, {"prompt": "Ho"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LONG = b"".join(b'{"prompt": "%d"}\n' % number for number in range(3000))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.replace(b"\n", b"\n\n")),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()),
        ("a.json", json.dumps({"instances": ROWS}).encode()),
        ("a.csv", b"prompt\nHi\n\nHo\n"),
        ("a.tsv", b'\xef\xbb\xbfprompt\r\nHi\r\n"Ho"\r\n'),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
        ("a.csv.xz", lzma.compress(b"prompt\nHi\nHo\n")),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(str(tmp_path / name), "train")] == ROWS
    assert [row for _, row in read_rows(str(tmp_path), "train")] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", LINES + b'{"prompt": "\xff"}\n', "a.jsonl, line 3: not UTF-8.*0xff.*Save"),
        ("a.jsonl", LINES + b"\0" * 20 + b"\n", "line 3: .*NUL bytes"),
        ("a.jsonl", LINES + b'{"prompt": "a", "prompt": "b"}\n', "line 3: .*'prompt' occurs twice"),
        ("a.jsonl", LINES + b'{"prompt": [{"role": "user", "role": "x"}]}\n', "line 3: .*'role' occurs twice"),
        ("a.jsonl", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: not valid JSON"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16.*Save it as UTF-8"),
        ("a.json", json.dumps(ROWS).encode()[:-1], "JSON list: not valid JSON"),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS}).encode(), "several lists of rows: train, test"),
        ("a.jsonl.gz", gzip.compress(LONG)[:-200], "a.jsonl.gz is cut off or damaged"),
        ("a.jsonl.gz", LINES, "is cut off or damaged: Not a gzipped file"),
        ("a.jsonl.bz2", LINES, "is cut off or damaged"),
        ("a.jsonl.xz", lzma.compress(LONG)[:-20], "is cut off or damaged"),
        ("a.csv", b"prompt,answer\na,b,c\n", "row 2: 3 cells under 2 columns"),
        ("a.csv", b'prompt\n"a\n', "row 1: not valid CSV"),
        ("a.csv", b"prompt\n\xff\n", "a.csv.*not UTF-8"),
        ("a.csv", b"prompt\na\n\0b\n", "row 3: .*NUL bytes"),
        ("a.csv", b"prompt,prompt\na,b\n", "'prompt' occurs twice"),
        ("a.arrow", b"", "a.arrow ends with '.arrow'.*Convert it to JSON Lines"),
        ("a.jsonl.zip", b"", "ends with '.jsonl.zip'.*Convert"),
    ],
)
def test_damage_and_other_formats_are_told(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){expected}"):
        list(read_rows(str(tmp_path / name), "train"))


def test_a_damaged_shard_that_is_kept_compressed(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.jsonl.gz").write_bytes(gzip.compress(b'{"role": "user", "content": "a"}\n' * 9999)[:-50])
    with pytest.raises(UserError, match=r"shard-00000.jsonl.gz is cut off or damaged.*recompute it"):
        list(read_jsonl(tmp_path / "shard-00000.jsonl", Message))


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("data/train_sft-00000-of-00003.parquet", "train_sft"),
        ("train_prefs.jsonl", "train_prefs"),
        ("train_1.jsonl", "train"),
        ("train_part2.jsonl.gz", "train"),
        ("gsm8k-test-00000-of-00001.parquet", "test"),
        ("dev.json", "validation"),
        ("val/part-00000-of-00002.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("my_eval.csv", "test"),
        ("part-00000-of-00002.parquet", None),
        ("contest.jsonl", None),
        ("latest.jsonl", None),
    ],
)
def test_the_split_of_a_file(path: str, split: str | None) -> None:
    assert split_of(Path(path)) == split


def read(directory: Path, split: str = "train") -> list[str]:
    return [row["prompt"] for _, row in read_rows(str(directory), split)]


def refused(directory: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        read(directory, split)
    return str(error.value)


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps({"prompt": name}) + "\n")
    return directory


def test_files_of_a_split_are_read_alone(tmp_path: Path) -> None:
    names = ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl")
    assert read(fill(tmp_path, *names, ".cache/x.jsonl", "dataset_infos.json")) == list(names[:2])
    assert read(tmp_path, "test") == list(names[2:])
    message = refused(tmp_path, "nonsense")
    assert "'nonsense'" in message
    assert "train: data/train-0" in message
    assert "test: data/test-0" in message
    assert read(fill(tmp_path / "plain", "a.jsonl", "b.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert "no split 'test'" in refused(tmp_path / "plain", "test")
    assert read(fill(tmp_path / "folders", "train/0.jsonl", "validation/0.jsonl"), "val") == ["validation/0.jsonl"]
    assert "a.jsonl" in (mixed := refused(fill(tmp_path / "mixed", "a.jsonl", "test.jsonl")))
    assert "test.jsonl" in mixed


def test_one_file_has_no_splits(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl", "a.jsonl")
    assert read(tmp_path / "test.jsonl") == read(tmp_path / "test.jsonl", "test") == ["test.jsonl"]
    assert "Remove split" in refused(tmp_path / "a.jsonl", "test")


def test_configurations_are_named(tmp_path: Path) -> None:
    fill(tmp_path / "hub", "main/train.jsonl", "socratic/train.jsonl")
    message = refused(tmp_path / "hub")
    assert "main, socratic" in message
    assert read(Path(message.rpartition("source=")[2])) == ["main/train.jsonl"]
    fill(tmp_path / "one/only", "train.jsonl", "test.jsonl")
    assert read(tmp_path / "one") == ["train.jsonl"]
    fill(tmp_path / "listed", "data/a-train.jsonl", "data/b-train.jsonl")
    (tmp_path / "listed/README.md").write_text("---\nconfigs:\n- config_name: a\n- config_name: b\n---\n")
    assert f"source=hf:{tmp_path}/listed:a" in refused(tmp_path / "listed")


def test_names_on_the_hub() -> None:
    assert hub_parts("hf:ORG/NAME") == ("ORG/NAME", None, None)
    assert hub_parts("hf:ORG/NAME:main@refs/pr/1") == ("ORG/NAME", "main", "refs/pr/1")


def test_a_directory_read_like_one_of_the_hub_is_known_by_its_content(tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl")
    first, other = input_digest(f"hf:{tmp_path}:main"), input_digest(f"hf:{tmp_path}:other")
    fill(tmp_path, "train.jsonl", "more.jsonl")
    assert len({first, other, input_digest(f"hf:{tmp_path}:main")}) == 3
