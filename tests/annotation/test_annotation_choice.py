"""Pair choice and batching, as pure functions."""

from hypothesis import given
from hypothesis import strategies as st

from annotation.batching import batches
from annotation.choice import BELOW_MARGIN, IDENTICAL, TIE, TOO_FEW, Candidate, choose

STRATEGIES = ["max_min", "max_random", "max_max", "all"]
scores = st.floats(-100, 100) | st.sampled_from([0.0, 1.0])
candidate_lists = st.lists(st.tuples(st.tuples(st.integers(0, 2)), scores), max_size=7).map(
    lambda rows: [Candidate(sample, ids, score) for sample, (ids, score) in enumerate(rows)]
)


@given(candidate_lists, st.sampled_from(STRATEGIES), st.floats(0, 5), st.integers(0, 9), st.text(max_size=4))
def test_pairs_are_ordered_distinct_and_all_accounted_for(candidates, strategy, margin, seed, prompt_id):
    choice = choose(candidates, strategy, margin, seed, prompt_id)
    for chosen, rejected in choice.pairs:
        assert chosen.score > rejected.score
        assert chosen.score - rejected.score >= margin
        assert chosen.response_ids != rejected.response_ids
    n = len(candidates)
    proposed = n * (n - 1) // 2 if strategy == "all" else 1
    assert len(choice.pairs) + sum(choice.dropped.values()) == max(1, proposed)
    assert choice == choose(candidates, strategy, margin, seed, prompt_id)


@given(candidate_lists, st.sampled_from(STRATEGIES), st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(candidates, strategy, rng):
    shuffled = candidates.copy()
    rng.shuffle(shuffled)
    assert choose(shuffled, strategy, 0, 0, "p") == choose(candidates, strategy, 0, 0, "p")


def four(*values: float) -> list[Candidate]:
    return [Candidate(sample, (sample,), value) for sample, value in enumerate(values)]


def test_each_strategy_picks_what_its_name_says():
    candidates = four(1.0, 4.0, 2.0, 3.0)

    def scores_of(strategy, seed=0):
        return [(a.score, b.score) for a, b in choose(candidates, strategy, 0, seed, "p").pairs]

    assert scores_of("max_min") == [(4.0, 1.0)]
    assert scores_of("max_max") == [(4.0, 3.0)]
    assert sorted(scores_of("all")) == [(2.0, 1.0), (3.0, 1.0), (3.0, 2.0), (4.0, 1.0), (4.0, 2.0), (4.0, 3.0)]
    drawn = {scores_of("max_random", seed)[0] for seed in range(50)}
    assert drawn == {(4.0, 1.0), (4.0, 2.0), (4.0, 3.0)}


def test_reasons_of_dropped_pairs():
    same = [Candidate(0, (7,), 1.0), Candidate(1, (7,), 0.0)]
    assert choose(same, "max_min", 0, 0, "p").dropped == {IDENTICAL: 1}
    assert choose(four(1.0, 1.0), "max_min", 0, 0, "p").dropped == {TIE: 1}
    assert choose(four(1.0, 0.6), "max_min", 0.5, 0, "p").dropped == {BELOW_MARGIN: 1}
    assert choose(four(1.0), "all", 0, 0, "p").dropped == {TOO_FEW: 1}
    assert choose(four(1.0, 1.0, 0.9), "all", 0.5, 0, "p").dropped == {TIE: 1, BELOW_MARGIN: 2}


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_sequence_once_within_the_budget(lengths, budget):
    made = batches(lengths, budget)
    assert sorted(index for batch in made for index in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    flat = [lengths[index] for batch in made for index in batch]
    assert flat == sorted(flat, reverse=True)
