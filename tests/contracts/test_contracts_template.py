"""Chat templates: the variables and the date that they are told, and what of these is in a stage's key."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from contracts.config import StageConfig, validate
from contracts.errors import UserError
from contracts.stage import key_parts, stage_key
from contracts.template import ChatFields, ChatTemplate, reads_clock

HELLO = [{"role": "user", "content": "Hello."}]
PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + PLAIN
TOLD = "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} " + PLAIN
IN_A_BRANCH = "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + PLAIN
WITH_TOOLS = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + PLAIN


class Renders(StageConfig, ChatFields):
    """A stage that renders conversations."""

    stage: ClassVar[str] = "renders"
    code_version: ClassVar[int] = 1


def write(folder: Path, template: str | list[dict[str, str]], file: str = "chat_template.jinja") -> Path:
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {"eos_token": {"content": "</s>", "special": True}}
    if file == "tokenizer_config.json":
        config["chat_template"] = template
    else:
        assert isinstance(template, str)
        (folder / file).write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def render(template: ChatTemplate, **options: Any) -> str:
    return template.render(HELLO, **{"tools": None, "for_answer": False, **options})


def test_a_template_is_read_wherever_it_stands(tmp_path: Path) -> None:
    for file in ("chat_template.jinja", "tokenizer_config.json"):
        assert render(ChatTemplate(write(tmp_path / file, PLAIN, file))) == "<user>Hello.</s>"
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": "tools! " + PLAIN}]
    template = ChatTemplate(write(tmp_path / "named", named, "tokenizer_config.json"))
    assert render(template) == "<user>Hello.</s>"
    assert render(template, tools=[{"type": "function"}]) == "tools! <user>Hello.</s>"
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate(write(tmp_path / "none", ""))


def test_variables_are_rendered_and_those_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", "{% if enable_thinking is false %}<no>{% endif %}" + PLAIN)
    assert render(ChatTemplate(model, {"enable_thinking": False})) == "<no><user>Hello.</s>"
    assert render(ChatTemplate(model)) == render(ChatTemplate(model, {"enable_thinking": True})) == "<user>Hello.</s>"
    with pytest.raises(UserError, match=r"chat_template_kwargs\.enable_thinkin is set.*It reads enable_thinking\."):
        ChatTemplate(model, {"enable_thinkin": False})
    with pytest.raises(UserError, match="It reads none"):
        ChatTemplate(write(tmp_path / "plain", PLAIN), {"enable_thinking": False})


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "strftime_now"])
def test_variables_of_ratchets_own_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} is set by Ratchet"):
        validate(Renders, {"output": tmp_path, "chat_template_kwargs": {name: "x"}}, "test")


@pytest.mark.parametrize("date", ["2025-02-30", "31.12.2025", "today", "2025-1-1"])
def test_days_that_are_none_are_refused(tmp_path: Path, date: str) -> None:
    with pytest.raises(UserError, match="date"):
        validate(Renders, {"output": tmp_path, "date": date}, "test")


@pytest.mark.parametrize("template", [DATED, TOLD], ids=["always", "where no date is given"])
def test_a_template_that_reads_the_clock_is_told_a_date_or_refused(tmp_path: Path, template: str) -> None:
    model = write(tmp_path / "model", template)
    assert reads_clock(model)
    assert "26 Jul 2024" in render(ChatTemplate(model, date="2024-07-26"))
    with pytest.raises(UserError, match=r"writes today's date.*date=YYYY-MM-DD"):
        render(ChatTemplate(model))


def test_a_date_by_a_variable_of_the_templates_own_reads_no_clock(tmp_path: Path) -> None:
    model = write(tmp_path / "model", TOLD)
    variables = {"date_string": "1 May 2020"}
    assert not reads_clock(model, variables)
    assert render(ChatTemplate(model, variables)) == "1 May 2020 <user>Hello.</s>"


@pytest.mark.parametrize(
    ("template", "reads"),
    [(PLAIN, False), (IN_A_BRANCH, True), (WITH_TOOLS, True), ("{# strftime_now #}" + PLAIN, False)],
    ids=["plain", "with a system turn", "with tools", "in a comment"],
)
def test_whether_a_template_reads_the_clock_in_any_conversation(tmp_path: Path, template: str, reads: bool) -> None:
    assert reads_clock(write(tmp_path / "model", template)) is reads


def test_variables_and_date_are_in_the_key_unless_they_are_left_at_their_default(tmp_path: Path) -> None:
    def key(**fields: Any) -> str:
        return stage_key(key_parts(Renders(output=tmp_path, **fields), {}))

    plain = key_parts(Renders(output=tmp_path), {})["config"]
    assert plain == key_parts(Renders(output=tmp_path, chat_template_kwargs={}, date=None), {})["config"]
    assert not {"chat_template_kwargs", "date"} & plain.keys()
    given = [{"date": "2025-07-31"}, {"date": "2025-08-01"}]
    given += [{"chat_template_kwargs": {"enable_thinking": value}} for value in (True, False)]
    assert len({key(), *(key(**fields) for fields in given)}) == 5


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "cannot be parsed"),
        ("{{ messages[7].content.x }}", "refuses|UndefinedError|has no element"),
        ("{{ raise_exception('no role here') }}", "no role here"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
    ids=["syntax", "undefined", "refusal", "sandbox"],
)
def test_a_template_that_fails_is_the_users_to_fix(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(ChatTemplate(write(tmp_path / "model", template)))
