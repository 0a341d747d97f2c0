"""Draws: which prompts of which sources an iteration answers, through the real command line."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
from forked import run_forked
from hypothesis import given
from hypothesis import strategies as st

from contracts.artifacts import Artifact
from contracts.drawing import LastAnswers, difficulties, draw_by_difficulty
from contracts.ledger import Ledger
from contracts.mixture import CurriculumSettings, next_sources, no_signal_reason
from contracts.publication import Publication
from contracts.records import PROMPTS, SCORES, Message, Prompt, Schema, Score


def publish(path: Path, schema: Schema, rows: list[Prompt] | list[Score]) -> Path:
    publication = Publication(path, schema, "handmade", path.name)
    publication.begin()
    ledger = Ledger("rows")
    ledger.keep(len(rows))
    publication.write_rows("shard-00000.jsonl", list(rows), ledger)
    empty: dict[str, str] = {}
    publication.publish(
        key_parts={}, inputs=empty, input_paths={}, unit="rows", weights=None, versions={}, seconds={}, facts={}
    )
    return path


def prompts(path: Path, *names: str) -> Path:
    return publish(path, PROMPTS, [Prompt(name, (Message("user", f"{name}?"),), tags=("old",)) for name in names])


def scores(path: Path, by_prompt: Mapping[str, list[float]]) -> Path:
    rows = [Score(name, sample, one) for name, values in by_prompt.items() for sample, one in enumerate(values)]
    return publish(path, SCORES, rows)


def run(output: Path, *arguments: str) -> tuple[int, str, str]:
    result = run_forked("contracts", "draw", f"output={output}", *arguments, timeout=200)
    return result.returncode, result.stdout, result.stderr


def drawn(output: Path, *arguments: str) -> Artifact:
    code, _, problem = run(output, *arguments)
    assert code == 0, problem
    return Artifact.open(output, PROMPTS)


def names(artifact: Artifact) -> list[str]:
    return [prompt.prompt_id for prompt in artifact.rows(Prompt)]


def test_sources_have_their_shares_and_are_gone_through_in_turn(tmp_path: Path) -> None:
    many = prompts(tmp_path / "many", *(f"m{number}" for number in range(9)))
    few = prompts(tmp_path / "few", "f0", "f1", "m0")
    arguments = [f"sources={{many: {many}, few: {few}}}", "weights={many: 2}", "count=3"]
    first = drawn(tmp_path / "1", *arguments)
    assert names(first) == ["m1", "f0", "m2"]
    assert [prompt.tags for prompt in first.rows(Prompt)][1] == ("old", "source:few")
    assert first.manifest.ledger.dropped == {"duplicate": 1}  # m0 is in both, and few comes first
    second = drawn(tmp_path / "2", *arguments, f"after={first.path}")
    third = drawn(tmp_path / "3", *arguments, f"after={second.path}")
    assert names(second) == ["m3", "f1", "m4"]
    assert names(third) == ["m5", "m0", "m6"]
    fourth = drawn(tmp_path / "4", *arguments, f"after={third.path}")
    assert names(fourth) == ["m7", "f0", "m8"]
    assert (fourth.manifest.facts["few/new"], fourth.manifest.facts["few/again"]) == (0, 1)
    code, told, _ = run(tmp_path / "4", *arguments, f"after={third.path}")
    assert code == 0
    assert told.startswith("reuse ")


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100), min_size=1),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
def test_shares_are_those_of_the_weights_however_they_are_divided_into_iterations(
    weights: dict[str, float], counts: list[int]
) -> None:
    taken: Counter[str] = Counter()
    for count in counts:
        taken.update(next_sources(weights, taken, count))
    total = sum(counts)
    assert taken == Counter(next_sources(dict(reversed(weights.items())), {}, total))
    for name, weight in weights.items():
        assert abs(taken[name] - total * weight / sum(weights.values())) < len(weights)


SIX = ("none", "half", "all", "few", "new0", "new1")


def test_a_curriculum_draws_known_prompts_within_the_band_and_new_ones(tmp_path: Path) -> None:
    source = prompts(tmp_path / "source", *SIX)
    arguments = [f"sources={{train: {source}}}", "count=4", "curriculum={low: 0.25, high: 0.75}"]
    first = drawn(tmp_path / "1", *arguments)
    assert names(first) == list(SIX[:4])
    assert "old" in next(first.rows(Prompt)).tags
    assert not [tag for prompt in first.rows(Prompt) for tag in prompt.tags if tag.startswith("source:")]
    known = scores(tmp_path / "scores", {"none": [0, 0], "half": [0, 1], "all": [1, 1], "few": [0, 0.5]})
    second = drawn(tmp_path / "2", *arguments, f"after={first.path}", f"history=[{known}]")
    assert names(second) == ["new0", "new1", "half", "few"]
    assert second.manifest.ledger.dropped == {"too_hard": 1, "too_easy": 1}
    later = scores(tmp_path / "later", {"half": [1, 1], "new0": [0, 1]})
    third = drawn(tmp_path / "3", *arguments, f"after={second.path}", f"history=[{known}, {later}]")
    # "few" and "new0" are within; "all" and "half" are out of it by as much, "all" for longer; "new1" has no scores.
    assert names(third) == ["few", "new0", "none", "all"]
    assert third.manifest.facts["beyond_band"] == 2


def test_measures() -> None:
    some = [Prompt(name, ()) for name in "abcd"]
    answered = {
        "a": LastAnswers(0, (1.0, 3.0)),
        "b": LastAnswers(0, (2.0,)),
        "c": LastAnswers(1, (9.0, -1.0)),
        "x": LastAnswers(0, ()),
    }
    assert difficulties(some, CurriculumSettings(low=0), answered) == {"a": 2, "b": 2, "c": 4}
    passing = CurriculumSettings(low=0, measure="pass_rate", passes=2.5)
    assert difficulties(some, passing, answered) == {"a": 0.5, "b": 0, "c": 0.5}
    assert difficulties(some, CurriculumSettings(low=0, measure="rank"), answered) == {"a": 0, "b": 0, "c": 2 / 3}


@given(st.data(), st.integers(1, 30), st.floats(0, 1))
def test_a_curriculum_draws_as_many_as_it_is_asked_for_each_once(data: st.DataObject, size: int, fresh: float) -> None:
    some = [Prompt(str(number), ()) for number in range(size)]
    position, wanted = data.draw(st.integers(0, size)), data.draw(st.integers(1, size))
    known = data.draw(st.sets(st.integers(0, size - 1).filter(lambda number: number < position or size == 0)))
    values = {str(number): LastAnswers(data.draw(st.integers(0, 3)), (data.draw(st.floats(0, 1)),)) for number in known}
    found = draw_by_difficulty(some, position, wanted, CurriculumSettings(low=0.3, high=0.6, fresh=fresh), values)
    assert len({prompt.prompt_id for prompt in found.prompts}) == wanted == len(found.prompts)
    counts = found.counts
    assert counts["new"] + counts["again"] + counts["beyond_band"] == wanted
    assert found.position == position + counts["new"] <= size
    assert min(counts.values(), default=0) >= 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sources={one: ONE, none: NONE}", "count=1"], "source none (NONE) has nothing to draw: it holds no prompts"),
        (["sources={one: ONE, two: ONE}", "count=1"], "all its prompts are in the sources before it"),
        (["sources={one: ONE}", "count=3"], "source one has 2 prompts, but its share of count=3 is 3"),
        (["sources={one: ONE}", "count=1", "weights={two: 1}"], "weights.two: there is no such source, only one"),
        (["sources={one: ONE}", "count=1", "weights={one: 0}"], "weights.one is 0; it must be above 0"),
        (["sources={}", "count=1"], "'sources' is {}"),
        (["sources={one: ONE}", "count=1", "curriculum={}"], "it has neither low nor high"),
        (["sources={one: ONE}", "count=1", "curriculum={low: 2, high: 1}"], "low=2 is above high=1"),
        (
            ["sources={one: ONE}", "count=1", "curriculum={low: 0, measure: pass_rate}"],
            "passes is the score from which",
        ),
        (["sources={one: ONE}", "count=1", "curriculum={low: 5, measure: rank}"], "are shares for measure=rank"),
        (["sources={one: ONE}", "count=1", "history=[ONE]"], "history is for a curriculum"),
        (["sources={one: ONE}", "count=1", "after=ONE"], "after=ONE was not drawn"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], said: str) -> None:
    one, none = prompts(tmp_path / "one", "a", "b"), prompts(tmp_path / "none")

    def placed(text: str) -> str:
        return (
            text.replace("ONE", str(one)).replace("NONE", str(none))
            if "NONE" not in text
            else (text.replace("NONE", str(none)).replace("ONE", str(one)))
        )

    before = sorted(os.listdir(tmp_path))
    code, _, problem = run(tmp_path / "output", *map(placed, arguments))
    assert code == 2
    assert placed(said) in problem
    assert sorted(os.listdir(tmp_path)) == before


def test_what_was_taken_is_in_a_file_of_its_own(tmp_path: Path) -> None:
    source = prompts(tmp_path / "source", "a", "b", "c")
    first = drawn(tmp_path / "1", f"sources={{train: {source}}}", "count=2")
    assert json.loads((first.path / "sources.json").read_bytes()) == {"train": {"taken": 2, "position": 2}}
    assert {file.path for file in first.manifest.files} == {"sources.json", "shard-00000.jsonl"}


def test_each_source_replaces_its_own_prompts_without_a_signal(tmp_path: Path) -> None:
    many = prompts(tmp_path / "many", *(f"m{number}" for number in range(9)))
    few = prompts(tmp_path / "few", "f0", "f1")
    arguments = [f"sources={{many: {many}, few: {few}}}", "count=4"]
    first = drawn(tmp_path / "1", *arguments)
    assert names(first) == ["f0", "m0", "f1", "m1"]
    judged = scores(tmp_path / "judged", {"f0": [0, 0], "m0": [0, 1], "m1": [1, 1.2], "f1": [2, 3]})
    again = [*arguments, f"after={first.path}", f"replaces=[{first.path}]", f"judged=[{judged}]"]
    second = drawn(tmp_path / "2", *again)
    assert names(second) == []  # of the source few none is left
    assert (second.manifest.facts["wanted"], second.manifest.facts["missing"]) == (1, 1)
    wider = drawn(tmp_path / "3", *again, "margin=0.5")
    assert names(wider) == ["m2"]
    assert wider.manifest.facts["missing"] == 1
    state = json.loads((wider.path / "sources.json").read_bytes())
    assert state == {"few": {"taken": 2, "position": 2}, "many": {"taken": 2, "position": 3}}  # shares stay as they are
    none = scores(tmp_path / "none", {"m2": [0, 1]})
    more = [f"after={wider.path}", f"replaces=[{first.path}, {wider.path}]", f"judged=[{judged}, {none}]", "margin=0.5"]
    assert drawn(tmp_path / "4", *arguments, *more).manifest.ledger.kept == 0


@pytest.mark.parametrize(
    ("values", "margin", "reason"),
    [
        ([], 0, "too_few_scores"),
        ([1], 0, "too_few_scores"),
        ([1, 1, 1], 0, "no_signal"),
        ([1, 1.5], 1, "below_margin"),
        ([1, 1.5], 0.5, None),
    ],
)
def test_signal(values: list[float], margin: float, reason: str | None) -> None:
    assert no_signal_reason(values, margin) == reason
