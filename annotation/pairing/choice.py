"""Selects the pairs of one prompt: calls a strategy, and applies the rules that hold for all strategies."""

import contextlib
import itertools
import operator
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from annotation.pairing.strategies import Candidate, PairPrompt, Proposal, Samples
from contracts.callables import as_user_mistake, place_of
from contracts.errors import UserError

TOO_FEW = "too_few_samples"
IDENTICAL = "identical_answers"
TIE = "tie"
BELOW_MARGIN = "below_margin"
ABOVE_MARGIN_CAP = "above_margin_cap"
NONE_PROPOSED = "none_proposed"
BEYOND_LIMIT = "beyond_per_prompt"
"""Reason for pairs beyond `per_prompt`. They are dropped on purpose, so `max_dropped` does not count them."""
REASON = re.compile("[a-z][a-z0-9_]{0,39}")


class Choice(NamedTuple):
    """The pairs of one prompt, and the number of dropped pairs by reason."""

    pairs: list[tuple[Candidate, Candidate]]
    """(chosen, rejected) pairs, sorted by the rank of the chosen answer, then by that of the rejected one."""
    dropped: dict[str, int]
    repeated: int = 0
    """Number of answers that were left out because they repeat another one."""


def choose(
    candidates: Sequence[Candidate],
    prompt: PairPrompt,
    propose: Callable[[list[Candidate], PairPrompt], Proposal],
    *,
    margin: float = 0.0,
    margin_cap: float | None = None,
    per_prompt: int | None = None,
    distinct: bool = False,
    what: str = "the strategy",
    seconds: float | None = None,
) -> Choice:
    """Choose the pairs of one prompt.

    The candidates are ranked by score, ties by sample index; with `distinct`, only the first of identical answers is a
    candidate. A proposed pair is dropped if its answers are identical, its scores are equal, or they differ by less
    than `margin` or more than `margin_cap`. Of the remaining pairs, the first `per_prompt` in the strategy's order are
    kept. If the strategy proposes none (because there are fewer than two candidates, or for a reason of its own), that
    counts as one dropped pair, so that for every prompt `max(1, proposed pairs) = len(pairs) + sum(dropped)`. `what`
    is the strategy's name in messages, and `seconds` its time limit.

    Raises:
        UserError: the strategy fails, exceeds its time limit, or proposes something that is no pair of candidates.
    """
    if len(candidates) < 2:
        return Choice([], {TOO_FEW: 1})
    kept = _deduplicated(candidates) if distinct else candidates
    repeated = len(candidates) - len(kept)
    if len(kept) < 2:
        return Choice([], {IDENTICAL: 1}, repeated)
    ranked = sorted(kept, key=lambda candidate: (-candidate.score, candidate.sample))
    proposed = _propose(propose, ranked, prompt, what, seconds)
    if isinstance(proposed, str):
        return Choice([], {proposed: 1}, repeated)
    ranks = {candidate.sample: rank for rank, candidate in enumerate(ranked)}
    pairs: list[tuple[Candidate, Candidate]] = []
    dropped: dict[str, int] = {}
    for better, worse in proposed:
        pair = ranked[ranks[better]], ranked[ranks[worse]]
        reason = _drop_reason(*pair, margin, margin_cap)
        if reason is None and per_prompt is not None and len(pairs) == per_prompt:
            reason = BEYOND_LIMIT
        if reason is None:
            pairs.append(pair)
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    pairs.sort(key=lambda pair: (ranks[pair[0].sample], ranks[pair[1].sample]))
    return Choice(pairs, dropped, repeated)


