"""Dynamic sampling: which prompts of several rounds are trained on, and that nothing else of them changes."""

import statistics

import msgspec
import pytest
from annotation_world import make_rollouts, publish_rollouts, publish_scores

from annotation.data.selection import SelectConfig, SelectScoresConfig
from annotation.pairing.config import PairsConfig
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.score import SCORE
from annotation.stages.selection import SELECT, SELECT_SCORES
from contracts.config import validate
from contracts.errors import UserError
from contracts.jsonl import read_jsonl
from contracts.records import Pair, Rollout, Score
from contracts.stage import run_stage


@pytest.fixture
def rounds(tmp_path):
    """Two rounds of rollouts with their scores: every third prompt of the first has no signal, one of the second."""
    rows = make_rollouts(10, 4)
    first, second = publish_rollouts(tmp_path / "first", rows[:7]), publish_rollouts(tmp_path / "second", rows[7:])
    numbers = {row.prompt_id: number for number, row in enumerate(rows)}

    def judge(rollout, completion):
        return 1.0 if numbers[rollout.prompt_id] % 3 == 0 else float(completion.sample)

    scores = [publish_scores(tmp_path / f"scores-{part.path.name}", part, judge) for part in (first, second)]
    return [first, second], scores


def select(folder, rollouts, scores, **keys):
    paths = {"rounds": [part.path for part in rollouts], "scores": [part.path for part in scores]}
    keys = {"margin": 0, **keys}
    return run_stage(SELECT, SelectConfig(output=folder / "selected", **paths, **keys))


def test_the_selected_answers_and_their_scores_are_what_they_were(tmp_path, rounds):
    rollouts, scores = rounds
    selected = select(tmp_path, rollouts, scores)
    assert str(selected.manifest.ledger) == "10 prompts in = 6 kept + 4 no_signal"
    facts = selected.manifest.facts
    assert (facts["wanted"], facts["missing"], facts["replayed"]) == (7, 1, 0)
    everything = [row for part in rollouts for row in part.rows(Rollout)]
    kept = list(selected.rows(Rollout))
    assert kept == [row for number, row in enumerate(everything) if number % 3]
    config = SelectScoresConfig(
        output=tmp_path / "scores",
        rollouts=selected.path,
        rounds=[part.path for part in rollouts],
        scores=[part.path for part in scores],
    )
    gathered = run_stage(SELECT_SCORES, config)
    known = {(row.prompt_id, row.sample): row for part in scores for row in part.rows(Score)}
    found = list(gathered.rows(Score))
    assert all(known[row.prompt_id, row.sample] == row for row in found)
    assert [row.prompt_id for row in found[::4]] == [row.prompt_id for row in kept]
    assert str(gathered.manifest.ledger) == "40 samples in = 24 kept + 16 not_selected"
    pairs = PairsConfig(output=tmp_path / "pairs", rollouts=selected.path, scores=gathered.path)
    assert [row.margin for row in run_stage(CHOOSE_PAIRS, pairs).rows(Pair)] == [3.0] * 6


def test_a_round_in_which_nothing_was_lacking(tmp_path, rounds):
    rollouts, scores = rounds
    empty = publish_rollouts(tmp_path / "empty", [])
    none = publish_scores(tmp_path / "none", empty, lambda rollout, completion: 0)
    selected = select(tmp_path, [rollouts[0], empty], [scores[0], none])
    assert len(selected.shards) == 1


def test_replay_adds_a_share_of_earlier_prompts_with_their_own_scores(tmp_path):
    def at(iteration, rows, value):
        made = publish_rollouts(
            tmp_path / f"r{iteration}", [msgspec.structs.replace(row, iteration=iteration) for row in rows]
        )
        return made, publish_scores(tmp_path / f"s{iteration}", made, lambda rollout, completion: value)

    rows = make_rollouts(12, 2)
    new, new_scores = at(3, rows[8:], 3.0)
    last, last_scores = at(2, rows[4:10], 2.0)
    first, first_scores = at(1, rows[:8], 1.0)
    taken = {}
    for share in (0.25, 0.5):
        selected = select(
            tmp_path / f"{share}",
            [new],
            [new_scores],
            margin=None,
            earlier=[last.path, first.path],
            earlier_scores=[last_scores.path, first_scores.path],
            shares=[1, share],
            seed=5,
        )
        parts = [[row.iteration for row in read_jsonl(shard, Rollout)] for shard in selected.shards]
        assert parts[:2] == [[3] * 4, [2] * 4]  # two of the last iteration's six are answered again
        taken[share] = {row.prompt_id for row in selected.rows(Rollout) if row.iteration == 1}
        dropped = selected.manifest.ledger.dropped
        assert dropped["not_drawn"] == 8 - 8 * share
        assert len(taken[share]) + dropped["answered_again"] == 2 + 8 * share
        ids = [row.prompt_id for row in selected.rows(Rollout)]
        assert len(set(ids)) == len(ids)
        config = SelectScoresConfig(
            output=tmp_path / f"{share}/scores",
            rollouts=selected.path,
            rounds=[new.path, last.path, first.path],
            scores=[new_scores.path, last_scores.path, first_scores.path],
        )
        gathered = run_stage(SELECT_SCORES, config)
        of_prompt = {row.prompt_id: row.iteration for row in selected.rows(Rollout)}
        assert all(score.score == of_prompt[score.prompt_id] for score in gathered.rows(Score))
    assert taken[0.25] <= taken[0.5]


def test_no_signal_at_all(tmp_path, rounds):
    rollouts, scores = rounds
    with pytest.raises(UserError, match=r"10 prompts in = 0 kept \+ 6 below_margin \+ 4 no_signal"):
        select(tmp_path, rollouts, scores, margin=9)


def test_scores_have_a_mean_for_each_set_of_a_mixture(tmp_path):
    (tmp_path / "judge.py").write_text('def judge(*, messages, **others): return len(messages[-1]["content"])')
    rows = [
        msgspec.structs.replace(row, tags=(f"source:{'even' if number % 2 == 0 else 'odd'}",))
        for number, row in enumerate(make_rollouts(6, 2))
    ]
    rollouts = publish_rollouts(tmp_path / "rollouts", rows)
    fields = {"kind": "rule", "function": f"{tmp_path / 'judge.py'}:judge", "rollouts": rollouts.path}
    facts = run_stage(SCORE, validate(SCORE.config, {**fields, "output": tmp_path / "scores"}, "test")).manifest.facts
    means = [statistics.fmean(len(row.messages[-1].content) for row in rows[start::2]) for start in (0, 1)]
    assert [facts["even/score_mean"], facts["odd/score_mean"]] == pytest.approx(means)
    empty = publish_rollouts(tmp_path / "empty", [])
    nothing = validate(SCORE.config, {**fields, "rollouts": empty.path, "output": tmp_path / "none"}, "test")
    assert run_stage(SCORE, nothing).manifest.facts["score_mean"] is None
