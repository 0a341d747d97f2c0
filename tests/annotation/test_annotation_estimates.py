"""Means, intervals and win rates."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.evaluating.estimates import clustered, win_share

values = st.lists(st.floats(-10, 10), min_size=1, max_size=5)


def test_one_value_per_cluster_is_the_usual_interval_of_a_mean():
    data = [0.3, 1.0, -2.0, 0.7, 5.0]
    estimate = clustered([[value] for value in data])
    assert estimate.mean == pytest.approx(statistics.fmean(data))
    assert estimate.ci95 == pytest.approx(1.96 * statistics.stdev(data) / math.sqrt(5))


def test_repeating_a_prompts_answers_adds_no_certainty():
    data = [0.3, 1.0, -2.0, 0.7, 5.0]
    assert clustered([[value] * 8 for value in data]).ci95 == pytest.approx(clustered([[v] for v in data]).ci95)


def test_the_interval_covers_the_truth_in_about_95_of_100_trials():
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        clusters = []
        for _ in range(60):
            centre = rng.gauss(1.0, 1.0)
            clusters.append([rng.gauss(centre, 0.5) for _ in range(4)])
        estimate = clustered(clusters)
        covered += abs(estimate.mean - 1.0) <= estimate.ci95
    assert 0.92 <= covered / 400 <= 0.98


def test_what_cannot_be_estimated_is_none():
    assert clustered([]) == clustered([[], []]) == (None, None)
    assert clustered([[1.0, 2.0]]) == (1.5, None)


@given(values, values)
def test_win_shares_of_both_sides_add_up_to_one(ours, theirs):
    assert win_share(ours, theirs) + win_share(theirs, ours) == pytest.approx(1.0)
    assert 0 <= win_share(ours, theirs) <= 1


def test_ties_count_half():
    assert win_share([1.0, 2.0], [1.0, 0.0]) == (0.5 + 1 + 1 + 1) / 4
