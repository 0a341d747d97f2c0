"""Runs beside each other: what differs in their configurations, and who is better on the same prompts."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import Browser

from contracts.artifacts import Artifact
from contracts.fingerprint import digest
from contracts.ledger import Ledger
from contracts.publication import Publication
from contracts.records import Completion, Message, Rollout, Schema, Score
from pipelines.config.load import load_run_config
from pipelines.graph import Node
from pipelines.iteration import build_graph
from pipelines.main import main
from pipelines.run.directory import RunDirectory, dated

PROMPTS = 30


def publish(output: Path, schema: Schema, rows: list[Any], config: dict[str, Any], **known: Any) -> Artifact:
    publication = Publication(output, schema, schema.name, digest([str(output), config]))
    publication.begin()
    ledger = Ledger("rows")
    ledger.keep(len(rows))
    publication.write_rows("shard-00000.jsonl", rows, ledger)
    return publication.publish(
        key_parts={"config": config}, inputs={}, input_paths={}, unit="rows", weights=None, versions={}, seconds={},
        **{"facts": {}, **known},
    )  # fmt: skip


def judged(config: Path, name: str, scores: list[float], judge: str = "one", *overrides: str) -> Path:
    """A run whose second policy has these scores on the held-out prompts, by each scorer."""
    loaded = dated(load_run_config(config, [f"name={name}", *overrides]))
    run = RunDirectory(loaded.run_directory)
    run.claim(loaded, config, 1)
    assert run._lock is not None
    run._lock.close()
    for node in build_graph(loaded, 1).nodes.values():
        if node.stage.name == "evaluation" and node.iteration == 1:
            judge_policy(node, name, scores, judge)
    return run.path


def judge_policy(node: Node, name: str, scores: list[float], judge: str) -> None:
    rows = [
        Rollout(
            f"{number:016x}", (Message("user", f"<b>question</b> {number}"),), (1, 4),
            (Completion(0, (5, 2), f"answer of {name}", "stop", (-0.1, -0.2), 1, None),), "weights", 1, "processed",
        )
        for number in range(len(scores))
    ]  # fmt: skip
    publish(node.path("rollouts"), node_schema("rollouts"), rows, {})
    found = [Score(row.prompt_id, 0, score) for row, score in zip(rows, scores, strict=True)]
    for scorer, path in node.config.scores.items():  # type: ignore[attr-defined]
        publish(path, node_schema("scores"), found, {"kind": "rule", "function": judge if scorer == "gold" else "one"})
    mean = statistics.fmean(scores)
    facts = {"metrics": {"iteration": 1, "reward_mean": mean, "gold_reward_mean": mean, "kl": None}}
    publish(node.output, node.stage.schema, [], {}, facts=facts)


def node_schema(name: str) -> Schema:
    return Schema(name, 1)


FIRST = [math.sin(number) for number in range(PROMPTS)]
SECOND = [math.sin(number) + 0.1 + 0.05 * math.cos(number) for number in range(PROMPTS)]


def compared(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_same_prompts_are_compared_one_by_one(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The interval is that of the differences, far narrower than those of the means."""
    first = judged(smallest, "first", FIRST)
    second = judged(smallest, "second", SECOND, "one", "training.settings.beta=0.3")
    found = compared(capsys, first, second)
    (change,) = found["changes"]
    assert change == {"key": "training.settings.beta", "values": ["0.1", "0.3"]}
    differences = [b - a for a, b in zip(FIRST, SECOND, strict=True)]
    for row in found["paired"]:
        assert row["difference"] == pytest.approx(statistics.fmean(differences))
        assert row["ci95"] == pytest.approx(1.96 * statistics.stdev(differences) / math.sqrt(PROMPTS))
        assert (row["prompts"], row["wins"]) == (PROMPTS, 1.0)
        assert row["sentence"].startswith("second (iteration 1) is better than first (iteration 1) by 0.0")
    answers = found["paired"][0]["answers"]
    assert answers[0]["second_score"] - answers[0]["first_score"] == pytest.approx(max(differences))
    assert (answers[0]["first"], answers[0]["second"]) == ("answer of first", "answer of second")
    assert main(["compare", str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "training.settings.beta" in said
    assert "second (iteration 1) is better than first (iteration 1) by 0.0" in said


def test_what_is_within_the_interval_is_no_difference(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = [score + (0.5 if number % 2 else -0.5) for number, score in enumerate(FIRST)]
    found = compared(capsys, judged(smallest, "first", FIRST), judged(smallest, "second", noise))
    assert "No significant difference between" in found["paired"][0]["sentence"]


def test_scores_of_different_judges_are_not_compared(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, judged(smallest, "first", FIRST), judged(smallest, "second", SECOND, "another"))
    assert [row["scorer"] for row in found["paired"]] == ["reward", "well_formed"]
    assert "The scorer gold is not the same" in found["notes"][0]


def test_prompts_that_only_one_has_are_left_out_and_counted(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, judged(smallest, "first", FIRST), judged(smallest, "second", SECOND[:20]))
    assert found["paired"][0]["prompts"] == 20
    assert "20 of 30 and 20 held-out prompts" in found["notes"][0]


def test_other_prompts_are_a_difference_and_no_comparison(
    smallest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "so?"}\n')
    first = judged(smallest, "first", FIRST)
    second = judged(smallest, "second", SECOND, "one", f"prompts.heldout.source={other}")
    for name in ("generation", "reward", "gold"):
        for file in (second / "iteration-001/heldout" / name).glob("shard-*"):
            file.write_text(file.read_text().replace('"prompt_id":"0', '"prompt_id":"f'))
    found = compared(capsys, first, second)
    assert "prompts.heldout.source" in [change["key"] for change in found["changes"]]
    assert found["paired"] == []
    assert "fewer than two held-out prompts in common" in found["notes"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iteration", "7"], "has evaluated no iteration 7 yet"),
        (["--metric", "nothing"], "there is no metric 'nothing' in "),
    ],
)
def test_mistakes(smallest: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    runs = [str(judged(smallest, name, FIRST)) for name in ("first", "second")]
    assert main(["compare", *runs, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", "{}", "run.json is damaged"),
        ("iteration-001/heldout/gold/shard-00000.jsonl", "nonsense\n", "shard-00000.jsonl, line 1"),
        ("iteration-001/heldout/generation/manifest.json", "{", "manifest.json"),
    ],
)
def test_a_damaged_run_is_named_and_the_others_are_compared(
    smallest: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, said: str
) -> None:
    scores = {"broken": FIRST, "first": FIRST, "second": SECOND}
    runs = [judged(smallest, name, values) for name, values in scores.items()]
    (runs[0] / file).write_text(content)
    assert main(["compare", *map(str, runs), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["first", "second"]
    assert found["left_out"] == [str(runs[0])]
    assert found["notes"][0].startswith(f"{runs[0]} is damaged and left out: ")
    assert said in found["notes"][0]
    assert {paired["scorer"] for paired in found["paired"]} == {"reward", "gold", "well_formed"}
    assert main(["compare", str(runs[0])]) == 2
    assert said in capsys.readouterr().err


def test_no_run_at_all_is_a_mistake(smallest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(judged(smallest, "first", FIRST)), "runs/nothing"]) == 2
    assert "runs/nothing is not the directory of a run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("size", [(390, 844), (1440, 1000)], ids=["phone", "desk"])
def test_the_page_stands_alone(
    browser: Browser, smallest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[int, int]
) -> None:
    """It draws its curves, shows what users and models wrote as text, and asks nobody for anything."""
    page = tmp_path / "comparison.html"
    runs = [str(judged(smallest, name, scores)) for name, scores in (("first", FIRST), ("second", SECOND))]
    assert main(["compare", *runs, "--html", str(page)]) == 0
    browser.resize(*size)
    browser.open(page.as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    assert browser.run("document.querySelectorAll('#charts .uplot canvas').length") == 2
    shown = browser.run("document.body.innerText")
    assert "second (iteration 1) is better than first (iteration 1)" in shown
    assert "<b>question</b>" in shown
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith(("file:", "data:", "about:"))] == []
