"""The stages that put data together, killed at every step of their work: the same command ends with the same bytes."""

import json
import os
import shutil

import pytest
from annotation_world import make_rollouts, publish_rollouts, publish_scores
from killing import STEPS, is_killed_at

from annotation.data.mixing import PairsSampleConfig, PreferencesImportConfig, PreferencesScoresConfig
from annotation.data.selection import SelectConfig, SelectScoresConfig
from annotation.pairing.config import PairsConfig
from annotation.stages.mixing import IMPORT_PREFERENCES, PREFERENCES_SCORES, SAMPLE_PAIRS
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.selection import SELECT, SELECT_SCORES
from contracts import jsonl
from contracts.artifacts import Artifact
from contracts.mixture import DrawConfig
from contracts.prompts import PromptsConfig
from contracts.stage import run_stage
from contracts.stages.draw import DRAW
from contracts.stages.prompts import IMPORT_PROMPTS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
CALLS = [*STEPS, (os, "listdir"), (jsonl, "encode")]
"""What changes files, and each row that is written."""


def killed_at_every_step(folder, stage, config, **keys):
    """The stage's artifact, after runs of it that were killed: each at its first step, its fourth and so on, in a place
    of its own, and then one after the other at every step, in one place.
    """
    whole = run_stage(stage, config(output=folder / "whole", **keys))
    seen = contents(whole)

    def check(place, number):
        found = Artifact.open(place / "out")
        assert found.damage() == []
        assert contents(found) == seen, f"killed at step {number}"
        assert os.listdir(place) == ["out"], f"killed at step {number}"
        assert sorted(os.listdir(found.path)) == sorted(os.listdir(whole.path)), f"killed at step {number}"

    number = 1
    while True:
        place = folder / "killed"
        made = config(output=place / "out", **keys)
        reached = is_killed_at(number, lambda: run_stage(stage, made), CALLS)  # noqa: B023
        if (place / "out").exists():
            assert contents(Artifact.open(place / "out")) == seen, "published before it was whole"
        run_stage(stage, made)
        check(place, number)
        shutil.rmtree(place)
        if not reached:
            break
        number += 3
    assert number > 15, "the stage's steps are not seen"

    made = config(output=folder / "again" / "out", **keys)
    for step in range(1, number):
        is_killed_at(step, lambda: run_stage(stage, made), CALLS)
    run_stage(stage, made)
    check(folder / "again", "each in turn")
    return whole


def contents(artifact):
    """All that is published, but for times and places."""
    manifest = artifact.manifest
    files = {file.path: (artifact.path / file.path).read_bytes() for file in manifest.files}
    return files, manifest.ledger, manifest.facts, manifest.rows, manifest.digest


def prompts_of(folder, name, texts, **keys):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return killed_at_every_step(folder / name, IMPORT_PROMPTS, PromptsConfig, source=source, **keys)


def judged(rollout, completion):
    return float(completion.sample) if len(rollout.messages[0].content) % 2 else 1.0


def test_prompts_without_near_duplicates_and_what_is_drawn_of_them(tmp_path):
    held = prompts_of(tmp_path, "held", ["which of these is the oldest town"])
    texts = [f"what is {number} and {number} more of it" for number in range(6)]
    near = ["Which of these is the oldest town?", "what is 3 and 3 more of it!"]
    many = prompts_of(tmp_path, "many", [*texts, *near], exclude=[held.path], near_duplicates=0.7)
    assert str(many.manifest.ledger) == "8 rows in = 6 kept + 1 near_duplicate + 1 near_held_out"
    few = prompts_of(tmp_path, "few", ["one", "two"])
    keys = {"sources": {"many": many.path, "few": few.path}, "weights": {"many": 2.0}, "count": 3}
    first = killed_at_every_step(tmp_path / "first", DRAW, DrawConfig, **keys)
    second = killed_at_every_step(tmp_path / "second", DRAW, DrawConfig, after=first.path, **keys)
    both = [json.loads(line)["prompt_id"] for part in (first, second) for line in part.shards[0].open()]
    assert len(set(both)) == 6, "nothing is drawn twice, and nothing passed over"


def test_dynamic_sampling_and_replay(tmp_path):
    rows = make_rollouts(8, 3)
    rollouts = [publish_rollouts(tmp_path / f"r{start}", rows[start : start + 4], shard=2) for start in (0, 4)]
    scores = [publish_scores(tmp_path / f"s{number}", part, judged) for number, part in enumerate(rollouts)]
    paths = [[part.path for part in parts] for parts in (rollouts, scores)]
    new = {"rounds": paths[0][:1], "scores": paths[1][:1], "margin": 0.0}
    earlier = {"earlier": paths[0][1:], "earlier_scores": paths[1][1:], "shares": [0.5]}
    selected = killed_at_every_step(tmp_path / "selected", SELECT, SelectConfig, **new, **earlier)
    assert selected.manifest.ledger.rows_in == 8
    both = dict(zip(("rounds", "scores"), paths, strict=True))
    gathered = killed_at_every_step(
        tmp_path / "gathered", SELECT_SCORES, SelectScoresConfig, rollouts=selected.path, **both
    )
    assert gathered.manifest.rows == 3 * selected.manifest.rows


def test_pairs_from_elsewhere_and_a_part_of_them(tmp_path, models):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"review the film {'long ' * n}", "chosen": "great .", "rejected": "bad ."} for n in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "chosen": "bad ."}]))
    keys = {"source": source, "max_dropped": 0.5}
    rollouts = killed_at_every_step(
        tmp_path / "rollouts",
        IMPORT_PREFERENCES,
        PreferencesImportConfig,
        tokenizer=models["causal"],
        shard_size=4,
        **keys,
    )
    assert str(rollouts.manifest.ledger) == "7 pairs in = 6 kept + 1 identical_answers"
    scores = killed_at_every_step(
        tmp_path / "scores", PREFERENCES_SCORES, PreferencesScoresConfig, rollouts=rollouts.path, **keys
    )
    pairs = run_stage(CHOOSE_PAIRS, PairsConfig(output=tmp_path / "chosen", rollouts=rollouts.path, scores=scores.path))
    part = killed_at_every_step(
        tmp_path / "part", SAMPLE_PAIRS, PairsSampleConfig, rollouts=rollouts.path, pairs=pairs.path, share=0.5
    )
    assert str(part.manifest.ledger) == "6 pairs in = 3 kept + 3 not_drawn"
