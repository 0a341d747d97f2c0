"""The pairs stage, from published rollouts and scores to published pairs."""

import json
import signal
import statistics
import threading

import msgspec
import pytest
from annotation_world import make_rollout, make_rollouts, publish_rollouts, publish_scores
from pyarrow import parquet

from annotation.pairing.config import PairsConfig
from annotation.preflight import check_pairs
from annotation.stages.pairs import CHOOSE_PAIRS
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.preflight import Inspected
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


@pytest.mark.parametrize(
    ("strategy", "plain", "changed"),
    [
        ("max_min", "633a806a82aa7013", "1af36a44cc195b1c"),
        ("max_random", "e0b4e137f0dfac02", "b0e79d9a2a3bc485"),
        ("max_max", "e8fb14deaffd0f8e", "c20ca5a8f89436d0"),
        ("all", "55f44e45e05a164b", "784f648875c65b61"),
    ],
)
def test_what_these_strategies_publish_stays(tmp_path, rollouts, strategy, plain, changed):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    keys = {"margin": 0.2, "length_penalty": 0.05, "seed": 3}
    for name, given, wanted in (("plain", {}, plain), ("changed", keys, changed)):
        pairs = make(tmp_path / name, rollouts, scores, strategy=strategy, **given)
        assert pairs.manifest.files[0].sha256[:16] == wanted


