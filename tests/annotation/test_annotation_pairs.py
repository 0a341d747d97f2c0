"""The pairs stage, from published rollouts and scores to published pairs."""

import json
import statistics

import msgspec
import pytest
from annotation_world import make_rollout, make_rollouts, publish_rollouts, publish_scores
from pyarrow import parquet

from annotation.config import PairsConfig
from annotation.stages.pairs import CHOOSE_PAIRS
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.records import PAIRS, Message, Pair, Rollout
from contracts.stage import run_stage


def make(output, rollouts, scores, **keys):
    config = PairsConfig(output=output, rollouts=rollouts.path, scores=scores.path, **keys)
    return run_stage(CHOOSE_PAIRS, config)


def by_length(rollout, completion):
    return len(completion.text) / 10


def test_every_pair_is_two_generated_answers_with_the_stored_ids(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    pairs = make(tmp_path / "pairs", rollouts, scores, strategy="all")
    generated = {rollout.prompt_id: rollout for rollout in rollouts.rows(Rollout)}
    rows = list(pairs.rows(Pair))
    assert pairs.manifest.rows == pairs.manifest.ledger.kept == len(rows) > 40
    assert pairs.manifest.ledger.rows_in == 60
    assert len({row.pair_id for row in rows}) == len(rows)
    for row in rows:
        rollout = generated[row.prompt_id]
        for sample, ids, text, reason, score in (
            (row.chosen_sample, row.chosen_ids, row.chosen, row.chosen_finish_reason, row.chosen_score),
            (row.rejected_sample, row.rejected_ids, row.rejected, row.rejected_finish_reason, row.rejected_score),
        ):
            completion = rollout.completions[sample]
            assert (ids, text, reason) == (completion.response_ids, completion.text, completion.finish_reason)
            assert score == by_length(rollout, completion)
        assert row.prompt_ids == rollout.prompt_ids
        assert row.prompt == rollout.messages[-1].content
        assert row.margin == row.chosen_score - row.rejected_score > 0


def test_the_length_penalty_selects_and_labels_alike(tmp_path):
    """Raw scores prefer the long answer, penalised ones the short: the stored score and order are the penalised."""
    rollout = make_rollout(0, ["great good great good .", "good ."])
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    scores = publish_scores(tmp_path / "scores", rollouts, lambda _, completion: 2.0 - completion.sample)
    (plain,) = make(tmp_path / "plain", rollouts, scores).rows(Pair)
    (fined,) = make(tmp_path / "fined", rollouts, scores, length_penalty=0.5).rows(Pair)
    assert (plain.chosen_sample, plain.chosen_score, plain.rejected_score) == (0, 2.0, 1.0)
    assert (fined.chosen_sample, fined.chosen_score, fined.rejected_score) == (1, 1.0 - 1.5, 2.0 - 3.0)
    assert fined.margin == 0.5


def test_answers_in_which_the_policy_sampled_bos_are_left_out_and_counted(tmp_path):
    rollout = make_rollout(0, ["good <s> good .", "good .", "great great ."])
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    scores = publish_scores(tmp_path / "scores", rollouts, lambda _, completion: 2.0 - completion.sample)
    pairs = make(tmp_path / "pairs", rollouts, scores)
    (pair,) = pairs.rows(Pair)
    assert (pair.chosen_sample, pair.rejected_sample) == (1, 2)
    assert (pairs.manifest.facts["stray_bos"], pairs.manifest.facts["unscored"]) == (1, 0)


def test_the_dataset_holds_the_same_rows_as_the_jsonl(tmp_path, rollouts):
    import datasets
    import pandas

    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    pairs = make(tmp_path / "pairs", rollouts, scores)
    expected = [msgspec.to_builtins(pair) for pair in pairs.rows(Pair)]
    path = str(tmp_path / "pairs/train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    assert [{**row} for row in loaded] == [
        {key: list(value) if isinstance(value, tuple) else value for key, value in row.items()} for row in expected
    ]
    assert list(pandas.read_parquet(path).columns) == [
        name for name in Pair.__struct_fields__ if name not in ("tags", "tools")
    ]


def test_tools_and_calls_reach_the_pairs_and_the_dataset(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    turns = (
        Message("user", "review"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "3", name="weather"),
    )
    plain, calling = make_rollout(0, ["good .", "great ."]), make_rollout(1, ["bad .", "good ."])
    calling = msgspec.structs.replace(calling, messages=turns, tools=tools)
    rollouts = publish_rollouts(tmp_path / "rollouts", [plain, calling])
    scores = publish_scores(tmp_path / "scores", rollouts, lambda _, completion: completion.sample)
    pairs = make(tmp_path / "pairs", rollouts, scores)
    first, second = pairs.rows(Pair)
    assert (first.tools, second.tools, second.messages) == (msgspec.UNSET, tools, turns)
    one, two = parquet.read_table(tmp_path / "pairs/train.parquet").to_pylist()
    assert (one["tools"], json.loads(two["tools"])) == (None, list(tools))
    assert json.loads(two["messages"][1]["tool_calls"]) == [call]
    assert [turn["name"] for turn in two["messages"]] == [None, None, "weather"]


def test_the_same_inputs_give_the_same_bytes(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    one, two = (make(tmp_path / name, rollouts, scores, strategy="max_random", seed=3) for name in ("one", "two"))
    other = make(tmp_path / "other", rollouts, scores, strategy="max_random", seed=4)
    assert one.manifest.digest == two.manifest.digest != other.manifest.digest
    assert Artifact.open(one.path, PAIRS).damage() == []


def test_the_facts_are_those_of_the_pairs(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "s", rollouts, lambda r, c: None if c.sample == 3 else by_length(r, c))
    pairs = make(tmp_path / "pairs", rollouts, scores)
    rows, facts = list(pairs.rows(Pair)), pairs.manifest.facts
    assert facts["margin_mean"] == pytest.approx(statistics.fmean(row.margin for row in rows))
    assert facts["chosen_tokens_mean"] == pytest.approx(statistics.fmean(len(row.chosen_ids) for row in rows))
    assert facts["rejected_score_mean"] == pytest.approx(statistics.fmean(row.rejected_score for row in rows))
    assert facts["unscored"] == 10
    assert facts["reward_length_correlation"] > 0.9
    completions = [completion for rollout in rollouts.rows(Rollout) for completion in rollout.completions]
    assert facts["truncation_rate"] == sum(c.finish_reason == "length" for c in completions) / len(completions)


def test_no_pair_left_is_told_with_the_counts_and_leaves_nothing(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, lambda *_: 1.0)
    with pytest.raises(UserError, match=r"no pair is left .*10 pairs in = 0 kept \+ 10 tie"):
        make(tmp_path / "pairs", rollouts, scores)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts", "scores"]


def test_scores_without_their_completion_are_an_error(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    shard = scores.shards[-1]
    shard.write_text(shard.read_text() + '{"prompt_id":"feedfeedfeedfeed","sample":2,"score":1.0}\n')
    with pytest.raises(UserError, match=r"scores prompt feedfeedfeedfeed, sample 2, which .* does not hold"):
        make(tmp_path / "pairs", rollouts, scores)


def test_a_prompt_that_occurs_twice_is_an_error(tmp_path):
    row = make_rollouts(1, 2)[0]
    rollouts = publish_rollouts(tmp_path / "rollouts", [row, row], shard=1)
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    with pytest.raises(UserError, match=f"prompt {row.prompt_id} occurs twice"):
        make(tmp_path / "pairs", rollouts, scores)
