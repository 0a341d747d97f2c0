"""The report: its words, its figures and its forms."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import handmade
import msgspec
import pytest
from reported import ReportedRun, gathered, page_of, unpacked

from annotation.config import CheckpointEvaluationConfig
from contracts.artifacts import Artifact
from contracts.manifest import read_manifest, with_checksum
from contracts.records import CHECKPOINT_EVALUATION, Pair, Rollout, Score
from pipelines.commands.declaring import open_run
from pipelines.insight.report import page as page_module
from pipelines.insight.report import sample_cache as cache_module
from pipelines.insight.report.command import write_report
from pipelines.insight.report.data import LedgerLine
from pipelines.insight.report.gather import BEFORE_SELECTION, gather, roles_of
from pipelines.insight.report.sample_cache import SampleCache
from pipelines.insight.report.statements import dropped_statement
from pipelines.insight.report.vocabulary import Vocabulary
from pipelines.main import main

HELD_OUT, TRAINED = "heldout/generation", "generation"


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
            "No sign of it. Within a prompt length and reward hardly go together (at most +0.00), and answers to "
            "held-out prompts stayed at 6 tokens.",
        ),
    ],
    ids=["longer", "shorter", "not-yet", "constant", "for-another-reason", "none"],
)
def test_reward_and_length(tmp_path: Path, length: Any, judge: Any, tone: str, says: str) -> None:
    """The first screen says in words whether the reward rewards length, and whether the policy has learnt that."""
    made = ReportedRun(tmp_path, length, judge)
    made.questions = 40
    report = gathered(made.build().path)
    found = next(one for one in report.statements if one.topic == "length")
    assert found.answer.startswith(says)
    assert found.tone == tone
    learning = report.statements[0]
    assert ("length may be all that it learned" in " ".join(learning.details)) is (tone == "bad")
    assert learning.answer.startswith("By its reward, yes." if tone == "bad" else ("Yes.", "Not measurably."))


def test_what_was_selected_of_the_answers_is_what_was_trained_on() -> None:
    names = [(1, "generation"), (1, "selected/rollouts"), (2, "generation"), (2, "round-2/generation")]
    nodes: Any = [SimpleNamespace(name=f"{number}/{role}", role=role, iteration=number) for number, role in names]
    assert roles_of(nodes) == {
        "1/generation": BEFORE_SELECTION,
        "1/selected/rollouts": TRAINED,
        "2/generation": TRAINED,
        "2/round-2/generation": "round-2/generation",
    }


def test_what_was_dropped_is_less_what_was_to_be_left_out() -> None:
    """The count, its share and its reasons are of the same rows."""
    counts = {"tie": 5, "beyond_per_prompt": 40}
    line = LedgerLine(
        stage="iteration-001/pairs", iteration=1, role="pairs", unit="pairs", rows_in=100, kept=55, dropped=counts
    )
    report: Any = SimpleNamespace(ledgers=[line])
    assert dropped_statement(report).answer == (
        "Little. The largest share was dropped by iteration-001/pairs: 5 of 100 pairs (5 %), by reason: tie 5."
    )


@pytest.mark.parametrize(
    "judge",
    [lambda iteration, length: {5: 1, 6: 5, 7: 1}[length] + iteration, lambda _, length: {5: 1, 6: 3, 7: 2}[length]],
    ids=["none", "some"],
)
def test_too_few_answers_to_tell(tmp_path: Path, judge: Any) -> None:
    """Nine answers to three prompts: neither a yes nor a no."""
    report = gathered(ReportedRun(tmp_path, lambda iteration, sample: 5 + sample, judge).build().path)
    found = next(one for one in report.statements if one.topic == "length")
    assert found.answer.startswith("Not known: there are too few answers. Among 9 of 3 prompts the correlation")
    assert "± 0.8" in found.answer
    assert found.tone == "unclear"


@pytest.mark.parametrize(
    ("judge", "tone", "says"),
    [
        (lambda iteration, length: length % 2 + iteration, "good", "Yes. The held-out reward rose from"),
        (lambda iteration, length: length % 2 - iteration, "bad", "No, it got worse. The held-out reward fell from"),
        (lambda iteration, length: length % 2, "unclear", "Not measurably."),
    ],
    ids=["better", "worse", "same"],
)
def test_learning(tmp_path: Path, judge: Any, tone: str, says: str) -> None:
    """Whether it learned is decided on the same held-out prompts."""
    made = ReportedRun(tmp_path, score=judge).build()
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


def test_figures_are_those_of_the_artifacts(reported_run: ReportedRun) -> None:
    """Every figure of the answers and pairs, computed once more from what is published."""
    report = gathered(reported_run.path)
    for found in report.sets:
        rows = list(Artifact.open(reported_run.path / found.name).rows(Rollout))
        completions = [one for row in rows for one in row.completions]
        assert found.prompts == len(rows)
        assert found.samples == len(completions)
        assert found.truncated == sum(one.finish_reason == "length" for one in completions)
        assert found.mean_length == pytest.approx(statistics.fmean(len(one.response_ids) for one in completions))
        place = (reported_run.path / found.name).parent
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
        ledger = Artifact.open(reported_run.path / line.stage).manifest.ledger
        assert (line.rows_in, line.kept, line.dropped) == (ledger.rows_in, ledger.kept, ledger.dropped)
    for row in report.stages:
        if row.key is not None:
            assert row.key == Artifact.open(reported_run.path / row.name).manifest.key
    assert [row["reward_mean"] for row in report.evaluations] == [
        Artifact.open(reported_run.path / f"iteration-00{number}/evaluation").manifest.facts["metrics"]["reward_mean"]
        for number in (0, 1, 2)
    ]


def test_chunks_hold_every_answer(reported_run: ReportedRun) -> None:
    """What the browser of samples shows is what was published, token by token."""
    cache = SampleCache()
    report = gather(*open_run(reported_run.path), cache)
    for found in report.sets:
        assert len(found.chunks) == 1
        groups = unpacked(cache.chunk(f"{found.key}-0"))
        _, tokens = unpacked(cache.chunk(f"{found.key}-0t"))
        rows = list(Artifact.open(reported_run.path / found.name).rows(Rollout))
        assert [group[0] for group in groups] == found.columns.prompt == [row.prompt_id for row in rows]
        for row, group, per_answer in zip(rows, groups, tokens, strict=True):
            assert group[1] == [[message.role, message.content] for message in row.messages]
            for one, shown, (ids, logprobs) in zip(row.completions, group[3], per_answer, strict=True):
                assert shown[5:] == [[[{"half": 0.5}, {"why": "because"}], *[None for _ in found.scorers[1:]]]]
                assert shown[:4] == [one.sample, one.text, one.finish_reason, len(one.response_ids)]
                assert ids == list(one.response_ids)
                assert logprobs == [50] * len(ids)  # hundredths of a nat, without their sign


def test_engine_and_trainer(reported_run: ReportedRun, run: Path) -> None:
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


def test_what_judges_have_cost(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that was paid for a scorer, with its cost where there are prices."""
    paid = {"scorer": "gold", "answers_paid": 7, "prompt_tokens_paid": 1200, "completion_tokens_paid": 90}
    for iteration, facts in enumerate((paid, {**paid, "cost": 0.25}, {**paid, "cost": 0.5})):
        path = run / f"iteration-00{iteration}/heldout/gold/manifest.json"
        manifest = read_manifest(path.read_bytes())
        path.write_bytes(with_checksum(msgspec.structs.replace(manifest, facts={**manifest.facts, **facts})))
    (line,) = gathered(run).paid
    assert (line.scorer, line.stages, line.answers) == ("gold", 3, 21)
    assert (line.prompt_tokens, line.completion_tokens, line.cost) == (3600, 270, 0.75)
    assert main(["report", str(run), "--markdown"]) == 0
    assert "| gold | 3 | 21 | 3,600 | 270 | 0.75 |" in capsys.readouterr().out
    assert "<h3>What judges have cost</h3>" in page_of(run)


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
    assert "report.samples/ next to it" in capsys.readouterr().out
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
    real = cache_module.read_set
    monkeypatch.setattr(cache_module, "read_set", lambda sources: (read.append(sources.name), real(sources))[1])
    page_of(run)
    assert read == []
    (run / "report.samples" / f"{gathered(run).sets[0].key}-0.js").unlink()
    read.clear()
    page_of(run)
    assert read == ["iteration-000/heldout/generation"]


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
    write_report(*open_run(run), run / "report.html")
    first = (run / "report.samples").stat().st_mtime_ns
    write_report(*open_run(run), run / "report.html")
    assert (run / "report.samples").stat().st_mtime_ns == first


