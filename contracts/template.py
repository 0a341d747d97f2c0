"""A model's chat template: read from its directory, rendered here, whatever libraries are installed.

transformers renders templates too, but not the same way in all its versions, and by the clock of the machine. Here a
template sees what the field's templates expect (transformers' documentation of chat templates: `messages`, `tools`,
`documents`, `add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, the tag
`generation`), and the date that it is given. Needs jinja2, which is loaded late.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from pydantic import AfterValidator

from contracts.config import Section, identity, worded
from contracts.errors import UserError
from contracts.records import Message

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OURS = frozenset({"messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception", *NAMED_TOKENS})
"""Variables of a template that are not the user's to set."""
DATE = worded(r"^\d{4}-\d{2}-\d{2}$", "a day like 2025-07-31")


def checked_variables(value: dict[str, Any]) -> dict[str, Any]:
    """`chat_template_kwargs`, or a ValueError where they would replace what is not the user's to set."""
    if taken := sorted(OURS & value.keys()):
        raise ValueError(f"{taken[0]} is set by Ratchet, from the data and the tokenizer. Take it out.")
    return value


def checked_date(value: str | None) -> str | None:
    """A date, or a ValueError where there is no such day."""
    if value is not None:
        try:
            datetime.date.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{error}. Give a day like 2025-07-31.") from error
    return value


Variables = Annotated[dict[str, Any], AfterValidator(checked_variables)]
"""A config's `chat_template_kwargs`."""
Day = Annotated[str | None, AfterValidator(checked_date)]
"""A config's `date`; its field has the pattern `DATE`."""


class TemplateSettings(Section):
    """Settings of how a model's conversations are rendered."""

    chat_template_kwargs: Variables = identity({}, later=True)
    """Variables for the model's chat template, for example {enable_thinking: false} or {date_string: 26 Jul 2024};
    each must be one that the template reads. Tools come with the data."""


class ChatFields(TemplateSettings):
    """What a stage that renders conversations is told beside them."""

    date: Day = identity(None, later=True, pattern=DATE)
    """The date (2025-07-31) for a chat template that writes today's; required for such a template."""


class ChatTemplate:
    """The chat template of a model directory, with the variables and the date that a stage renders it with."""

    def __init__(
        self, path: Path, variables: dict[str, Any] | None = None, date: str | None = None, *, text: str | None = None
    ) -> None:
        """Read it.

        Args:
            variables: `chat_template_kwargs`.
            date: what the template is told to be today.
            text: the template, if it is not the directory's.

        Raises:
            UserError: there is none, it is no template, or it reads none of the `variables`.
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
            known = sorted({name for read in self._read.values() for name in read} - OURS - self.special.keys())
            raise UserError(
                f"chat_template_kwargs.{unknown[0]} is set, but the chat template of {path} does not read it. "
                + (f"It reads {', '.join(known)}." if known else "It reads none. Take it out.")
            )

    def render(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] | None, for_answer: bool
    ) -> str:
        """The text of a conversation; `for_answer` ends it where the assistant's answer begins.

        Raises:
            UserError: the template refuses it, fails, or asks for today's date where none was given.
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
            # Templates refuse in their own words (jinja's raise_exception), for example a system turn.
            raise TemplateRefusedError(str(error)) from error
        except Exception as error:  # templates are programs of others
            raise TemplateRefusedError(
                f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            ) from error

    def reads_clock(self) -> bool:
        """Whether it asks for today's date, in any of the conversations that are tried."""
        self._clock_read = False
        date, self.date = self.date, self.date or "2000-01-01"
        try:
            for messages, tools in _trials():
                try:
                    self.render(messages, tools=tools, for_answer=True)
                except TemplateRefusedError:  # of a role that it does not know, for example
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
                    f"the chat template of {self.path} is no template that can be read: {error.message} (line "
                    f"{error.lineno}). Fix it, or take that of the model's authors."
                ) from error
        return compiled

    @functools.cached_property
    def _read(self) -> dict[str, set[str]]:
        """Variables that each template reads from outside."""
        from jinja2.meta import find_undeclared_variables

        environment = _environment()
        _ = self._compiled  # a syntax error is explained there
        return {name: find_undeclared_variables(environment.parse(text)) for name, text in self.texts.items()}

    def _today(self, format: str) -> str:
        self._clock_read = True
        if self.date is None:
            raise UserError(
                f"the chat template of {self.path} writes today's date, so the same prompts would be others tomorrow. "
                "Give the day that it is to write: date=YYYY-MM-DD (part of the stage key; give the same to all stages "
                "that render for this model), or, where the template reads a variable for it, chat_template_kwargs."
            )
        return datetime.datetime.fromisoformat(self.date).strftime(format)


def reads_clock(path: Path, variables: dict[str, Any] | None = None) -> bool:
    """Whether the chat template of a model directory, given these variables, asks for today's date."""
    if not any("strftime_now" in text for text in template_texts(path).values()):
        return False
    return ChatTemplate(path, variables).reads_clock()


class TemplateRefusedError(UserError):
    """A template refuses a conversation, fails at it, or leaves some of it out."""


def template_texts(path: Path) -> dict[str, str]:
    """The chat templates of a model directory by name; `default` is the one that is used."""
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
    """The special tokens of a model directory that have a name, like eos_token."""
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


def as_template_sees(
    messages: Sequence[Message], *, parts: bool = False, arguments_as_text: bool = False
) -> list[dict[str, Any]]:
    """Turns as a template reads them.

    Args:
        parts: content as a list of parts, as templates of vision models want it.
        arguments_as_text: arguments of tool calls as JSON in a text, as some templates want them; most write an object
            as JSON.
    """
    turns = []
    for message in messages:
        turn = msgspec.to_builtins(message)
        if parts:
            turn["content"] = [{"type": "text", "text": message.content}]
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]  # gpt-oss's name for it
        if "tool_calls" in turn:
            turn["tool_calls"] = [_call(call, as_text=arguments_as_text) for call in turn["tool_calls"]]
        turns.append(turn)
    return turns


def _call(call: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """A tool call with its arguments in the form that is wanted."""
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
    """A JSON object of a model directory; nothing where there is no such file."""
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
    """The sandbox of templates, made late, because jinja2 is loaded with the first template."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant wrote; it changes nothing in the text."""

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
    """Conversations whose renderings show together what a template asks for."""
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}
    turns = [user, {"role": "assistant", "content": "Hi."}, user]
    parameters = {"type": "object", "properties": {"x": {"type": "string", "description": "x"}}, "required": ["x"]}
    function = {"name": "look", "description": "Look it up.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    conversations = [[user], [system, user], turns, [system, *turns]]
    return [(conversation, given) for given in (None, tools) for conversation in conversations]
