"""Converts conversations to token ids and back, with the chat template applied once by the model's own tokenizer.

The first `ChatTokenizer` of a process imports transformers, which not every environment has.
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
from contracts.template import ChatTemplate, TemplateRefusedError, read_json, template_messages, template_texts
from contracts.tokenizer import load_tokenizer
from contracts.turns import (
    THINK_END,
    marker,
    missing_call,
    missing_markers,
    missing_tool,
    missing_turn,
    occurs,
    shows_parts,
    texts_in,
    with_markers,
)

Tools = JsonObjects | msgspec.UnsetType
THINK = "<think>"
FORMATS: tuple[dict[str, bool], ...] = ({}, {"parts": True}, {"arguments_as_text": True})
"""Formats in which a template may expect turns (arguments of `template_messages`), in the order of the attempts."""
OPEN, CLOSE = "\ue0f0", "\ue0f1"
"""Private-use characters that enclose special tokens which the tokenizer must read as text."""
SLOT, SLOT_END = "\ue0f2", "\ue0f3"
"""Private-use characters that enclose a slot's number; token ids replace it (`ChatTokenizer.with_slots_filled`)."""


def slot(number: int) -> str:
    """A placeholder in a turn's text for token ids that no text can produce."""
    return f"{SLOT}{number}{SLOT_END}"


def without_slots(text: str) -> str:
    """Remove the characters of slots from a text, so that nothing in it can be mistaken for a slot."""
    return _without(text, SLOT, SLOT_END)


class PromptAndAnswer(msgspec.Struct, frozen=True):
    """A conversation that ends with an answer, as token ids."""

    prompt: list[int]
    """The prompt's tokens as in generation, up to where the answer begins."""
    response: list[int]
    """The answer's tokens, including the one that ends it."""


