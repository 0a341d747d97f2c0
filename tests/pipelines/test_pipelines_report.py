"""The report's data, words and files, of runs that are whole, half, damaged, hostile or large."""

import json
import math
import shutil
import statistics
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from typing import Any

import handmade
import msgspec
import pytest
from reported import ReportedRun

from contracts.artifacts import Artifact
from contracts.manifest import with_checksum
from contracts.records import Pair, Rollout, Score
from pipelines.commands.declaring import opened
from pipelines.insight.listeners import page as listener
from pipelines.insight.listeners.page import PageWriter
from pipelines.insight.report import keep as keep_module
from pipelines.insight.report import page as page_module
from pipelines.insight.report import view
from pipelines.insight.report.command import write_report
from pipelines.insight.report.data import RunReport
from pipelines.insight.report.gather import gather
from pipelines.insight.report.keep import Keep
from pipelines.insight.report.page import render_page
from pipelines.insight.report.tables import gantt
from pipelines.insight.report.view import LiveReport, make_server
from pipelines.insight.report.vocabulary import Vocabulary
from pipelines.main import main
from pipelines.run.directory import RunDirectory
from pipelines.run.events import (
    Event,
    ListenerFailed,
    RunEnded,
    RunStarted,
    StagePublished,
    StageReused,
    StageStarted,
    StageWaits,
)

HELD_OUT, TRAINED = "heldout/generation", "generation"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ReportedRun:
    """A finished run; nobody changes it."""
    return ReportedRun(tmp_path_factory.mktemp("made")).build()


@pytest.fixture
def run(made: ReportedRun, tmp_path: Path) -> Path:
    """A copy of it."""
    path = tmp_path / "runs" / "handmade"
    shutil.copytree(made.path, path)
    return path


def gathered(path: Path) -> RunReport:
    """The report of a run."""
    return gather(*opened(path), Keep())


def answers(report: RunReport) -> dict[str, str]:
    """What the first screen says, by topic."""
    return {one.topic: one.answer for one in report.statements}


def page_of(path: Path) -> str:
    """The page of a run, written by the command."""
    assert main(["report", str(path)]) == 0
    return (path / "report.html").read_text()


def unpacked(content: str) -> Any:
    """What is in a chunk."""
    return json.loads(zlib.decompress(b64decode(content)))


# What it says.


@pytest.mark.parametrize(
    ("length", "judge", "tone", "says"),
    [
        (
            lambda iteration, sample: 4 + sample + 4 * iteration,
            lambda iteration, length: length / 2,
            "bad",
            "Yes, it looks like it. The reward grows with length: the same prompt's longer answers score higher "
            "(correlation +1.00 within prompts, iteration 1), and answers to held-out prompts went from 5 to 13 tokens "
            "(+160 %).",
        ),
        (
            lambda iteration, sample: 14 + sample - 5 * iteration,
            lambda iteration, length: -length,
            "bad",
            "Yes, by shortening. The reward falls with length",
        ),
        (
            lambda iteration, sample: 4 + sample,
            lambda iteration, length: length,
            "unclear",
            "It could. The reward grows with length",
        ),
        (
            lambda iteration, sample: 4 + sample % 2 + 4 * iteration,
            lambda iteration, length: iteration,
            "unclear",
            "Not known",
        ),
        (
            lambda iteration, sample: 5 + sample + 4 * iteration,
            lambda iteration, length: {0: 1, 1: 5, 2: 1}[(length - 5) % 4] if iteration else 0,
            "unclear",
            "Answers got longer, but not because the reward asks for it",
        ),
        (
            lambda iteration, sample: 5 + sample,
            lambda iteration, length: {5: 1, 6: 5, 7: 1}[length] + iteration,
            "good",
            "No sign of it. Within a prompt length and reward hardly go together",
        ),
    ],
    ids=["longer", "shorter", "not-yet", "constant", "for-another-reason", "none"],
)
def test_reward_and_length(tmp_path: Path, length: Any, judge: Any, tone: str, says: str) -> None:
    """The first screen says in words whether the reward rewards length, and whether the policy has learnt that."""
    report = gathered(ReportedRun(tmp_path, length, judge).build().path)
    found = next(one for one in report.statements if one.topic == "length")
    assert found.answer.startswith(says)
    assert found.tone == tone
    learning = report.statements[0]
    assert ("length may be all that it learned" in " ".join(learning.details)) is (tone == "bad")
    assert learning.answer.startswith("By its reward, yes." if tone == "bad" else ("Yes.", "Not that it shows."))