def _deduplicated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Keep the first sample of each distinct answer. Keeping the one with the best score would favour scoring noise."""
    by_sample = sorted(candidates, key=lambda candidate: candidate.sample, reverse=True)
    return list({candidate.response_ids: candidate for candidate in by_sample}.values())


def _drop_reason(chosen: Candidate, rejected: Candidate, margin: float, margin_cap: float | None) -> str | None:
    if chosen.response_ids == rejected.response_ids:
        return IDENTICAL
    if chosen.score == rejected.score:
        return TIE
    if chosen.score - rejected.score < margin:
        return BELOW_MARGIN
    if margin_cap is not None and chosen.score - rejected.score > margin_cap:
        return ABOVE_MARGIN_CAP
    return None


class _TimeLimitError(BaseException):
    """Raised inside a strategy that exceeds its time limit; no Exception, so that its own handlers do not catch it."""


@contextlib.contextmanager
def _time_limit(seconds: float | None, what: str) -> Iterator[None]:
    """Interrupt the block with a signal after `seconds`, and raise a UserError.

    Python handles signals between two bytecode instructions, which interrupts an endless loop. A library call that does
    not return is not interrupted; the supervisor kills the stage when it counts as stalled.
    """
    if seconds is None:
        yield
        return

    done, caller, signaled = threading.Event(), threading.get_ident(), signal.SIGVTALRM

    def watch() -> None:
        pause = seconds
        while not done.wait(pause):
            signal.pthread_kill(caller, signaled)
            pause = 1.0  # signal again, in case the strategy caught the exception

    def end(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise _TimeLimitError

    before = signal.signal(signaled, end)
    watcher = threading.Thread(target=watch, name="deadline of a strategy", daemon=True)
    watcher.start()
    try:
        yield
    except _TimeLimitError as error:
        raise UserError(
            f"{what}: it took longer than seconds_per_prompt={seconds:g} and was stopped{place_of(error)}. Remove "
            "what does not end, or raise seconds_per_prompt."
        ) from None
    finally:
        done.set()
        watcher.join()
        signal.signal(signaled, before)


def _propose(
    propose: Callable[[list[Candidate], PairPrompt], Proposal],
    ranked: list[Candidate],
    prompt: PairPrompt,
    what: str,
    seconds: float | None,
) -> list[Samples] | str:
    """Call the strategy and check its result: sample index pairs, or the reason for which there are none."""
    with (
        _time_limit(seconds, f"{what}, prompt {prompt.prompt_id}"),
        as_user_mistake(f"{what} failed on prompt {prompt.prompt_id}"),
    ):
        returned: Any = propose(list(ranked), prompt)
        found = returned
        if isinstance(returned, Iterable) and not isinstance(returned, str):
            found = list(itertools.islice(returned, len(ranked) ** 2))  # bounded, in case the iterator is endless
    what = f"{what}, prompt {prompt.prompt_id}"
    if isinstance(found, str):
        if not REASON.fullmatch(found):
            raise UserError(
                f"{what}: it returned {found!r:.80}; a reason for no pair is one word of a-z, 0-9 and _, such as "
                "all_correct."
            )
        return found
    if not isinstance(found, list):
        raise UserError(
            f"{what}: it returned {found!r:.80}; it must return a list of pairs (chosen, rejected) of sample indices, "
            "[] where there is none, or a word for why there is none."
        )
    scores = {candidate.sample: candidate.score for candidate in ranked}
    pairs = [_checked(item, scores, what) for item in found]
    if len(set(pairs)) < len(pairs):
        twice = next(pair for number, pair in enumerate(pairs) if pair in pairs[:number])
        raise UserError(f"{what}: it returned the pair {twice} twice. Return each pair once.")
    return pairs or NONE_PROPOSED


def _checked(item: Any, scores: dict[int, float], what: str) -> Samples:
    """A proposed pair as two ints.

    Raises:
        UserError: it is no pair of two candidates, or the chosen one scores lower than the rejected one.
    """
    try:
        better, worse = (operator.index(sample) for sample in item)  # accepts numpy integers
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{what}: it returned {item!r:.80} where a pair (chosen, rejected) of sample indices is wanted, such as "
            "(candidates[0].sample, candidates[-1].sample)."
        ) from error
    if better in scores and worse in scores and better != worse and scores[better] >= scores[worse]:
        return better, worse
    if unknown := [sample for sample in (better, worse) if sample not in scores]:
        known = ", ".join(map(str, sorted(scores)))
        wrong = f"no candidate is sample {unknown[0]}: they are {known}."
    elif better == worse:
        wrong = "chosen and rejected are the same answer."
    else:
        wrong = (
            f"the chosen answer scores lower ({scores[better]:g}) than the rejected one ({scores[worse]:g}). Pairs are "
            "labelled by the score: swap the pair or leave it out. Other criteria must be part of the score."
        )
    raise UserError(f"{what}: it returned {item!r:.80}, but {wrong}")
