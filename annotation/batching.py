"""Batches of sequences of similar length under a token budget."""

from collections.abc import Sequence


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide the sequences into batches of at most `budget` tokens, padding included.

    Args:
        lengths: tokens of each sequence.
        budget: rows times the longest row of a batch; a longer sequence makes a batch of its own.

    Returns:
        Indices into `lengths`, longest first, so that a batch that does not fit the memory fails at once.
    """
    result: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(index)
        else:
            result.append([index])
    return result
