"""`pipeline score`: a run's scorer on texts of the user's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.main import main

RULE = "def words(*, response, **others):\n    return {'score': len(response.split()), 'why': response[:1]}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run that nobody has begun."""
    (tmp_path / "rules.py").write_text(RULE)
    path = tmp_path / "run.yaml"
    scorers = {
        "reward": {"kind": "combined", "expression": "0.1 * words + exact", "max_dropped": 1},
        "words": {"kind": "rule", "function": f"{tmp_path}/rules.py:words"},
        "exact": {"kind": "exact_match", "max_dropped": 1},
        "learned": {"kind": "reward_model"},
    }
    prompts = {name: {"source": f"world:{name}.jsonl"} for name in ("train", "heldout")}
    data = {"name": "own", "world": {}, "policy": "world:model", "prompts": prompts, "scorers": scorers}
    path.write_text(json.dumps({**data, "directory": str(tmp_path / "runs")}))
    return path


def texts(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_come_back_in_their_order_with_scores(
    config: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of a scorer that is made of others; two answers to one prompt, and one without a judgement."""
    rows = [
        {"prompt": "so?", "response": "great", "answer": "great", "id": 7},
        {"prompt": "and?", "response": "a b c"},
        {"messages": [{"role": "user", "content": "so?"}], "response": "not great", "answer": "great"},
    ]
    assert main(["score", str(config), "reward", texts(tmp_path, *rows), "--tokenizer", str(world)]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [{name: row[name] for name in given} for row, given in zip(found, rows, strict=True)] == rows
    assert [row["score"] for row in found] == [pytest.approx(1.1), None, pytest.approx(0.2)]
    assert found[2]["parts"] == {"words": 2, "exact": 0}
    assert "parts" not in found[1]
    told = texts(tmp_path, {**rows[0], "score": None, "why": "too_long", "extras": {"old": 1}, "parts": {"old": 1}})
    assert main(["score", str(config), "reward", told, "--tokenizer", str(world)]) == 0
    (again,) = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert again == found[0], "what an earlier scorer has said is gone"
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"rules.py", "run.yaml", "texts.jsonl"}


def test_rows_without_a_judgement_take_no_other_row_with_them(
    config: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever a run allows to be dropped (0.1 of `words`), also of a scorer that others are made of."""
    (tmp_path / "rules.py").write_text(
        "def words(*, response, **_):\n    return len(response) if response != 'x' else None\n"
    )
    file = texts(tmp_path, {"prompt": "so?", "response": "x", "answer": "y"}, {"prompt": "and?", "response": "a b"})
    command = ["score", str(config), "words", file, "--tokenizer", str(world)]
    assert main(command) == 0
    out, err = capfd.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert (first["score"], first["why"]) == (None, "unscored")
    assert second["score"] == 3
    assert "why" not in second
    assert "words: 2 samples in = 1 kept + 1 unscored" in err
    assert main([*command[:2], "reward", *command[3:]]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(row["score"], row["why"]) for row in found] == [
        (None, "no_words (unscored)"),
        (None, "no_exact (no_answer)"),
    ]
    assert main([*command[:4], "scorers.words.max_dropped=0.4", *command[4:]]) == 2
    assert "max_dropped=0.4" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("scorer", "row", "said"),
    [
        ("rewrad", {"prompt": "so?", "response": "x"}, "has no scorer 'rewrad'. Did you mean 'reward'?"),
        ("words", {"prompt": "so?"}, "texts.jsonl, line 1: a row needs"),
        ("words", {"prompt": "so?", "messages": [], "response": "x"}, "either"),
        (
            "words",
            {"prompt": "so?", "response": "x"},
            "is no model's directory, but the responses need its tokenizer. Give",
        ),
    ],
)
def test_bad_input(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scorer: str, row: dict[str, Any], said: str
) -> None:
    arguments = ["score", str(config), scorer, texts(tmp_path, row), "scorers.learned={kind: repetition}"]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_kind_that_does_not_exist_is_told_with_the_nearest(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = texts(tmp_path, {"prompt": "so?", "response": "x"})
    assert main(["score", str(config), "words", file, "scorers.learned={kind: process_rewrd}"]) == 2
    assert "'process_rewrd', which does not exist. Did you mean 'process_reward'?" in capsys.readouterr().err


def test_a_prompt_has_one_known_answer(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "so?", "response": "x", "answer": answer} for answer in ("a", "b")]
    assert main(["score", str(config), "exact", texts(tmp_path, *rows)]) == 2
    assert "line 2: the same prompt has another answer in an earlier row" in capsys.readouterr().err


def test_an_error_names_the_line_in_the_users_file(
    config: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not that of the file with the grouped rows, which nobody sees and which is deleted."""
    (tmp_path / "rules.py").write_text("def words(*, response, **_):\n    return 1 if response != 'x' else [][0]\n")
    asked = [("so?", "a"), ("so?", "b"), ("and?", "x")]
    rows = [{"prompt": prompt, "response": response} for prompt, response in asked]
    file = texts(tmp_path, *rows)
    assert main(["score", str(config), "words", file, "--tokenizer", str(world)]) == 2
    said = capfd.readouterr().err
    assert '("and?"), sample 0: IndexError' in said
    assert f"The prompt is {file}, line 3." in said
    assert not re.search(r"ratchet-score-\S+, line", said)


LEAVES = """
import os, time


def words(*, response, **_):
    if os.fork() == 0:
        os.setsid()
        os.execvp("sleep", ["sleep", "4321"])
    return len(response.split())
"""


def test_processes_that_a_scorer_leaves_behind_end_with_it(
    config: Path, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.py").write_text(LEAVES)
    asked = texts(tmp_path, {"prompt": "so?", "response": "a b"})
    assert main(["score", str(config), "words", asked, "--tokenizer", str(world)]) == 0
    (row,) = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert row["score"] == 2
    left = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert b"sleep\x004321\x00" not in left
