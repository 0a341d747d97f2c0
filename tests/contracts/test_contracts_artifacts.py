"""The artifact store: whatever happens to a writer, a reader sees nothing or the whole, and nothing is made twice."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts import versions
from contracts.artifacts import Artifact, artifact_of, input_digest, is_published
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.publication import Publication, partial_directory
from contracts.records import PROMPTS, SCORES, Message, Prompt

KEY = "k" * 64


def prompt(number: int) -> Prompt:
    return Prompt(f"{number:016x}", (Message("user", f"question {number}"),))


def write_shard(publication: Publication, number: int, rows: int = 3) -> None:
    ledger = Ledger("prompts")
    ledger.keep(rows)
    ledger.drop("too_long", number)
    publication.write_rows(f"shard-{number:05d}.jsonl", [prompt(number * rows + i) for i in range(rows)], ledger)


def publish(publication: Publication) -> Artifact:
    return publication.publish(
        key_parts={}, inputs={}, input_paths={}, unit="prompts", weights=None, versions={}, seconds={}, facts={}
    )


def make(target: Path, shards: int = 3, key: str = KEY) -> Artifact:
    publication = Publication(target, PROMPTS, "prompts", key)
    publication.begin()
    for number in range(shards):
        write_shard(publication, number)
    return publish(publication)


def test_what_is_published_reads_back_with_its_counts(tmp_path: Path) -> None:
    artifact = make(tmp_path / "out")
    assert [row.prompt_id for row in artifact.rows(Prompt)] == [f"{i:016x}" for i in range(9)]
    assert str(artifact.manifest.ledger) == "12 prompts in = 9 kept + 3 too_long"
    assert artifact.manifest.rows == 9
    assert artifact.damage() == []
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", *(f"shard-0000{i}.jsonl" for i in range(3))]


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b", key="other" * 10)
    assert first.manifest.digest == second.manifest.digest == input_digest(tmp_path / "a")
    assert make(tmp_path / "c", shards=2).manifest.digest != first.manifest.digest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_writer_killed_anywhere_leaves_nothing_or_all_and_the_next_one_ends_the_same(data: st.DataObject) -> None:
    """A crash is simulated by leaving the directory as it is after a random number of steps, and damaging leftovers."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        expected = make(root / "whole").manifest.digest
        target = root / "out"
        made: list[int] = []
        for _ in range(data.draw(st.integers(0, 3), label="crashes")):
            publication = Publication(target, PROMPTS, "prompts", KEY)
            publication.begin()
            for number in range(3):
                if f"shard-{number:05d}.jsonl" in publication.receipts():
                    continue
                action = data.draw(st.sampled_from(["write", "crash", "torn scratch", "file without receipt", "flip"]))
                if action == "write":
                    write_shard(publication, number)
                    made.append(number)
                    continue
                if action == "torn scratch":
                    publication.scratch(f"shard-{number:05d}.jsonl").write_bytes(b'{"prompt_id": "00')
                if action == "file without receipt":
                    (publication.directory / f"shard-{number:05d}.jsonl").write_bytes(b"{}\n")
                if action == "flip" and publication.receipts():
                    name = data.draw(st.sampled_from(sorted(publication.receipts())))
                    content = bytearray((publication.directory / name).read_bytes())
                    content[5] ^= 1
                    (publication.directory / name).write_bytes(bytes(content))
                    made.remove(int(name[6:11]))
                break
            assert publication._lock._file is not None
            publication._lock._file.close()
            assert not target.exists(), "a reader must not see an unfinished artifact"
        publication = Publication(target, PROMPTS, "prompts", KEY)
        publication.begin()
        missing = [n for n in range(3) if f"shard-{n:05d}.jsonl" not in publication.receipts()]
        assert not set(missing) & set(made), "a finished shard was lost"
        for number in missing:
            write_shard(publication, number)
        assert publish(publication).manifest.digest == expected
        assert sorted(os.listdir(root)) == ["out", "whole"]


def test_killed_between_manifest_and_rename_only_the_rename_is_left(tmp_path: Path) -> None:
    target = tmp_path / "out"
    expected = make(tmp_path / "whole").manifest.digest
    made = make(target)
    os.rename(made.path, partial_directory(target, KEY))
    publication = Publication(target, PROMPTS, "prompts", KEY)
    publication.begin()
    assert publication.complete
    assert publication.finish().manifest.digest == expected