@pytest.mark.parametrize(
    ("judge", "tone", "says"),
    [
        (lambda iteration, length: length % 2 + iteration, "good", "Yes. The held-out reward rose from"),
        (lambda iteration, length: length % 2 - iteration, "bad", "No, it got worse. The held-out reward fell from"),
        (lambda iteration, length: length % 2, "unclear", "Not that it shows."),
    ],
    ids=["better", "worse", "same"],
)
def test_learning(tmp_path: Path, judge: Any, tone: str, says: str) -> None:
    """Whether it learned is decided on the same held-out prompts."""
    made = ReportedRun(tmp_path, judge=judge).build()
    report = gathered(made.path)
    found = report.statements[0]
    assert found.answer.startswith(says)
    assert found.tone == tone

    def means(iteration: int) -> dict[str, float]:
        scores: dict[str, list[float]] = {}
        for row in Artifact.open(made.path / f"iteration-00{iteration}/heldout/reward").rows(Score):
            scores.setdefault(row.prompt_id, []).append(row.score)
        return {prompt: statistics.fmean(values) for prompt, values in scores.items()}

    first, last = means(0), means(2)
    differences = [last[prompt] - first[prompt] for prompt in first]
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    assert f"by {statistics.fmean(differences):+.3g} ± {half:.2g} (95 %) on the same 2 held-out prompts" in found.answer


def test_figures_are_those_of_the_artifacts(made: ReportedRun) -> None:
    """Every figure of the answers and pairs, computed once more from what is published."""
    report = gathered(made.path)
    for found in report.sets:
        rows = list(Artifact.open(made.path / found.name).rows(Rollout))
        completions = [one for row in rows for one in row.completions]
        assert found.prompts == len(rows)
        assert found.samples == len(completions)
        assert found.truncated == sum(one.finish_reason == "length" for one in completions)
        assert found.mean_length == pytest.approx(statistics.fmean(len(one.response_ids) for one in completions))
        place = (made.path / found.name).parent
        scores = {(row.prompt_id, row.sample): row.score for row in Artifact.open(place / "reward").rows(Score)}
        pairs = [(scores[row.prompt_id, one.sample], len(one.response_ids)) for row in rows for one in row.completions]
        assert found.means["reward"] == pytest.approx(statistics.fmean(score for score, _ in pairs))
        assert found.correlation.across == pytest.approx(statistics.correlation(*map(list, zip(*pairs, strict=True))))
        groups = [{scores[row.prompt_id, one.sample] for one in row.completions} for row in rows]
        assert found.groups_with_gradient == sum(len(group) > 1 for group in groups)
        if found.role == TRAINED:
            chosen = list(Artifact.open(place / "pairs").rows(Pair))
            assert found.pairs is not None
            assert found.pairs.count == len(chosen)
            assert found.pairs.margin == pytest.approx(statistics.fmean(pair.margin for pair in chosen))
            assert found.pairs.chosen_length == pytest.approx(statistics.fmean(len(one.chosen_ids) for one in chosen))
            assert found.columns.margin == [pytest.approx(pair.margin, rel=1e-3) for pair in chosen]
        else:
            assert found.pairs is None
    assert [found.role for found in report.sets] == [HELD_OUT, TRAINED, HELD_OUT, TRAINED, HELD_OUT]
    for line in report.ledgers:
        ledger = Artifact.open(made.path / line.stage).manifest.ledger
        assert (line.rows_in, line.kept, line.dropped) == (ledger.rows_in, ledger.kept, ledger.dropped)
    for row in report.stages:
        if row.key is not None:
            assert row.key == Artifact.open(made.path / row.name).manifest.key
    assert [row["reward_mean"] for row in report.evaluations] == [
        Artifact.open(made.path / f"iteration-00{number}/evaluation").manifest.facts["metrics"]["reward_mean"]
        for number in (0, 1, 2)
    ]


