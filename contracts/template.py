"""Reads and renders a model's chat template, independently of the installed libraries.

transformers renders templates too, but differently from version to version, and with the machine's clock. Here a
template gets what transformers' documentation of chat templates promises (`messages`, `tools`, `documents`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, the tag `generation`), and the
date is an argument. Needs jinja2, which is imported on first use.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from pydantic import AfterValidator

from contracts.config import Section, described_pattern, identity
from contracts.errors import UserError
from contracts.records import Message

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception", *NAMED_TOKENS})
"""Variables of a template that the user may not set."""
DATE = described_pattern(r"^\d{4}-\d{2}-\d{2}$", "a day like 2025-07-31")


def checked_variables(value: dict[str, Any]) -> dict[str, Any]:
    """Return `chat_template_kwargs`; raise ValueError if they set a reserved variable."""
    if taken := sorted(RESERVED & value.keys()):
        raise ValueError(f"{taken[0]} is set by Ratchet, from the data and the tokenizer. Take it out.")
    return value


def checked_date(value: str | None) -> str | None:
    """Return the date; raise ValueError if it does not exist."""
    if value is not None:
        try:
            datetime.date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{error}. Give a day like 2025-07-31.") from error
    return value


Variables = Annotated[dict[str, Any], AfterValidator(checked_variables)]
"""The type of a config's `chat_template_kwargs`."""
Day = Annotated[str | None, AfterValidator(checked_date)]
"""The type of a config's `date`; its field has the pattern `DATE`."""


class TemplateSettings(Section):
    """Settings of the rendering of a model's conversations."""

    chat_template_kwargs: Variables = identity({}, later=True)
    """Variables for the model's chat template, for example {enable_thinking: false} or {date_string: 26 Jul 2024};
    each must be one that the template reads. Tools come with the data."""


class ChatFields(TemplateSettings):
    """Config keys of a stage that renders conversations."""

    date: Day = identity(None, later=True, pattern=DATE)
    """The date (2025-07-31) for a chat template that writes today's; required for such a template."""


class ChatTemplate:
    """The chat template of a model directory, with the variables and the date that a stage renders it with."""

    def __init__(
        self, path: Path, variables: dict[str, Any] | None = None, date: str | None = None, *, text: str | None = None
    ) -> None:
        """Read the template.

        Args:
            variables: `chat_template_kwargs`.
            date: the date that the template sees as today's.
            text: a template to use instead of the directory's.

        Raises:
            UserError: there is no template, it has a syntax error, or it does not read one of `variables`.
        """
        self.path = path
        self.texts = template_texts(path) if text is None else {"default": text}
        if "default" not in self.texts:
            raise UserError(
                f"the tokenizer of {path} has no chat template, so a conversation cannot be turned into tokens. Use an "
                "instruction-tuned model, or put a chat_template.jinja into the directory."
            )
        self.special = special_tokens(path)
        self.variables = dict(variables or {})
        self.date = date
        self._clock_read = False
        unknown = sorted(name for name in self.variables if all(name not in read for read in self._read.values()))
        if unknown:
            known = sorted({name for read in self._read.values() for name in read} - RESERVED - self.special.keys())
            raise UserError(
                f"chat_template_kwargs.{unknown[0]} is set, but the chat template of {path} does not read it. "
                + (f"It reads {', '.join(known)}." if known else "It reads none. Take it out.")
            )

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] | None, for_answer: bool
    ) -> str:
        """Render a conversation; with `for_answer`, up to where the assistant's answer begins.

        Raises:
            UserError: the template refuses the conversation, fails, or reads today's date and none was given.
        """
        from jinja2 import TemplateError

        compiled = self._compiled["tool_use" if tools and "tool_use" in self.texts else "default"]
        try:
            return str(
                compiled.render(
                    **{"documents": None, **self.special, **self.variables},
                    messages=messages,
                    tools=list(tools) if tools else None,
                    add_generation_prompt=for_answer,
                )
            )
        except UserError:
            raise
        except TemplateError as error:
            # Templates refuse conversations with messages of their own (raise_exception), for example a system turn.
            raise TemplateRefusedError(str(error)) from error
        except Exception as error:  # a template is arbitrary code
            raise TemplateRefusedError(
                f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            ) from error

    def reads_clock(self) -> bool:
        """Whether the template reads today's date in any of several trial conversations."""
        self._clock_read = False
        date, self.date = self.date, self.date or "2000-01-01"
        try:
            for messages, tools in _trials():
                try:
                    self.render(messages, tools=tools, for_answer=True)
                except TemplateRefusedError:  # for example because of an unknown role
                    continue
        finally:
            self.date = date
        return self._clock_read

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        from jinja2 import TemplateSyntaxError

        environment = _environment()
        environment.globals["strftime_now"] = self._today
        compiled = {}
        for name, text in self.texts.items():
            try:
                compiled[name] = environment.from_string(text)
            except TemplateSyntaxError as error:
                raise UserError(
                    f"the chat template of {self.path} cannot be parsed: {error.message} (line "
                    f"{error.lineno}). Fix it, or take that of the model's authors."
                ) from error
        return compiled

    @functools.cached_property
    def _read(self) -> dict[str, set[str]]:
        """The variables that each template reads."""
        from jinja2.meta import find_undeclared_variables

        environment = _environment()
        _ = self._compiled  # raises a UserError for a syntax error
        return {name: find_undeclared_variables(environment.parse(text)) for name, text in self.texts.items()}

    def _today(self, format: str) -> str:
        self._clock_read = True
        if self.date is None:
            raise UserError(
                f"the chat template of {self.path} writes today's date, so the same prompts would differ tomorrow. "
                "Set the date that it has to write: date=YYYY-MM-DD (part of the stage key; give the same to all "
                "stages that render for this model), or, if the template reads a variable for it, chat_template_kwargs."
            )
        return datetime.datetime.fromisoformat(self.date).strftime(format)


