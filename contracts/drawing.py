"""The draw stage: selects the prompts of an iteration."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.mixture import SOURCE, CurriculumSettings, DrawConfig, next_sources, no_signal_reason, too_few_prompts
from contracts.records import PROMPTS, SCORES, Prompt, Score
from contracts.stage import Context, Outcome

SHARD = "shard-00000.jsonl"
STATE = "sources.json"


class SourceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a source has been read, by this draw and all earlier ones."""

    taken: int = 0
    """Number of prompts drawn, with repetitions."""
    position: int = 0
    """Index of the next prompt in the source, from 0; it keeps growing when the source restarts."""


class LastAnswers(NamedTuple):
    """The scores of a prompt's most recent answers in earlier iterations."""

    iteration: int
    """The iteration of the answers, as an index into the history."""
    scores: tuple[float, ...]
    """The scores of these answers."""


@dataclass
class Picked:
    """The prompts drawn from one source."""

    prompts: list[Prompt]
    counts: Counter[str]
    """Counts of drawn prompts (new, again, beyond_band) and of those that were not drawn (too_hard, too_easy)."""
    position: int
    """The new position in the source."""


def run(config: DrawConfig, context: Context) -> Outcome:
    """Publish the drawn prompts, and how far each source has been read."""
    sources, duplicates = _read_sources(config.sources)
    before = _read_state(config.after)
    answered = read_history(config.history)

    used, turns = _remaining_draws(config, sources, before)
    picked: dict[str, Picked] = {}
    for name, wanted in sorted(Counter(turns).items()):
        available = sum(prompt.prompt_id not in used for prompt in sources[name])
        if wanted > available and not config.replaces:
            raise UserError(too_few_prompts(name, available, config.count, wanted))
        wanted, state = min(wanted, available), before.get(name, SourceState())
        if config.curriculum is None:
            picked[name] = draw_in_order(sources[name], state.position, wanted, used)
        else:
            picked[name] = draw_by_difficulty(sources[name], state.position, wanted, config.curriculum, answered, used)

    left = {name: iter(found.prompts) for name, found in picked.items()}
    drawn = [(name, prompt) for name in turns if (prompt := next(left[name], None)) is not None]
    rows = [_tagged(prompt, name if len(sources) > 1 else None) for name, prompt in drawn]
    ledger = Ledger("prompts")
    ledger.keep(len(rows))
    for reason in ("too_hard", "too_easy"):
        ledger.drop(reason, sum(found.counts[reason] for found in picked.values()))
    ledger.drop("duplicate", duplicates)
    after = dict.fromkeys(sources, SourceState()) | before
    for name, found in picked.items():
        taken = after[name].taken + (0 if config.replaces else len(found.prompts))
        after[name] = SourceState(taken, found.position)
    context.publication.write_rows(SHARD, rows, ledger)
    context.publication.scratch(STATE).write_bytes(msgspec.json.encode(after, order="deterministic"))
    context.publication.commit(STATE, Ledger("prompts"))
    facts = _facts(sources, picked)
    if config.replaces:
        facts |= {"wanted": len(turns), "missing": len(turns) - len(rows)}
    return Outcome("prompts", facts, note=_note(config, picked, answered))


# Sources and history.


def _read_sources(paths: Mapping[str, Path]) -> tuple[dict[str, list[Prompt]], int]:
    """Read the prompts of each source by name, without those of an earlier source; also return how many those are.

    Raises:
        UserError: a source has no prompts of its own.
    """
    seen: set[str] = set()
    sources: dict[str, list[Prompt]] = {}
    repeated = 0
    for name, path in sorted(paths.items()):
        prompts = list(Artifact.open(path, PROMPTS).rows(Prompt))
        own = [prompt for prompt in prompts if prompt.prompt_id not in seen]
        if not own:
            why = "all its prompts are in the sources before it, too" if prompts else "it holds no prompts"
            raise UserError(f"source {name} ({path}) has nothing to draw: {why}. Take it out, or name another set.")
        repeated += len(prompts) - len(own)
        seen.update(prompt.prompt_id for prompt in own)
        sources[name] = own
    return sources, repeated


