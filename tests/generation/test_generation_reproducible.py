"""The same inputs give the same bytes: run again, after a kill, with replicas, as tasks."""

import signal
import time
from pathlib import Path

import pytest
from generation_runs import generate, processed_config, raw_config, rows, start

from contracts.artifacts import Artifact


def test_two_replicas_publish_the_same_bytes(
    engine: str, processed: Artifact, policy: Path, prompts: Path, tmp_path: Path
) -> None:
    again = generate(tmp_path / "out", replicas=2, **processed_config(engine, policy, prompts))
    assert again.manifest.key == processed.manifest.key
    assert again.manifest.digest == processed.manifest.digest


def test_killed_and_run_again_publishes_the_same_bytes(
    engine: str, raw: Artifact, policy: Path, prompts: Path, tmp_path: Path
) -> None:
    config = raw_config(engine, policy, prompts)
    for number in range(5):  # beside other work, this process may come too late
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        killed = start(output, **config)
        while not (finished := list(output.parent.glob(".out.partial-*/.receipt-shard-00000.jsonl.json"))):
            if killed.poll() is not None:
                break
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        told = killed.communicate()
        assert killed.returncode in (0, -signal.SIGKILL), told
        if finished and len(list(finished[0].parent.glob(".receipt-*"))) in range(1, len(raw.manifest.files)):
            break
    partial = finished[0].parent
    first = (partial / "shard-00000.jsonl").stat().st_ino

    again = generate(output, **config)
    assert again.manifest.digest == raw.manifest.digest
    assert again.shards[0].stat().st_ino == first
    assert {name: again.manifest.facts[name] for name in ("completions", "stop_rate")} == {
        name: raw.manifest.facts[name] for name in ("completions", "stop_rate")
    }


def test_run_again_reuses_what_is_published(raw: Artifact, engine: str, policy: Path, prompts: Path) -> None:
    created = raw.manifest.created
    assert generate(raw.path, **raw_config(engine, policy, prompts)).manifest.created == created


def test_another_seed_gives_other_answers(raw: Artifact, engine: str, policy: Path, prompts: Path) -> None:
    if engine == "vllm":
        pytest.skip("the seeds are the stage's own, the same for every engine")
    config = {**raw_config(engine, policy, prompts), "seed": 8}
    other = rows(generate(raw.path.parent / "other-seed", **config))
    pairs = list(zip(rows(raw), other, strict=True))
    assert all(one.completions[1].response_ids == two.completions[1].response_ids for one, two in pairs)
    assert sum(one.completions[0].response_ids != two.completions[0].response_ids for one, two in pairs) > 20


def test_tasks_and_a_publisher_publish_what_one_process_does(
    engine: str, raw: Artifact, policy: Path, prompts: Path, tmp_path: Path
) -> None:
    config = raw_config(engine, policy, prompts)
    output = tmp_path / "out"
    tasks = [
        start(output, {"RATCHET_ROLE": "task", "RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}, **config)
        for rank in (1, 2)
    ]
    for task in tasks:
        out, err = task.communicate(timeout=300)
        assert task.returncode == 0, out + err
    assert not output.exists()

    publisher = start(output, {"RATCHET_ROLE": "publisher", "OMP_NUM_THREADS": "7"}, **config)
    out, err = publisher.communicate(timeout=120)
    assert publisher.returncode == 0, out + err
    made = Artifact.open(output).manifest
    assert (made.digest, made.key, made.weights) == (raw.manifest.digest, raw.manifest.key, raw.manifest.weights)
    assert made.facts == {**raw.manifest.facts, "threads": "1"}, "the publisher's own threads are of no interest"
    assert made.ledger == raw.manifest.ledger