class ChatTokenizer:
    """The tokenizer of a model directory, and its chat template if it has one."""

    def __init__(self, path: Path, variables: dict[str, Any] | None = None, date: str | None = None) -> None:
        """Load the tokenizer.

        Args:
            variables: `chat_template_kwargs` of a config.
            date: the date that the template sees as today's.

        Raises:
            UserError: the directory has no tokenizer that all environments read alike.
        """
        self.path = path
        self.tokenizer: Any = load_tokenizer(path)
        self.tokenizer.chat_template = template_texts(path).get("default")
        self.variables = variables
        self.date = date
        self.counts: Counter[str] = Counter()
        """Counts of changes to conversations that the user should know about."""
        self._formats: dict[Any, dict[str, bool]] = {}

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template; UserError if there is none."""
        return ChatTemplate(self.path, self.variables, self.date)

    def conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = msgspec.UNSET,
        for_answer: bool = False,
        what: str = "a conversation",
    ) -> list[int]:
        """Token ids of a conversation; with `for_answer`, up to where the assistant's answer begins or, if the last
        turn is an assistant's (prefill), up to the end of its text.

        Special tokens that are written inside a turn are read as text, and counted (`counts`).

        Args:
            what: the conversation's name for messages.

        Raises:
            UserError: the template refuses the conversation, drops a part of it, or begins it with two BOS tokens; or a
                turn is a whole conversation that was rendered already.
        """
        if for_answer and messages and messages[-1].role == "assistant":
            return self._with_prefill(messages, tools, what)
        safe, tools = self._safe(messages, tools)
        return self._ids(self.render(safe, tools=tools, for_answer=for_answer, what=what), what)

    def with_slots_filled(
        self, messages: Sequence[Message], ids: Sequence[int], *, tools: Tools = msgspec.UNSET, what: str
    ) -> tuple[list[int], dict[int, int]]:
        """Token ids of a conversation, with `ids` in place of every `slot` in its turns' texts.

        The text between two slots is tokenized separately, so that it cannot merge with the ids.

        Returns:
            The ids, and the index at which those of each slot begin, by its number; slots that the template drops are
            absent.

        Raises:
            UserError: as in `conversation`.
        """
        safe, tools = self._safe(messages, tools)
        first, *others = re.split(f"{SLOT}(\\d+){SLOT_END}", self.render(safe, tools=tools, what=what))
        found = self._encode(first)
        begins: dict[int, int] = {}
        for number, text in zip(others[::2], others[1::2], strict=True):
            begins[int(number)] = len(found)
            found += [*ids, *self._continuation(text)]
        return self._with_one_bos(found, what), begins

    def _with_prefill(self, messages: Sequence[Message], tools: Tools, what: str) -> list[int]:
        """Token ids of a conversation up to the end of its prefill, the last turn.

        Raises:
            UserError: as in `conversation`; or the prefill has tool calls or a stop token.
        """
        *before, last = messages
        texts = [last.content, *texts_in(last.reasoning_content)]
        if last.tool_calls or not self._stops.isdisjoint(token for text in texts for token in self._encode(text)):
            held = "tool calls" if last.tool_calls else "a token that ends answers"
            raise UserError(f"the beginning of the answer in {what} holds {held}, so no answer can go on from it.")
        safe, tools = self._safe(before, tools)
        prompt = self.render(safe, tools=tools, for_answer=True, what=what)
        self.counts["begun_answers"] += 1
        return self._ids(prompt + self._prefill_text(prompt, safe, last, tools, what), what)

    def _prefill_text(self, prompt: str, before: Sequence[Message], last: Message, tools: Tools, what: str) -> str:
        """The text that follows the rendered prompt if the answer begins with the prefill `last`: the template's text
        before such a turn, and the turn's own."""
        bare = prompt.rstrip()
        thinking = bare.endswith(THINK)
        if last.content.lstrip().startswith(THINK):  # unfinished thoughts, which no template can render
            text = last.content.lstrip()
            return text.removeprefix(THINK).removeprefix(prompt[len(bare) :]) if thinking else text
        thoughts = "" if last.reasoning_content is msgspec.UNSET else last.reasoning_content
        marked, prefill = marker(len(before)), last.content or thoughts
        field = "content" if last.content else "reasoning_content"
        turn: Message = msgspec.structs.replace(last, **{field: marked})
        try:
            full = self.render([*before, turn], tools=tools, what=what)
        except UserError:
            full = ""
        if full.startswith(prompt) and marked in full:
            lead = full[len(prompt) :].partition(marked)[0]
            if prefill is thoughts or occurs(thoughts, lead):
                return lead + prefill
        elif not thoughts:
            return prefill if thinking else self._answer_lead + prefill
        raise TemplateRefusedError(
            f"the chat template of {self.path} leaves out the thoughts with which the answer in {what} begins. Write "
            f"them into its text: {THINK}...{THINK_END}."
        )

    def prompt_and_answer(
        self, messages: Sequence[Message], *, tools: Tools = msgspec.UNSET, what: str = "a conversation"
    ) -> PromptAndAnswer | str:
        """Token ids of a conversation that ends with an assistant's turn: those of the prompt, and those of the answer.

        The prompt is the same as in generation, and the answer is what the template writes after it, up to the token
        that ends it. If the template writes anything else there (reasoning models), or if the first characters of the
        answer would merge with the last ones of the prompt, the answer is tokenized separately.

        Returns:
            The ids, or the reason why there are none: "stop_inside" (the answer contains a stop token), "no_thinking"
            (the prompt ends with <think>, but the answer has no thoughts), "left_out" (the template drops the answer's
            thoughts or tool calls).

        Raises:
            UserError: as in `conversation`.
        """
        *before, last = messages
        texts = [last.content, *texts_in([getattr(last, name) for name in ("reasoning_content", "tool_calls")])]
        control = {token for text in texts for token in self._encode(text)} & self._control_ids
        if not control.isdisjoint(self.stop_ids):
            return "stop_inside"
        if control:
            self.counts["answers_with_special_tokens"] += 1
        before, tools = self._safe(before, tools)
        prompt_text = self.render(before, tools=tools, for_answer=True, what=what)
        prompt = self._ids(prompt_text, what)
        try:
            full_text = self.render([*before, last], tools=tools, what=what)
        except UserError:  # Mistral's template, for example, drops the system turn unless the last turn is the user's
            full_text = ""
        tail = full_text.removeprefix(prompt_text) if full_text.startswith(prompt_text) else ""
        if tail and self._contains(last, tail) and not _thinks_twice(last.content, tail):
            full = self._ids(full_text, what)
            response = full[len(prompt) :] if full[: len(prompt)] == prompt else self._continuation(tail)
        else:
            text = _answer_text(prompt_text, last)
            if text in ("no_thinking", "left_out"):
                return text
            response = self._continuation(self._answer_lead + text)
        stops = self.stop_ids
        end = next((index for index, token in enumerate(response) if token in stops), None)
        return PromptAndAnswer(prompt, [*response, self.end_id] if end is None else response[: end + 1])

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = msgspec.UNSET,
        for_answer: bool = False,
        what: str = "a conversation",
    ) -> str:
        """Render a conversation as text, and check that no turn, tool call or tool is missing.

        Raises:
            UserError: as in `conversation`.
        """
        self._refuse_rendered(messages, what)
        turn_format = self._format(messages, tools, for_answer, what)
        text = self._rendered(messages, tools, for_answer, what, **turn_format)
        place = missing_turn(messages, text)
        if place is not None:
            turn = messages[place]
            start = " ".join(turn.content.split())[:60]
            raise TemplateRefusedError(
                f"the chat template of {self.path} leaves out the text of turn {place + 1} ({turn.role}: {start!r}) of "
                f"{what}, or changes it. Use conversations that it knows how to write, or another template."
            )
        call = missing_call(messages, text)
        tool = None if tools is msgspec.UNSET else missing_tool(tools, text)
        if call is not None or tool is not None:
            part = f"tool calls ({call!r})" if call is not None else f"tools ({tool!r})"
            raise TemplateRefusedError(
                f"the chat template of {self.path} leaves out the {part} of {what}: it has no branch for them. Use a "
                "model whose template knows tools, or data without them."
            )
        return text

    @property
    def vocabulary(self) -> str:
        """Digest of the mapping from tokens to ids; models with equal digests can read each other's ids."""
        return digest(self.tokenizer.get_vocab())

    @property
    def fingerprint(self) -> str:
        """Digest of everything that affects encoding and decoding: tokenizer.json with its normalizer, pre-tokenizer
        and decoder, the templates, the special tokens and the stop ids."""
        backend = msgspec.json.decode(self.tokenizer.backend_tokenizer.to_str())
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        return digest([backend, special, template_texts(self.path), list(self.stop_ids)])

    @property
    def bos_id(self) -> int | None:
        """The BOS token; None if there is none, or if it is a stop token as well (GPT-2)."""
        begin: int | None = self.tokenizer.bos_token_id
        return None if begin in self.stop_ids else begin

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop tokens: the tokenizer's EOS first, then those of generation_config.json (or config.json).

        May be empty for a model that does not generate, such as a reward model.
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
        """The token that ends an answer in the template: the first stop token that it writes after one, or else the
        first of all stop tokens."""
        following = self._continuation(self._sample.rpartition(marker(1))[2])
        return next((token for token in following if token in self.stop_ids), self.stop_ids[0])

    def require_stop(self) -> None:
        """Raise UserError if there are no stop tokens."""
        if not self.stop_ids:
            raise UserError(
                f"{self.path} names no EOS token, so no answer could ever end. Set eos_token in its "
                'tokenizer_config.json, or "eos_token_id" in its generation_config.json.'
            )

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues another one; special tokens written in it become their own ids."""
        return self._continuation(text)

    def text(self, response_ids: Sequence[int], preceding: Sequence[int] = ()) -> str:
        """Decode a response without its stop token and other special tokens.

        Args:
            preceding: the tokens before it, if it continues a text; without them decoders may drop its first space.
        """
        ids = list(response_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        if preceding:
            known, whole = self._decoded(preceding), self._decoded([*preceding, *ids])
            if whole.startswith(known):
                return whole[len(known) :]
        return self._decoded(ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    # Rendering.

    def _rendered(
        self, messages: Sequence[Message], tools: Tools, for_answer: bool, what: str, **turn_format: bool
    ) -> str:
        try:
            return self.template.render(
                template_messages(messages, **turn_format),
                tools=None if tools is msgspec.UNSET else tools,
                for_answer=for_answer,
            )
        except TemplateRefusedError as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateRefusedError(
                f"the chat template of {self.path} refuses {what} of the turns {roles}: {error}. Use conversations "
                "with the roles that it knows, or another model."
            ) from error

    def _format(self, messages: Sequence[Message], tools: Tools, for_answer: bool, what: str) -> dict[str, bool]:
        """The format in which the template expects such turns, so that it drops none of them.

        It is determined once per sequence of roles, with markers in place of the texts.

        Raises:
            UserError: the template drops a turn in every format.
        """
        shape = tuple((message.role, not message.content.strip(), bool(message.tool_calls)) for message in messages)
        known = (shape, tools is msgspec.UNSET, for_answer)
        if known not in self._formats:
            self._formats[known] = self._first_format(with_markers(messages), tools, for_answer, what)
        return self._formats[known]

    def _first_format(self, turns: Sequence[Message], tools: Tools, for_answer: bool, what: str) -> dict[str, bool]:
        formats = FORMATS if any(turn.tool_calls for turn in turns) else FORMATS[:2]
        problem: UserError | None = None
        for turn_format in formats:
            try:
                text = self._rendered(turns, tools, for_answer, what, **turn_format)
            except TemplateRefusedError as error:
                problem = problem or error
                continue
            missing = missing_markers(turns, text)
            if not missing and not (turn_format.get("parts") and shows_parts(text)):
                return turn_format
            roles = " and ".join(dict.fromkeys(turns[place].role for place in missing))
            problem = problem or TemplateRefusedError(
                f"the chat template of {self.path} leaves out the {roles} turn of {what}: its text is not in what the "
                f"template renders. Use conversations without {roles} turns there (of prompts: no `system`), or a "
                "template that writes them."
            )
        assert problem is not None
        raise problem

    def _refuse_rendered(self, messages: Sequence[Message], what: str) -> None:
        """Raise UserError if a user's turn is a conversation that was already rendered with this template."""
        openings, ends = self._affixes
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
    def _affixes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The first words of rendered conversations, and the texts that follow a user's last turn."""
        openings: set[str] = set()
        ends: set[str] = set()
        begin = self.tokenizer.bos_token or ""
        for messages in ([Message("user", "?")], [Message("system", "!"), Message("user", "?")]):
            turns = with_markers(messages)
            for for_answer in (True, False):
                try:
                    turn_format = self._first_format(turns, msgspec.UNSET, for_answer, "a conversation")
                    text = self._rendered(turns, msgspec.UNSET, for_answer, "a conversation", **turn_format)
                except UserError:  # the template does not support a system turn
                    continue
                openings.update(text.partition(marker(0))[0].strip().removeprefix(begin).split()[:1])
                ends.add(text.rpartition(marker(len(turns) - 1))[2].strip())
        return tuple(openings), tuple(ends - {""})

    @functools.cached_property
    def _sample(self) -> str:
        """A rendered question with its answer, both of which are markers."""
        return self.render(with_markers([Message("user", "?"), Message("assistant", "!")]))

    @functools.cached_property
    def _answer_lead(self) -> str:
        """The whitespace that the template writes before an answer."""
        before = self._sample.rpartition(marker(1))[0]
        prompt = self.render(with_markers([Message("user", "?")]), for_answer=True)
        lead = before.removeprefix(prompt)
        return lead if before.startswith(prompt) and not lead.strip() else ""

    def _contains(self, answer: Message, text: str) -> bool:
        """Whether a text contains all of an answer: its content, thoughts and tool calls."""
        thoughts = "" if answer.reasoning_content is msgspec.UNSET else answer.reasoning_content
        return occurs(answer.content, text) and occurs(thoughts, text) and missing_call([answer], text) is None

    # Token ids.

    def _ids(self, text: str, what: str) -> list[int]:
        return self._with_one_bos(self._encode(text), what)

    def _with_one_bos(self, ids: list[int], what: str) -> list[int]:
        begin = self.tokenizer.bos_token_id
        if begin is not None and begin not in self.stop_ids and ids[:2] == [begin, begin]:
            raise UserError(
                f"the chat template of {self.path} begins {what} with two BOS tokens ({self.tokenizer.bos_token!r}), "
                "which costs quality without an error. Take one out: of its chat_template, of the tokenizer's "
                "post-processor, or of the text."
            )
        return ids

    def _encode(self, text: str, *, as_text: bool = False) -> list[int]:
        """Token ids of a text; with `as_text`, special tokens in it are encoded as plain characters."""
        if OPEN in text:
            first, *others = re.split(f"{OPEN}(.*?){CLOSE}", text, flags=re.DOTALL)
            ids = self._encode(_without(first, OPEN, CLOSE))
            for number, piece in enumerate(others):
                ids += self._continuation(_without(piece, OPEN, CLOSE), as_text=number % 2 == 0)
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

    def _continuation(self, text: str, *, as_text: bool = False) -> list[int]:
        """Token ids of a text that continues another one, without the prefix that some tokenizers add at the start."""
        if not text:
            return []
        newline, both = self._encode("\n"), self._encode("\n" + text, as_text=as_text)
        return (
            both[len(newline) :] if newline and both[: len(newline)] == newline else self._encode(text, as_text=as_text)
        )

    def _safe(self, messages: Sequence[Message], tools: Tools) -> tuple[list[Message], Tools]:
        """Mark special tokens in the texts of turns and tools as plain text."""
        given: Any = [msgspec.structs.asdict(message) for message in messages]
        if not any(map(self._control_text.search, texts_in([given, tools]))):
            return list(messages), tools
        self.counts["special_tokens_as_text"] += 1
        return [Message(**self._marked(turn)) for turn in given], self._marked(tools)

    def _marked(self, value: Any) -> Any:
        """Mark the special tokens in all strings of a nested value as plain text."""
        if isinstance(value, str):
            return self._control_text.sub(f"{OPEN}\\g<0>{CLOSE}", _without(value, OPEN, CLOSE))
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._marked, value))
        return value

    @functools.cached_property
    def _control(self) -> dict[int, str]:
        """The control tokens by id: special tokens and stop tokens."""
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


def _answer_text(prompt: str, answer: Message) -> str:
    """The text of an answer to a prompt that may end with `<think>`, for templates that do not render it after the
    prompt; or the reason why there is none (see `ChatTokenizer.prompt_and_answer`)."""
    thoughts = "" if answer.reasoning_content is msgspec.UNSET else answer.reasoning_content
    stripped = prompt.rstrip()
    if not stripped.endswith(THINK):
        return "left_out" if thoughts or answer.tool_calls else answer.content
    if not thoughts and THINK_END not in answer.content:
        return "no_thinking"
    if answer.tool_calls:
        return "left_out"
    if thoughts:
        return f"{thoughts}\n{THINK_END}\n\n{answer.content}"
    text = answer.content.lstrip()
    return text.removeprefix(THINK).removeprefix(prompt[len(stripped) :]) if text.startswith(THINK) else answer.content


def _thinks_twice(answer: str, tail: str) -> bool:
    """Whether a template has written an extra thinking block before an answer that contains its thoughts already."""
    return THINK_END in answer and tail.count(THINK_END) > answer.count(THINK_END)


def _without(text: str, *characters: str) -> str:
    for character in characters:
        text = text.replace(character, "")
    return text
