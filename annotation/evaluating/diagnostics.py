"""Computes diagnostics of a policy's answers that mean scores do not show: their diversity, and scorer agreement.

All are computed from token ids and scores, in arrays over all answers or over those to one prompt. docs/gates.md has
the definitions.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from annotation.evaluating.estimates import clustered
from contracts.records import Completion

Array: TypeAlias = "np.ndarray[Any, Any]"
ORDERS = (1, 2, 3)
"""The n of distinct-n."""
OVERLAP = 2
"""The n of the n-grams for the similarity of two answers."""


def diversity(answers: Sequence[Sequence[Completion]]) -> dict[str, float | None]:
    """The metrics distinct_1 to distinct_3 over all answers, and self_similarity of the answers to the same prompt.

    Args:
        answers: the answers to each prompt. The stop token is not part of an answer's n-grams.
    """
    flat = [answer for given in answers for answer in given]
    ids = [answer.response_ids[: len(answer.response_ids) - (answer.finish_reason == "stop")] for answer in flat]
    metrics: dict[str, float | None] = {}
    for n in ORDERS:
        grams, _ = n_grams(ids, n)
        metrics[f"distinct_{n}"] = len(np.unique(grams)) / len(grams) if len(grams) else None
    similar, first = [], 0
    for given in answers:
        similar.append(_similarities(ids[first : first + len(given)]))
        first += len(given)
    estimate = clustered(similar)
    return metrics | {"self_similarity": estimate.mean, "self_similarity_ci95": estimate.ci95}


def n_grams(ids: Sequence[Sequence[int]], n: int) -> tuple[Array, Array]:
    """All n-grams of some answers, as two arrays: an id per n-gram, equal for equal tokens, and its answer's index.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) is the number of distinct ids divided by that of all n-grams.
    """
    lengths = np.array([len(answer) for answer in ids], dtype=np.int64)
    tokens = np.fromiter((token for answer in ids for token in answer), np.int64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(ids)), lengths)
    _, tokens = np.unique(tokens, return_inverse=True)
    count = max(0, len(tokens) - n + 1)
    grams, known = tokens[:count], int(tokens.max(initial=0)) + 1
    for offset in range(1, n):  # an n-gram is an (n-1)-gram and the token after it
        _, grams = np.unique(grams * known + tokens[offset : offset + count], return_inverse=True)
    inside = owner[:count] == owner[n - 1 : n - 1 + count]
    return grams[inside], owner[:count][inside]


def _similarities(ids: Sequence[Sequence[int]]) -> list[float]:
    """ROUGE-2 F1 (Lin 2004) of token ids for every pair of answers to a prompt: twice the number of shared bigrams,
    divided by the number of bigrams in both. If neither has a bigram: 1 if the answers are equal, else 0."""
    grams, owner = n_grams(ids, OVERLAP)
    order = np.lexsort((grams, owner))
    grams, owner = grams[order], owner[order]
    # Each further occurrence of a bigram in an answer counts as a distinct item, so that set overlap is bag overlap.
    new = np.r_[True, (grams[1:] != grams[:-1]) | (owner[1:] != owner[:-1])][: len(grams)]
    starts = np.flatnonzero(new)
    occurrence = np.arange(len(grams)) - np.repeat(starts, np.diff(np.r_[starts, len(grams)]))
    _, column = np.unique(np.stack([grams, occurrence], axis=1), axis=0, return_inverse=True)
    has = np.zeros((len(ids), int(column.max(initial=-1)) + 1))
    has[owner, column.reshape(-1)] = 1.0
    shared, sizes = has @ has.T, has.sum(axis=1)
    first, second = np.triu_indices(len(ids), 1)
    total = sizes[first] + sizes[second]
    found = 2 * shared[first, second] / np.maximum(total, 1)
    same = [tuple(ids[a]) == tuple(ids[b]) for a, b in zip(first, second, strict=True)]
    return [float(value) for value in np.where(total == 0, same, found)]


def agreement(pairs: Sequence[Sequence[tuple[float, float]]]) -> tuple[float | None, float | None, float | None]:
    """Agreement of two scorers on the same answers: Spearman's rho over all answers, and Kendall's tau-b among the
    answers to each prompt, averaged over prompts, with its 95 % interval.

    Args:
        pairs: for each prompt, the two scores of each answer.

    Returns:
        rho, tau, half width of tau's interval; None if one scorer's scores are all equal.
    """
    scores = np.array([pair for prompt in pairs for pair in prompt], dtype=np.float64).reshape(-1, 2)
    taus = [
        [tau] for prompt in pairs if (tau := _kendall(np.array(prompt, dtype=np.float64).reshape(-1, 2))) is not None
    ]
    estimate = clustered(taus)
    return _spearman(scores), estimate.mean, estimate.ci95


def _spearman(scores: Array) -> float | None:
    """Pearson's correlation of the ranks; equal scores share their mean rank (Spearman 1904)."""
    ranks = np.stack([_ranks(column) for column in scores.T]) - (len(scores) - 1) / 2
    spread = float(np.prod((ranks**2).sum(axis=1)))
    return None if spread == 0 else float(ranks[0] @ ranks[1] / np.sqrt(spread))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean = (last - counts + last - 1) / 2
    return mean[inverse.reshape(-1)]


def _kendall(scores: Array) -> float | None:
    """Tau-b (Kendall 1945): concordant minus discordant pairs, divided by the square root of the product of the numbers
    of pairs that each scorer does not tie."""
    one, other = (np.sign(column[:, None] - column[None, :]) for column in scores.T)
    untied = float(np.abs(one).sum() * np.abs(other).sum())
    return None if untied == 0 else float((one * other).sum() / np.sqrt(untied))
