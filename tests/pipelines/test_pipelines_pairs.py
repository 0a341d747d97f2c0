"""`pipeline pairs`: other pairs of an iteration, compared with the run's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reported import ReportedRun

from contracts.artifacts import Artifact
from contracts.records import PAIRS, Pair
from pipelines.config.load import load_run_config
from pipelines.lineage.trace import trace
from pipelines.main import main
from pipelines.run.directory import RunDirectory, dated

MINE = """
def second(candidates, prompt, *, rank=1):
    return [(candidates[rank].sample, candidates[-1].sample)]

def wrong(candidates, prompt):
    return [(candidates[-1].sample, candidates[0].sample)]

def failing(candidates, prompt):
    return candidates["first"]

def of_one(candidates):
    return []
"""


@pytest.fixture
def spread(tmp_path: Path) -> Path:
    """A run whose answers score 0.5, 1 and 2, and are longer in this order."""
    run = ReportedRun(
        tmp_path / "spread", length=lambda _, sample: 4 + sample, score=lambda _, length: [2.0, 0.5, 1.0][length % 3]
    )
    return run.build().path


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["pairs", *map(str, arguments), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["pairs", *map(str, arguments)]) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message


def claimed(config: Path, *overrides: str) -> Path:
    """A run of two iterations that has not begun."""
    loaded = dated(load_run_config(config, list(overrides)))
    run = RunDirectory(loaded.run_directory)
    run.claim(loaded, config, 2)
    assert run._lock is not None
    run._lock.close()
    return run.path


def rows_of(path: object) -> list[Pair]:
    return list(Artifact.open(Path(str(path)), PAIRS).rows(Pair))


def test_pairs_are_made_anew_beside_the_run(spread: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in spread.rglob("*") if path.is_file()}
    found = compared(capfd, spread, "--iteration=1", "strategy=all", "margin=0.6")
    own, other = found["sets"]
    assert (own["name"], own["path"], own["pairs"]) == ("the run's", str(spread / "iteration-001/pairs"), 3)
    made = Path(other["path"])
    assert made.parent == spread / "alternatives/iteration-001"
    assert made.name.startswith("all-")
    assert (other["pairs"], other["proposed"], other["dropped"]) == (6, 9, {"below_margin": 3})
    rows = rows_of(made)
    assert [row.margin for row in rows] == [1.0, 1.5] * 3
    assert (other["margin"], other["margin_10"], other["margin_90"]) == (1.25, 1.0, 1.5)
    assert (other["chosen_score"], other["rejected_score"]) == (2.0, 0.75)
    assert (other["chosen_tokens"], other["rejected_tokens"], other["chosen_longer"]) == (6.0, 4.5, 1.0)
    assert (other["prompts"], other["answers"]) == (3, 9)
    ids = [
        {(row.prompt_id, row.chosen_sample, row.rejected_sample) for row in rows_of(it["path"])} for it in (own, other)
    ]
    shared = {"name": made.name, "pairs": len(ids[0] & ids[1]), "only_first": len(ids[0] - ids[1])}
    assert found["shared"] == [{**shared, "only_here": len(ids[1] - ids[0]), "turned": 0, "prompts": 3}]
    after = {path: path.read_bytes() for path in before}
    assert after == before, "nothing of the run was touched"


def test_what_is_made_already_is_not_made_again(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["pairs", str(run), "--iteration=1", "strategy=max_random", "seed=3", "--plain"]
    assert main(command) == 0
    first = capfd.readouterr().out
    assert "published" in first
    (made,) = (run / "alternatives/iteration-001").iterdir()
    at = made.stat().st_mtime_ns
    assert main(command) == 0
    second = capfd.readouterr().out
    assert "already made: " in second
    assert "published" not in second
    assert first.splitlines()[1:] == second.splitlines()[1:]
    assert made.stat().st_mtime_ns == at
    assert main(["pairs", str(run), "--iteration=1", "--plain"]) == 0
    alone = capfd.readouterr().out
    assert "these are the run's own pairs" in alone
    assert made.name in alone, "without a key, what was made before is shown"


def test_the_table_names_what_differs_and_how_to_train_on_it(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys = ["strategy=top_k_bottom_k", "settings={top: 1, bottom: 2}", "per_prompt=1"]
    assert main(["pairs", str(run), "--iteration=2", "--plain", *keys]) == 0
    lines = capfd.readouterr().out.splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:4]] for line in lines if "|" in line
    }
    assert cells["strategy"] == ["max_min", "top_k_bottom_k"]
    assert cells["settings"] == ["-", "top: 1, bottom: 2"]
    assert cells["per_prompt"] == ["-", "1"]
    assert "length_penalty" not in cells
    assert cells["dropped: beyond_per_prompt"] == ["-", "3"]
    assert lines[-1] == (
        f"Train on them: pipeline fork {run} --from-iteration 2 pairs.strategy=top_k_bottom_k "
        "'pairs.settings={top: 1, bottom: 2}' pairs.per_prompt=1"
    )


def test_a_strategy_of_ones_own(
    spread: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    found = compared(capfd, spread, "--iteration=1", "strategy=mine.py:second", "output=tried")
    assert found["sets"][1]["path"] == str(tmp_path / "tried")
    assert [(row.chosen_score, row.rejected_score) for row in rows_of("tried")] == [(1.0, 0.5)] * 3
    message = said(capfd, spread, "--iteration=1", "strategy=mine.py:wrong")
    assert "error: strategy 'mine.py:wrong', prompt " in message
    assert "but the chosen answer scores lower" in message
    for override, complaint in {
        "strategy=mine.py:failing": "mine.py, line 9).",
        "strategy=mine.py:of_one": "takes (candidates), but is called as of_one(candidates, prompt)",
        "strategy=mine.py:second settings.rnk=1": "called as second(candidates, prompt, rnk=...): got an unexpected",
    }.items():
        message = said(capfd, spread, "--iteration=1", *override.split())
        assert complaint in message
        assert "log" not in message
    told = trace("tried", spread)
    assert told["artifacts"][told["target"]]["sources"]["function"] | {"digest": ""} == {
        "function": "mine.py:second", "digest": "", "state": "same",
    }  # fmt: skip
    (tmp_path / "mine.py").write_text(MINE.replace("rank=1", "rank=0"))
    assert "output" in said(capfd, spread, "--iteration=1", "strategy=mine.py:second", "output=tried")
    compared(capfd, spread, "--iteration=1", "strategy=mine.py:second")
    (made,) = (spread / "alternatives/iteration-001").iterdir()
    assert made.name.startswith("second-")
    assert [row.margin for row in rows_of(made)] == [1.5] * 3, "an edit makes them anew"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--iteration=7"], "--iteration is 7, but {run} has no pairs of it: it has iterations 1 to 2."),
        (["--iteration=0"], "--iteration is 0"),
        (["strategy=max_mni"], "Did you mean 'max_min'?"),
        (["stratgy=all"], "'stratgy' cannot be set here: pairs are rebuilt from an iteration's own responses"),
        (["training.learning_rate=3"], "scores. Give keys of `pairs` only, without the prefix."),
        (["rollouts=elsewhere"], "'rollouts' cannot be set here"),
        (["settings.top=2"], "strategy max_min has no setting 'top'"),
        (["strategy=nowhere.py:choose"], "no module or file 'nowhere.py' was found"),
        (["margin=9"], "no pair is left of {run}/iteration-002/generation: 3 pairs in = 0 kept + 3 below_margin"),
        (["strategy=all", "output={run}/iteration-001/pairs"], "was published by another run"),
        (["strategy=all", "output={run}/prompts"], "exists and is not an artifact"),
    ],
    ids=str,
)
def test_mistakes_are_told(run: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str) -> None:
    message = said(capfd, run, *(text.format(run=run) for text in arguments))
    assert complaint.format(run=run) in message


def test_a_run_on_samples_has_no_pairs(smallest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = claimed(smallest, "training={algorithm: grpo}")
    message = said(capfd, run, "strategy=all")
    assert message.startswith(f"error: {run} makes no pairs: training.algorithm=grpo trains on the samples themselves.")


def test_an_iteration_that_has_no_scores_yet(smallest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = claimed(smallest)
    message = said(capfd, run, "--iteration=2", "strategy=all")
    assert "iteration-002/pairs cannot be made yet: " in message
    assert "not published. Continue the run first." in message


def test_what_lies_there_is_no_part_of_the_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", str(run), "--iteration=1", "strategy=all"]) == 0
    (made,) = (run / "alternatives/iteration-001").iterdir()
    assert main(["verify", str(run)]) == 0
    assert main(["verify", str(made)]) == 0
    assert "1 artifact, 2 files" in capfd.readouterr().out
    pair = rows_of(run / "iteration-001/pairs")[0].pair_id
    first, second = (found["pairs"] for found in trace(pair, run)["found"])
    assert (first, second) == ("iteration-001/pairs", f"alternatives/iteration-001/{made.name}")
    shutil.rmtree(run / "iteration-001/generation")
    assert main(["verify", str(made)]) == 0, "what it was made of may go"
