"""Exchange with RLHFlow's files."""

import json

import pytest
from annotation_world import EOS, IDS, publish_scores, run_cli

from annotation.config import RlhflowExportConfig, RlhflowImportConfig, RlhflowScoresConfig
from annotation.stages.rlhflow import RLHFLOW_EXPORT, RLHFLOW_IMPORT, RLHFLOW_SCORES
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.prompts import prompt_id
from contracts.records import Message, Rollout, Score
from contracts.stage import run_stage


def export(output, **keys):
    run_stage(RLHFLOW_EXPORT, RlhflowExportConfig(output=output, **keys))
    return [json.loads(line) for line in (output / "rlhflow.jsonl").read_text().splitlines()]


def imported(output, source, models, **keys):
    config = RlhflowImportConfig(output=output, source=source, tokenizer=models["causal"], **keys)
    return run_stage(RLHFLOW_IMPORT, config)


def imported_scores(output, source, rollouts, **keys):
    config = RlhflowScoresConfig(output=output, source=source, rollouts=rollouts.path, **keys)
    return run_stage(RLHFLOW_SCORES, config)


def test_a_round_trip_keeps_prompts_answers_and_rewards(tmp_path, rollouts, models):
    scores = publish_scores(tmp_path / "scores", rollouts, lambda r, c: len(c.text) / 3)
    lines = export(tmp_path / "out", rollouts=rollouts.path, scores=scores.path)
    original = list(rollouts.rows(Rollout))
    assert [line["prompt"] for line in lines] == [
        [{"role": m.role, "content": m.content} for m in rollout.messages] for rollout in original
    ]
    source = tmp_path / "out/rlhflow.jsonl"
    back = imported(tmp_path / "back", source, models, shard_size=4, iteration=3)
    back_scores = imported_scores(tmp_path / "back-scores", source, back)
    assert export(tmp_path / "again", rollouts=back.path, scores=back_scores.path) == lines
    for rollout, known in zip(back.rows(Rollout), original, strict=True):
        assert (rollout.prompt_id, rollout.prompt_ids) == (known.prompt_id, known.prompt_ids)
        assert (rollout.policy, rollout.iteration) == ("imported", 3)
        for completion, kept in zip(rollout.completions, known.completions, strict=True):
            body = kept.response_ids[:-1] if kept.finish_reason == "stop" else kept.response_ids
            assert completion.response_ids == (*body, EOS)
            assert (completion.logprobs, completion.sampling, completion.seed) == ((), None, None)
    found = {(row.prompt_id, row.sample): row.score for row in back_scores.rows(Score)}
    assert found == {(row.prompt_id, row.sample): row.score for row in scores.rows(Score)}
    assert len(back.shards) == 3


def test_text_only_instances_and_prompts_that_are_strings(tmp_path, models):
    source = tmp_path / "data.json"
    instances = [{"prompt": "review the film", "responses": ["great .", "bad ."], "rewards": [1, 0]}]
    source.write_text(json.dumps({"type": "text_only", "instances": instances}, indent=2))
    rollouts = imported(tmp_path / "rollouts", source, models)
    (rollout,) = rollouts.rows(Rollout)
    assert rollout.messages == (Message("user", "review the film"),)
    assert rollout.prompt_id == prompt_id(rollout.messages)
    ids = [IDS[token] for token in ("<s>", "<|user|>", "review", "the", "film", "<|assistant|>")]
    assert list(rollout.prompt_ids) == ids
    scores = imported_scores(tmp_path / "scores", source, rollouts)
    assert [row.score for row in scores.rows(Score)] == [1.0, 0.0]
    pairs = ("pairs", f"rollouts={rollouts.path}", f"scores={scores.path}", f"output={tmp_path / 'pairs'}")
    run_cli(*pairs)
    assert Artifact.open(tmp_path / "pairs").manifest.rows == 1


def test_unscored_samples_and_repeated_prompts_are_counted(tmp_path, rollouts, models):
    scores = publish_scores(tmp_path / "scores", rollouts, lambda r, c: None if c.sample else 1.0)
    lines = export(tmp_path / "out", rollouts=rollouts.path, scores=scores.path)
    assert all(len(line["responses"]) == len(line["rewards"]) == 1 for line in lines)
    assert str(Artifact.open(tmp_path / "out").manifest.ledger) == "40 samples in = 10 kept + 30 unscored"

    source = tmp_path / "twice.jsonl"
    row = json.dumps({"prompt": "review the film", "responses": ["good ."], "idx": 7}) + "\n"
    source.write_text(row * 2)
    with pytest.raises(UserError, match="1 duplicate_prompt is more than max_dropped"):
        imported(tmp_path / "a", source, models)
    assert str(imported(tmp_path / "b", source, models, max_dropped=1).manifest.ledger).endswith("1 duplicate_prompt")


def test_answers_to_an_empty_prompt_are_counted(tmp_path, models):
    rows = [{"prompt": prompt, "responses": ["good .", "bad ."]} for prompt in ("review the film", "", " \n")]
    source = tmp_path / "empty.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = imported(tmp_path / "rollouts", source, models, max_dropped=0.7)
    assert str(made.manifest.ledger) == "6 samples in = 2 kept + 4 empty_prompt"
    with pytest.raises(UserError, match="4 empty_prompt is more than max_dropped"):
        imported(tmp_path / "again", source, models, max_dropped=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "responses": ["b"]}\n{"prompt": "c"}\n', "line 2: .*responses"),
        ('{"prompt": "a", "responses": ["b"]\n', "line 1: "),
        ('{"type": "text_only", "instances": [{"prompt": 3}]}', "instances"),
        ('{"prompt": "a", "responses": ["b"], "rewards": [1, 2]}\n', "line 1: 2 rewards for 1 responses"),
        ("", "holds no rows"),
    ],
)
def test_broken_files_name_the_place(tmp_path, models, text, message):
    source = tmp_path / "source.jsonl"
    source.write_text(text)
    with pytest.raises(UserError, match=message):
        imported(tmp_path / "rollouts", source, models)


def test_rewards_of_another_file_are_refused(tmp_path, rollouts):
    source = tmp_path / "source.jsonl"
    source.write_text('{"prompt": "a", "responses": ["b"], "rewards": [1]}\n')
    with pytest.raises(UserError, match="does not hold the answers of prompt"):
        imported_scores(tmp_path / "scores", source, rollouts)
    source.write_text('{"prompt": "a", "responses": ["b"]}\n')
    with pytest.raises(UserError, match="line 1: the row has no rewards"):
        imported_scores(tmp_path / "scores", source, rollouts)