def test_two_writers_of_one_target_exclude_each_other(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code = (
        "import sys, time; from pathlib import Path; from contracts.publication import Publication; "
        "from contracts.records import PROMPTS; "
        f"p = Publication(Path(sys.argv[1]), PROMPTS, 'prompts', {KEY!r}); p.begin(); print('held', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is making"):
            Publication(target, PROMPTS, "prompts", KEY).begin()
        other.kill()
        other.wait()
    make(target)


def test_an_output_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    make(tmp_path / "out")
    assert is_published(tmp_path / "out", KEY)
    with pytest.raises(UserError, match="published by another run"):
        is_published(tmp_path / "out", "z" * 64)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not an artifact"):
        is_published(tmp_path / "mine", KEY)


def test_opening_names_what_is_wrong(tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(UserError, match="holds prompts v1; expected scores v1"):
        Artifact.open(tmp_path / "out", SCORES)
    with pytest.raises(UserError, match="does not exist"):
        Artifact.open(tmp_path / "nothing")
    (tmp_path / "out" / "manifest.json").write_bytes(b'{"schema"')
    with pytest.raises(UserError, match="is damaged"):
        Artifact.open(tmp_path / "out")


def test_a_manifest_of_another_program_above_an_input_is_no_artifact(tmp_path: Path) -> None:
    data = tmp_path / "site" / "data"
    data.mkdir(parents=True)
    (tmp_path / "site" / "manifest.json").write_text('{"name": "my web app", "key": "x"}')
    assert artifact_of(data) is None
    artifact = make(tmp_path / "out")
    shard = artifact.shards[0]
    assert getattr(artifact_of(shard), "path", None) == artifact.path
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema"', '"scheme"', 1))
    with pytest.raises(UserError, match="damaged"):
        artifact_of(shard)


@settings(max_examples=25, deadline=None)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7), shard=st.integers(0, 2))
def test_one_flipped_bit_is_found_and_named(place: int, bit: int, shard: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        artifact = make(Path(folder) / "out")
        path = artifact.shards[shard]
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(bytes(content))
        assert [path.name in line for line in artifact.damage()] == [True]


def test_counts_that_do_not_add_up_are_a_defect(tmp_path: Path) -> None:
    publication = Publication(tmp_path / "out", PROMPTS, "prompts", KEY)
    publication.begin()
    with pytest.raises(AssertionError, match="5 in, but 1 kept or dropped"):
        publication.write_rows("shard-00000.jsonl", [prompt(0)], Ledger("prompts", rows_in=5, kept=1))


def test_the_source_version_is_of_the_contracts_and_of_the_stages_package(tmp_path, monkeypatch):
    for name in ("contracts", "one", "two"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "code.py").write_text(f"name = {name!r}\n")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "contracts" / "versions.py"))
    before = versions.source_version("one")
    (tmp_path / "two" / "part" / "code.py").write_text("name = 2\n")
    assert versions.source_version("one") == before
    found = {before}
    for name in ("contracts", "one"):
        (tmp_path / name / "part" / "code.py").write_text("name = 2\n")
        found.add(versions.source_version("one"))
    assert len(found) == 3


def test_weights_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from contracts import fingerprint

    (tmp_path / "config.json").write_text("{}")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = tmp_path / "model.safetensors"

    def write(number: bytes) -> None:
        weights.write_bytes(len(header).to_bytes(8, "little") + header + number)

    read: list[Path] = []
    hashed = fingerprint.file_sha256
    monkeypatch.setattr(fingerprint, "file_sha256", lambda path: (read.append(path), hashed(path))[1])
    monkeypatch.setattr(fingerprint, "_known", {})
    write(b"1234")
    fresh = fingerprint.weights_fingerprint(tmp_path)
    write(b"5678")  # within a tick of the clock, the same size
    assert fingerprint.weights_fingerprint(tmp_path) != fresh
    monkeypatch.setattr(fingerprint, "STABLE_NANOSECONDS", -(10**18))
    read.clear()
    found = {fingerprint.weights_fingerprint(tmp_path) for _ in range(3)}
    assert len(read) == 2
    time.sleep(0.02)
    write(b"9999")
    assert fingerprint.weights_fingerprint(tmp_path) not in found
