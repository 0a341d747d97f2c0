"""Import of prompts from Parquet, `save_to_disk` directories and the Hub.

The prompts stage belongs to contracts, but reads these in the annotation environment, which has pyarrow and datasets.
"""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from contracts.artifacts import Artifact
from contracts.records import PROMPTS, Prompt

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


def test_a_hub_dataset(tmp_path: Path) -> None:
    """`load_dataset` takes a folder in the place of a Hub id, so that its part needs no network here."""
    (tmp_path / "repo").mkdir()
    parquet.write_table(pyarrow.table({"question": QUESTIONS}), tmp_path / "repo" / "train.parquet")
    result = run(f"hf:{tmp_path / 'repo'}", tmp_path / "out", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    prompts = Artifact.open(tmp_path / "out", PROMPTS).rows(Prompt)
    assert [prompt.messages[-1].content for prompt in prompts] == QUESTIONS


def test_a_hub_dataset_that_cannot_be_had(tmp_path: Path) -> None:
    result = run("hf:nobody/nothing@main", tmp_path / "out", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert result.returncode == 2, result.stderr
    assert "hf:nobody/nothing@main" in result.stderr
    assert "Traceback" not in result.stderr
