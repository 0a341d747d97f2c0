"""Pair choice and batching, as pure functions."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.models.batching import batches
from annotation.pairing.choice import (
    ABOVE_MARGIN_CAP,
    BELOW_MARGIN,
    BEYOND_LIMIT,
    IDENTICAL,
    NONE_PROPOSED,
    TIE,
    TOO_FEW,
    Choice,
    choose,
)
from annotation.pairing.config import PairsConfig, PairsSettings
from annotation.pairing.strategies import ALL_CORRECT, ALL_WRONG, STRATEGIES, UNMATCHED, Candidate, PairPrompt
from contracts.attempt import ATTEMPT
from contracts.config import Role, validate
from contracts.errors import UserError
from contracts.stopping import Stopped

scores = st.floats(-100, 100) | st.sampled_from([0.0, 1.0])
answers = st.lists(st.integers(0, 2), max_size=3).map(tuple)
"""Few enough that many are identical."""
candidate_lists = st.lists(st.tuples(answers, scores), max_size=7).map(
    lambda rows: [Candidate(sample, ids, score) for sample, (ids, score) in enumerate(rows)]
)
settings = {
    "top_k_bottom_k": st.fixed_dictionaries({"top": st.integers(1, 4), "bottom": st.integers(1, 4)}),
    "length_matched": st.fixed_dictionaries({"tolerance": st.floats(0, 1)}),
    "uncertainty": st.fixed_dictionaries({"sure": st.booleans()}),
    "correct_against_wrong": st.fixed_dictionaries({"threshold": st.floats(-1, 2)}),
}
strategies = st.sampled_from(sorted(STRATEGIES)).flatmap(
    lambda name: st.tuples(st.just(name), settings.get(name, st.just({})))
)
limits = st.fixed_dictionaries(
    {
        "margin": st.floats(0, 5),
        "margin_cap": st.none() | st.floats(5, 50),
        "per_prompt": st.none() | st.integers(1, 3),
        "distinct": st.booleans(),
    }
)


def prompt_of(seed: int = 0) -> PairPrompt:
    return PairPrompt("p", [], None, [], seed)


def chosen_by(strategy, candidates, given=None, seed=0, **modifiers) -> Choice:
    propose = PairsSettings(strategy=strategy, settings=given or {}).load()
    return choose(candidates, prompt_of(seed), propose, **modifiers)


@given(candidate_lists, strategies, limits, st.integers(0, 9))
def test_pairs_are_ordered_distinct_and_all_accounted_for(candidates, strategy, modifiers, seed):
    name, given = strategy
    choice = chosen_by(name, candidates, given, seed, **modifiers)
    for chosen, rejected in choice.pairs:
        assert chosen in candidates
        assert rejected in candidates
        assert chosen.score > rejected.score
        assert modifiers["margin"] <= chosen.score - rejected.score <= (modifiers["margin_cap"] or 200)
        assert chosen.response_ids != rejected.response_ids
    assert len({(a.sample, b.sample) for a, b in choice.pairs}) == len(choice.pairs) <= (modifiers["per_prompt"] or 99)
    left = len({row.response_ids for row in candidates}) if modifiers["distinct"] else len(candidates)
    assert choice.repeated == (len(candidates) - left if len(candidates) > 1 else 0)
    if modifiers["distinct"]:
        texts = [(chosen.response_ids, rejected.response_ids) for chosen, rejected in choice.pairs]
        assert len(set(texts)) == len(texts)
    proposed = len(choice.pairs) + sum(choice.dropped.values())
    most = PairsSettings(strategy=name, settings=given).most(max(2, left))
    assert 1 <= proposed <= max(1, most)
    if left > 1 and name in ("max_min", "max_random", "max_max", "all", "uncertainty"):
        assert proposed == most
    assert choice == chosen_by(name, candidates, given, seed, **modifiers)


@given(candidate_lists, strategies, limits, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(candidates, strategy, modifiers, rng):
    shuffled = candidates.copy()
    rng.shuffle(shuffled)
    name, given = strategy
    assert chosen_by(name, shuffled, given, **modifiers) == chosen_by(name, candidates, given, **modifiers)


@given(candidate_lists, strategies, st.integers(1, 3))
def test_a_limit_keeps_some_of_the_pairs_and_counts_the_others(candidates, strategy, most):
    name, given = strategy
    whole, few = chosen_by(name, candidates, given), chosen_by(name, candidates, given, per_prompt=most)
    assert all(pair in whole.pairs for pair in few.pairs)
    assert len(few.pairs) == min(most, len(whole.pairs))
    assert few.dropped.pop(BEYOND_LIMIT, 0) == len(whole.pairs) - len(few.pairs)
    assert few.dropped == whole.dropped


@given(candidate_lists.filter(lambda rows: len(rows) > 1), st.floats(0, 1))
def test_length_matched_is_all_without_the_pairs_of_unlike_length(candidates, tolerance):
    def is_like(pair):
        short, long = sorted(len(answer.response_ids) for answer in pair)
        return long == 0 or 1 - short / long <= tolerance

    wanted = [pair for pair in chosen_by("all", candidates).pairs if is_like(pair)]
    found = chosen_by("length_matched", candidates, {"tolerance": tolerance})
    assert found.pairs == wanted
    assert (UNMATCHED in found.dropped) == (not any(map(is_like, itertools.combinations(candidates, 2))))


@given(candidate_lists.filter(lambda rows: len(rows) > 1), st.integers(1, 4), st.integers(1, 4))
def test_top_k_bottom_k_is_the_pairs_of_all_with_these_ranks(candidates, top, bottom):
    ranked = sorted(candidates, key=lambda row: (-row.score, row.sample))
    wanted = [
        pair for pair in chosen_by("all", candidates).pairs if pair[0] in ranked[:top] and pair[1] in ranked[-bottom:]
    ]
    found = chosen_by("top_k_bottom_k", candidates, {"top": top, "bottom": bottom})
    assert found.pairs == wanted


@given(candidate_lists.filter(lambda rows: len(rows) > 1), st.floats(-1, 2))
def test_correct_against_wrong_is_every_correct_answer_with_every_wrong_one(candidates, threshold):
    choice = chosen_by("correct_against_wrong", candidates, {"threshold": threshold})
    wanted = {
        (a.sample, b.sample)
        for a, b in itertools.product(candidates, candidates)
        if a.score >= threshold > b.score and a.response_ids != b.response_ids
    }
    assert {(a.sample, b.sample) for a, b in choice.pairs} == wanted
    correct = sum(row.score >= threshold for row in candidates)
    assert (ALL_CORRECT in choice.dropped) == (correct == len(candidates))
    assert (ALL_WRONG in choice.dropped) == (correct == 0)


def four(*values: float) -> list[Candidate]:
    return [Candidate(sample, (sample,), value) for sample, value in enumerate(values)]


def scores_of(strategy, candidates, given=None, seed=0, **modifiers):
    return [(a.score, b.score) for a, b in chosen_by(strategy, candidates, given, seed, **modifiers).pairs]


def test_each_strategy_picks_what_its_name_says():
    candidates = four(1.0, 4.0, 2.0, 3.0)
    assert scores_of("max_min", candidates) == [(4.0, 1.0)]
    assert scores_of("max_max", candidates) == [(4.0, 3.0)]
    assert scores_of("all", candidates) == [(4, 3), (4, 2), (4, 1), (3, 2), (3, 1), (2, 1)]
    drawn = {scores_of("max_random", candidates, seed=seed)[0] for seed in range(50)}
    assert drawn == {(4.0, 1.0), (4.0, 2.0), (4.0, 3.0)}
    assert scores_of("top_k_bottom_k", candidates) == [(4, 2), (4, 1), (3, 2), (3, 1)]
    assert scores_of("top_k_bottom_k", candidates, {"top": 1, "bottom": 3}) == [(4, 3), (4, 2), (4, 1)]
    assert scores_of("top_k_bottom_k", candidates, {"top": 9, "bottom": 9}) == scores_of("all", candidates)
    assert scores_of("correct_against_wrong", candidates, {"threshold": 3}) == [(4, 2), (4, 1), (3, 2), (3, 1)]


def test_a_limit_takes_what_the_strategy_prefers():
    candidates = four(1.0, 4.0, 2.5, 3.9)
    assert scores_of("all", candidates, per_prompt=2) == [(4.0, 1.0), (3.9, 1.0)]
    assert scores_of("uncertainty", candidates, per_prompt=1) == [(4.0, 3.9)]
    assert scores_of("uncertainty", candidates, per_prompt=1, margin=0.5) == [(3.9, 2.5)]
    rights = four(1.0, 1.0, 0.0, 0.0, 0.0)
    choice = chosen_by("correct_against_wrong", rights, per_prompt=2)
    assert [(a.sample, b.sample) for a, b in choice.pairs] == [(0, 4), (1, 3)], "no answer twice before it has to be"
    assert choice.dropped == {BEYOND_LIMIT: 4}


def test_uncertainty_is_how_much_several_judgements_disagree():
    votes = [(3.0, {"a": 3.0, "b": 3.0}), (2.0, {"a": 5.0, "b": -1.0}), (1.0, {"a": 1.0, "b": 1.1})]
    rows = [Candidate(sample, (sample,), score, parts=parts) for sample, (score, parts) in enumerate(votes)]
    first = chosen_by("uncertainty", rows, {"parts": ["a", "b"]}, per_prompt=1)
    assert [(a.sample, b.sample) for a, b in first.pairs] == [(1, 2)], "4 and -2.1: mean 0.95, deviation 3.05"
    last = chosen_by("uncertainty", rows, {"parts": ["a", "b"], "sure": True}, per_prompt=1)
    assert [(a.sample, b.sample) for a, b in last.pairs] == [(0, 2)], "both say so"
    with pytest.raises(
        UserError, match=r"prompt p, sample 0, has no part 'c'. Its parts: a, b. Correct settings.parts"
    ):
        chosen_by("uncertainty", rows, {"parts": ["a", "c"]})
    same = [Candidate(sample, (sample,), -sample, parts={"a": 1.0, "b": 1.0}) for sample in range(3)]
    assert len(chosen_by("uncertainty", same, {"parts": ["a", "b"]}).pairs) == 3


def test_reasons_of_dropped_pairs():
    same = [Candidate(0, (7,), 1.0), Candidate(1, (7,), 0.0)]
    assert chosen_by("max_min", same).dropped == {IDENTICAL: 1}
    assert chosen_by("max_min", four(1.0, 1.0)).dropped == {TIE: 1}
    assert chosen_by("max_min", four(1.0, 0.6), margin=0.5).dropped == {BELOW_MARGIN: 1}
    assert chosen_by("max_min", four(2.0, 0.6), margin_cap=1.0).dropped == {ABOVE_MARGIN_CAP: 1}
    assert chosen_by("all", four(1.0)).dropped == {TOO_FEW: 1}
    assert chosen_by("all", four(1.0, 1.0, 0.9), margin=0.5).dropped == {TIE: 1, BELOW_MARGIN: 2}


def test_of_identical_answers_the_first_counts_whatever_their_scores():
    rows = [Candidate(0, (7,), 0.5), Candidate(1, (7,), 0.9), Candidate(2, (8,), 0.7), Candidate(3, (8,), 0.1)]
    assert scores_of("max_min", rows) == [(0.9, 0.1)]
    found = chosen_by("max_min", rows, distinct=True)
    assert [(a.sample, b.sample) for a, b in found.pairs] == [(2, 0)]
    assert (found.repeated, found.dropped) == (2, {})
    assert chosen_by("all", rows[:2], distinct=True) == Choice([], {IDENTICAL: 1}, 1)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "it returned None; it must return a list of pairs"),
        (7, "it returned 7; it must return a list of pairs"),
        ([0, 1], "it returned 0 where a pair (chosen, rejected) of sample indices is wanted"),
        (["01"], "it returned '01' where a pair"),
        ([(0, 1, 2)], "it returned (0, 1, 2) where a pair"),
        ([(0.0, 1.0)], "it returned (0.0, 1.0) where a pair"),
        ([(0, 5)], "it returned (0, 5), but no candidate is sample 5: they are 0, 1, 2."),
        ([(0, -1)], "no candidate is sample -1"),
        ([(1, 1)], "chosen and rejected are the same answer"),
        ([(2, 0)], "but the chosen answer scores lower (1) than the rejected one (3)"),
        ([(0, 1), (0, 2), (0, 1)], "it returned the pair (0, 1) twice"),
        (itertools.cycle([(0, 1)]), "it returned the pair (0, 1) twice"),
        ("No pair!", "a reason for no pair is one word of a-z"),
    ],
    ids=str,
)
def test_what_a_strategy_returns_wrong_is_told(returned, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        choose(four(3.0, 2.0, 1.0), prompt_of(), lambda *_: returned, what="strategy 'mine.py:f'")
    assert str(caught.value).startswith("strategy 'mine.py:f', prompt p: it returned")


def test_a_pair_of_candidates_instead_of_samples_is_told():
    with pytest.raises(UserError, match=re.escape("such as (candidates[0].sample, candidates[-1].sample)")):
        choose(four(3.0, 2.0), prompt_of(), lambda rows, _: [(rows[0], rows[1])])


@pytest.mark.parametrize("with_log", [True, False])
def test_a_strategy_that_fails_is_named_with_its_line(capfd, tmp_path, monkeypatch, with_log):
    if with_log:
        monkeypatch.setenv(ATTEMPT, str(tmp_path))

    def fails(candidates, prompt):
        yield (0, 1)
        raise KeyError("length")

    with pytest.raises(UserError, match=r"mine failed on prompt p: KeyError: 'length' \(.*test_annotation_choice.py"):
        choose(four(3.0, 2.0), prompt_of(), fails, what="mine")
    assert ("Traceback" in capfd.readouterr().err) == with_log


def test_a_request_to_stop_is_no_mistake_of_a_strategy():
    def stops(candidates, prompt):
        raise Stopped(143)

    with pytest.raises(Stopped):
        choose(four(3.0, 2.0), prompt_of(), stops)


def test_a_strategy_may_propose_nothing_with_or_without_a_reason():
    assert choose(four(1.0, 0.0), prompt_of(), lambda *_: []).dropped == {NONE_PROPOSED: 1}
    assert choose(four(1.0, 0.0), prompt_of(), lambda *_: "too_short").dropped == {"too_short": 1}


def test_indices_of_numpy_will_do():
    numpy = pytest.importorskip("numpy")
    (pair,) = choose(four(1.0, 3.0), prompt_of(), lambda *_: numpy.array([[1, 0]])).pairs
    assert [answer.sample for answer in pair] == [1, 0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy": "max_mni"}, "there is no such strategy. Did you mean 'max_min'?"),
        ({"strategy": "best"}, "There are max_min, max_random"),
        ({"settings": {"top": 2}}, "strategy max_min has no setting 'top'. It has no settings."),
        (
            {"strategy": "top_k_bottom_k", "settings": {"tpo": 2}},
            "has no setting 'tpo'. Did you mean 'top'? Its settings: top, bottom.",
        ),
        (
            {"strategy": "top_k_bottom_k", "settings": {"top": 0}},
            "the setting top is 0, but must be greater than or equal to 1 (its default is 2)",
        ),
        ({"strategy": "uncertainty", "settings": {"parts": ["a"]}}, "the setting parts is ['a'], but must be"),
        ({"strategy": "length_matched", "settings": {"tolerance": "little"}}, "the setting tolerance is 'little', but"),
        (
            {"strategy": "correct_against_wrong", "settings": {"threshold": float("nan")}},
            "the setting threshold is nan, but must be a finite number",
        ),
        ({"function": "mine.py:f"}, "there is no key function. Set your own function as strategy=mine.py:f."),
        ({"margin": 2.0, "margin_cap": 1.0}, "margin_cap is 1, below margin (2): no pair would be left."),
        ({"per_prompt": 0}, "'per_prompt' is 0"),
    ],
    ids=str,
)
def test_what_a_configuration_has_wrong_is_told(keys, said):
    with pytest.raises(UserError, match=re.escape(said)):
        validate(PairsSettings, keys, "mine.yaml")


def test_keys_that_came_later_do_not_change_what_is_published():
    """The stage key holds only what it held when pairs were published without them."""
    config = PairsConfig(output="o", rollouts="r", scores="s")
    assert config.select(Role.IDENTITY) == {
        "strategy": "max_min", "length_penalty": 0.0, "margin": 0.0, "max_dropped": 0.95, "seed": 0,
    }  # fmt: skip
    assert config.source_files() == {}
    further = {"settings": {"top": 1}, "margin_cap": 3.0, "per_prompt": 2, "distinct": True}
    changed = PairsConfig(output="o", rollouts="r", scores="s", strategy="top_k_bottom_k", **further)
    assert {name: changed.select(Role.IDENTITY)[name] for name in further} == further


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    made = batches(lengths, budget)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    flat = [lengths[index] for batch in made for index in batch]
    assert flat == sorted(flat, reverse=True)