def _read_state(path: Path | None) -> dict[str, SourceState]:
    if path is None:
        return {}
    file = Artifact.open(path, PROMPTS).path / STATE
    if not file.is_file():
        raise UserError(
            f"after={path} was not drawn: it has no {STATE}. Give what `python -m contracts draw` has made."
        )
    return msgspec.json.decode(file.read_bytes(), type=dict[str, SourceState])


def read_history(paths: Iterable[Path]) -> dict[str, LastAnswers]:
    """The scores of the most recent answers to each prompt, from published scores in the order of the iterations."""
    found: dict[str, LastAnswers] = {}
    for iteration, path in enumerate(paths):
        found |= {name: LastAnswers(iteration, tuple(values)) for name, values in scores_by_prompt(path).items()}
    return found


def scores_by_prompt(path: Path) -> dict[str, list[float]]:
    """Read the published scores of each prompt's answers."""
    scores: dict[str, list[float]] = {}
    for score in Artifact.open(path, SCORES).rows(Score):
        scores.setdefault(score.prompt_id, []).append(score.score)
    return scores


def _remaining_draws(
    config: DrawConfig, sources: Mapping[str, Sequence[Prompt]], before: Mapping[str, SourceState]
) -> tuple[set[str], list[str]]:
    """The ids of the prompts that the iteration has already, and the sources of the prompts to draw, one name each.

    A prompt is replaced from its own source, so that the proportions of a mixture stay the same.
    """
    if not config.replaces:
        weights = {name: config.weights.get(name, 1.0) for name in sources}
        return set(), next_sources(weights, {name: state.taken for name, state in before.items()}, config.count)
    source_of = {prompt.prompt_id: name for name, prompts in sources.items() for prompt in prompts}
    draws = [[prompt.prompt_id for prompt in Artifact.open(path, PROMPTS).rows(Prompt)] for path in config.replaces]
    lacking = Counter(source_of[name] for name in draws[0])
    for names, path in zip(draws, config.judged, strict=True):
        scores = scores_by_prompt(path)
        lacking.subtract(
            source_of[name] for name in names if no_signal_reason(scores.get(name, ()), config.margin) is None
        )
    return {name for names in draws for name in names}, sorted(lacking.elements())


# Drawing from one source.


def draw_in_order(prompts: Sequence[Prompt], position: int, wanted: int, used: Collection[str] = frozenset()) -> Picked:
    """Draw the next prompts that are not in `used`; at its end, the source restarts."""
    found: list[Prompt] = []
    counts: Counter[str] = Counter()
    while len(found) < wanted:
        prompt = prompts[position % len(prompts)]
        if prompt.prompt_id not in used:
            found.append(prompt)
            counts["new" if position < len(prompts) else "again"] += 1
        position += 1
    return Picked(found, counts, position)


def draw_by_difficulty(
    prompts: Sequence[Prompt],
    position: int,
    wanted: int,
    settings: CurriculumSettings,
    answered: Mapping[str, LastAnswers],
    used: Collection[str] = frozenset(),
) -> Picked:
    """Draw new prompts in order, and known ones within the band, in the proportion that the settings say.

    If there are too few of one kind, more of the other are drawn; then prompts outside the band, the nearest first; and
    last, prompts that were drawn before and have no scores yet. Of equally suitable prompts, those that were answered
    the longest ago go first.
    """
    known = difficulties(prompts, settings, answered)
    new = prompts[position:]
    within: list[tuple[float, int, Prompt]] = []
    beyond: list[tuple[float, int, Prompt]] = []
    counts: Counter[str] = Counter()
    skipped = {*known, *used}
    waiting = [prompt for prompt in prompts[:position] if prompt.prompt_id not in skipped]
    for prompt in prompts:
        if (value := known.get(prompt.prompt_id)) is None or prompt.prompt_id in used:
            continue
        distance = _distance(value, settings)
        age = answered[prompt.prompt_id].iteration
        (beyond if distance else within).append((abs(distance), age, prompt))
        counts["too_hard"] += distance < 0
        counts["too_easy"] += distance > 0
    within.sort(key=lambda item: item[1])  # of the same age, in the order of the source
    beyond.sort(key=lambda item: item[:2])
    again = min(len(within), round(wanted * (1 - settings.fresh)))
    fresh = min(len(new), wanted - again)
    again = min(len(within), wanted - fresh)
    rest = wanted - fresh - again
    filled = [prompt for *_, prompt in beyond[:rest]]
    filled += waiting[: rest - len(filled)]
    for distance in (_distance(known[prompt.prompt_id], settings) for prompt in filled if prompt.prompt_id in known):
        counts["too_hard" if distance < 0 else "too_easy"] -= 1
    counts += Counter(new=fresh, again=again, beyond_band=len(filled))
    found = [*new[:fresh], *(prompt for *_, prompt in within[:again]), *filled]
    return Picked(found, counts, position + fresh)


