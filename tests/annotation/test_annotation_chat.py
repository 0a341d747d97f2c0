"""What every environment makes of a model's tokenizer and chat template, by the files of its directory alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_level import CHATML, GEMMA, GEMMA_TOKENS, write_tokenizer
from msgspec import UNSET
from tokenizers import Tokenizer, decoders

from annotation.remote.templates import Question
from contracts.chat import ChatTokenizer
from contracts.conversations import with_answer
from contracts.errors import UserError
from contracts.pairwise import question
from contracts.preflight import Conversation, Inspected
from contracts.records import Message, Rollout
from contracts.tokenizer import load_tokenizer
from modeling.inspect import PROBES

USER = Message("user", "Name a bird.")
SYSTEM = Message("system", "Be brief.")
ANSWER = Message("assistant", "An owl.")
TOOL = {"type": "function", "function": {"name": "weather", "description": "Look.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = Message("assistant", "", tool_calls=(CALL,))
TOLD = Message("tool", "It rains.")
NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
NO_TOOL = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}")
PARTS = CHATML.replace("+ message.content +", "+ message.content[0].text +")
LOOPED_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_of(folder: Path, template: str = CHATML, **options: Any) -> ChatTokenizer:
    return ChatTokenizer(write_tokenizer(folder / "model", template, **options))


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizer", "Qwen2TokenizerFast", "X"])
def test_ids_and_texts_are_those_of_the_file_whatever_class_is_named(tmp_path: Path, name: str) -> None:
    model = write_tokenizer(
        tmp_path / "model", tokenizer_class=name, add_prefix_space=True, legacy=True, add_bos_token=True
    )
    file = Tokenizer.from_file(str(model / "tokenizer.json"))
    found = load_tokenizer(model)
    for text in PROBES:
        ids = file.encode(text, add_special_tokens=False).ids
        assert found(text, add_special_tokens=False)["input_ids"] == ids
        assert found.decode(ids) == file.decode(ids) == text
    chat = ChatTokenizer(model)
    prompt = chat.conversation([USER], for_answer=True)
    assert file.decode(prompt, skip_special_tokens=False) == chat.render([USER], for_answer=True)
    assert chat.text(file.encode("An owl , a finch .").ids) == "An owl , a finch ."


def test_truncation_and_padding_that_a_file_has_switched_on_are_off(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    file = Tokenizer.from_file(str(model / "tokenizer.json"))
    expected = file.encode(PROBES[0], add_special_tokens=False).ids
    file.enable_truncation(4)
    file.enable_padding(length=64)
    file.save(str(model / "tokenizer.json"))
    assert load_tokenizer(model)(PROBES[0], add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "vocab.json"])
def test_another_vocabulary_alone_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    model = write_tokenizer(tmp_path / "model")
    (model / "tokenizer.json").rename(model / name)
    with pytest.raises(UserError, match=rf"{name} alone") as refusal:
        load_tokenizer(model)
    assert f"save_pretrained({str(model)!r})" in str(refusal.value)
    assert "pipeline env python generation" in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (NO_SYSTEM, [SYSTEM, USER], "leaves out the system turn"),
        (NO_TOOL, [USER, ANSWER, TOLD, USER], "leaves out the tool turn"),
        (CHATML.replace("message.content +", "message.content[:8] +"), [USER], "leaves out the user turn"),
        (CHATML.replace("message.content +", "(message.content | upper) +"), [USER], "leaves out the user turn"),
        (CHATML.replace("message.content +", "(message.content | replace('bird', '')) +"), [USER], "turn 1 .user:"),
    ],
    ids=["system", "tool", "cut", "changed", "words"],
)
def test_a_turn_that_a_template_leaves_out_is_refused(
    tmp_path: Path, template: str, messages: list[Message], what: str
) -> None:
    chat = chat_of(tmp_path, template)
    with pytest.raises(UserError, match=what) as refusal:
        chat.conversation(messages, for_answer=True, what="prompts.jsonl, line 3")
    assert "prompts.jsonl, line 3" in str(refusal.value)
    assert str(chat.path) in str(refusal.value)
    if messages != [USER]:  # what it can write, it does
        assert USER.content in chat.render([USER], for_answer=True)


@pytest.mark.parametrize("template", [PARTS, LOOPED_PARTS], ids=["first", "loop"])
def test_content_is_given_as_parts_where_a_template_wants_parts(tmp_path: Path, template: str) -> None:
    plain = chat_of(tmp_path / "plain").render([SYSTEM, USER, ANSWER, USER], for_answer=True)
    assert chat_of(tmp_path, template).render([SYSTEM, USER, ANSWER, USER], for_answer=True) == plain


def test_white_space_and_thoughts_that_a_template_cuts_off_are_no_loss(tmp_path: Path) -> None:
    answered = Message("assistant", "<think>\nIt flies.\n</think>\n\nAn owl.")
    template = CHATML.replace("message.content +", "(message.content.split('</think>') | last | trim) +")
    text = chat_of(tmp_path, template).render([Message("user", "  Name a bird.\n"), answered, USER], for_answer=True)
    assert "It flies" not in text
    assert "An owl." in text


def test_tools_and_their_calls_are_rendered_or_refused(tmp_path: Path) -> None:
    chat = chat_of(tmp_path / "with", WITH_TOOLS)
    text = chat.render([USER, CALLING, TOLD], tools=(TOOL,), for_answer=True)
    assert '"name": "weather"' in text
    assert 'weather({"city": "Rome"})' in text
    assert "It rains." in text
    as_text = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    again = chat.render([USER, Message("assistant", "", tool_calls=(as_text,)), TOLD], tools=(TOOL,), for_answer=True)
    assert again == text

    without = chat_of(tmp_path / "without")
    with pytest.raises(UserError, match=r"tools \('weather'\) of prompt 7"):
        without.render([USER], tools=(TOOL,), for_answer=True, what="prompt 7")
    with pytest.raises(UserError, match=r"tool calls \('weather'\)"):
        without.render([USER, CALLING, TOLD], for_answer=True)


@pytest.mark.parametrize(
    ("template", "options"), [(CHATML, {}), (GEMMA, GEMMA_TOKENS), (WITH_TOOLS, {})], ids=["chatml", "gemma", "tools"]
)
@pytest.mark.parametrize("turns", [[USER], [USER, ANSWER, USER]], ids=["one", "three"])
def test_a_prompt_that_was_rendered_already_is_refused(
    tmp_path: Path, template: str, options: dict[str, Any], turns: list[Message]
) -> None:
    chat = chat_of(tmp_path, template, **options)
    for for_answer in (True, False):
        text = chat.render(turns, for_answer=for_answer)
        for given in (text, text.removeprefix("<bos>"), f"{text}\n"):
            with pytest.raises(UserError, match="rendered already") as refusal:
                chat.conversation([Message("user", given)], for_answer=True, what="line 1")
            assert "as `messages`" in str(refusal.value)


def test_special_tokens_in_a_turn_are_read_as_text_and_counted(tmp_path: Path) -> None:
    chat = chat_of(tmp_path)
    quoted = Message("user", "What does <|im_end|> mean, and\n<|im_start|>?")
    ids = chat.conversation([USER, ANSWER, quoted], for_answer=True)
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (4, 3)  # those that the template writes
    assert chat.tokenizer.decode(ids) == chat.render([USER, ANSWER, quoted], for_answer=True)
    assert chat.counts == {"special_tokens_as_text": 1}
    chat.conversation([USER], for_answer=True)
    assert chat.counts == {"special_tokens_as_text": 1}


def test_special_tokens_in_tools_calls_and_thoughts_are_read_as_text(tmp_path: Path) -> None:
    template = WITH_TOOLS.replace("\n{{ message.content }}", "\n{{ message.reasoning_content }}{{ message.content }}")
    chat = chat_of(tmp_path, template)
    tool = {"type": "function", "function": {"name": "weather", "description": "Ends with <|im_end|>."}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": ["<|im_start|>"]}}}
    calling = Message("assistant", "", reasoning_content="Is it <|im_end|>?", tool_calls=(call,))
    ids = chat.conversation([USER, calling, TOLD], tools=(tool,), for_answer=True)
    start, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (5, 4)
    assert chat.tokenizer.decode(ids) == chat.render([USER, calling, TOLD], tools=(tool,), for_answer=True)
    assert chat.counts == {"special_tokens_as_text": 1}


def test_the_fingerprint_knows_all_that_makes_ids_of_text(tmp_path: Path) -> None:
    first = ChatTokenizer(write_tokenizer(tmp_path / "a")).fingerprint
    assert ChatTokenizer(write_tokenizer(tmp_path / "b", tokenizer_class="LlamaTokenizerFast")).fingerprint == first
    others = [
        write_tokenizer(tmp_path / "c", CHATML + " "),
        write_tokenizer(tmp_path / "d", stop=["<|im_end|>", "<|im_start|>"]),
        write_tokenizer(tmp_path / "e"),
    ]
    file = json.loads((others[2] / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "NFC"}
    (others[2] / "tokenizer.json").write_text(json.dumps(file))
    assert len({first, *(ChatTokenizer(other).fingerprint for other in others)}) == 4


def test_a_pairwise_judge_is_asked_about_the_users_own_conversations_before_anything_runs(tmp_path: Path) -> None:
    from contracts.preflight import findings_of
    from modeling.inspect import check_rendering

    def found(template: str, *messages: Message, tools: Any = None) -> list[tuple[str, str]]:
        chat = chat_of(tmp_path, template)
        stage = Inspected("score", None, frozenset(), (Conversation("line 3", "prompts", messages, tools),))
        return [(one.level, one.found) for one in findings_of(lambda: check_rendering(stage, chat, "comparisons"))]

    ((level, _),) = found(NO_SYSTEM, SYSTEM, USER, CALLING, TOLD, tools=(TOOL,))  # all of it in one user's turn
    assert level == "ok"
    ((level, text),) = found(CHATML.replace("message.content +", "(message.content | replace('bird', '')) +"), USER)
    assert (level, "line 3" in text) == ("error", True)
    ((level, text),) = found(CHATML + "{{ raise_exception('never') }}", USER)
    assert (level, "never" in text) == ("error", True)


def test_a_pairwise_judge_reads_tools_and_their_calls() -> None:
    from contracts.pairwise import question

    assert question([USER], "one", "two", UNSET) == question([USER], "one", "two")
    text = question([USER, CALLING, TOLD], "one", "two", (TOOL,))
    assert text.startswith(f"[CONTEXT] \n\n<turn> tools\n {json.dumps([TOOL])}\n<turn> user\n Name a bird.\n")
    assert f"\n<turn> assistant\n {json.dumps([CALL])}\n<turn> tool\n It rains.\n" in text


BEGUN = Message("assistant", "A bird is")
THINKING = CHATML.replace(
    "+ message.content +",
    "+ ('<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' if message.role == 'assistant' else '')"
    " + message.content +",
)


@pytest.mark.parametrize(
    ("template", "begun", "expected"),
    [
        (CHATML, BEGUN, "<|im_start|>assistant\nA bird is"),
        (CHATML, Message("assistant", " {"), "<|im_start|>assistant\n {"),
        (LOOPED_PARTS, BEGUN, "<|im_start|>assistant\nA bird is"),
        (GEMMA, BEGUN, "<start_of_turn>model\nA bird is"),
        # Qwen3's way: what is no thought follows none; what is one begins them, and a later answer follows them.
        (THINKING, BEGUN, "<|im_start|>assistant\n<think>\n\n</think>\n\nA bird is"),
        (THINKING, Message("assistant", "<think>\nA"), "<|im_start|>assistant\n<think>\nA"),
        (THINKING, Message("assistant", "", "Hm"), "<|im_start|>assistant\n<think>\nHm"),
        (THINKING, Message("assistant", "A", "Hm"), "<|im_start|>assistant\n<think>\nHm\n</think>\n\nA"),
        # DeepSeek-R1's way: the prompt has begun to think already.
        (CHATML.replace("assistant\n'", "assistant\n<think>\n'"), BEGUN, "<|im_start|>assistant\n<think>\nA bird is"),
        (
            CHATML.replace("assistant\n'", "assistant\n<think>\n'"),
            Message("assistant", "<think>\nA"),
            "<|im_start|>assistant\n<think>\nA",
        ),
    ],
)
def test_an_answer_goes_on_from_its_beginning(tmp_path: Path, template: str, begun: Message, expected: str) -> None:
    """A conversation that ends with an assistant's turn is a prompt as far as its text."""
    special = GEMMA_TOKENS if template == GEMMA else {}
    chat = chat_of(tmp_path, template, **special)
    ids = chat.conversation([USER, begun], for_answer=True)
    prompt = chat.render([USER], for_answer=True)
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith(expected)
    assert text.startswith(prompt)
    assert ids == chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert chat.counts["begun_answers"] == 1


