"""`pipeline verify` finds whatever is wrong with what a run has published, names the file, and cries no wolf."""

import fcntl
import gzip
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from handmade import HandmadeRun, compress

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.manifest import MANIFEST, Manifest, Released, with_checksum
from contracts.publication import partial_directory
from pipelines.lineage.verify import Findings, verify
from pipelines.main import main
from pipelines.run.decisions import lender_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> HandmadeRun:
    """A run that the tests of this file share and leave as it is."""
    run = HandmadeRun(tmp_path_factory.mktemp("verify")).build()
    compress(run.path / "iteration-001/generation/shard-00000.jsonl")
    release(run.path / "iteration-001/training", ["model.safetensors"])
    return run


@pytest.fixture
def run(tmp_path: Path) -> HandmadeRun:
    """A run of a test's own."""
    return HandmadeRun(tmp_path).build()


def release(artifact: Path, names: list[str]) -> None:
    """Delete files as `pipeline gc` does."""
    record = Released(tuple(names), "not among the best", "2026-01-01T00:00:00Z")
    (artifact / "released.json").write_bytes(with_checksum(record))
    for name in names:
        (artifact / name).unlink(missing_ok=True)


def forge(artifact: Path, **changes: Any) -> None:
    """Write a manifest that is whole in itself, but wrong."""
    manifest = msgspec.json.decode((artifact / MANIFEST).read_bytes(), type=Manifest)
    changed = msgspec.structs.replace(manifest, checksum="", **changes)
    (artifact / MANIFEST).write_bytes(with_checksum(changed))


