"""Configs: classified fields, unknown keys, overrides, stage keys."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from contracts.config import (
    PathText,
    Role,
    Section,
    StageConfig,
    apply_overrides,
    identity,
    input_path,
    read_yaml,
    runtime,
)
from contracts.config import validate as validate_config
from contracts.errors import UserError
from contracts.stage import key_parts, stage_key


class Inner(Section):
    """A section."""

    beta: float = identity(0.1, was="kl_weight")
    threads: int = runtime(1, was="workers jobs")


class Needed(Section):
    """A section without which nothing goes."""

    path: Path = input_path()
    """A file: of any kind."""


class Example(StageConfig):
    """A stage."""

    stage: ClassVar[str] = "example"
    code_version: ClassVar[int] = 1
    source: Path = input_path(was="from")
    """What it reads. Anything."""
    others: dict[str, Path] = input_path({})
    learning_rate: float = identity(1e-3)
    inner: Inner = identity(Inner())


class Demanding(Example):
    """A stage with a section that has to be set."""

    needed: Needed = identity()


def key(**fields: object) -> str:
    return stage_key(key_parts(Example(**fields), {"torch": "1"}))  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("1\n")
    return tmp_path / "a.jsonl"


def test_a_field_without_a_role_cannot_be_defined() -> None:
    with pytest.raises(TypeError, match=r"Forgotten\.size must be declared"):

        class Forgotten(Section):
            size: int = Field(1)


def test_the_key_depends_on_identity_and_content_and_on_nothing_else(source: Path, tmp_path: Path) -> None:
    base = key(source=source, output=tmp_path / "x")
    assert base == key(source=source, output=tmp_path / "y", inner={"threads": 8})
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(source.read_bytes())
    assert base == key(source=copy, output=tmp_path / "x")
    assert base != key(source=source, output=tmp_path / "x", inner={"beta": 0.2})
    assert base != key(source=source, output=tmp_path / "x", others={"extra": copy})
    assert base != stage_key(key_parts(Example(source=source, output=tmp_path), {"torch": "2"}))
    source.write_text("2\n")
    assert base != key(source=source, output=tmp_path / "x")


def test_roles_are_selected_in_nested_sections(source: Path, tmp_path: Path) -> None:
    config = Example(source=source, output=tmp_path)
    assert config.select(Role.IDENTITY) == {"learning_rate": 1e-3, "inner": {"beta": 0.1}}
    assert config.select(Role.RUNTIME) == {"output": str(tmp_path), "inner": {"threads": 1}}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"inner": {"bta": 0.2}}, r"unknown key 'inner\.bta'\. Did you mean 'inner\.beta'\?"),
        ({"learning_rat": 1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"inner": {"beta": "much"}}, r"'inner\.beta' is 'much'"),
        ({"source": None}, r"'source' is null, but is not a valid path for .*\. Set it\."),
        (
            {"learning_rate": None},
            r"'learning_rate' is null, but .* Leave it out to have the default \(0\.001\), or set",
        ),
        (
            {"inner": None},
            r"'inner' is null, but it is a section\. Leave it out .*, or set inner\.KEY; its keys are beta",
        ),
        ({"others": None}, r"'others' is null, but it holds entries by name\. Set others\.NAME, or leave it out\."),
        ({}, r"'source' is required but not set\. Set source=VALUE: What it reads\."),
        ({"needed": {}}, r"'needed\.path' is required but not set\. Set needed\.path=VALUE: A file\."),
        ({"needed": None}, r"'needed' is null, but this section is required\. Set needed\.path; its keys are path"),
        ({"inner": {"kl_weight": 1}}, r"unknown key 'inner\.kl_weight': it is called 'inner\.beta' now\."),
        ({"inner": {"jobs": 1}}, r"unknown key 'inner\.jobs': it is called 'inner\.threads' now\."),
        ({"from": "a"}, "unknown key 'from': it is called 'source' now"),
    ],
)
def test_mistakes_are_explained(data: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        validate_config(Demanding if "needed" in data else Example, {"output": "x", **data}, "example.yaml")


def test_overrides_are_yaml_and_reach_into_sections() -> None:
    data = apply_overrides({"inner": {"threads": 1}}, ["inner.beta=5e-7", "others={a: b}", "source=null"])
    assert data == {"inner": {"threads": 1, "beta": 5e-7}, "others": {"a": "b"}, "source": None}
    assert validate_config(Inner, {"beta": "5e-7"}, "x").beta == 5e-7
    for wrong in ["beta", "=1", "inner.threads.more=1", "a=[1"]:
        with pytest.raises(UserError):
            apply_overrides({"inner": {"threads": 1}}, [wrong])


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "a: b: c"])
def test_broken_yaml_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")


def test_a_number_sign_on_the_command_line_begins_no_comment() -> None:
    given = ["answer_after=####", "name=a #b", "k=4", "stop=['#']", "nothing=null"]
    read = {"answer_after": "####", "name": "a #b", "k": 4, "stop": ["#"], "nothing": None}
    assert apply_overrides({}, given) == read


class Homes(StageConfig):
    """A stage with paths of every form."""

    stage: ClassVar[str] = "homes"
    code_version: ClassVar[int] = 1
    one: Path = input_path()
    several: list[Path] = input_path([])
    named: dict[str, Path] | None = input_path(None)
    function: PathText = identity("")
    text: str = identity("")


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in nothing else; a file whose name begins with one stays what it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {"output": "~", "one": "~/a", "several": ["~/b", "c~"], "named": {"x": "~/d"}, "function": "~/f.py:judge"}
    made = validate_config(Homes, {**data, "text": "~/g"}, "x")
    assert (made.output, made.one, made.several) == (
        tmp_path,
        tmp_path / "a",
        [tmp_path / "b", Path("c~")],
    )
    assert (made.named, made.function, made.text) == ({"x": tmp_path / "d"}, f"{tmp_path}/f.py:judge", "~/g")
    others = validate_config(Homes, {"output": "x", "one": "~no-such-user/a", "several": ["a/~"]}, "x")
    assert (others.one, others.several) == (Path("~no-such-user/a"), [Path("a/~")])