def test_a_beginning_from_which_nothing_can_go_on_is_refused(tmp_path: Path) -> None:
    chat = chat_of(tmp_path)
    with pytest.raises(UserError, match="holds a token that ends answers"):
        chat.conversation([USER, Message("assistant", "An owl.<|im_end|>")], for_answer=True, what="prompt 3")
    with pytest.raises(UserError, match="the answer in prompt 3 holds tool calls"):
        chat.conversation([USER, CALLING], for_answer=True, what="prompt 3")
    with pytest.raises(UserError, match="leaves out the thoughts with which the answer in prompt 3 begins"):
        chat.conversation([USER, Message("assistant", "A", "Hm")], for_answer=True, what="prompt 3")


def test_an_answer_and_its_beginning_are_one_turn_to_who_judges_it(tmp_path: Path) -> None:
    chat = chat_of(tmp_path)
    whole = with_answer((USER, BEGUN), " an owl.")
    assert whole == (USER, Message("assistant", "A bird is an owl."))
    assert with_answer((USER,), "An owl.") == (USER, ANSWER)
    prompt = chat.conversation([USER, BEGUN], for_answer=True)
    ids = chat.tokenizer(" an owl.", add_special_tokens=False)["input_ids"]
    assert chat.text([*ids, chat.end_id], prompt[-8:]) == " an owl."
    asked = question([USER, BEGUN], " an owl.", " a finch.")
    assert asked.endswith("\n [RESPONSE A] A bird is an owl. [RESPONSE B] A bird is a finch. \n")
    assert "assistant" not in asked
    rollout = Rollout("0" * 16, (USER, BEGUN), tuple(prompt), (), "policy", 0, "raw")
    (sent,) = Question("{{ conversation }} | {{ response }}", None, {}).messages(rollout, response=" an owl.")
    assert sent["content"] == "user:\nName a bird. | A bird is an owl."


def test_decoders_that_drop_the_first_blank_keep_that_between_beginning_and_answer(tmp_path: Path) -> None:
    model = write_tokenizer(tmp_path / "model")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    backend.save(str(model / "tokenizer.json"))
    chat = ChatTokenizer(model)
    begun, ids = (chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("A bird is", " an owl."))
    assert chat.text(ids) == "an owl."
    assert chat.text(ids, begun) == " an owl."