def test_a_finished_run_is_whole(run: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("logs", "report.samples"):
        (run.path / folder).mkdir()
        (run.path / folder / "text").touch()
    assert main(["verify", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [file for path in run.path.rglob(MANIFEST) for file in Artifact.open(path.parent).manifest.files]
    artifacts = len(list(run.path.rglob(MANIFEST)))
    size = sum(file.bytes for file in files) / 1e6
    rows = sum(file.rows for file in files)
    assert lines == [
        f"{run.path}: {artifacts} artifacts, {len(files)} files, {size:.1f} MB, {rows} rows checked: no problem"
    ]


def test_a_finished_run_on_samples_is_whole(tmp_path: Path) -> None:
    run = HandmadeRun(tmp_path, on_samples=True).build()
    compress(run.path / "iteration-001/experience/shard-00000.jsonl")
    findings = verify(run.path)
    assert (findings.problems, findings.warnings, findings.notes) == ([], [], [])
    assert verify(run.path / "iteration-002/experience").rows == 3


def test_what_gc_has_deleted_or_compressed_is_no_problem(finished: HandmadeRun) -> None:
    findings = verify(finished.path)
    assert (findings.problems, findings.warnings, findings.notes) == ([], [], [])
    assert findings.released == 1
    assert "; 1 file deleted by `pipeline gc`: no problem" in str(findings)


@pytest.mark.slow
def test_every_flipped_bit_is_found_and_its_file_named(finished: HandmadeRun) -> None:
    chance = random.Random(20)
    published = [path.parent for path in finished.path.rglob(MANIFEST)]
    files = sorted(file for folder in published for file in folder.rglob("*"))
    assert {file.suffix for file in files} == {".json", ".jsonl", ".gz", ".safetensors", ".parquet"}
    places = [(file, chance.randrange(file.stat().st_size)) for file in [*files, *chance.choices(files, k=120)]]
    for file, position in places:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[position] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        problems = verify(file.parent if file.name != MANIFEST and chance.random() < 0.8 else finished.path).problems
        found = any(str(file) in problem for problem in problems)
        assert found or same_rows(content, flipped), f"{file}, byte {position}: {problems}"
        file.write_bytes(content)
    assert verify(finished.path).problems == []


def same_rows(content: bytes, changed: bytes) -> bool:
    """Whether a file is compressed, and the bytes changed are those that its rows do not depend on, as a time."""
    return content.startswith(b"\x1f\x8b") and gzip.decompress(changed) == gzip.decompress(content)


@pytest.mark.slow
def test_compressed_rows_that_changed_are_found(finished: HandmadeRun) -> None:
    file = finished.path / "iteration-001/generation/shard-00000.jsonl.gz"
    content = file.read_bytes()
    ends = [*range(12), *range(len(content) - 12, len(content))]
    for position, bit in [(position, bit) for position in ends for bit in range(8)]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        file.write_bytes(flipped)
        found = any(str(file) in problem for problem in verify(file.parent).problems)
        assert found or same_rows(content, flipped), f"byte {position}, bit {bit}"
    for wrong in (content[:-1], content + content, b""):
        file.write_bytes(wrong)
        assert any(str(file) in problem for problem in verify(file.parent).problems)
    file.write_bytes(content)


def test_damage_is_told_in_one_message_and_stops_nothing(run: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    torn, changed = run.path / "iteration-001/pairs" / MANIFEST, run.path / "iteration-002/training/config.json"
    torn.write_bytes(torn.read_bytes()[:100])
    changed.write_bytes(changed.read_bytes() + b" ")
    assert main(["verify", str(run.path)]) == 1
    captured = capsys.readouterr()
    named = [line for line in captured.out.splitlines() if line.startswith((f"{torn} ", f"{changed}:"))]
    assert len(named) == 2
    assert captured.out.splitlines()[-1].endswith(": 2 problems")
    assert captured.err.startswith(f"error: {run.path} is damaged.")
    assert "Traceback" not in captured.err


Tampering = Callable[[HandmadeRun], Any]


def delete(path: Path) -> None:
    """A file or a directory."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TAMPERINGS: dict[str, tuple[Tampering, str]] = {
    "missing evaluation": (
        lambda run: delete(run.path / "iteration-002/evaluation"),
        "metrics.jsonl: it has metrics of iteration-002/evaluation, but its evaluation is missing or damaged",
    ),
    "missing manifest": (
        lambda run: delete(run.path / "iteration-002/training" / MANIFEST),
        "iteration-002/training: files without a manifest.json",
    ),
    "manifest that is a directory": (
        lambda run: replace_by_directory(run.path / "iteration-002/training" / MANIFEST),
        "iteration-002/training: files without a manifest.json",
    ),
    "a pipe in place of a file": (
        lambda run: replace_by_pipe(run.path / "iteration-001/generation/shard-00000.jsonl"),
        "shard-00000.jsonl: it is not a regular file",
    ),
    "missing file": (
        lambda run: (run.path / "iteration-001/pairs/train.parquet").unlink(),
        "iteration-001/pairs/train.parquet: missing",
    ),
    "a released file that nobody knows": (
        lambda run: release(run.path / "iteration-001/training", ["other.safetensors"]),
        "iteration-001/training/released.json: it names other.safetensors",
    ),
    "damaged released.json": (
        lambda run: (run.path / "iteration-001/training/released.json").write_text("{"),
        "iteration-001/training/released.json is damaged",
    ),
    "weights that no manifest lists": (
        lambda run: (run.path / "iteration-001/training/model-2.safetensors").write_bytes(b""),
        "iteration-001/training/model-2.safetensors: no manifest lists it",
    ),
    "rows": (
        lambda run: forge(run.path / "iteration-001/pairs", rows=4),
        "iteration-001/pairs/manifest.json: it has 4 rows, but its files add up to 3",
    ),
    "ledger": (
        lambda run: forge(run.path / "iteration-001/pairs", ledger=Ledger("pairs", 5, 3, {"ties": 1})),
        "iteration-001/pairs/manifest.json: the ledger does not add up",
    ),
    "key": (
        lambda run: forge(run.path / "iteration-001/pairs", key="0" * 64),
        "iteration-001/pairs/manifest.json: the key",
    ),
    "digest": (
        lambda run: forge(run.path / "iteration-001/evaluation", digest="0" * 64),
        "iteration-001/evaluation/manifest.json: the digest",
    ),
    "inputs": (
        lambda run: forge(run.path / "prompts/train", inputs={}, input_paths={}),
        "prompts/train/manifest.json: the inputs",
    ),
    "missing artifact": (
        lambda run: shutil.rmtree(run.path / "iteration-001/pairs"),
        "iteration-001/pairs: it is missing",
    ),
    "changed prompts of the user's": (
        lambda run: run.source.write_text("{}"),
        "prompts.jsonl: it has changed",
    ),
    "changed model from elsewhere": (
        lambda run: (run.judge / "config.json").write_text("{}"),
        "judge: it has changed",
    ),
    "damaged model from elsewhere": (
        lambda run: (run.judge / "model.safetensors").write_bytes(b"12345678"),
        "judge/model.safetensors is cut off or damaged",
    ),
    "metrics": (
        lambda run: replace(run.path / "metrics.jsonl", '"eval/reward_mean":', '"eval/reward_mean":1'),
        "metrics.jsonl: iteration-000/evaluation: eval/reward_mean is ",
    ),
    "metrics of another evaluation": (
        lambda run: replace(run.path / "metrics.jsonl", '"key":"', '"key":"f'),
        "metrics.jsonl: its last metrics of iteration-000/evaluation are of the key f",
    ),
    "torn metrics": (
        lambda run: (run.path / "metrics.jsonl").write_text('{"point": 0'),
        "metrics.jsonl, line 1",
    ),
}


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_wrong_is_named(run: HandmadeRun, name: str) -> None:
    tamper, expected = TAMPERINGS[name]
    tamper(run)
    assert any(expected in problem for problem in verify(run.path).problems), verify(run.path).problems


def renamed(rows: list[Any], **changes: Any) -> list[Any]:
    """The same rows, the last one changed."""
    return [*rows[:-1], msgspec.structs.replace(rows[-1], **changes)]


MUTATIONS: dict[str, tuple[str, Callable[[list[Any]], list[Any]], str]] = {
    "another policy": (
        "iteration-002/generation",
        lambda rows: renamed(rows, policy="0" * 64),
        "iteration-002/generation/shard-00001.jsonl: prompt {} names the policy 000000000000",
    ),
    "a prompt twice": (
        "iteration-002/generation",
        lambda rows: [*rows, rows[0]],
        "iteration-002/generation/shard-00001.jsonl: prompt {} occurs twice",
    ),
    "a score twice": (
        "iteration-001/reward",
        lambda rows: [*rows, rows[-1]],
        "iteration-001/reward/shard-00001.jsonl: prompt {}, sample 2 is scored twice",
    ),
    "a score of nothing": (
        "iteration-001/heldout/gold",
        lambda rows: renamed(rows, sample=9),
        "iteration-001/heldout/gold/shard-00000.jsonl: prompt {}, sample 9 is scored, but was not sampled",
    ),
    "other prompt ids": (
        "iteration-002/pairs",
        lambda rows: renamed(rows, prompt_ids=(1, 2)),
        "iteration-002/pairs/shard-00000.jsonl: pair {} has other prompt_ids",
    ),
    "other chosen ids": (
        "iteration-002/pairs",
        lambda rows: renamed(rows, chosen_ids=(1, 2)),
        "iteration-002/pairs/shard-00000.jsonl: pair {} has other chosen_ids",
    ),
    "another sample": (
        "iteration-002/pairs",
        lambda rows: renamed(rows, rejected_sample=7),
        "iteration-002/pairs/shard-00000.jsonl: pair {} has other rejected_ids",
    ),
    "a pair of another prompt": (
        "iteration-002/pairs",
        lambda rows: renamed(rows, prompt_id="f" * 16),
        "iteration-002/pairs/shard-00000.jsonl: pair {} is of prompt ffffffffffffffff",
    ),
    "another fingerprint": (
        "iteration-002/training weights",
        lambda rows: ["0" * 64],
        "iteration-002/training/manifest.json: the fingerprint of the weights",
    ),
}


def of_sample(rows: list[Any], **fields: Any) -> list[Any]:
    """The rows, with other values in the last sample of the last one."""
    *samples, last = rows[-1].samples
    return renamed(rows, samples=(*samples, msgspec.structs.replace(last, **fields)))


SAMPLE_MUTATIONS: dict[str, tuple[str, Callable[[list[Any]], list[Any]], str]] = {
    "values that are too many": (
        "iteration-001/values",
        lambda rows: renamed(rows, token_values=(0.0,) * 9),
        "iteration-001/values/shard-00001.jsonl: prompt {}, sample 2 has 9 numbers for",
    ),
    "a log-probability too few": (
        "iteration-002/reference",
        lambda rows: renamed(rows, token_logprobs=(0.0,)),
        "iteration-002/reference/shard-00001.jsonl: prompt {}, sample 2 has 1 numbers for",
    ),
    "experience of other tokens": (
        "iteration-002/experience",
        lambda rows: of_sample(rows, response_ids=(1, 2)),
        "iteration-002/experience/shard-00000.jsonl: prompt {}, sample 2 has other response_ids",
    ),
    "experience of another sample": (
        "iteration-002/experience",
        lambda rows: of_sample(rows, sample=7),
        "iteration-002/experience/shard-00000.jsonl: prompt {}, sample 7 has other response_ids",
    ),
    "experience of another policy": (
        "iteration-002/experience",
        lambda rows: renamed(rows, policy="f" * 64),
        "iteration-002/experience/shard-00000.jsonl: prompt {} names the policy ffffffffffff",
    ),
    "experience of another prompt": (
        "iteration-002/experience",
        lambda rows: renamed(rows, prompt_id="f" * 16),
        "iteration-002/experience/shard-00000.jsonl: a row is of prompt {}, which",
    ),
    "experience of other prompt ids": (
        "iteration-001/experience",
        lambda rows: renamed(rows, prompt_ids=(1, 2)),
        "iteration-001/experience/shard-00000.jsonl: prompt {} has other prompt_ids than its rollout",
    ),
    "other log-probabilities": (
        "iteration-001/experience",
        lambda rows: of_sample(rows, behaviour=(-0.5,) * len(rows[-1].samples[-1].behaviour)),
        "iteration-001/experience/shard-00000.jsonl: prompt {}, sample 2 has another `behaviour`",
    ),
    "an advantage too many": (
        "iteration-001/experience",
        lambda rows: of_sample(rows, advantages=(0.0,) * 9),
        "iteration-001/experience/shard-00000.jsonl: prompt {}, sample 2 has 9 advantages for",
    ),
}


SPREADING = {
    "a prompt twice", "a pair of another prompt", "values that are too many", "a log-probability too few",
}  # fmt: skip
"""What is wrong in more than one file."""


@pytest.mark.parametrize("name", [*MUTATIONS, *SAMPLE_MUTATIONS])
def test_rows_that_contradict_each_other_are_named(tmp_path: Path, name: str) -> None:
    place, change, expected = (MUTATIONS | SAMPLE_MUTATIONS)[name]
    published: list[Any] = []

    def mutate(stage: str, rows: list[Any]) -> list[Any]:
        if stage != place:
            return rows
        published[:] = change(rows)
        return published

    run = HandmadeRun(tmp_path, mutate, on_samples=name in SAMPLE_MUTATIONS).build()
    row = published[-1]
    about = getattr(row, "pair_id", None) or getattr(row, "prompt_id", "")
    findings = verify(run.path)
    assert [problem for problem in findings.problems if expected.format(about) in problem], findings.problems
    assert len(findings.problems) == 1 or name in SPREADING
    directory = run.path / place.split()[0]
    assert any(expected.format(about) in problem for problem in verify(directory).problems)


def test_many_contradictions_are_counted(tmp_path: Path) -> None:
    def mutate(stage: str, rows: list[Any]) -> list[Any]:
        return [msgspec.structs.replace(row, sample=5) for row in rows] if "gold" in stage else rows

    run = HandmadeRun(tmp_path, mutate).build()
    first = [problem for problem in verify(run.path).problems if "iteration-001/heldout" in problem]
    assert len(first) == 6
    assert first[-1].endswith("1 more contradictions like these")


def moved(run: HandmadeRun, target: Path) -> Findings:
    target.parent.mkdir(parents=True)
    run.path.rename(target)
    return verify(target)


def test_a_run_that_was_moved_is_whole(run: HandmadeRun, tmp_path: Path) -> None:
    findings = moved(run, tmp_path / "elsewhere" / "renamed")
    assert (findings.problems, findings.warnings, findings.notes) == ([], [], [])


def test_damage_of_a_moved_run_is_named_where_it_is(run: HandmadeRun, tmp_path: Path) -> None:
    forge(run.path / "iteration-001/reference", digest="1" * 64)
    shutil.rmtree(run.path / "iteration-002/pairs")
    target = tmp_path / "elsewhere" / "renamed"
    problems = moved(run, target).problems
    assert any(problem.startswith(f"{target}/iteration-001/reference: it has changed") for problem in problems)
    assert any(problem.startswith(f"{target}/iteration-002/pairs: it is missing") for problem in problems)


def test_a_copy_is_verified_by_itself(run: HandmadeRun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    damaged = copy / "iteration-002/generation/shard-00000.jsonl"
    damaged.write_bytes(damaged.read_bytes().replace(b"answer", b"Answer", 1))
    assert verify(run.path).problems == []
    assert [str(damaged) in problem for problem in verify(copy).problems] == [True]


def test_relative_paths_do(
    run: HandmadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.path.parent)
    (run.path / "iteration-001/pairs/train.parquet").unlink()
    assert main(["verify", "handmade"]) == 1
    assert capsys.readouterr().out.startswith("handmade/iteration-001/pairs/train.parquet: missing")
    monkeypatch.chdir(run.path / "iteration-002")
    assert verify(Path("training")).problems == []


def test_what_was_made_under_another_key_is_found_in_superseded(run: HandmadeRun) -> None:
    pairs = run.path / "iteration-001/pairs"
    aside = run.path / "superseded/iteration-001/pairs" / Artifact.open(pairs).manifest.key[:16]
    aside.parent.mkdir(parents=True)
    pairs.rename(aside)
    run.mutate = lambda name, rows: rows[:-1]
    run.pairs("iteration-001/pairs", run.path / "iteration-001/generation", run.path / "iteration-001/reward", 0.1)
    findings = verify(run.path)
    assert findings.problems == []
    assert [note.partition(": it was read, but the run now has")[0] for note in findings.notes] == [str(aside)]
    assert "pairs of iteration-001/reference, pairs of iteration-001/training" in findings.notes[0]
    damaged = aside / "train.parquet"
    damaged.write_bytes(b"")
    assert any(str(damaged) in problem for problem in verify(run.path).problems)
    shutil.rmtree(run.path / "superseded")
    assert any(problem.startswith(f"{pairs}: it has changed") for problem in verify(run.path).problems)


def test_what_another_run_shares_and_no_stage_has_taken_yet_is_no_damage(run: HandmadeRun) -> None:
    """As after --share in a run that has failed: a note beside each artifact says whose it is."""
    reward = run.path / "iteration-001/reward"
    place = run.path / "superseded/iteration-001/reward" / Artifact.open(reward).manifest.key[:16]
    shutil.copytree(reward, place)
    lender_file(place).write_text("../other")
    assert verify(run.path).problems == []
    shutil.rmtree(place)
    assert verify(run.path).problems == [f"{place.parent}: files without a manifest.json"]


def test_what_is_gone_from_outside_is_only_noted(run: HandmadeRun) -> None:
    run.source.unlink()
    shutil.rmtree(run.judge)
    findings = verify(run.path)
    assert findings.problems == []
    assert [note.partition(":")[0] for note in findings.notes] == [str(run.judge), str(run.source)]
    assert "model of iteration-000/heldout/reward, " in findings.notes[0]
    assert " and 2 more" in findings.notes[0]


def test_what_another_run_has_published_is_checked_where_it_was_read(run: HandmadeRun, tmp_path: Path) -> None:
    other = HandmadeRun(tmp_path / "other")
    other.salt = "other"
    other.model = run.path / "iteration-002/training"
    other.build()
    assert verify(other.path).problems == []
    damaged = other.model / "config.json"
    damaged.write_bytes(damaged.read_bytes() + b" ")
    problems = verify(other.path).problems
    assert [str(damaged) in problem for problem in problems] == [True]


def test_leftovers_are_warnings_unless_somebody_drives_the_run(run: HandmadeRun) -> None:
    training = run.path / "iteration-001/training"
    left = [
        run.path / "metrics.jsonl.1234.tmp",
        training / "notes.txt",
        training / ".lock",
        training / "config.json.1.tmp",
        run.path / "iteration-002/reward/shard-00000.jsonl.gz",
        partial_directory(run.path / "iteration-002/pairs", "0" * 64),
    ]
    for path in left[:-1]:
        path.touch()
    left[-1].mkdir()
    partial_directory(run.path / "iteration-003/pairs", "0" * 64).mkdir(parents=True)  # begun, and still wanted
    findings = verify(run.path)
    assert findings.problems == []
    assert sorted(warning.partition(":")[0] for warning in findings.warnings) == sorted(map(str, left))
    with (run.path / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert verify(run.path).warnings == []


def test_one_artifact_alone(run: HandmadeRun, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    shutil.copytree(run.path / "iteration-001/pairs", pairs)
    findings = verify(pairs)
    assert (findings.problems, findings.artifacts, findings.files) == ([], 1, 2)
    (run.path / "iteration-001/pairs/train.parquet").unlink()
    (run.path / "iteration-002/pairs/train.parquet").unlink()
    assert len(verify(run.path / "iteration-001/pairs").problems) == 1
    assert verify(run.path / "iteration-001/training").problems == []
    (pairs / MANIFEST).write_text("{}")
    assert [str(pairs / MANIFEST) in problem for problem in verify(pairs).problems] == [True]


def test_a_place_that_is_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not the directory of a run"):
            verify(path)
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_copy_is_judged_by_what_is_in_it(run: HandmadeRun, tmp_path: Path) -> None:
    copy = tmp_path / "copies" / "of" / run.path.name
    shutil.copytree(run.path, copy)
    assert verify(copy).problems == []
    shutil.rmtree(copy / "iteration-001/training")
    assert any("iteration-001/training" in problem for problem in verify(copy).problems)
