"""The report of runs that are half, damaged, forked, hostile or large."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handmade
import msgspec
import pytest
from reported import ReportedRun, answers, gathered, page_of

from pipelines.commands.declaring import open_run
from pipelines.insight.report.gather import gather
from pipelines.insight.report.page import render_page
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.insight.report.tables import gantt
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    RunEnded,
    RunStarted,
    StageFailed,
    StagePublished,
    StageStarted,
)


def _delete(name: str) -> Callable[[Path], None]:
    return lambda run: shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()


def _spoil(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        (run / name).write_bytes(content)

    return spoil


def _nothing(run: Path) -> None:
    for path in [*run.glob("iteration-*"), run / "prompts", run / "metrics.jsonl"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_nothing, "26 of 26 stages are not published"),
        (_delete("iteration-002"), "11 of 26 stages are not published"),
        (_delete("iteration-002/pairs"), "iteration-001/heldout/reference, iteration-002/pairs"),
        (_delete("iteration-001/generation/shard-00001.jsonl"), "answers of iteration-001/generation"),
        (_delete("iteration-001/reward/shard-00001.jsonl"), "answers of iteration-001/generation"),
        (_spoil("iteration-001/generation/shard-00000.jsonl", b'{"prompt_id": "a'), "shard-00000.jsonl, line 1"),
        (_spoil("iteration-001/heldout/gold/shard-00000.jsonl", b"\xff\n"), "answers of iteration-001/heldout"),
        (_spoil("iteration-002/evaluation/manifest.json", b"{}"), "iteration-002/evaluation"),
        (_spoil("iteration-002/training/training-log.jsonl", b"nonsense\n"), "iteration-002/training"),
        (_spoil("events.jsonl", b'\x00{"event": "pub\n'), "1 line of events.jsonl cannot be read"),
        (_spoil("metrics.jsonl", b"\xff\xfe\n"), ""),
        (_delete("config.resolved.yaml"), "config.resolved.yaml"),
        (_delete("lock"), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_runs(run: Path, damage: Callable[[Path], None], said: str) -> None:
    """Whatever is missing or damaged is named, and the rest is reported."""
    damage(run)
    text = page_of(run)
    report = gathered(run)
    assert said in " ".join([*report.missing, *report.notes])
    assert said.partition(",")[0] in text
    assert len(report.statements) >= 4
    assert "<h2>Did it learn?</h2>" in text


def test_what_has_failed_is_told_without_secrets(run: Path) -> None:
    """A page is passed on; what a log says may have a token in it."""
    token = "hf_" + "Qq" * 12
    shutil.rmtree(run / "iteration-002/evaluation")
    attempt = run / "logs/iteration-002/evaluation/attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "failure-host-1.json").write_text(
        json.dumps({"kind": "user", "text": f"no access with {token}", "time": 1.0})
    )
    failed = StageFailed(stage="iteration-002/evaluation", attempt="attempt-1", kind="user", how=token, retry_in=None)
    RunDirectory(run).record(failed)
    report = gathered(run)
    row = next(row for row in report.stages if row.name == "iteration-002/evaluation")
    assert (row.state, row.detail) == ("failed", "no access with (hidden)")
    assert report.statements[0].answer == "iteration-002/evaluation failed: no access with (hidden)."
    assert f"`pipeline logs {run} iteration-002/evaluation`" in report.statements[0].details[-1]
    text = page_of(run)
    assert "no access with (hidden)" in text
    assert token not in text


def test_compressed_rows_are_read(run: Path) -> None:
    """As retention keeps them."""
    before = gathered(run)
    for shard in list(run.rglob("shard-*.jsonl")):
        handmade.compress(shard)
    assert gathered(run).sets == before.sets


def test_stages_of_several_days(run: Path) -> None:
    """The time between two commands is shortened in the chart, and counts for nothing."""
    stream = RunDirectory(run).stream
    names = ["iteration-001/generation", "iteration-001/reward", "iteration-001/pairs"]
    times = [(1000.0, 1040.0), (1050.0, 1100.0), (90_000.0, 90_100.0)]
    lines = [RunStarted(stages=26, by="me", time=1000.0)]
    for number, (name, (begin, end)) in enumerate(zip(names, times, strict=True)):
        if number == 2:
            lines += [RunEnded(outcome="interrupted", time=1100.0), RunStarted(stages=26, by="me", time=begin)]
        lines.append(StageStarted(stage=name, reason="", key="k", attempt="attempt-1", time=begin))
        lines.append(StagePublished(stage=name, key="k", time=end))
    stream.path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    attempt = run / "logs/iteration-001/generation/attempt-1"
    attempt.mkdir(parents=True)
    (attempt / "stage.yaml").write_text("k: 3\nreplicas: 4\n")
    report = gathered(run)
    assert report.time.wall == pytest.approx(200)
    assert {row.name: row.devices for row in report.stages if row.wait is not None} == dict(
        zip(names, [4, 1, 1], strict=True)
    )
    assert report.time.device_hours == pytest.approx((4 + 1 + 1) / 3600)  # each says that it took a second
    assert [(row.begun, row.ended) for row in report.stages if row.wait is not None] == times
    chart = gantt(report)
    assert chart["shortened"]
    lefts = {bar["name"]: bar["left"] for bar in chart["bars"]}
    total = 200 + 190 / 50
    assert [lefts[name] for name in names] == pytest.approx([0, 100 * 50 / total, 100 * (100 + 190 / 50) / total])
    assert max(bar["left"] + bar["width"] for bar in chart["bars"]) == pytest.approx(100)
    assert "Times in which no stage ran are shortened" in page_of(run)


def test_half_written_answers_are_not_read(run: Path) -> None:
    """What a stage has not published does not count."""
    (run / "iteration-002/generation").rename(run / "iteration-002/.generation.partial-0123456789abcdef")
    report = gathered(run)
    assert [found.name for found in report.sets if found.iteration == 2] == ["iteration-002/heldout/generation"]


def test_scores_of_other_answers_are_left_out(run: Path) -> None:
    """They are said to be outdated, and not mixed with the answers."""
    shutil.rmtree(run / "iteration-002/generation")
    shutil.copytree(run / "iteration-001/generation", run / "iteration-002/generation")
    report = gathered(run)
    assert "iteration-002/reward: computed from other answers than iteration-002/generation has now" in report.missing
    found = next(found for found in report.sets if found.name == "iteration-002/generation")
    assert found.scorers == []
    assert found.columns.best == [None] * 3


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> | a\x1b[31m\u202eb\u2066c\x00d `x` *y* \ufeff"


def test_hostile_texts_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No text of a model or of a user gets into the page as markup, nor into the Markdown."""
    path = ReportedRun(tmp_path, texts=lambda text: HOSTILE).build().path
    (path / "config.resolved.yaml").write_text(f"name: {HOSTILE}")
    text = page_of(path)
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert not set(text) & set("\x1b\u202e\u2066\x00\ufeff")
    capsys.readouterr()
    assert main(["report", str(path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert not set(said) & set("\x1b\u202e\u2066\x00\ufeff")
    assert "name: </script>" in said.partition("```yaml")[2]


def test_lone_surrogates(run: Path) -> None:
    """A text that is no Unicode costs its set of answers at most, and is named."""
    shard = run / "iteration-001/generation/shard-00000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b'"text":"word', b'"text":"\\ud800word', 1))
    page_of(run)
    assert any("iteration-001/generation" in line for line in gathered(run).missing)


def test_forked_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another run has made costs this one no time, and is told as that."""
    monkeypatch.chdir(run.parent.parent)
    assert main(["fork", str(run), "--from-iteration", "2", "--name", "child"]) == 0
    report = gathered(run.with_name("child"))
    shared = [row for row in report.stages if row.key is not None]
    assert {row.iteration for row in shared} == {None, 0, 1}
    assert {row.detail for row in shared} == {"computed by another run or command"}
    assert report.time.stages == 0
    assert answers(report)["time"].startswith("Not known")
    assert answers(report)["learning"].startswith("Yes. The held-out reward rose from")


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": math.nan, "text": "x"}], [{"loss": 1.0}]])
def test_training_logs_of_any_kind(run: Path, rows: list[dict[str, Any]]) -> None:
    """A log without steps or numbers is no curve."""
    log = run / "iteration-002/training/training-log.jsonl"
    log.write_text("".join(json.dumps(row).replace("NaN", "null") + "\n" for row in rows))
    assert [one for one in gathered(run).training if one.iteration == 2 and one.series] == []
    page_of(run)


@pytest.mark.slow
def test_hundred_thousand_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read shard by shard, in bounded memory; the page stays below 5 MB, and the rest lies beside it."""
    monkeypatch.setattr(handmade, "SHARD", 1000)
    made = ReportedRun(tmp_path, length=lambda iteration, sample: 30 + 5 * sample + iteration)
    made.questions = 16_700
    made.build()
    command = ["-c", "import resource, sys; from pipelines.main import main; main(['report', sys.argv[1]]); "
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"]  # fmt: skip
    result = subprocess.run([sys.executable, *command, str(made.path)], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 250_000  # KiB
    assert (made.path / "report.html").stat().st_size < 5_000_000
    assert sum(found.samples for found in gathered(made.path).sets) > 100_000


def test_page_of_a_long_run_is_bounded(reported_run: ReportedRun) -> None:
    """Three hundred iterations: the page has the latest of everything, and says what it leaves out."""
    cache = SampleCache()
    report = gather(*open_run(reported_run.path), cache)
    columns = msgspec.structs.replace(report.sets[3].columns)
    count = 1200
    for name in columns.__struct_fields__:
        setattr(columns, name, [getattr(columns, name)[0]] * count)
    columns.prompt = [f"{number:016x}" for number in range(count)]
    excerpts = {name: [f"What is {name}?", []] for name in columns.prompt}
    large = msgspec.structs.replace(
        report.sets[3], columns=columns, excerpts=excerpts, chunks=[count], prompts=count, points=[[5.0, 1.5]] * 300
    )
    numbers = range(1, 301)
    report.sets = [msgspec.structs.replace(large, key=f"{number:016x}", iteration=number) for number in numbers]
    report.stages = [
        msgspec.structs.replace(row, iteration=number) for number in numbers for row in report.stages[-12:]
    ]
    report.ledgers = [
        msgspec.structs.replace(one, iteration=number) for number in numbers for one in report.ledgers[-9:]
    ]
    report.evaluations = [{**report.evaluations[-1], "iteration": number} for number in numbers]
    text, others = render_page(report, cache, "beside", live=1)
    assert len(text) < 5_000_000
    assert 0 < len(others) < 600
    assert "The latest 600 of 3600" in text
