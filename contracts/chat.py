"""Conversations to token ids and back: the chat template applied once, by the tokenizer that owns it.

Imported late by those who need it: transformers is loaded with the first tokenizer, and not everywhere installed.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError
from contracts.fingerprint import digest
from contracts.records import JsonObjects, Message
from contracts.template import ChatTemplate, TemplateRefusedError, as_template_sees, read_json, template_texts
from contracts.tokenizer import load_tokenizer
from contracts.turns import (
    THINK_END,
    lost,
    lost_call,
    lost_tool,
    mark,
    missing_marks,
    occurs,
    shows_python,
    texts_in,
    with_marks,
)

Tools = JsonObjects | msgspec.UnsetType
THINK = "<think>"
WAYS: tuple[dict[str, bool], ...] = ({}, {"parts": True}, {"arguments_as_text": True})
"""How turns can be handed to a template (`as_template_sees`), in the order in which this is tried."""
OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Private characters around what is to be read as text, between the template and the tokenizer."""
SLOT, SLOT_END = "\ue0f2", "\ue0f3"
"""The same around the number of a slot, where token ids go (`ChatTokenizer.filled`)."""


def slot(number: int) -> str:
    """What stands in a turn's text where token ids go that nobody's text can make."""
    return f"{SLOT}{number}{SLOT_END}"


def without_slots(text: str) -> str:
    """A text of others, in which nothing can be taken for a slot."""
    return _without(text, SLOT, SLOT_END)


class Answered(msgspec.Struct, frozen=True):
    """A conversation that ends with an answer, as token ids."""

    prompt: list[int]
    """As generation makes them, up to where the answer begins."""
    response: list[int]
    """The answer, with the token that ends it."""


