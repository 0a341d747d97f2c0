"""Diagnostics of an evaluation: each against its definition, written out."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import msgspec
import pytest
from annotation_world import make_rollouts, publish_rollouts, publish_scores
from hypothesis import given
from hypothesis import strategies as st
from test_annotation_evaluation import evaluate, length

from annotation.evaluating.diagnostics import agreement, diversity, n_grams
from annotation.scorers.expression import Expression
from contracts.errors import UserError


@dataclass
class Answer:
    response_ids: tuple[int, ...]
    finish_reason: str


ANSWERS = st.lists(
    st.lists(
        st.builds(Answer, st.lists(st.integers(0, 4), max_size=7).map(tuple), st.just("length"))
        | st.builds(Answer, st.lists(st.integers(0, 4), max_size=7).map(lambda ids: (*ids, 9)), st.just("stop")),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=4,
)


def bags(answer, n):
    ids = answer.response_ids[:-1] if answer.finish_reason == "stop" else answer.response_ids
    return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)), tuple(ids)


def similarity(one, other):
    (a, first), (b, second) = bags(one, 2), bags(other, 2)
    return 2 * (a & b).total() / (a.total() + b.total()) if a or b else float(first == second)


@given(ANSWERS)
def test_diversity_is_what_its_definition_says(answers):
    metrics = diversity(answers)
    for n in (1, 2, 3):
        grams = sum((bags(answer, n)[0] for prompt in answers for answer in prompt), Counter())
        assert metrics[f"distinct_{n}"] == (pytest.approx(len(grams) / grams.total()) if grams else None)
    found = [similarity(a, b) for prompt in answers for a, b in itertools.combinations(prompt, 2)]
    expected = pytest.approx(sum(found) / len(found)) if found else None
    assert metrics["self_similarity"] == expected


@given(st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5), st.integers(1, 4))
def test_n_grams_stay_within_their_answer(ids, n):
    grams, owner = n_grams(ids, n)
    written = [
        (number, tuple(answer[i : i + n])) for number, answer in enumerate(ids) for i in range(len(answer) - n + 1)
    ]
    assert owner.tolist() == [number for number, _ in written]
    assert len(set(zip(grams.tolist(), (gram for _, gram in written), strict=True))) == len(set(grams.tolist()))


SCORES = st.lists(
    st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1, max_size=5), min_size=1, max_size=5
)


def ranks(values):
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def correlation(one, other):
    centred = [[value - sum(values) / len(values) for value in values] for values in (one, other)]
    spread = math.prod(sum(value**2 for value in values) for values in centred)
    return sum(a * b for a, b in zip(*centred, strict=True)) / math.sqrt(spread) if spread else None


def tau_b(pairs):
    signs = [((a > c) - (a < c), (b > d) - (b < d)) for (a, b), (c, d) in itertools.combinations(pairs, 2)]
    told = sum(x != 0 for x, _ in signs) * sum(y != 0 for _, y in signs)
    return sum(x * y for x, y in signs) / math.sqrt(told) if told else None


@given(SCORES)
def test_agreement_is_what_its_definition_says(pairs):
    rho, tau, _ = agreement(pairs)
    expected = correlation(
        *(ranks(list(column)) for column in zip(*(p for prompt in pairs for p in prompt), strict=True))
    )
    assert rho == (expected if expected is None else pytest.approx(expected, abs=1e-9))
    known = [value for prompt in pairs if (value := tau_b(prompt)) is not None]
    assert tau == (pytest.approx(sum(known) / len(known), abs=1e-9) if known else None)


def test_they_are_published_where_they_are_asked_for_and_nothing_else_changes(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    gold = publish_scores(tmp_path / "gold", rollouts, lambda r, c: -length(r, c))
    before = publish_rollouts(tmp_path / "before", make_rollouts(10, 2, seed=7))
    earlier = publish_scores(tmp_path / "earlier", before, lambda r, c: 0.0)
    given = {"scores": {"reward": rewards.path, "gold": gold.path}}
    plain, artifact = evaluate(tmp_path / "plain", rollouts, **given)
    assert artifact.manifest.key_parts["config"] == {"iteration": 0}, "what was published before keeps its key"
    metrics, _ = evaluate(tmp_path / "e", rollouts, **given, diagnostics=True, previous=earlier.path)
    assert metrics.items() >= plain.items()
    assert set(metrics) - set(plain) == {
        *("distinct_1", "distinct_2", "distinct_3", "self_similarity", "self_similarity_ci95", "response_length_ci95"),
        *("stop_rate_ci95", "spearman_gold", "kendall_gold", "kendall_gold_ci95"),
        *("win_rate_previous", "win_rate_previous_ci95"),
    }
    assert metrics["win_rate_previous"] == 1.0
    assert metrics["spearman_gold"] == pytest.approx(-1)
    assert metrics["kendall_gold"] == pytest.approx(-1)


def test_a_stop_string_ends_an_answer_in_the_rate_and_in_its_interval(tmp_path):
    rows = [
        msgspec.structs.replace(
            rollout,
            completions=tuple(
                msgspec.structs.replace(answer, finish_reason="stop_string" if answer.sample % 2 else "stop")
                for answer in rollout.completions
            ),
        )
        for rollout in make_rollouts(10, 4)
    ]
    rollouts = publish_rollouts(tmp_path / "stopped", rows)
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    metrics, _ = evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path}, diagnostics=True)
    assert (metrics["stop_rate"], metrics["stop_rate_ci95"]) == (1, 0)


def test_the_previous_policy_was_judged_by_the_same_scorer(tmp_path, rollouts):
    rewards = publish_scores(tmp_path / "reward", rollouts, length)
    other = publish_scores(tmp_path / "other", rollouts, length, key_parts={"inputs": {"model": "x"}})
    with pytest.raises(UserError, match="different scorers"):
        evaluate(tmp_path / "e", rollouts, scores={"reward": rewards.path}, previous=other.path)


def test_the_uncertainty_of_a_reward_is_the_spread_of_its_ensemble(tmp_path, rollouts):
    scores = {name: publish_scores(tmp_path / name, rollouts, lambda r, c, by=by: by * c.sample).path
              for name, by in (("reward", 0.5), ("one", 1.0), ("other", 3.0))}  # fmt: skip
    metrics, _ = evaluate(tmp_path / "e", rollouts, scores=scores, ensemble=["one", "other"])
    assert metrics["reward_uncertainty"] == pytest.approx((0 + 1 + 2 + 3) / 4)
    for names, what in ((["one"], "ensemble names 'one' alone"), (["one", "x"], r"Set scores\.x=SCORES")):
        with pytest.raises(ValueError, match=what):
            evaluate(tmp_path / "wrong", rollouts, scores=scores, ensemble=names)
    assert Expression("2 * mean(one, standard(x), other) + tokens").ensemble == ["one", "other"]
    assert Expression("min(one, 1) + other").ensemble == []