def test_chunks_hold_every_answer(made: ReportedRun) -> None:
    """What the browser of samples shows is what was published, token by token."""
    keep = Keep()
    report = gather(*opened(made.path), keep)
    for found in report.sets:
        assert len(found.chunks) == 1
        groups = unpacked(keep.chunk(f"{found.key}-0"))
        _, tokens = unpacked(keep.chunk(f"{found.key}-0t"))
        rows = list(Artifact.open(made.path / found.name).rows(Rollout))
        assert [group[0] for group in groups] == found.columns.prompt == [row.prompt_id for row in rows]
        for row, group, per_answer in zip(rows, groups, tokens, strict=True):
            assert group[1] == [[message.role, message.content] for message in row.messages]
            for one, shown, (ids, logprobs) in zip(row.completions, group[3], per_answer, strict=True):
                assert shown[:4] == [one.sample, one.text, one.finish_reason, len(one.response_ids)]
                assert ids == list(one.response_ids)
                assert logprobs == [50] * len(ids)  # hundredths of a nat, without their sign


def test_engine_and_trainer(made: ReportedRun, run: Path) -> None:
    """Their difference is measured where the reference has the weights that sampled, and nowhere else."""
    assert [found.gap for found in gathered(run).sets] == [None] * 5
    sampled = Artifact.open(run / "iteration-001/generation").manifest.weights
    path = run / "iteration-001/reference/manifest.json"
    manifest = msgspec.structs.replace(Artifact.open(path.parent).manifest, weights=sampled)
    path.write_bytes(with_checksum(manifest))
    found = gathered(run).sets[1]
    logprobs = {(row.prompt_id, row.sample): row.token_logprobs for row in Artifact.open(path.parent).rows(Score)}
    gaps = [
        abs(ours - theirs)
        for row in Artifact.open(run / "iteration-001/generation").rows(Rollout)
        for one in row.completions
        if (values := logprobs.get((row.prompt_id, one.sample)))
        for ours, theirs in zip(one.logprobs, values, strict=True)
    ]
    assert found.gap == pytest.approx(statistics.fmean(gaps))
    assert found.gap_tokens == len(gaps)


# Its forms.


