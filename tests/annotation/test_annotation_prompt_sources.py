"""Import of prompts from Parquet, `save_to_disk` directories and the Hub.

The prompts stage belongs to contracts, but reads these in the annotation environment, which has pyarrow and datasets.
"""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.records import PROMPTS, Message, Prompt
from contracts.sources import read_rows

QUESTIONS = ["why?", "how?", "when?"]


def run(source: Path | str, output: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "contracts", "prompts", f"source={source}", f"output={output}", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def questions(source: Path, output: Path, *arguments: str) -> list[str]:
    result = run(source, output, *arguments)
    assert result.returncode == 0, result.stderr
    return [prompt.messages[-1].content for prompt in Artifact.open(output, PROMPTS).rows(Prompt)]


def test_parquet_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "so"}] for text in QUESTIONS]
    parquet.write_table(pyarrow.table({"messages": chats, "answer": ["1", None, "3"]}), folder / "a.parquet")
    assert questions(folder / "a.parquet", tmp_path / "one") == QUESTIONS
    assert questions(folder, tmp_path / "all") == QUESTIONS
    artifact = Artifact.open(tmp_path / "all", PROMPTS)
    assert [prompt.answer for prompt in artifact.rows(Prompt)] == ["1", None, "3"]
    assert artifact.manifest.facts["assistant_turns_removed"] == 3


@pytest.mark.slow
def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"question": QUESTIONS})
    dataset.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(str(tmp_path / "splits"))
    assert questions(tmp_path / "plain", tmp_path / "out1") == QUESTIONS
    assert questions(tmp_path / "splits", tmp_path / "out2") == QUESTIONS[:1]
    assert questions(tmp_path / "splits", tmp_path / "out3", "split=test") == QUESTIONS
    result = run(tmp_path / "splits", tmp_path / "out4", "split=dev")
    assert result.returncode == 2
    assert "no split 'dev', only train, test" in result.stderr


def saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"question": QUESTIONS * 400}).save_to_disk(str(folder))
    return folder


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


DATA = "data-00000-of-00001.arrow"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data": (lambda folder: (folder / DATA).unlink(), f"{DATA} is missing"),
    "data cut off": (lambda folder: cut(folder / DATA, 0.8), f"{DATA} is cut off or damaged"),
    "no data left": (lambda folder: cut(folder / DATA, 0), f"{DATA} is cut off or damaged"),
    "no info": (lambda folder: (folder / "dataset_info.json").unlink(), "dataset_info.json is missing"),
    "info cut off": (lambda folder: cut(folder / "dataset_info.json", 0.5), "dataset_info.json is cut off"),
    "info of a list": (lambda folder: (folder / "dataset_info.json").write_text("[]"), "dataset_info.json is cut off"),
    "other features": (
        lambda folder: (folder / "dataset_info.json").write_text('{"features": {"question": {"_type": "Nope"}}}'),
        "dataset_info.json or state.json does not fit the data",
    ),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "state cut off": (lambda folder: cut(folder / "state.json", 0.5), "state.json is cut off"),
    "empty state": (lambda folder: (folder / "state.json").write_text("{}"), "no list of data files"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_save_to_disk_directory_names_the_file(tmp_path: Path, damage: str) -> None:
    do, expected = DAMAGE[damage]
    do(saved(tmp_path / "saved"))
    with pytest.raises(UserError, match=f"{expected}.*Download or write it again"):
        list(read_rows(str(tmp_path / "saved"), "train"))


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0.0, 0.5, "not a Parquet file, or cut off"),
        (0.55, 0.75, "is cut off or damaged after row 8192"),
        (0.995, 0.999, "a.parquet"),
    ],
)
def test_damaged_parquet_names_the_file_and_where(tmp_path: Path, begin: float, end: float, expected: str) -> None:
    texts = [f"{number} {random.Random(number).random()}" for number in range(20_000)]
    parquet.write_table(pyarrow.table({"question": texts}), tmp_path / "a.parquet", row_group_size=8192)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    first, last = int(len(content) * begin), int(len(content) * end)
    content[first:last] = bytes(last - first) if begin else b""
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(UserError, match=expected):
        list(read_rows(str(tmp_path / "a.parquet"), "train"))


