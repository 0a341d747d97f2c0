"""Compares sets of pairs that strategies have chosen from the same responses: numbers, margins, lengths, overlap."""

import statistics
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contracts.artifacts import Artifact
from contracts.records import Pair
from pipelines.text import echo, plural


class PairSet(msgspec.Struct, frozen=True):
    """Statistics of one set of pairs. Scores and margins are means over its pairs, lengths are in tokens."""

    name: str
    path: str
    config: dict[str, Any]
    """The strategy, and the other settings of its stage that enter the stage key."""
    pairs: int
    proposed: int
    """Pairs that the strategy proposed; a prompt for which it proposed none counts as one."""
    dropped: dict[str, int]
    prompts: int
    """Prompts with a pair."""
    margin: float | None
    margin_10: float | None
    """The 10th percentile of the margins."""
    margin_50: float | None
    margin_90: float | None
    chosen_score: float | None
    rejected_score: float | None
    chosen_tokens: float | None
    rejected_tokens: float | None
    chosen_longer: float | None
    """Share of the pairs whose chosen answer is the longer one; equal lengths count as half."""
    answers: int
    """Distinct answers in the pairs."""
    reward_length_correlation: float | None = None
    """Correlation of the length with the score that pairs are chosen by, over all scored answers; None if not known."""


class SharedPairs(msgspec.Struct, frozen=True):
    """The overlap of a set of pairs with the first set."""

    name: str
    pairs: int
    only_first: int
    only_here: int
    turned: int
    """Pairs of the same two answers with chosen and rejected swapped."""
    prompts: int
    """Prompts with a pair in both sets."""


class PairComparison(msgspec.Struct, frozen=True):
    """Several sets of pairs that were chosen from the same responses."""

    run: str
    iteration: int
    sets: list[PairSet]
    shared: list[SharedPairs]
    """One entry for each set but the first."""


def compare_pairs(run: str, iteration: int, artifacts: dict[str, Artifact]) -> PairComparison:
    """Compare artifacts of pairs, given by name, with the first of them."""
    read = {name: _read(name, artifact) for name, artifact in artifacts.items()}
    (_, (_, first)), *others = read.items()
    shared = []
    for name, (_, pairs) in others:
        turned = {(prompt, rejected, chosen) for prompt, chosen, rejected in first} & pairs
        prompts = {prompt for prompt, *_ in first} & {prompt for prompt, *_ in pairs}
        shared.append(
            SharedPairs(name, len(first & pairs), len(first - pairs), len(pairs - first), len(turned), len(prompts))
        )
    return PairComparison(run, iteration, [found for found, _ in read.values()], shared)


def _read(name: str, artifact: Artifact) -> tuple[PairSet, set[tuple[str, int, int]]]:
    """The statistics of an artifact, and its pairs as (prompt id, chosen sample, rejected sample)."""
    keys: set[tuple[str, int, int]] = set()
    numbers: list[tuple[float, float, float, int, int]] = []
    for pair in artifact.rows(Pair):
        keys.add((pair.prompt_id, pair.chosen_sample, pair.rejected_sample))
        lengths = len(pair.chosen_ids), len(pair.rejected_ids)
        numbers.append((pair.margin, pair.chosen_score, pair.rejected_score, *lengths))
    margins, chosen, rejected, chosen_tokens, rejected_tokens = zip(*numbers, strict=True) if numbers else [()] * 5
    longer = [(a > b) + 0.5 * (a == b) for a, b in zip(chosen_tokens, rejected_tokens, strict=True)]
    low, middle, high = _decile(margins, 1), _decile(margins, 5), _decile(margins, 9)
    manifest = artifact.manifest
    found = PairSet(
        name, str(artifact.path), manifest.key_parts["config"], len(numbers),
        manifest.ledger.rows_in, dict(sorted(manifest.ledger.dropped.items())), len({prompt for prompt, *_ in keys}),
        _mean(margins), low, middle, high, _mean(chosen), _mean(rejected), _mean(chosen_tokens),
        _mean(rejected_tokens), _mean(longer),
        len({(prompt, sample) for prompt, *samples in keys for sample in samples}),
        manifest.facts.get("reward_length_correlation"),
    )  # fmt: skip
    return found, keys


def _mean(values: Any) -> float | None:
    return statistics.fmean(values) if values else None


def _decile(values: Any, number: int) -> float | None:
    """The (10 * number)-th percentile of values, without interpolation; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, number * len(ordered) // 10)] if ordered else None


ROWS: tuple[tuple[str, Callable[[PairSet], str]], ...] = (
    ("pairs", lambda it: str(it.pairs)),
    ("prompts with a pair", lambda it: str(it.prompts)),
    ("answers in pairs", lambda it: str(it.answers)),
    ("margin", lambda it: _shown(it.margin)),
    ("margin, 10 / 50 / 90 %", lambda it: " / ".join(map(_shown, (it.margin_10, it.margin_50, it.margin_90)))),
    ("score of chosen / rejected", lambda it: f"{_shown(it.chosen_score)} / {_shown(it.rejected_score)}"),
    ("tokens of chosen / rejected", lambda it: f"{_shown(it.chosen_tokens, 1)} / {_shown(it.rejected_tokens, 1)}"),
    ("chosen is the longer one", lambda it: "-" if it.chosen_longer is None else f"{it.chosen_longer:.0%}"),
    ("score and length, correlation", lambda it: _shown(it.reward_length_correlation, 2)),
)
"""The rows of the table, after the settings that differ: title, and the value for a set. The reasons of dropped pairs
follow the number of pairs."""


def print_pairs(console: Console, found: PairComparison) -> None:
    """Print a table with a column for each set, and a sentence on each overlap."""
    table = Table(title=f"Pairs of {found.run}, iteration {found.iteration}")
    table.add_column("")
    for one in found.sets:
        table.add_column(escape(one.name), justify="right", overflow="fold")
    keys = dict.fromkeys(key for one in found.sets for key in one.config)
    for key in keys:
        values = [_value(one.config.get(key)) for one in found.sets]
        if key == "strategy" or len(set(values)) > 1:
            table.add_row(key, *map(escape, values))
    reasons = dict.fromkeys(reason for one in found.sets for reason in one.dropped)
    for title, show in ROWS:
        table.add_row(title, *(show(one) for one in found.sets))
        if title == "pairs":
            for reason in reasons:
                table.add_row(f"  dropped: {reason}", *(str(one.dropped.get(reason, "-")) for one in found.sets))
    console.print(table)
    first = found.sets[0].name
    for shared in found.shared:
        turned = f", {plural(shared.turned, 'pair')} the other way round" if shared.turned else ""
        echo(
            console,
            f"{plural(shared.pairs, 'pair')} in both, {shared.only_here} only in {shared.name}, {shared.only_first} "
            f"only in {first}{turned}; {plural(shared.prompts, 'prompt')} with a pair in both.",
        )


def as_json(found: PairComparison) -> str:
    """A comparison as one JSON object."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode()


def _value(value: Any) -> str:
    """The value of a config key as text; - for None."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_value(item)}" for name, item in value.items())
    return "-" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