def test_markdown_and_json_say_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are printed, and nothing is written."""
    before = sorted(path for path in run.rglob("*"))
    assert main(["report", str(run), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert main(["report", str(run), "--markdown"]) == 0
    text = capsys.readouterr().out
    for statement in data["statements"]:
        assert f"## {statement['question']}" in text
        assert statement["answer"].replace("_", "\\_") in text
    assert "| 2 | 3 | 9 |" in text
    assert sorted(path for path in run.rglob("*")) == before


def test_page_stands_alone(run: Path) -> None:
    """It loads nothing, and every answer is in it."""
    text = page_of(run)
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert text.count('src="') == 0
    assert '<link rel="stylesheet"' not in text
    report = gathered(run)
    assert all(f'data-chunk="{found.key}-0"' in text for found in report.sets)
    for statement in report.statements:
        assert statement.question in text
    assert (run / "report.md").read_text().startswith("# handmade\n")


def test_page_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--output says where; a place where nothing can be written is a mistake."""
    assert main(["report", str(run), "--output", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").exists()
    assert not (run / "report.html").exists()
    for place, message in ((tmp_path, "is a directory"), (tmp_path / "no/page.html", "does not exist")):
        assert main(["report", str(run), "--output", str(place)]) == 2
        assert message in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_what_does_not_fit_is_beside_the_page(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As scripts; those of answers that were made again go, and other people's files stay."""
    monkeypatch.setattr(page_module, "PAGE_BYTES", 0)
    text = page_of(run)
    assert "report.samples/ beside it" in capsys.readouterr().out
    assert 'data-chunk="' not in text.replace('[data-chunk="', "")
    keys = {found.key for found in gathered(run).sets}
    scripts = {path.name for path in (run / "report.samples").glob("*.js")}
    assert scripts == {f"{key}-0{kind}.js" for key in keys for kind in ("", "t")}
    name = f"{keys.pop()}-0"
    content = (run / "report.samples" / f"{name}.js").read_text()
    assert content.startswith(f'ratchetChunk("{name}","')
    mine = run / "report.samples" / "notes.json"
    mine.write_text("{}")
    stale = run / "report.samples" / "0123456789abcdef-0.js"
    stale.write_text("")
    page_of(run)
    assert mine.exists()
    assert not stale.exists()


def test_samples_are_read_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later report reads only the answers that are new since."""
    page_of(run)
    read: list[str] = []
    real = keep_module.read_set
    monkeypatch.setattr(keep_module, "read_set", lambda sources: (read.append(sources.name), real(sources))[1])
    page_of(run)
    assert read == []
    (run / "report.samples" / f"{gathered(run).sets[0].key}-0.js").unlink()
    read.clear()
    page_of(run)
    assert read == ["iteration-000/heldout/generation"]


# Bad input and faults.


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
    report = gathered(run)
    assert report.time.wall == pytest.approx(200)
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
    assert "iteration-002/reward: made from other answers than iteration-002/generation has now" in report.missing
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
    assert {row.detail for row in shared} == {"made by another run or command"}
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
    result = subprocess.run(
        [sys.executable, *command, str(made.path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(result.stdout.split()[-1]) < 250_000  # KiB
    assert (made.path / "report.html").stat().st_size < 5_000_000
    assert sum(found.samples for found in gathered(made.path).sets) > 100_000


def test_page_of_a_long_run_is_bounded(made: ReportedRun) -> None:
    """Three hundred iterations: the page has the latest of everything, and says what it leaves out."""
    keep = Keep()
    report = gather(*opened(made.path), keep)
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
    text, others = render_page(report, keep, "beside", live=1)
    assert len(text) < 5_000_000
    assert 0 < len(others) < 600
    assert "The latest 600 of 3600" in text


# By itself, and live.


def test_page_is_written_by_itself(pretended_run: Path) -> None:
    """A run of pretended stages ends with a report, though nothing in it can be read as answers."""
    text = (pretended_run / "report.html").read_text()
    assert '<span class="badge finished">finished</span>' in text
    assert "2 of 2 policies judged" in text
    assert not any(isinstance(event, ListenerFailed) for event in RunDirectory(pretended_run).events())


def test_page_is_written_when_something_has_happened(run: Path) -> None:
    """After each policy that is judged, at the end of the run if anything was published since, and at a failure."""
    page = run / "report.html"
    page.write_text("")
    writer = PageWriter(*opened(run))

    def writes(*events: Event) -> bool:
        page.write_text("")
        writer(list(events))
        return page.read_text() != ""

    reused = StageReused(stage="iteration-001/evaluation", reason="it is there", key="k")
    assert not writes(RunStarted(stages=26, by="me"), reused)
    assert not writes(RunEnded(outcome="finished"))
    assert not writes(StagePublished(stage="iteration-001/training", key="k"))
    assert writes(StagePublished(stage="iteration-001/evaluation", key="k"))
    assert not writes()
    assert not writes(StagePublished(stage="iteration-002/evaluation", key="k")), "the end of the run comes at once"
    assert writes(RunEnded(outcome="finished"))
    assert writes(RunEnded(outcome="failed"))


def test_large_reports_are_made_elsewhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many new answers are left to a process of its own; what goes wrong there is raised once."""
    monkeypatch.setattr(listener, "QUICKLY", 10)
    writer = PageWriter(*opened(run))
    writer([StagePublished(stage="iteration-002/generation", key="k")])
    assert not (run / "report.html").exists()
    writer([StagePublished(stage="iteration-001/evaluation", key="k")])
    writer([RunEnded(outcome="finished")])
    assert "3 of 3 policies judged" in (run / "report.html").read_text()
    (run / "run.json").write_text("{}")
    writer([StagePublished(stage="iteration-002/generation", key="k")])
    with pytest.raises(RuntimeError, match=r"run\.json is damaged.*exit code 2"):
        writer([RunEnded(outcome="failed")])


@pytest.fixture
def served(run: Path) -> Iterator[tuple[Path, int]]:
    """A run that `pipeline view` serves, and the port."""
    server = make_server(LiveReport(lambda: opened(run)), 0)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield run, int(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


def test_view(served: tuple[Path, int]) -> None:
    """The page, its chunks and its version; nothing else, for nobody else, and nothing is written."""
    run, port = served
    before = sorted(run.rglob("*"))
    address = f"http://127.0.0.1:{port}"

    def get(path: str) -> str:
        with urllib.request.urlopen(address + path, timeout=30) as answer:
            return str(answer.read().decode())

    page = get("/")
    assert 'data-chunk="' not in page.replace('[data-chunk="', "")
    assert get("/version") == "1"
    key = gathered(run).sets[0].key
    assert get(f"/samples/{key}-0.js").startswith(f'ratchetChunk("{key}-0","')
    for path in ("/samples/0123456789abcdef-0.js", "/run.json", "/samples/../run.json", "/%2e%2e/run.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(path)
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 403
    assert sorted(run.rglob("*")) == before


def test_view_sees_what_happens(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new event makes a new version, where it changes what the report says."""
    monkeypatch.setattr(view, "SECONDS", -1.0)
    live = LiveReport(lambda: opened(run))
    assert live.renew() == 1
    assert live.renew() == 1
    RunDirectory(run).record(StageWaits(stage="iteration-002/evaluation", text="for a machine"))
    assert live.renew() == 1, "an event that changes nothing in the report"
    (run / "iteration-002/evaluation/manifest.json").unlink()
    RunDirectory(run).record(StageWaits(stage="iteration-002/evaluation", text="for a machine"))
    assert live.renew() == 2
    assert b"2 of 3 policies judged" in live.page()


def test_port_in_use(served: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is a mistake with a way out."""
    run, port = served
    assert main(["view", str(run), "--port", str(port)]) == 2
    assert "Choose another one with --port" in capsys.readouterr().err
    assert main(["view", str(run), "--port", "70000"]) == 2


# Tokens.


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"the": 0, "film": 1}}}, {0: " the", 1: " film"}),
        (
            {
                "model": {"type": "BPE", "vocab": {"\u0120caf\u00c3\u00a9": 0, "\u010a": 1}},
                "decoder": {"type": "ByteLevel"},
            },
            {0: " café", 1: "\n"},
        ),
        (
            {
                "model": {"type": "Unigram", "vocab": [["\u2581so", -1.0], ["on", -2.0]]},
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Metaspace"}]},
                "added_tokens": [{"id": 2, "content": "</s>"}],
            },
            {0: " so", 1: "on", 2: "</s>"},
        ),
        (
            {"model": {"type": "WordPiece", "vocab": {"play": 0, "##ing": 1}}, "decoder": {"type": "WordPiece"}},
            {0: " play", 1: "ing"},
        ),
        ({}, {}),
        ([], {}),
    ],
    ids=["words", "bytes", "unigram", "pieces", "empty", "no-object"],
)
def test_texts_of_tokens(tmp_path: Path, tokenizer: Any, texts: dict[int, str]) -> None:
    """Vocabularies of all kinds are read without the library that they are for; what is unknown is left out."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Vocabulary(tmp_path).texts([0, 1, 2, 3]) == texts
    assert Vocabulary(tmp_path / "absent").texts([0]) == {}
    assert Vocabulary(None).texts([0]) == {}


def test_writing_twice_is_the_same(run: Path) -> None:
    """But for the time that it names."""
    write_report(*opened(run), run / "report.html")
    first = (run / "report.samples").stat().st_mtime_ns
    write_report(*opened(run), run / "report.html")
    assert (run / "report.samples").stat().st_mtime_ns == first