def test_parquet_with_what_is_no_text(tmp_path: Path) -> None:
    column = pyarrow.array([b"a", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"question": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, after row 0: a text is not UTF-8"):
        list(read_rows(str(tmp_path / "a.parquet"), "train"))


def test_compressed_by_zstandard(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(b'{"question": "why?"}\n' * 1000)
    assert len(list(read_rows(str(path), "train"))) == 1000
    cut(path, 0.5)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst is cut off or damaged"):
        list(read_rows(str(path), "train"))


def test_tool_calls_of_a_table_lose_the_keys_of_other_rows(tmp_path: Path) -> None:
    """A table gives every object the keys of all others, with null for a value."""

    def row(name: str, **arguments: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": [*turns, {"role": "tool", "content": "3"}]}

    table = pyarrow.Table.from_pylist([row("weather", city="Oslo"), row("time", zone="CET")])
    parquet.write_table(table, tmp_path / "a.parquet")
    result = run(tmp_path / "a.parquet", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    first, second = Artifact.open(tmp_path / "out", PROMPTS).rows(Prompt)
    called = [prompt.messages[1].tool_calls[0]["function"]["arguments"] for prompt in (first, second)]  # type: ignore[index]
    assert called == [{"city": "Oslo"}, {"zone": "CET"}]
    assert first.messages[0] == Message("user", "weather")


@pytest.mark.slow
def test_a_configuration_of_a_data_set(tmp_path: Path) -> None:
    for config in ("main", "socratic"):
        (tmp_path / "hub" / config).mkdir(parents=True)
        for split in ("train", "test"):
            table = pyarrow.table({"question": [f"{config} {split}?"]})
            parquet.write_table(table, tmp_path / "hub" / config / f"{split}-00000-of-00001.parquet")
    header = "\n".join(
        f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}/test-*"
        for config in ("main", "socratic")
    )
    (tmp_path / "hub/README.md").write_text(f"---\nconfigs:\n{header}\n---\n")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = run(f"hf:{tmp_path}/hub", tmp_path / "out", "split=test", **offline)
    assert result.returncode == 2
    assert "'main', 'socratic'" in result.stderr
    assert f"source=hf:{tmp_path}/hub:CONFIG" in result.stderr
    result = run(f"hf:{tmp_path}/hub:socratic", tmp_path / "out", "split=test", **offline)
    assert result.returncode == 0, result.stderr
    assert [prompt.messages[-1].content for prompt in Artifact.open(tmp_path / "out").rows(Prompt)] == [
        "socratic test?"
    ]
    assert questions(tmp_path / "hub/main", tmp_path / "other", "split=test") == ["main test?"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"prompt": ["a", "b", "a"]}, ["data.parquet, row 3", "data.parquet, row 1"]),
        ({"text": ["a"]}, ["data.parquet, row 1", "text"]),
        ({"prompt": [1.5]}, ["data.parquet, row 1"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, table: dict[str, list[object]], expected: list[str]) -> None:
    parquet.write_table(pyarrow.table(table), tmp_path / "data.parquet")
    result = run(tmp_path / "data.parquet", tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr
    assert os.listdir(tmp_path) == ["data.parquet"]


def test_a_file_that_only_looks_like_parquet(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_text("prompt\nwhy?\n")
    result = run(tmp_path / "data.parquet", tmp_path / "out")
    assert result.returncode == 2
    assert "data.parquet is not a Parquet file" in result.stderr


@pytest.mark.slow
def test_a_hub_dataset(tmp_path: Path) -> None:
    """`load_dataset` takes a folder in the place of a Hub id, so that its part needs no network here."""
    (tmp_path / "repo").mkdir()
    parquet.write_table(pyarrow.table({"question": QUESTIONS}), tmp_path / "repo" / "train.parquet")
    result = run(f"hf:{tmp_path / 'repo'}", tmp_path / "out", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    prompts = Artifact.open(tmp_path / "out", PROMPTS).rows(Prompt)
    assert [prompt.messages[-1].content for prompt in prompts] == QUESTIONS


@pytest.mark.slow
def test_a_hub_dataset_that_cannot_be_had(tmp_path: Path) -> None:
    result = run("hf:nobody/nothing@main", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 2, result.stderr
    assert "hf:nobody/nothing@main" in result.stderr
    assert "Traceback" not in result.stderr