def test_own_evaluations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the user's own evaluations have said stands beside the others, of the policies that they have judged."""
    record = json.loads((run / "run.json").read_text())
    (run / "evals.py").write_text("def lm(checkpoint, output):\n    return {}\n")
    record["settings"]["evaluations"] = {"lm": {"function": f"{run}/evals.py:lm"}}
    (run / "run.json").write_text(json.dumps(record))
    for iteration, value in ((0, 0.25), (2, 0.5)):
        output = run / f"iteration-00{iteration}/evaluations/lm"
        config = CheckpointEvaluationConfig(
            output=output, function=f"{run}/evals.py:lm", checkpoint=run / "prompts/train"
        )
        handmade.publish(config, CHECKPOINT_EVALUATION, {}, {}, facts={"metrics": {"acc_<i>": value}})
    report = gathered(run)
    assert report.own_evaluations == [{"iteration": 0, "lm/acc_<i>": 0.25}, {"iteration": 2, "lm/acc_<i>": 0.5}]
    text = page_of(run)
    assert "<th>lm/acc_&lt;i&gt;</th>" in text
    capsys.readouterr()
    assert main(["report", str(run), "--markdown"]) == 0
    assert "| iteration | lm/acc\\_\\<i\\> |\n| --- | --- |\n| 0 | 0.250 |\n| 2 | 0.500 |" in capsys.readouterr().out
