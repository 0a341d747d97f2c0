"""Diagnostics of a policy's answers that no scorer's mean shows: how diverse they are, and whether scorers agree.

All of it is of token ids and scores alone, in arrays of all answers or of one prompt's. docs/gates.md has the
definitions.
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
"""The n of the n-grams by which two answers are compared."""


def diversity(answers: Sequence[Sequence[Completion]]) -> dict[str, float | None]:
    """Metrics distinct_1 to distinct_3 of all answers, and self_similarity of those to the same prompt.

    Args:
        answers: the answers to each prompt. The token that ends an answer is in none of its n-grams.
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
    """All n-grams of some answers: a number that is the same for the same tokens, and the answer that each is in.

    Distinct-n (Li et al. 2016, arXiv 1510.03055) is the share of different ones among them.
    """
    lengths = np.array([len(answer) for answer in ids], dtype=np.int64)
    tokens = np.fromiter((token for answer in ids for token in answer), np.int64, int(lengths.sum()))
    owner = np.repeat(np.arange(len(ids)), lengths)
    _, tokens = np.unique(tokens, return_inverse=True)
    count = max(0, len(tokens) - n + 1)
    grams, known = tokens[:count], int(tokens.max(initial=0)) + 1
    for offset in range(1, n):  # an n-gram is an (n-1)-gram and the token behind it
        _, grams = np.unique(grams * known + tokens[offset : offset + count], return_inverse=True)
    inside = owner[:count] == owner[n - 1 : n - 1 + count]
    return grams[inside], owner[:count][inside]


def _similarities(ids: Sequence[Sequence[int]]) -> list[float]:
    """Of every pair of answers to a prompt: ROUGE-2 F1 (Lin 2004) of token ids, which is twice the bigrams that both
    have over all that they have. Without any bigram: whether the answers are the same."""
    grams, owner = n_grams(ids, OVERLAP)
    order = np.lexsort((grams, owner))
    grams, owner = grams[order], owner[order]
    # A bigram's second occurrence in an answer is another one than its first: the overlap of bags is that of sets.
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
    """How two scorers agree about the same answers: Spearman's rho over all answers, and Kendall's tau-b among the
    answers to a prompt, as the mean over prompts with its 95 % interval.

    Args:
        pairs: of each prompt, both scores of each answer.

    Returns:
        rho, tau, half width of tau's interval; None where a scorer's scores are all the same.
    """
    scores = np.array([pair for prompt in pairs for pair in prompt], dtype=np.float64).reshape(-1, 2)
    taus = [
        [tau] for prompt in pairs if (tau := _kendall(np.array(prompt, dtype=np.float64).reshape(-1, 2))) is not None
    ]
    estimate = clustered(taus)
    return _spearman(scores), estimate.mean, estimate.ci95


def _spearman(scores: Array) -> float | None:
    """Pearson's correlation of the ranks, where equal scores share the mean of theirs (Spearman 1904)."""
    ranks = np.stack([_ranks(column) for column in scores.T]) - (len(scores) - 1) / 2
    spread = float(np.prod((ranks**2).sum(axis=1)))
    return None if spread == 0 else float(ranks[0] @ ranks[1] / np.sqrt(spread))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean = (last - counts + last - 1) / 2
    return mean[inverse.reshape(-1)]


def _kendall(scores: Array) -> float | None:
    """Tau-b (Kendall 1945): concordant less discordant pairs, over the root of the product of the pairs that either
    scorer tells apart."""
    one, other = (np.sign(column[:, None] - column[None, :]) for column in scores.T)
    told = float(np.abs(one).sum() * np.abs(other).sum())
    return None if told == 0 else float((one * other).sum() / np.sqrt(told))