class ChatTokenizer:
    """The tokenizer of a model directory, and its chat template if it has one."""

    def __init__(self, path: Path, variables: dict[str, Any] | None = None, date: str | None = None) -> None:
        """Load it.

        Args:
            variables: `chat_template_kwargs` of a config.
            date: the day that the template is told to be today.

        Raises:
            UserError: the directory holds no tokenizer that all environments read alike.
        """
        self.path = path
        self.tokenizer: Any = load_tokenizer(path)
        self.tokenizer.chat_template = template_texts(path).get("default")
        self.variables = variables
        self.date = date
        self.counts: Counter[str] = Counter()
        """What was done to conversations that somebody should know of."""
        self._ways: dict[Any, dict[str, bool]] = {}

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template, or a UserError where there is none."""
        return ChatTemplate(self.path, self.variables, self.date)

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = msgspec.UNSET,
        for_answer: bool = False,
        what: str = "a conversation",
    ) -> list[int]:
        """Token ids of a conversation; `for_answer` ends them where the assistant's answer begins, or, where the last
        turn is an assistant's, behind its text, which the answer goes on from (prefill).

        The text of special tokens inside a turn is read as text, and counted (`counts`).

        Raises:
            UserError: the template refuses the conversation, which `what` names, leaves some of it out, or begins it
                with two BOS tokens; or a turn is a whole conversation that was rendered already.
        """
        if for_answer and messages and messages[-1].role == "assistant":
            return self._begun(messages, tools, what)
        safe, tools = self._safe(messages, tools)
        return self._ids(self.render(safe, tools=tools, for_answer=for_answer, what=what), what)

    def filled(
        self, messages: Sequence[Message], ids: Sequence[int], *, tools: Tools = msgspec.UNSET, what: str
    ) -> tuple[list[int], dict[int, int]]:
        """Token ids of a conversation with `ids` in every `slot` of its turns' texts.

        What is between two slots is tokenized apart, so that nothing that a text says merges with them.

        Returns:
            The ids, and by the number of each slot where its own begin; those that the template leaves out are absent.

        Raises:
            UserError: as in `conversation`.
        """
        safe, tools = self._safe(messages, tools)
        first, *others = re.split(f"{SLOT}(\\d+){SLOT_END}", self.render(safe, tools=tools, what=what))
        found = self._encode(first)
        begins: dict[int, int] = {}
        for number, text in zip(others[::2], others[1::2], strict=True):
            begins[int(number)] = len(found)
            found += [*ids, *self._behind(text)]
        return self._begins_once(found, what), begins

    def _begun(self, messages: Sequence[Message], tools: Tools, what: str) -> list[int]:
        """Token ids of a conversation up to the end of the answer's beginning, its last turn.

        Raises:
            UserError: as in `conversation`; or the beginning has tool calls, or a token that ends answers.
        """
        *before, last = messages
        said = [last.content, *texts_in(last.reasoning_content)]
        if last.tool_calls or not self._stops.isdisjoint(token for text in said for token in self._encode(text)):
            held = "tool calls" if last.tool_calls else "a token that ends answers"
            raise UserError(f"the beginning of the answer in {what} holds {held}, so no answer can go on from it.")
        safe, tools = self._safe(before, tools)
        prompt = self.render(safe, tools=tools, for_answer=True, what=what)
        self.counts["begun_answers"] += 1
        return self._ids(prompt + self._beginning(prompt, safe, last, tools, what), what)

    def _beginning(self, prompt: str, before: Sequence[Message], last: Message, tools: Tools, what: str) -> str:
        """What follows a prompt's text where the answer begins with `last`: what the template writes before such a
        turn, and its text."""
        bare = prompt.rstrip()
        thinking = bare.endswith(THINK)
        if last.content.lstrip().startswith(THINK):  # thoughts that go on: no template can say that of a turn
            text = last.content.lstrip()
            return text.removeprefix(THINK).removeprefix(prompt[len(bare) :]) if thinking else text
        thoughts = "" if last.reasoning_content is msgspec.UNSET else last.reasoning_content
        marked, said = mark(len(before)), last.content or thoughts
        field = "content" if last.content else "reasoning_content"
        turn: Message = msgspec.structs.replace(last, **{field: marked})
        try:
            full = self.render([*before, turn], tools=tools, what=what)
        except UserError:
            full = ""
        if full.startswith(prompt) and marked in full:
            lead = full[len(prompt) :].partition(marked)[0]
            if said is thoughts or occurs(thoughts, lead):
                return lead + said
        elif not thoughts:
            return said if thinking else self._lead + said
        raise TemplateRefusedError(
            f"the chat template of {self.path} leaves out the thoughts with which the answer in {what} begins. Write "
            f"them into its text: {THINK}...{THINK_END}."
        )

    def answered(
        self, messages: Sequence[Message], *, tools: Tools = msgspec.UNSET, what: str = "a conversation"
    ) -> Answered | str:
        """Token ids of the conversation before its last turn, which is an assistant's, and of that turn as an answer.

        The prompt is what generation makes, and the answer what the template writes behind it, up to the token that
        ends it. Where the template writes other things there (models that think), or where the first characters of the
        answer would merge with the last of the prompt, the answer is tokenized apart.

        Returns:
            The ids, or why there are none: "stop_inside" (the answer holds a token that ends answers), "no_thinking"
            (the prompt has begun to think for the model, the answer has no thoughts), "left_out" (the template leaves
            out the thoughts or tool calls of the answer).

        Raises:
            UserError: as in `conversation`.
        """
        *before, last = messages
        said = [last.content, *texts_in([getattr(last, name) for name in ("reasoning_content", "tool_calls")])]
        control = {token for text in said for token in self._encode(text)} & self._control_ids
        if not control.isdisjoint(self.stop_ids):
            return "stop_inside"
        if control:
            self.counts["answers_with_special_tokens"] += 1
        before, tools = self._safe(before, tools)
        prompt_text = self.render(before, tools=tools, for_answer=True, what=what)
        prompt = self._ids(prompt_text, what)
        try:
            full_text = self.render([*before, last], tools=tools, what=what)
        except UserError:  # Mistral's, for example, leaves the system's turn out where the user's is not the last
            full_text = ""
        tail = full_text.removeprefix(prompt_text) if full_text.startswith(prompt_text) else ""
        if tail and self._holds(last, tail) and not _thinks_twice(last.content, tail):
            full = self._ids(full_text, what)
            response = full[len(prompt) :] if full[: len(prompt)] == prompt else self._behind(tail)
        else:
            text = _apart(prompt_text, last)
            if text in ("no_thinking", "left_out"):
                return text
            response = self._behind(self._lead + text)
        stops = self.stop_ids
        end = next((index for index, token in enumerate(response) if token in stops), None)
        return Answered(prompt, [*response, self.end_id] if end is None else response[: end + 1])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = msgspec.UNSET,
        for_answer: bool = False,
        what: str = "a conversation",
    ) -> str:
        """The text of a conversation, checked to hold all that went into it.

        Raises:
            UserError: as in `conversation`.
        """
        self._refuse_rendered(messages, what)
        way = self._way(messages, tools, for_answer, what)
        text = self._rendered(messages, tools, for_answer, what, **way)
        place = lost(messages, text)
        if place is not None:
            turn = messages[place]
            start = " ".join(turn.content.split())[:60]
            raise TemplateRefusedError(
                f"the chat template of {self.path} leaves out the text of turn {place + 1} ({turn.role}: {start!r}) of "
                f"{what}, or changes it. Use conversations that it knows how to write, or another template."
            )
        call = lost_call(messages, text)
        tool = None if tools is msgspec.UNSET else lost_tool(tools, text)
        if call is not None or tool is not None:
            part = f"tool calls ({call!r})" if call is not None else f"tools ({tool!r})"
            raise TemplateRefusedError(
                f"the chat template of {self.path} leaves out the {part} of {what}: it has no branch for them. Use a "
                "model whose template knows tools, or data without them."
            )
        return text

    @property
    def vocabulary(self) -> str:
        """Digest of what each token id stands for; two models with the same one can read each other's ids."""
        return digest(self.tokenizer.get_vocab())

    @property
    def fingerprint(self) -> str:
        """Digest of all that makes ids of conversations and text of ids: of tokenizer.json with its normalizer,
        pre-tokenizer and decoder, of the templates, the special tokens and the stop ids."""
        backend = msgspec.json.decode(self.tokenizer.backend_tokenizer.to_str())
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return digest([backend, special, template_texts(self.path), list(self.stop_ids)])

    @property
    def begin_id(self) -> int | None:
        """The token that only ever begins; None where there is none, or where it ends answers as well (GPT-2)."""
        begin: int | None = self.tokenizer.bos_token_id
        return None if begin in self.stop_ids else begin

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the tokenizer's EOS first, then those of generation_config.json (or config.json).

        Empty for a model that never answers, such as a reward model.
        """
        end = self.tokenizer.eos_token_id
        found = [] if end is None else [int(end)]
        for name in ("generation_config.json", "config.json"):
            ids = read_json(self.path / name).get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(isinstance(token, int) and token >= 0 for token in ids):
                    raise UserError(
                        f"eos_token_id in {self.path / name} is {ids}: give the ids of the tokens that end answers."
                    )
                found += ids
                break
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an answer, the template's way: the first stop token that it writes behind one, else the
        first of all."""
        behind = self._behind(self._sample.rpartition(mark(1))[2])
        return next((token for token in behind if token in self.stop_ids), self.stop_ids[0])

    def require_stop(self) -> None:
        """Raise UserError unless there is a token that ends an answer."""
        if not self.stop_ids:
            raise UserError(
                f"{self.path} names no EOS token, so no answer could ever end. Set eos_token in its "
                'tokenizer_config.json, or "eos_token_id" in its generation_config.json.'
            )

    def following(self, text: str) -> list[int]:
        """Token ids of a text that follows another; special tokens in it are read as such."""
        return self._behind(text)

    def text(self, response_ids: Sequence[int], behind: Sequence[int] = ()) -> str:
        """A response without its stop token and other special tokens.

        Args:
            behind: the tokens before it, where it goes on with a text: decoders leave the first blank of a text out.
        """
        ids = list(response_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        if behind:
            known, whole = self._decoded(behind), self._decoded([*behind, *ids])
            if whole.startswith(known):
                return whole[len(known) :]
        return self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    # Rendering.

    def _rendered(self, messages: Sequence[Message], tools: Tools, for_answer: bool, what: str, **way: bool) -> str:
        try:
            return self.template.render(
                as_template_sees(messages, **way),
                tools=None if tools is msgspec.UNSET else tools,
                for_answer=for_answer,
            )
        except TemplateRefusedError as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateRefusedError(
                f"the chat template of {self.path} refuses {what} of the turns {roles}: {error}. Use conversations "
                "with the roles that it knows, or another model."
            ) from error

    def _way(self, messages: Sequence[Message], tools: Tools, for_answer: bool, what: str) -> dict[str, bool]:
        """How such turns have to be handed to the template, so that it writes all of them.

        Tried once for each sequence of roles, with words that no template has in the place of the texts.

        Raises:
            UserError: it leaves some turn out either way.
        """
        shape = tuple((message.role, not message.content.strip(), bool(message.tool_calls)) for message in messages)
        known = (shape, tools is msgspec.UNSET, for_answer)
        if known not in self._ways:
            self._ways[known] = self._first_way(with_marks(messages), tools, for_answer, what)
        return self._ways[known]

    def _first_way(self, turns: Sequence[Message], tools: Tools, for_answer: bool, what: str) -> dict[str, bool]:
        ways = WAYS if any(turn.tool_calls for turn in turns) else WAYS[:2]
        problem: UserError | None = None
        for way in ways:
            try:
                text = self._rendered(turns, tools, for_answer, what, **way)
            except TemplateRefusedError as error:
                problem = problem or error
                continue
            missing = missing_marks(turns, text)
            if not missing and not (way.get("parts") and shows_python(text)):
                return way
            roles = " and ".join(dict.fromkeys(turns[place].role for place in missing))
            problem = problem or TemplateRefusedError(
                f"the chat template of {self.path} leaves out the {roles} turn of {what}: its text is not in what the "
                f"template renders. Use conversations without {roles} turns there (of prompts: no `system`), or a "
                "template that writes them."
            )
        assert problem is not None
        raise problem

    def _refuse_rendered(self, messages: Sequence[Message], what: str) -> None:
        """Raise UserError where a user's turn is a conversation that this template has rendered already."""
        openings, ends = self._surroundings
        if not openings or not ends:
            return
        for message in messages:
            text = _without(message.content, OPEN, CLOSE).strip()
            if message.role == "user" and text.endswith(ends):
                bare = text.removeprefix(self.tokenizer.bos_token or "")
                if bare.lstrip().startswith(openings):
                    raise UserError(
                        f"the user's turn of {what} is a whole conversation that the chat template of {self.path} has "
                        f"rendered already ({bare[:40]!r}...); it would be rendered twice. Give the turns themselves, "
                        'as `messages`: [{"role": "user", "content": ...}].'
                    )

    @functools.cached_property
    def _surroundings(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The first words of rendered conversations, and what follows the text of a user's turn at their end."""
        openings: set[str] = set()
        ends: set[str] = set()
        begin = self.tokenizer.bos_token or ""
        for messages in ([Message("user", "?")], [Message("system", "!"), Message("user", "?")]):
            turns = with_marks(messages)
            for for_answer in (True, False):
                try:
                    way = self._first_way(turns, msgspec.UNSET, for_answer, "a conversation")
                    text = self._rendered(turns, msgspec.UNSET, for_answer, "a conversation", **way)
                except UserError:  # it knows no system turn
                    continue
                openings.update(text.partition(mark(0))[0].strip().removeprefix(begin).split()[:1])
                ends.add(text.rpartition(mark(len(turns) - 1))[2].strip())
        return tuple(openings), tuple(ends - {""})

    @functools.cached_property
    def _sample(self) -> str:
        """A question with its answer, both of them marks."""
        return self.render(with_marks([Message("user", "?"), Message("assistant", "!")]))

    @functools.cached_property
    def _lead(self) -> str:
        """The white space that the template writes before an answer."""
        before = self._sample.rpartition(mark(1))[0]
        prompt = self.render(with_marks([Message("user", "?")]), for_answer=True)
        lead = before.removeprefix(prompt)
        return lead if before.startswith(prompt) and not lead.strip() else ""

    def _holds(self, answer: Message, text: str) -> bool:
        """Whether a text holds all of an answer: its content, thoughts and calls."""
        thoughts = "" if answer.reasoning_content is msgspec.UNSET else answer.reasoning_content
        return occurs(answer.content, text) and occurs(thoughts, text) and lost_call([answer], text) is None

    # Token ids.

    def _ids(self, text: str, what: str) -> list[int]:
        return self._begins_once(self._encode(text), what)

    def _begins_once(self, ids: list[int], what: str) -> list[int]:
        begin = self.tokenizer.bos_token_id
        if begin is not None and begin not in self.stop_ids and ids[:2] == [begin, begin]:
            raise UserError(
                f"the chat template of {self.path} begins {what} with two BOS tokens ({self.tokenizer.bos_token!r}), "
                "which costs quality without an error. Take one out: of its chat_template, of the tokenizer's "
                "post-processor, or of the text."
            )
        return ids

    def _encode(self, text: str, *, as_text: bool = False) -> list[int]:
        """Token ids of a text; `as_text`: of special tokens in it, those of their characters."""
        if OPEN in text:
            first, *others = re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)
            ids = self._encode(_without(first, OPEN, CLOSE))
            for number, piece in enumerate(others):
                ids += self._behind(_without(piece, OPEN, CLOSE), as_text=number % 2 == 0)
            return ids
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = as_text
        try:
            ids = list(backend.encode(text, add_special_tokens=False).ids)
        finally:
            backend.encode_special_tokens = False
        if as_text and not self._control_ids.isdisjoint(ids):
            raise UserError(
                f"the tokenizer of {self.path} reads {text!r} as a special token wherever it occurs, so a conversation "
                "that quotes it cannot be written. Take it out of the data."
            )
        return ids

    def _behind(self, text: str, *, as_text: bool = False) -> list[int]:
        """Token ids of a text that follows another: without what some tokenizers put before the first word."""
        if not text:
            return []
        newline, both = self._encode("\n"), self._encode("\n" + text, as_text=as_text)
        return (
            both[len(newline) :] if newline and both[: len(newline)] == newline else self._encode(text, as_text=as_text)
        )

    def _safe(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Message], Tools]:
        """The same turns and tools, with special tokens in their texts marked as text."""
        given: Any = [msgspec.structs.asdict(message) for message in messages]
        if not any(map(self._control_text.search, texts_in([given, tools]))):
            return list(messages), tools
        self.counts["special_tokens_as_text"] += 1
        return [Message(**self._marked(turn)) for turn in given], self._marked(tools)

    def _marked(self, value: Any) -> Any:
        """A value with the special tokens in all of its texts marked as text."""
        if isinstance(value, str):
            return self._control_text.sub(f"{OPEN}\\g<0>{CLOSE}", _without(value, OPEN, CLOSE))
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._marked, value))
        return value

    @functools.cached_property
    def _control(self) -> dict[int, str]:
        """Tokens that steer a model: the special ones, and those that end an answer."""
        decoder = self.tokenizer.added_tokens_decoder
        return {key: token.content for key, token in decoder.items() if token.special or key in self.stop_ids}

    @functools.cached_property
    def _stops(self) -> set[int]:
        return set(self.stop_ids)

    @functools.cached_property
    def _control_ids(self) -> set[int]:
        return set(self._control)

    @functools.cached_property
    def _control_text(self) -> re.Pattern[str]:
        texts = sorted((text for text in self._control.values() if text.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _apart(prompt: str, answer: Message) -> str:
    """What an answer adds to a prompt that may have begun to think for the model (`<think>` at its end), where the
    template does not say it; or why that cannot be told."""
    thoughts = "" if answer.reasoning_content is msgspec.UNSET else answer.reasoning_content
    begun = prompt.rstrip()
    if not begun.endswith(THINK):
        return "left_out" if thoughts or answer.tool_calls else answer.content
    if not thoughts and THINK_END not in answer.content:
        return "no_thinking"
    if answer.tool_calls:
        return "left_out"
    if thoughts:
        return f"{thoughts}\n{THINK_END}\n\n{answer.content}"
    text = answer.content.lstrip()
    return text.removeprefix(THINK).removeprefix(prompt[len(begun) :]) if text.startswith(THINK) else answer.content


def _thinks_twice(answer: str, tail: str) -> bool:
    """Whether a template has written thoughts of its own before an answer that has its thoughts in its text."""
    return THINK_END in answer and tail.count(THINK_END) > answer.count(THINK_END)


def _without(text: str, *characters: str) -> str:
    for character in characters:
        text = text.replace(character, "")
    return text