def difficulties(
    prompts: Sequence[Prompt], settings: CurriculumSettings, answered: Mapping[str, LastAnswers]
) -> dict[str, float]:
    """The measure that the band applies to, by prompt id, of each prompt that was answered; larger means easier."""
    found = {prompt.prompt_id: answered[prompt.prompt_id].scores for prompt in prompts if prompt.prompt_id in answered}
    if settings.measure == "pass_rate":
        bar = settings.passes
        assert bar is not None
        return {name: sum(score >= bar for score in scores) / len(scores) for name, scores in found.items()}
    means = {name: sum(scores) / len(scores) for name, scores in found.items()}
    if settings.measure == "score":
        return means
    ranks: dict[str, float] = {}
    ordered = sorted(means, key=lambda name: means[name])
    for _, group in itertools.groupby(enumerate(ordered), key=lambda item: means[item[1]]):
        equal = list(group)
        ranks |= {name: equal[0][0] / len(ordered) for _, name in equal}
    return ranks


def _distance(value: float, settings: CurriculumSettings) -> float:
    """How far a prompt is outside the band: negative if it is too hard, positive if too easy, 0 inside."""
    if settings.low is not None and value < settings.low:
        return value - settings.low
    if settings.high is not None and value > settings.high:
        return value - settings.high
    return 0.0


# The manifest and the output.


def _tagged(prompt: Prompt, source: str | None) -> Prompt:
    return prompt if source is None else msgspec.structs.replace(prompt, tags=(*prompt.tags, f"{SOURCE}{source}"))


def _facts(sources: Mapping[str, Sequence[Prompt]], picked: Mapping[str, Picked]) -> dict[str, Any]:
    """Counts of the drawn prompts, by source if there are several."""

    def of(name: str, prefix: str) -> Iterator[tuple[str, int]]:
        found = picked.get(name, Picked([], Counter(), 0))
        yield f"{prefix}prompts", len(found.prompts)
        yield f"{prefix}of", len(sources[name])
        for count in ("new", "again", "beyond_band"):
            yield f"{prefix}{count}", found.counts[count]

    return {key: value for name in sources for key, value in of(name, f"{name}/" if len(sources) > 1 else "")}


def _note(config: DrawConfig, picked: Mapping[str, Picked], answered: Mapping[str, LastAnswers]) -> str:
    """The text that the stage's last line of output adds to the ledger."""
    parts = []
    if len(config.sources) > 1:
        parts.append("by source: " + ", ".join(f"{name} {len(found.prompts)}" for name, found in picked.items()))
    if config.replaces:
        parts.append(f"{sum(len(found.prompts) for found in picked.values())} in the place of those without a signal")
    if config.curriculum is not None and not answered:
        parts.append("no scores of earlier iterations yet, so that all are taken in turn")
    if beyond := sum(found.counts["beyond_band"] for found in picked.values()):
        parts.append(f"{beyond} are out of the curriculum's band, because there were too few within")
    return "; ".join(parts)
