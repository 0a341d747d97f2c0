"""What Ratchet reads of YAML, and what it refuses; in files and in overrides alike."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from contracts import yaml_text
from contracts.config import apply_overrides, read_yaml
from contracts.errors import UserError

BOMB = "".join(f"a{level}: &a{level} [{', '.join(9 * [f'*a{level - 1}' if level else 'x'])}]\n" for level in range(40))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join(9 * [f'*a{level - 1}'])}]}}\n" for level in range(1, 40)
)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("no", "no"), ("on", "on"), ("Yes", "Yes"), ("true", True), ("FALSE", False), ("~", None),
        ("1e-5", 1e-5), ("5E7", 5e7), ("-.5", -0.5), ("1.", 1.0), ("1_000", 1000), ("0x1F", 31), ("+7", 7),
        ("010", 10), ("0o17", 15), ("12:30", "12:30"), ("1:30:00", "1:30:00"), ("2026-01-01", "2026-01-01"), ("=", "="),
        (".inf", float("inf")), ("!!str 5", "5"), ("[1, x]", [1, "x"]), ("{3: x}", {"3": "x"}), ("", None), ("''", ""),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_a_word_is_what_it_looks_like(word: str, value: object) -> None:
    found = yaml_text.load(f"key: {word}")["key"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "value",
    ["no", "1e-5", "12:30", "2026-01-01", "010", "1e5", "null", "0x1", ".inf", "<<", "a: b", "", "é", "1.5", "#", "\t",
     1e-5, 4e-4, 1e22, -0.0, 10**300, True, None, 3, [], {}],
)  # fmt: skip
def test_what_is_written_is_read_as_it_was(value: object) -> None:
    assert repr(yaml_text.load(yaml_text.dump({"key": value, "list": [value]}))) == repr(
        {"key": value, "list": [value]}
    )


WORDS = st.sampled_from("no y 12:30 1e5 1_0 010 0o7 0x1 = << null .inf 2026-01-01 ~ *a &a - ? : {} # ! %".split())
TEXTS = st.text() | WORDS | st.text(st.sampled_from("a: -?[]{}&*!|>'\"%@`#,\\\n\t\x85\u2028\ufeff01.e_"), max_size=8)
PLAIN = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS
DATA = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=12)


@given(st.dictionaries(TEXTS, DATA))
def test_what_is_written_is_the_same_for_readers_of_both_versions_of_yaml(data: dict[str, object]) -> None:
    text = yaml_text.dump(data)
    assert yaml_text.load(text) == data
    assert yaml.safe_load(text) == data


@given(TEXTS | st.lists(TEXTS).map("".join))
def test_any_text_is_plain_data_or_refused(text: str) -> None:
    with contextlib.suppress(yaml_text.YamlError):
        json.dumps(yaml_text.load(text))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BOMB, "more than 200000 values once its aliases"),
        (MERGE_BOMB, "more than 200000 values once its aliases"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: {c: *a}}", "contains itself"),
        ("a: " + "[" * 5000, "more than 64 nested lists and sections"),
        ("a: " + "{a: " * 5000, "more than 64 nested lists and sections"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 500)),
            "64 nested lists and sections",
        ),
        ("a: *b", "undefined alias 'b'"),
        ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: the key 'a' occurs twice"),
        ("3: x\n'3': y", "the key '3' occurs twice"),
        ("~: 1", "a key must be text, not ~"),
        ("true: 1", "a key must be text, not true"),
        ("? [a]\n: 1", "a key must be text, not a list or a section"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: !!int x", "not valid YAML: invalid literal for int() with base 10: 'x'"),
        ("a: !!int ''", "not valid YAML: "),
        ("a: !!bool x", "not valid YAML: "),
        ("a: !!float [x]", "line 1: not valid YAML: expected a scalar node"),
        ("a: !!python/object/apply:os.system [true]", "the tag !!python/object/apply:os.system is not read here"),
        ("a: !!set {x}", "the tag !!set is not read here"),
        ("a:\n\tb: 1", "line 2: not valid YAML: a tab. Indent with spaces"),
        ("a: 1\n---\nb: 2", "a second document begins"),
        ("a: 1\nb\x00: 2", "line 2: not valid YAML: the character U+0000, which YAML does not allow"),
        ("[1, 2]", "expected `key: value` lines, found a list"),
    ],
)
def test_what_is_refused_is_named_at_once(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(UserError) as error:
        read_yaml(file)
    assert complaint in str(error.value)
    assert str(error.value).startswith(str(file))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("name: café".encode("latin-1"), "is not UTF-8 text"),
        ("name: x".encode("utf-16"), "is not UTF-8 text"),
        (b"\x7fELF\x02\x01\x01\x00", "the character U+007F"),
        (b"# \n" * (6 << 20), "too many for a configuration"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=complaint.replace("+", r"\+")):
        read_yaml(tmp_path / "config.yaml")


def test_a_mark_of_the_encoding_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_yaml(tmp_path / "config.yaml") == {"name": "x"}


@pytest.mark.parametrize(
    ("item", "complaint"),
    [
        ("a=&a [*a]", "contains itself"),
        ("a=&a {b: *a}", "contains itself"),
        ("a=" + "[" * 100_000, "more than 64 nested lists"),
        ("a={b: 1, b: 2}", "the key 'b' occurs twice"),
        ("a=!!python/name:os.system", "the tag !!python/name:os.system"),
        ("a..b=1", "cannot read the override"),
        (".a=1", "cannot read the override"),
    ],
)
def test_an_override_is_read_the_same_way(item: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        apply_overrides({}, [item])
    assert complaint in str(error.value)
    assert len(str(error.value)) < 300
    assert apply_overrides({}, ["a=1e-5", "b=no", "c=12:30"]) == {"a": 1e-5, "b": "no", "c": "12:30"}
