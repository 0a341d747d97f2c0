"""Records and JSONL: what is written is what is read, and nothing else is accepted."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import UserError
from contracts.jsonl import encode, read_jsonl, write_jsonl
from contracts.records import Completion, Message, Prompt, Rollout, Sampling, Score

finite = st.floats(allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
text = st.text(st.characters(codec="utf-8"), max_size=12)
sampling = st.builds(Sampling, finite, finite, st.integers(0, 9), st.integers(1, 9))
completions = st.builds(
    Completion, st.integers(0, 9), ids, text, st.sampled_from(["stop", "length"]), st.lists(finite).map(tuple),
    st.integers(0, 2**31), sampling,
)  # fmt: skip
messages = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant"]), text), max_size=3).map(tuple)
rollouts = st.builds(
    Rollout, text, messages, ids, st.lists(completions, max_size=3).map(tuple), text, st.integers(0, 9),
    st.sampled_from(["raw", "processed"]), st.none() | text, st.lists(text, max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(rollouts, max_size=4))
def test_rollouts_survive_the_disk_with_every_bit(
    rows: list[Rollout], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write_jsonl(path, rows) == len(rows)
    assert list(read_jsonl(path, Rollout)) == rows


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt_id": "a", "sample": 0}\n', "missing required field `score`"),
        (b'{"prompt_id": "a", "sample": "0", "score": 1.0}\n', "Expected `int`, got `str`"),
        (b'{"prompt_id": "a", "sample": 0, "score": 1.0, "extra": 1}\n', "unknown field `extra`"),
        (b'{"prompt_id": "a", "sample": 0, "score": NaN}\n', "invalid"),
        (b'{"prompt_id": "a", "sample": 0,\n', "malformed|truncated"),
        (b'{"prompt_id": "\xff", "sample": 0, "score": 1.0}\n', "utf-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_bytes(encode(Score("a", 0, 1.0)) + b"\n" + line)
    with pytest.raises(UserError, match=rf"(?i)scores\.jsonl, line 3: .*({complaint})"):
        list(read_jsonl(path, Score))


def test_a_torn_last_line_is_tolerated_only_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    whole = Prompt("a", (Message("user", "hello"),))
    path.write_bytes(encode(whole) + encode(whole)[:-9])
    assert list(read_jsonl(path, Prompt, tolerate_torn_tail=True)) == [whole]
    with pytest.raises(UserError, match="line 2"):
        list(read_jsonl(path, Prompt))
