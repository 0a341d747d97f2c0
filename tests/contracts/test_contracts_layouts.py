"""The layouts of data sets that people have: what becomes the prompt, the answer and the tools, and what is counted."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from contracts.demonstrations import Demonstrations
from contracts.errors import UserError
from contracts.importing import PromptReader
from contracts.layouts import NAMES
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import Prompt


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def reader(**keys: Any) -> PromptReader:
    return PromptReader(PromptsConfig(source=Path("x"), output=Path("y"), **keys))


def refusal(row: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        reader(**keys).read(row, "data, line 7")
    assert str(error.value).startswith("data, line 7")
    return str(error.value)


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PASSAGE = "It was written by Ibsen."
PREFERENCE = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
VERL = {
    "data_source": "math",
    "prompt": [user("2+3?")],
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"index": 0},
}
LAYOUTS: dict[str, tuple[dict[str, Any], str, str | None, str]] = {
    # A row; its turns; its answer; the columns that are counted as not read.
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": "5"},
        "user: Add.\n\n2 and 3",
        None,
        "output",
    ),
    "alpaca without input": ({"instruction": "Sing.", "input": "", "output": "la"}, "user: Sing.", None, "output"),
    "dolly": (
        {"instruction": "Who?", "context": PASSAGE, "response": "Ibsen", "category": "qa"},
        f"user: Who?\n\n{PASSAGE}",
        None,
        "category response",
    ),
    "squad": (
        {"question": "Who?", "context": PASSAGE, "answers": {"text": ["Ibsen"], "answer_start": [18]}, "id": "5"},
        f"user: Who?\n\n{PASSAGE}",
        '{"text": ["Ibsen"], "answer_start": [18]}',
        "id",
    ),
    "a context that is no text": ({"question": "Who?", "context": {"title": ["x"]}}, "user: Who?", None, "context"),
    "orca_dpo_pairs": (
        {"system": "In French.", "question": "2+2?", "chosen": "Quatre.", "rejected": "Four."},
        "system: In French. | user: 2+2?",
        None,
        "chosen rejected",
    ),
    "orca": ({"system_prompt": "In French.", "prompt": "2+2?"}, "system: In French. | user: 2+2?", None, ""),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        "system: s | user: a",
        None,
        "",
    ),
    "lmsys": ({"conversation": [user("a"), assistant("b")], "model": "m"}, "user: a", None, "model"),
    "wildchat": (
        {"conversation": [{**user("a"), "country": "NO", "toxic": None}], "model": "m"},
        "user: a",
        None,
        "conversation.country model",
    ),
    "openai developer": (
        {"messages": [{"role": "developer", "content": "s"}, user("a")]},
        "system: s | user: a",
        None,
        "",
    ),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "user: a", None, ""),
    "numina": ({"problem": "a", "solution": "b", "messages": [user("a"), assistant("b")]}, "user: a", None, "solution"),
    "ultrafeedback": (
        {"prompt": "a", "messages": [user("a"), assistant("b")], **PREFERENCE},
        "user: a",
        None,
        "chosen rejected",
    ),
    "preference without prompt": (PREFERENCE, "user: a", None, ""),
    "hh-rlhf": ({"chosen": f"{HH} d", "rejected": f"{HH} e"}, "user: a | assistant: b | user: c", None, ""),
    "hh prompt": ({"prompt": HH}, "user: a | assistant: b | user: c", None, ""),
    "verl": (VERL, "user: 2+3?", "5", "data_source extra_info reward_model.style"),
    "openmath": (
        {"problem": "2+3?", "generated_solution": "5", "expected_answer": "5"},
        "user: 2+3?",
        "5",
        "generated_solution",
    ),
    "gsm8k": ({"question": "2+3?", "answer": "2+3=5\n#### 5"}, "user: 2+3?", "2+3=5\n#### 5", ""),
    "mmlu": (
        {"question": "Fruit?", "choices": ["stone", "apple"], "answer": 1},
        "user: Fruit?\n\nA. stone\nB. apple",
        "B",
        "",
    ),
    "arc": (
        {"question": "Fruit?", "choices": {"text": ["stone", "apple"], "label": ["1", "2"]}, "answerKey": "2"},
        "user: Fruit?\n\n1. stone\n2. apple",
        "2",
        "",
    ),
    "choices in the text": (
        {"prompt": "Fruit?\nA) stone\nB) apple", "options": ["stone", "apple"], "answer": 1},
        "user: Fruit?\nA) stone\nB) apple",
        "B",
        "",
    ),
    "humaneval": (
        {"prompt": "def f():", "test": "assert", "entry_point": "f"},
        "user: def f():",
        None,
        "entry_point test",
    ),
    "helpsteer": ({"prompt": "a", "response": "b", "helpfulness": 4}, "user: a", None, "helpfulness response"),
    "list answer": ({"question": "a", "answer": ["x", "ü"]}, "user: a", '["x", "ü"]', ""),
    "object answer": ({"question": "a", "answer": {"value": None}}, "user: a", '{"value": null}', ""),
    "boolean answer": ({"question": "a", "answer": True}, "user: a", "true", ""),
    "float answer": ({"question": "a", "answer": 5.0}, "user: a", "5.0", ""),
    "integer answer": ({"question": "a", "answer": 10**30}, "user: a", str(10**30), ""),
    "turns as JSON text": ({"messages": json.dumps([user("a"), assistant("b")])}, "user: a", None, ""),
    "a list that is no turns": ({"prompt": '[{"name": "x"}]'}, 'user: [{"name": "x"}]', None, ""),
    "one tag": ({"prompt": "a", "tags": "chat"}, "user: a", None, ""),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_row_becomes(name: str) -> None:
    row, turns, answer, unread = LAYOUTS[name]
    read = reader()
    prompt = read.read(row, "data, line 7").prompt
    assert prompt is not None
    assert " | ".join(f"{message.role}: {message.content}" for message in prompt.messages) == turns
    assert prompt.answer == answer
    assert " ".join(sorted(read.layout.not_read)) == unread
    assert prompt.tools is msgspec.UNSET


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                user("a"),
                {**assistant(""), "tool_calls": [CALL]},
                {"role": "tool", "content": "3", "tool_call_id": "c1"},
            ],
            "tools": [TOOL],
        },
        {  # The same in JSON texts, filled up with nulls as in a table, without content.
            "messages": [
                {**user("a"), "tool_calls": None, "name": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {**CALL, "function": {"name": "weather", "arguments": '{"city": "Oslo"}', "x": None}}
                    ],
                },
                {"role": "function", "content": "3", "tool_call_id": "c1"},
                assistant("It is cold."),
            ],
            "tools": json.dumps([{"name": "weather", "parameters": {"type": "object"}}]),
        },
    ],
)
def test_tools_and_their_calls_are_taken_in(row: dict[str, Any]) -> None:
    prompt = reader().read(row, "data, line 7").prompt
    assert prompt is not None
    assert prompt.tools == (TOOL,)
    assert prompt.messages[1].tool_calls == (CALL,)
    assert (prompt.messages[2].role, prompt.messages[2].tool_call_id) == ("tool", "c1")
    without = (
        prompt_id(prompt.messages),
        prompt_id(
            [
                *prompt.messages[:1],
                msgspec.structs.replace(prompt.messages[1], tool_calls=msgspec.UNSET),
                prompt.messages[2],
            ]
        ),
    )
    assert len({prompt.prompt_id, *without}) == 3
    assert msgspec.json.decode(msgspec.json.encode(prompt), type=Prompt) == prompt


def test_thoughts_names_and_calls_in_the_way_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3"},
        {"role": "assistant", "content": "cold", "thinking": "hm", "name": "bot"},
        user("b"),
    ]
    prompt = reader().read({"conversations": turns}, "data, line 7").prompt
    assert prompt is not None
    assert prompt.messages[1].tool_calls == ({"type": "function", "function": CALL["function"]},)
    assert (prompt.messages[3].reasoning_content, prompt.messages[3].name) == ("hm", "bot")


def test_any_column_can_be_named() -> None:
    row = {
        "text": "Who?",
        "persona": "Be brief.",
        "passage": "p",
        "meta": {"gold": [1], "level": 2},
        "system": 3,
        "uid": 4,
    }
    columns = {"prompt": "text", "system": "persona", "answer": "meta.gold", "id": "uid", "input": "passage"}
    read = reader(columns=columns)
    prompt = read.read(row, "data, line 7").prompt
    assert prompt is not None
    assert [message.content for message in prompt.messages] == ["Be brief.", "Who?\n\np"]
    assert (prompt.answer, prompt.prompt_id) == ("[1]", "4")
    assert read.layout.not_read == {"meta.level": 1, "system": 1}
    prompt = reader(column="text", columns={"system": None}).read(row, "data, line 7").prompt
    assert prompt is not None
    assert [message.content for message in prompt.messages] == ["Who?"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "turn 1.*'image_url'.*Remove"),
        ({"messages": [user("a"), {**assistant(""), "tool_calls": [{"x": 1}]}]}, "turn 2.*tool call.*name"),
        ({"messages": [user("a"), {**assistant(""), "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments"),
        ({"messages": [user("a")], "tools": "no JSON"}, "'tools'.*JSON"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1.*no content"),
        ({"messages": str([user("a")])}, "'messages'.*not valid JSON.*json.dumps"),
        ({"messages": [{"role": "system", "content": "s"}, user("a")], "system": "t"}, "system: null"),
        ({"prompt": "a", "system": {"x": 1}}, "'system'.*system: null"),
        ({"question": "a", "answer": float("nan")}, "answer is nan"),
        ({"question": "a", "choices": ["x", "y"], "answer": 2}, "answer is 2.*2 choices.*from 0"),
        ({"question": "a \ud83d", "answer": "b"}, "surrogate"),
        ({"question": "a", "answer": "b\ud83d"}, "surrogate"),
        ({"question": "a", "prompt_id": "\ud83d"}, "surrogate"),
        ({"question": "a", "tags": ["\ud83d"]}, "surrogate"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "different prompts"),
        ({"chosen": "a", "rejected": "b"}, "the column 'chosen' holds no prompt"),
        ({"prompt": None}, "the column 'prompt' is null"),
        ({"other": "a"}, "no column"),
        ({"problem": "x", "messages": [user("a")]}, "messages, problem"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(row: dict[str, Any], expected: str) -> None:
    assert re.search(expected, refusal(row))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [user("a"), assistant("b")], "score": 1}, "user: a | assistant: b"),
        ({"instruction": "a", "input": "x", "output": "b"}, "user: a\n\nx | assistant: b"),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, "user: a | assistant: b"),
        ({"system": "s", "question": "a", "response": "b"}, "system: s | user: a | assistant: b"),
        ({"question": "a", "choices": ["x", "y"], "answer": 1}, "user: a\n\nA. x\nB. y | assistant: B"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "user: a | assistant: b"),
        ({"messages": [user("a")]}, "user: a"),
    ],
)
def test_demonstrations_have_the_same_layouts(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({**row, "note": "n", "tools": [TOOL]}) + "\n")
    demonstrations = Demonstrations(tmp_path / "data.jsonl")
    (found,) = demonstrations
    assert " | ".join(f"{message.role}: {message.content}" for message in found.messages) == expected
    assert found.tools == (TOOL,)
    assert demonstrations.layout.not_read == {"note": 1, **({"score": 1} if "score" in row else {})}


def test_the_table_in_the_docs_has_every_name(root: Path) -> None:
    text = (root / "docs/stages.md").read_text()
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", text[text.index("| what | columns |") :].split("\n\n")[0], re.MULTILINE
    )
    assert {slot: tuple(re.findall(r"`([^`]+)`", names)) for slot, names in rows} == NAMES