OWN = """
import random
import time
from statistics import fmean, pstdev

def sweet_spot(candidates, prompt, *, spread=2.0):
    scores = [candidate.score for candidate in candidates]
    wanted = fmean(scores) - spread * pstdev(scores)
    best, *others = candidates
    worse = min(others, key=lambda candidate: abs(candidate.score - wanted))
    return [(best.sample, worse.sample)]

def tells(candidates, prompt, *, seen):
    with open(seen, "a") as file:
        print(repr((candidates[0], prompt)), file=file)
    return "nothing_today" if prompt.seed % 2 else [(candidates[0].sample, candidates[1].sample)]

def by_chance(candidates, prompt):
    return [(candidates[0].sample, random.choice(candidates[1:]).sample)]

def by_seed(candidates, prompt):
    return [(candidates[0].sample, random.Random(prompt.seed).choice(candidates[1:]).sample)]

def endless(candidates, prompt):
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            pass

def wrong(candidates, prompt):
    return [(candidates[-1].sample, candidates[0].sample)]
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_strategy_of_ones_own_chooses_and_is_in_the_key(tmp_path, rollouts, own):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    strategy = f"{own}:sweet_spot"
    pairs = make(tmp_path / "own", rollouts, scores, strategy=strategy, settings={"spread": 9})
    rows, worst = list(pairs.rows(Pair)), list(make(tmp_path / "max_min", rollouts, scores).rows(Pair))
    assert {row.strategy for row in rows} == {"mine.py:sweet_spot"}, "without the folders of somebody's machine"
    assert [row.chosen_sample for row in rows] == [row.chosen_sample for row in worst]
    assert [row.rejected_score for row in rows] == [row.rejected_score for row in worst], "nothing is further below"
    mild = make(tmp_path / "mild", rollouts, scores, strategy=strategy, settings={"spread": 0.0})
    assert all(one.margin <= other.margin for one, other in zip(mild.rows(Pair), rows, strict=True))
    assert list(mild.rows(Pair)) != rows
    assert pairs.manifest.key_parts["sources"].keys() == {"function"}
    own.write_text(OWN + "\n# edited\n")
    with pytest.raises(UserError, match="published by another run"):
        make(tmp_path / "own", rollouts, scores, strategy=strategy, settings={"spread": 9})


def test_what_a_strategy_of_ones_own_is_given(tmp_path, own):
    rollout = msgspec.structs.replace(make_rollout(0, ["good good .", "great"]), tags=("films",))
    more = [rollout, *make_rollouts(6, 2)[1:]]
    rollouts = publish_rollouts(tmp_path / "rollouts", more)
    scores = publish_scores(tmp_path / "scores", rollouts, lambda _, completion: 3.0 - completion.sample)
    keys = {"strategy": f"{own}:tells", "settings": {"seen": str(tmp_path / "seen")}, "length_penalty": 0.5}
    pairs = make(tmp_path / "pairs", rollouts, scores, **keys)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert len(seen) == 12, "each is asked about twice"
    assert seen[0].startswith("(Candidate(sample=1, response_ids=(")
    assert "), score=1.5, text='great', finish_reason='length', parts={})" in seen[0]
    assert "messages=[{'role': 'user', 'content': 'review the film '}]" in seen[0]
    assert "answer='great', tags=['films'], seed=" in seen[0]
    ledger = pairs.manifest.ledger
    assert ledger.dropped["nothing_today"] == 3
    assert ledger.kept + sum(ledger.dropped.values()) == ledger.rows_in == 6


def test_what_a_strategy_of_ones_own_does_wrong_ends_the_stage_with_its_name(tmp_path, rollouts, own):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    with pytest.raises(
        UserError, match=r"strategy '.*mine.py:wrong', prompt [0-9a-f]{16}: it returned .* scores lower"
    ):
        make(tmp_path / "pairs", rollouts, scores, strategy=f"{own}:wrong")
    with pytest.raises(UserError, match=r"mine.py has no function 'wring'. Check the spelling\. Did you mean 'wrong'"):
        make(tmp_path / "pairs", rollouts, scores, strategy=f"{own}:wring")
    assert not (tmp_path / "pairs").exists()


def test_a_strategy_without_an_end_is_ended(tmp_path, rollouts, own):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    message = (
        r"mine.py:endless', prompt [0-9a-f]{16}: it took longer than seconds_per_prompt=0.2 and was stopped "
        r"\(.*mine.py, line \d+\)\. Remove"
    )
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "pairs", rollouts, scores, strategy=f"{own}:endless", seconds_per_prompt=0.2)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("deadline")]
    late = make(tmp_path / "late", rollouts, scores, strategy=f"{own}:by_seed", seconds_per_prompt=50)
    plain = make(tmp_path / "plain", rollouts, scores, strategy=f"{own}:by_seed")
    assert late.manifest.key == plain.manifest.key


def test_a_strategy_that_draws_by_chance_is_told_how_to_draw(tmp_path, rollouts, own):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    with pytest.raises(UserError, match=r"mine.py:by_chance'.*asked twice .*draw with random.Random\(prompt.seed\)"):
        make(tmp_path / "chance", rollouts, scores, strategy=f"{own}:by_chance")
    one, two = (make(tmp_path / name, rollouts, scores, strategy=f"{own}:by_seed") for name in ("one", "two"))
    other = make(tmp_path / "other", rollouts, scores, strategy=f"{own}:by_seed", seed=1)
    assert one.manifest.digest == two.manifest.digest != other.manifest.digest


def test_how_a_strategy_of_ones_own_would_be_called_is_looked_at_before(tmp_path, own):
    def found(function, **settings):
        keys = {"strategy": f"{own}:{function}", "settings": settings}
        config = PairsConfig(output=tmp_path, rollouts=tmp_path, scores=tmp_path, **keys)
        return [finding.found for finding in check_pairs(Inspected("pairs", config, frozenset(), ()))]

    assert found("sweet_spot", spread=1.0) == found("wrong") == []
    (said,) = found("tells")
    assert "is called as tells(candidates, prompt): missing a required argument: 'seen'" in said
    (said,) = found("sweet_spot", sprad=1.0)
    assert "got an unexpected keyword argument 'sprad'. Did you mean 'spread'?" in said


def test_pairs_beyond_the_limit_are_no_loss(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    pairs = make(tmp_path / "pairs", rollouts, scores, strategy="all", per_prompt=1, max_dropped=0.5)
    assert pairs.manifest.ledger.dropped["beyond_per_prompt"] > 30
    widest = [row.margin for row in make(tmp_path / "max_min", rollouts, scores).rows(Pair)]
    assert [row.margin for row in pairs.rows(Pair)] == widest


def test_identical_answers_that_are_left_out_are_counted(tmp_path):
    rollout = make_rollout(0, ["good .", "good .", "great great ."])
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    scores = publish_scores(tmp_path / "scores", rollouts, by_length)
    pairs = make(tmp_path / "pairs", rollouts, scores, strategy="all", distinct=True)
    assert [(row.chosen_sample, row.rejected_sample) for row in pairs.rows(Pair)] == [(2, 0)]
    assert (pairs.manifest.facts["repeated"], pairs.manifest.ledger.rows_in) == (1, 1)
    assert "repeated" not in make(tmp_path / "plain", rollouts, scores, strategy="all").manifest.facts