def reads_clock(path: Path, variables: dict[str, Any] | None = None) -> bool:
    """Whether the chat template of a model directory, given these variables, reads today's date."""
    if not any("strftime_now" in text for text in template_texts(path).values()):
        return False
    return ChatTemplate(path, variables).reads_clock()


class TemplateRefusedError(UserError):
    """A template refuses a conversation, fails on it, or drops a part of it."""


def template_texts(path: Path) -> dict[str, str]:
    """Read the chat templates of a model directory, by name; `default` is used unless tools have one of their own."""
    config = read_json(path / "tokenizer_config.json")
    found = config.get("chat_template")
    texts = {}
    if isinstance(found, str):
        texts["default"] = found
    elif isinstance(found, list):
        try:
            texts.update({item["name"]: item["template"] for item in found})
        except (TypeError, KeyError) as error:
            raise UserError(
                f"chat_template in {path / 'tokenizer_config.json'} is a list, but not of objects with `name` and "
                "`template`. Take that of the model's authors."
            ) from error
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").is_file():
        files["default"] = path / "chat_template.jinja"
    for name, file in files.items():
        try:
            texts[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {error.reason}. Take that of the model's authors.") from error
    return {name: text for name, text in texts.items() if text.strip()}


def special_tokens(path: Path) -> dict[str, str]:
    """Read the special tokens of a model directory that have a name, like eos_token."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(path / file)
        named = {name: config.get(name) for name in NAMED_TOKENS}
        extra = config.get("extra_special_tokens")
        named |= extra if isinstance(extra, dict) else {}
        named |= config.get("model_specific_special_tokens") or {}
        for name, value in named.items():
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
    return found


def template_messages(
    messages: Sequence[Message], *, parts: bool = False, arguments_as_text: bool = False
) -> list[dict[str, Any]]:
    """Convert messages to the dicts that a template reads.

    Args:
        parts: pass content as a list of parts, as templates of vision models expect.
        arguments_as_text: pass the arguments of tool calls as JSON text, as some templates expect; most expect an
            object, which they write as JSON themselves.
    """
    turns = []
    for message in messages:
        turn = msgspec.to_builtins(message)
        if parts:
            turn["content"] = [{"type": "text", "text": message.content}]
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]  # the name in gpt-oss's template
        if "tool_calls" in turn:
            turn["tool_calls"] = [_call(call, as_text=arguments_as_text) for call in turn["tool_calls"]]
        turns.append(turn)
    return turns


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Convert a tool call's arguments to text or to an object."""
    function = call.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    return {**call, "function": {**function, "arguments": arguments}}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a model directory; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Download or save the model again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object. Download or save the model again.")
    return data


@functools.cache
def _environment_class() -> Any:
    """The class of the templates' sandbox; a function, because jinja2 is imported with the first template."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Implements `{% generation %}`, which marks an assistant's text without changing it."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> Any:
            return caller()

    return functools.partial(
        ImmutableSandboxedEnvironment,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )


def _environment() -> Any:
    from jinja2 import TemplateError

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = _environment_class()()
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment


def _trials() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Conversations that together exercise the branches of a template."""
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}
    turns = [user, {"role": "assistant", "content": "Hi."}, user]
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    function = {"name": "look", "description": "Look it up.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    conversations = [[user], [system, user], turns, [system, *turns]]
    return [(conversation, given) for given in (None, tools) for conversation in conversations]
