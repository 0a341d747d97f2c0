"""`pipeline trace` walks back from whatever it is given, checks every link, and says what it could not find."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from handmade import HandmadeRun, compress, publish

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.manifest import MANIFEST, with_checksum
from contracts.records import EXPERIENCE, ExperienceRow, Pair, Rollout, Score
from pipelines.lineage.trace import trace
from pipelines.lineage.verify import verify
from pipelines.main import main
from training.config import ExperienceConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> HandmadeRun:
    """A run that the tests of this file share and leave as it is."""
    return HandmadeRun(tmp_path_factory.mktemp("lineage")).build()


@pytest.fixture
def run(tmp_path: Path) -> HandmadeRun:
    """A run of a test's own."""
    return HandmadeRun(tmp_path).build()


def output(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What `pipeline trace` prints."""
    assert main(["trace", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def first_pair(run: HandmadeRun, place: str = "iteration-002/pairs") -> Pair:
    return next(iter(Artifact.open(run.path / place).rows(Pair)))


def entry(found: dict[str, Any], artifact: str, name: str) -> dict[str, Any]:
    """One input of one of the artifacts found."""
    inputs = found["artifacts"][artifact]["inputs"]
    return next(item for item in inputs if item["name"] == name)


def test_a_checkpoint_goes_back_to_all_that_it_was_made_from(finished: HandmadeRun) -> None:
    found = trace(str(finished.path / "iteration-002/training"))
    made = [
        f"{here}/{stage}"
        for here in ("iteration-002", "iteration-001")
        for stage in ("training", "pairs", "generation", "reward", "reference")
    ]
    assert found["target"] == "iteration-002/training"
    assert set(found["artifacts"]) == {*made, "prompts/train"}
    inputs = [item for artifact in found["artifacts"].values() for item in artifact["inputs"]]
    assert {item["state"] for item in inputs} == {"same"}
    outside = {Path(item["place"]) for item in inputs if item["artifact"] is None}
    assert outside == {finished.model, finished.judge, finished.source}


def test_the_tree_says_what_each_manifest_says(finished: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, finished.path / "iteration-002/training")
    for name in ("iteration-002/training", "iteration-001/training", "iteration-002/pairs", "prompts/train"):
        manifest = Artifact.open(finished.path / name).manifest
        identity = f"key {manifest.key[:12]}  digest {manifest.digest[:12]}"
        assert text.count(identity) == 1, f"{name} is told once"
        assert f"made {manifest.created}" in text
    assert f"weights {Artifact.open(finished.path / 'iteration-001/training').manifest.weights or '':.12}" in text
    assert "settings: seed 11, beta 0.2" in text
    assert "learning_rate" not in text, "the defaults are not told"
    assert "k 3, iteration 2, seed 7" in text
    assert "torch 2.13.0, transformers 5.23.0" in text
    assert "3 rows in = 3 kept" in text
    assert "rollouts: iteration-002/generation  (above)" in text
    assert "model: iteration-001/training  (below)" in text
    assert f"policy: {finished.model}  digest " in text


@pytest.mark.parametrize("place", ["iteration-001/pairs", "iteration-001/heldout/gold", "prompts/train"])
def test_any_artifact_can_be_traced(
    finished: HandmadeRun, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trace(str(finished.path / place))["target"] == place
    assert trace(place, finished.path)["target"] == place
    monkeypatch.chdir(finished.path)
    assert trace(place)["target"] == place
    assert trace(f"{place}/{MANIFEST}")["target"] == place
    assert f"\n{place}  [" in output(capsys, place)


def test_the_source_of_a_function_is_told(run: HandmadeRun) -> None:
    place = "iteration-001/heldout/gold"
    source = trace(place, run.path)["artifacts"][place]["sources"]["function"]
    assert (source["function"], source["state"]) == (f"{run.rules}:long", "same")
    run.rules.write_text("def long(**_):\n    return 0\n")
    assert trace(place, run.path)["artifacts"][place]["sources"]["function"]["state"] == "changed"
    run.rules.unlink()
    assert trace(place, run.path)["artifacts"][place]["sources"]["function"]["state"] == "gone"


def test_digests_keys_and_fingerprints_are_looked_up(
    finished: HandmadeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.path.parents[1])
    manifest = Artifact.open(finished.path / "iteration-001/training").manifest
    for text in (manifest.weights, manifest.digest, manifest.key, (manifest.weights or "")[:8]):
        assert trace(str(text))["target"] == "iteration-001/training"
    initial = Artifact.open(finished.path / "iteration-001/generation").manifest.weights or ""
    found = trace(initial[:10])
    assert (found["kind"], found["path"], found["digest"]) == ("outside", str(finished.model), initial)
    assert "policy of runs/handmade/iteration-001/generation" in found["read_by"]
    assert "was not made by a run" in output(capsys, initial[:10])


def test_json_is_what_the_tree_says(finished: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    for what in (
        finished.path / "iteration-002/training",
        first_pair(finished).pair_id,
        first_pair(finished).prompt_id,
    ):
        printed = json.loads(output(capsys, what, "--run", finished.path, "--json"))
        assert printed == json.loads(json.dumps(trace(str(what), finished.path)))


def test_a_pair_is_told_with_prompt_answers_scores_and_policy(
    finished: HandmadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = first_pair(finished)
    (found,) = trace(pair.pair_id, finished.path)["found"]
    here = finished.path / "iteration-002"
    rollout = next(row for row in Artifact.open(here / "generation").rows(Rollout) if row.prompt_id == pair.prompt_id)
    rewards = {
        row.sample: row.score for row in Artifact.open(here / "reward").rows(Score) if row.prompt_id == pair.prompt_id
    }
    for side, sample in (("chosen", pair.chosen_sample), ("rejected", pair.rejected_sample)):
        completion, told = rollout.completions[sample], found[side]
        assert (told["sample"], told["text"], told["seed"]) == (sample, completion.text, completion.seed)
        assert told["sampling"] == {"temperature": 0.9, "top_p": 1, "top_k": 0, "max_tokens": 8}
        assert told["mean_logprob"] == pytest.approx(sum(completion.logprobs) / len(completion.logprobs))
        assert told["scores"].keys() == {"reward", "reference"}
        assert told["scores"]["reward"] == told["label"] == rewards[sample]
    assert found["margin"] == pair.margin
    assert found["labels"] == "reward"
    assert found["used_by"] == ["iteration-002/training"]
    assert found["prompt"]["from"]["prompts"] == "prompts/train"
    assert found["prompt"]["from"]["source"] == str(finished.source)
    assert found["policy"]["weights"] == Artifact.open(finished.path / "iteration-001/training").manifest.weights
    assert found["policy"]["checkpoint"] == str(finished.path / "iteration-001/training")
    assert found["lineage"]["target"] == "iteration-001/training"

    text = output(capsys, pair.pair_id, "--run", finished.path)
    assert f"user: {pair.prompt}" in text, "markup in a prompt is left as it is"
    assert "[bold]" in pair.prompt
    for expected in (pair.chosen, pair.rejected, "strategy max_min", "trained on by iteration-002/training"):
        assert expected in text
    assert f"seed {100 + pair.chosen_sample}, temperature 0.9, top_p 1" in text


def test_a_pair_is_found_in_every_run_below_runs(run: HandmadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.path.parents[1])
    shutil.copytree(run.path, run.path.with_name("other"))
    found = trace(first_pair(run).pair_id)["found"]
    assert [Path(item["run"]).name for item in found] == ["handmade", "other"]
    assert [item["policy"]["checkpoint"] for item in found] == [
        str(run.path.with_name(name) / "iteration-001/training") for name in ("handmade", "other")
    ]
    digest = Artifact.open(run.path / "iteration-001/pairs").manifest.digest
    assert trace(digest)["also"] == ["runs/other/iteration-001/pairs"]


def test_a_prompt_is_told_with_all_its_answers_and_pairs(
    finished: HandmadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = first_pair(finished)
    (found,) = trace(pair.prompt_id, finished.path)["found"]
    assert [prompt["prompts"] for prompt in found["prompts"]] == ["prompts/train"]
    assert [row["rollouts"] for row in found["rollouts"]] == ["iteration-001/generation", "iteration-002/generation"]
    assert all(len(row["answers"]) == 3 for row in found["rollouts"])
    assert all("reward" in answer["scores"] for row in found["rollouts"] for answer in row["answers"])
    assert [row["pairs"] for row in found["pairs"]] == ["iteration-001/pairs", "iteration-002/pairs"]
    text = output(capsys, pair.prompt_id, "--run", finished.path)
    assert f"pair {pair.pair_id}  in iteration-002/pairs" in text
    assert text.count("scores: ") == 6


def test_a_policy_trained_on_samples_goes_back_to_its_critics_and_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = HandmadeRun(tmp_path, on_samples=True).build()
    found = trace("iteration-002/training", run.path)
    stages = ("training", "experience", "generation", "reward", "reference", "values")
    made = {f"iteration-00{number}/{stage}" for number in (1, 2) for stage in stages}
    assert set(found["artifacts"]) == {*made, "iteration-001/critic", "prompts/train"}
    assert entry(found, "iteration-002/values", "model")["artifact"] == "iteration-001/critic"
    text = output(capsys, "iteration-002/training", "--run", run.path)
    assert "settings: seed 11, algorithm ppo, clip 0.1" in text
    prompt = next(iter(Artifact.open(run.path / "iteration-002/experience").rows(ExperienceRow)))
    (told,) = trace(prompt.prompt_id, run.path)["found"]
    second = told["experience"][1]
    assert second["experience"] == "iteration-002/experience"
    assert second["used_by"] == ["iteration-002/critic", "iteration-002/training"]
    sample = prompt.samples[1]
    assert sample.reference is not None
    assert second["answers"][1] == {
        "sample": 1,
        "tokens": len(sample.response_ids),
        "reward": sample.reward,
        "advantage": pytest.approx(sum(sample.advantages) / len(sample.advantages)),
        "kl": pytest.approx(sum(sample.behaviour) - sum(sample.reference)),
        "value": sample.values[0] if sample.values else None,
    }
    assert second["answers"][1]["value"] is not None
    text = output(capsys, prompt.prompt_id, "--run", run.path)
    assert "iteration-002/experience  trained on by iteration-002/critic, iteration-002/training" in text
    assert f"sample 1, tokens {len(sample.response_ids)}, reward {sample.reward:.6g}, advantage" in text


def test_the_source_of_an_algorithm_of_the_users_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.py"
    (tmp_path / "helper.py").write_text("HALF = 0.5\n")
    mine.write_text(
        "import helper\n\nREADS = 'samples'\nNEEDS = ()\n\n\ndef advantages(experience):\n    ...\n\n\n"
        "def loss(batch):\n    ...\n"
    )
    run = HandmadeRun(tmp_path, on_samples=True).build()
    rollouts, rewards = (run.path / "iteration-001" / name for name in ("generation", "reward"))
    config = ExperienceConfig(output=run.path / "mine", algorithm="mine.py", rollouts=rollouts, rewards=rewards)
    publish(config, EXPERIENCE, {0: []}, {})

    def states() -> dict[str, str]:
        sources = trace("mine", run.path)["artifacts"]["mine"]["sources"]
        return {name: source["state"] for name, source in sources.items()}

    assert states() == {"algorithm": "same", "helper": "same"}
    (tmp_path / "helper.py").write_text("HALF = 0.4\n")
    assert states() == {"algorithm": "same", "helper": "changed"}
    mine.unlink()
    assert states() == {"algorithm": "gone", "helper": "gone"}


def test_content_that_was_replaced_is_followed_into_superseded(
    run: HandmadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = run.path / "iteration-001/pairs"
    read = Artifact.open(pairs).manifest
    pair = first_pair(run, "iteration-001/pairs")
    aside = f"superseded/iteration-001/pairs/{read.key[:16]}"
    (run.path / aside).parent.mkdir(parents=True)
    pairs.rename(run.path / aside)
    run.mutate = lambda name, rows: rows[:-1]
    run.pairs("iteration-001/pairs", run.path / "iteration-001/generation", run.path / "iteration-001/reward", 0.1)
    found = trace("iteration-001/training", run.path)
    link = entry(found, "iteration-001/training", "pairs")
    assert (link["state"], link["artifact"], link["digest"]) == ("replaced", aside, read.digest)
    assert link["now"] == Artifact.open(pairs).manifest.digest
    assert found["artifacts"][aside]["digest"] == read.digest
    assert f"found by its digest {read.digest[:12]}" in output(capsys, "iteration-001/training", "--run", run.path)
    used = {item["pairs"]: item["used_by"] for item in trace(pair.pair_id, run.path)["found"]}
    assert used == {"iteration-001/pairs": [], aside: ["iteration-001/training"]}


def test_of_the_same_content_made_twice_the_one_that_was_read_is_followed(
    run: HandmadeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another margin that changes no pair: the training stays, but the pairs it has read are not those there now."""
    pairs = run.path / "iteration-001/pairs"
    read = Artifact.open(pairs).manifest
    aside = f"superseded/iteration-001/pairs/{read.key[:16]}"
    (run.path / aside).parent.mkdir(parents=True)
    pairs.rename(run.path / aside)
    run.pairs("iteration-001/pairs", run.path / "iteration-001/generation", run.path / "iteration-001/reward", 1e-9)
    made = Artifact.open(pairs).manifest
    assert (made.digest, made.key != read.key) == (read.digest, True)
    later = msgspec.structs.replace(made, created="2999-01-01T00:00:00Z", checksum="")
    (pairs / MANIFEST).write_bytes(with_checksum(later))
    link = entry(trace("iteration-001/training", run.path), "iteration-001/training", "pairs")
    assert (link["state"], link["artifact"], link["again"]) == ("same", aside, True)
    assert "rebuilt since, with the same content" in output(capsys, "iteration-001/training", "--run", run.path)
    pair_id = first_pair(run, "iteration-001/pairs").pair_id
    used = {item["pairs"]: item["used_by"] for item in trace(pair_id, run.path)["found"]}
    assert used == {"iteration-001/pairs": [], aside: ["iteration-001/training"]}
    findings = verify(run.path)
    assert (findings.problems, findings.notes) == ([], [])


def test_links_that_are_broken_are_told(run: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    training = "iteration-001/training"
    torn = run.path / "iteration-001/reference" / MANIFEST
    torn.write_bytes(torn.read_bytes()[:-20])
    run.source.write_text("{}")
    shutil.rmtree(run.model)
    shutil.rmtree(run.path / "iteration-001/reward")
    found = trace(training, run.path)
    assert entry(found, training, "reference")["state"] == "damaged"
    assert entry(found, training, "model")["state"] == "gone"
    assert entry(found, "prompts/train", "source")["state"] == "changed"
    assert entry(found, "iteration-001/pairs", "scores")["state"] == "gone"
    text = output(capsys, training, "--run", run.path)
    assert f"reference: {run.path}/iteration-001/reference  cannot be read: its manifest is damaged" in text.replace(
        "\n", ""
    )
    for expected in ("source: ", "HAS CHANGED", "does not exist any more; its digest was"):
        assert expected in text


def test_a_pair_is_told_also_where_its_rollouts_are_gone(run: HandmadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    pair = first_pair(run)
    shutil.rmtree(run.path / "iteration-002/generation")
    (found,) = trace(pair.pair_id, run.path)["found"]
    assert (found["chosen"]["text"], found["chosen"]["seed"], found["rollouts"]) == (pair.chosen, None, None)
    assert "sampled in rollouts that are gone" in output(capsys, pair.pair_id, "--run", run.path)


def test_a_moved_run_and_compressed_rows_make_no_difference(run: HandmadeRun, tmp_path: Path) -> None:
    pair = first_pair(run)
    (before,) = trace(pair.pair_id, run.path)["found"]
    target = tmp_path / "elsewhere" / "renamed"
    target.parent.mkdir()
    run.path.rename(target)
    for shard in sorted(target.glob("iteration-00*/generation/shard-*.jsonl")):
        compress(shard)
    (after,) = trace(pair.pair_id, target)["found"]
    assert after["chosen"] == before["chosen"]
    assert after["policy"]["checkpoint"] == str(target / "iteration-001/training")
    found = trace("iteration-002/training", target)
    states = {item["state"] for artifact in found["artifacts"].values() for item in artifact["inputs"]}
    assert states == {"same"}


def test_another_run_is_followed_within_itself(run: HandmadeRun, tmp_path: Path) -> None:
    """A policy that was trained by another run: the walk goes on there."""
    other = HandmadeRun(tmp_path / "other")
    other.salt = "other"
    other.model = run.path / "iteration-002/training"
    other.source, other.judge, other.rules = run.source, run.judge, run.rules
    other.build()
    found = trace("iteration-001/training", other.path)
    assert entry(found, "iteration-001/training", "model")["artifact"] == str(other.model)
    assert str(run.path / "iteration-001/pairs") in found["artifacts"]
    assert str(run.path / "prompts/train") in found["artifacts"]


def test_damaged_rows_do_not_hide_the_others(run: HandmadeRun) -> None:
    pair = first_pair(run)
    file = run.path / "iteration-001/pairs/shard-00000.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"pair_id":"', b'"pair_id":"' + pair.pair_id.encode() + b'","x":"', 1))
    found = trace(pair.pair_id, run.path)
    assert [item["pairs"] for item in found["found"]] == ["iteration-002/pairs"]
    assert any(str(file) in text for text in found["unread"])


@pytest.mark.parametrize("what", ["f" * 16, "0123456789abcdef0123", "iteration-009/training", "no-such-thing", "abc"])
def test_what_is_unknown_is_a_mistake_that_says_where_was_searched(
    finished: HandmadeRun, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished.path.parents[1])
    assert main(["trace", what]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: nothing is known of {what!r}; searched runs/handmade. Give the path")
    assert "16 hex digits" in message


def test_places_without_runs_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is none below \./runs"):
        trace("f" * 16)
    with pytest.raises(UserError, match="is not the directory of a run"):
        trace("f" * 16, tmp_path)


def test_a_run_is_not_traced_but_what_it_has_published(finished: HandmadeRun) -> None:
    with pytest.raises(UserError, match="A run is traced by its artifacts"):
        trace(str(finished.path), finished.path)


def test_a_digest_that_is_not_unique_is_a_mistake(finished: HandmadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.lineage.trace.PREFIX", re.compile("[0-9a-f]+"))
    digests = [Artifact.open(path.parent).manifest.digest for path in finished.path.rglob(MANIFEST)]
    shared = next(text[0] for text in digests if sum(other[0] == text[0] for other in digests) > 1)
    with pytest.raises(UserError, match="Give more digits"):
        trace(shared, finished.path)
