"""Import of prompts, through the real command line: what is read, what is dropped and counted, what is refused.

Parquet and datasets are read in the environment of the stage: tests/annotation/test_annotation_prompt_sources.py.
"""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from forked import run_forked
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.importing import PromptReader
from contracts.near_duplicates import grams_of, near_duplicates, similarity
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import PROMPTS, Message, Prompt
from contracts.seeds import derive_seed


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_forked("contracts", "prompts", *arguments, timeout=200)


def imported(source: Path, output: Path, *arguments: str) -> tuple[Artifact, list[Prompt]]:
    result = run(f"source={source}", f"output={output}", *arguments)
    assert result.returncode == 0, result.stderr
    artifact = Artifact.open(output, PROMPTS)
    return artifact, list(artifact.rows(Prompt))


def refused(source: Path, output: Path, *arguments: str) -> str:
    """The one message of a run that must fail by the user's mistake and leave nothing."""
    before = sorted(os.listdir(output.parent))
    result = run(f"source={source}", f"output={output}", *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(output.parent)) == before
    return result.stderr


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1].content for prompt in prompts]


def test_every_column_gives_the_same_prompt(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why?"}]
    rows = [
        {"prompt": "why?"},
        {"prompt": turns},
        {"messages": turns},
        {"context_messages": turns},
        {"question": "why?"},
    ]
    for number, row in enumerate(rows):
        artifact, prompts = imported(write(tmp_path / f"{number}.jsonl", [row]), tmp_path / f"out{number}")
        message = Message("user", "why?")
        assert prompts == [Prompt(prompt_id([message]), (message,))]
        assert str(artifact.manifest.ledger) == "1 rows in = 1 kept"


def test_a_chat_dataset_loses_its_final_answer_and_says_so(tmp_path: Path) -> None:
    turns = [("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content, "weight": 1} for role, content in turns]
    source = write(tmp_path / "chat.jsonl", [{"messages": messages, "prompt": "a"}, {"messages": messages[:2]}])
    artifact, prompts = imported(source, tmp_path / "out")
    assert [[message.content for message in prompt.messages] for prompt in prompts] == [
        ["be kind", "a", "b", "c"],
        ["be kind", "a"],
    ]
    assert artifact.manifest.facts == {"assistant_turns_removed": 1, "not_read": {"messages.weight": 2}}


def test_what_is_not_taken_in_is_said_last(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [{"prompt": "a", "output": "b", "score": 1}, {"prompt": "b", "output": None}])
    last = run(f"source={source}", f"output={tmp_path / 'out'}").stdout.splitlines()[-1]
    assert last.endswith("2 rows in = 2 kept; not read: output (1), score (1)")


def test_answers_tags_identities_and_the_system_message(tmp_path: Path) -> None:
    first = {"question": "1+1?", "answer": 2, "tags": ["sum"], "prompt_id": "mine", "id": 7}
    second = {"question": "2+2?", "answer": None, "solution": "4", "id": 8}
    source = write(tmp_path / "sums.jsonl", [first, second])
    _, prompts = imported(source, tmp_path / "out", "system=Be short.")
    assert [message.role for message in prompts[0].messages] == ["system", "user"]
    assert (prompts[0].answer, prompts[0].tags, prompts[0].prompt_id) == ("2", ("sum",), "mine")
    assert (prompts[1].answer, prompts[1].prompt_id) == (None, prompt_id(prompts[1].messages))
    _, prompts = imported(source, tmp_path / "other", "id_column=id", "answer_column=solution")
    assert [(prompt.prompt_id, prompt.answer) for prompt in prompts] == [("7", None), ("8", "4")]


def test_a_directory_and_a_published_artifact_are_sources_too(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "b.json", [{"prompt": "two"}])
    write(parts / "a.jsonl", [{"prompt": "one"}])
    (parts / "README.md").write_text("not data")
    artifact, prompts = imported(parts, tmp_path / "out")
    assert texts(prompts) == ["one", "two"]
    again, same = imported(artifact.path, tmp_path / "again")
    assert same == prompts
    assert again.manifest.digest == artifact.manifest.digest


def test_held_out_prompts_are_dropped_however_they_are_named_and_cost_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": str(number)} for number in range(10)]
    held_out = write(tmp_path / "h.jsonl", [{**row, "prompt_id": f"h{i}"} for i, row in enumerate(rows[:6])])
    imported(held_out, tmp_path / "heldout")
    train = write(tmp_path / "t.jsonl", rows)
    artifact, prompts = imported(train, tmp_path / "train", f"exclude=[{tmp_path / 'heldout'}]")
    assert texts(prompts) == ["6", "7", "8", "9"]
    assert str(artifact.manifest.ledger) == "10 rows in = 4 kept + 6 held_out"


def test_shuffle_and_limit(tmp_path: Path) -> None:
    source = write(tmp_path / "many.jsonl", [{"prompt": str(number)} for number in range(50)])
    orders = {
        name: texts(imported(source, tmp_path / name, *arguments)[1])
        for name, arguments in {
            "plain": [],
            "limited": ["limit=5"],
            "one": ["shuffle_seed=1"],
            "one_limited": ["shuffle_seed=1", "limit=5"],
            "two": ["shuffle_seed=2"],
        }.items()
    }
    assert orders["limited"] == orders["plain"][:5] == ["0", "1", "2", "3", "4"]
    assert orders["one_limited"] == orders["one"][:5]
    assert sorted(orders["one"], key=int) == sorted(orders["two"], key=int) == orders["plain"]
    assert orders["one"] != orders["two"]
    ledger = Artifact.open(tmp_path / "one_limited").manifest.ledger
    assert str(ledger) == "50 rows in = 5 kept + 45 over_limit"


def test_empty_prompts_and_duplicates_are_counted(tmp_path: Path) -> None:
    rows = [*[{"prompt": str(number)} for number in range(20)], {"prompt": " \n"}, {"prompt": []}, {"prompt": "3"}]
    source = write(tmp_path / "data.jsonl", rows)
    assert "3 " in refused(source, tmp_path / "strict", "duplicates=drop", "max_dropped=0.05")
    artifact, prompts = imported(source, tmp_path / "out", "duplicates=drop", "max_dropped=0.2")
    assert len(prompts) == 20
    assert str(artifact.manifest.ledger) == "23 rows in = 20 kept + 1 duplicate + 2 empty"


def test_the_same_command_again_reuses(tmp_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", [{"prompt": "a"}])
    imported(source, tmp_path / "out")
    assert "reuse" in run(f"source={source}", f"output={tmp_path / 'out'}").stdout
    write(source, [{"prompt": "b"}])
    assert "published by another run" in refused(source, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "arguments", "expected"),
    [
        (['{"prompt": "a"}', '{"prompt": "b"'], [], ["data.jsonl, line 2", "not valid JSON"]),
        (['{"prompt": "a"}', "", '["b"]'], [], ["data.jsonl, line 3", "list"]),
        (['{"prompt": 5}'], [], ["data.jsonl, line 1", "'prompt'"]),
        (['{"prompt": [{"role": "user"}]}'], [], ["data.jsonl, line 1", "content"]),
        (['{"prompt": [{"role": "robot", "content": "a"}]}'], [], ["data.jsonl, line 1", "robot"]),
        (['{"prompt": [{"role": "system", "content": "a"}]}'], [], ["data.jsonl, line 1", "system message"]),
        (['{"prompt": "a", "tags": 3}'], [], ["data.jsonl, line 1", "tags", "3"]),
        (['{"prompt": "a", "prompt_id": ""}'], [], ["data.jsonl, line 1", "prompt_id"]),
        (['{"text": "a", "label": 1}'], [], ["data.jsonl, line 1", "text, label", "column"]),
        (['{"prompt": "a", "question": "b"}'], [], ["data.jsonl, line 1", "prompt, question", "column"]),
        (['{"question": "a"}'], ["column=prompt"], ["data.jsonl, line 1", "'prompt'", "question"]),
        (['{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "a"}'], [], ["line 3", "line 1", "duplicates=drop"]),
        (['{"prompt": "a", "prompt_id": "x"}', '{"prompt": "b", "prompt_id": "x"}'], [], ["line 2", "line 1", "x"]),
        (['{"prompt": ""}', '{"prompt": []}'], [], ["no usable prompt", "2 empty"]),
        ([], [], ["no usable prompt"]),
        (['{"prompt": "a"}'], ["colunm=prompt"], ["colunm", "'column'"]),
        (['{"prompt": "a"}'], ["limit=0"], ["limit"]),
        (['{"prompt": "a", "solution": 1}'], ["answer_column=solutoin"], ["'solutoin'", "answer", "mean 'solution'"]),
        (['{"prompt": "a", "rm": {"gold": 1}}'], ["columns={answer: rm.glod}"], ["'rm.glod'", "mean 'rm.gold'"]),
        (['{"prompt": "a", "answer": null}'], ["answer_column=answer"], ["none of its 1 rows has a value"]),
        (['{"prompt": "a"}'], ["column=prompt", "columns={prompt: text}"], ["column and columns.prompt"]),
        (['{"prompt": "a"}'], ["columns={promt: text}"], ["columns: 'promt' is not a name"]),
        (['{"prompt": "a"}'], ["split=test"], ["data.jsonl is one file", "Remove split"]),
        (['{"prompt": "a", "answer": "\\ud83d"}'], [], ["line 1", "surrogate", "Remove"]),
    ],
)
def test_bad_input_is_refused_with_its_place(
    tmp_path: Path, lines: list[str], arguments: list[str], expected: list[str]
) -> None:
    source = tmp_path / "data.jsonl"
    source.write_text("".join(line + "\n" for line in lines))
    message = refused(source, tmp_path / "out", *arguments)
    for part in expected:
        assert part in message


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "missing.jsonl does not exist" in refused(tmp_path / "missing.jsonl", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("a")
    assert "'.txt'" in refused(tmp_path / "notes.txt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no file" in refused(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    assert "bytes.jsonl, line 1" in refused(tmp_path / "bytes.jsonl", tmp_path / "out")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner, max_size=2)
    ),
    max_leaves=8,
)
turns = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "robot"]),
    st.text(max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(
    row=st.dictionaries(
        st.sampled_from(["prompt", "messages", "question", "answer", "tags", "prompt_id", "other"]),
        json_values | st.lists(turns, max_size=4),
    )
)
@example(row={"prompt": [{"role": [], "content": None}]})
def test_any_row_is_a_prompt_or_empty_or_refused_with_its_place(row: dict[str, Any]) -> None:
    config = PromptsConfig(source=Path("x"), output=Path("y"))
    try:
        prompt = PromptReader(config).read(row, "data, line 7").prompt
    except UserError as refusal:
        message = str(refusal)
        prompt = None
    else:
        message = "data, line 7"
    assert message.startswith("data, line 7")
    if prompt is not None:
        assert prompt.messages[-1].role in ("user", "tool")
        assert any(turn.content.strip() for turn in prompt.messages)
        assert msgspec.json.decode(msgspec.json.encode(prompt), type=Prompt) == prompt


def test_near_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    said = "please write a short review of the new film in one sentence"
    held = write(tmp_path / "held.jsonl", [{"prompt": "name three large rivers in the north"}])
    heldout, _ = imported(held, tmp_path / "heldout")
    rows = [
        {"prompt": said},
        {"prompt": f"{said.upper()}!"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{said} now"}]},
        {"prompt": "write a long report about the old book"},
        {"prompt": "Name three large rivers, in the North?"},
        {"prompt": "写一篇关于新电影的短评"},
        {"prompt": "写一篇关于新电影的短评吧"},
    ]
    for row in rows:
        row.setdefault("prompt", None)
        row.setdefault("messages", None)
    source = write(tmp_path / "rows.jsonl", rows)
    artifact, prompts = imported(source, tmp_path / "out", "near_duplicates=0.7", f"exclude=[{heldout.path}]")
    assert texts(prompts) == [said, rows[3]["prompt"], rows[5]["prompt"]]
    assert artifact.manifest.ledger.dropped == {"near_duplicate": 3, "near_held_out": 1}
    everything, _ = imported(source, tmp_path / "all")
    assert everything.manifest.rows == 7
    assert "near_duplicates" not in everything.manifest.key_parts["config"]


@given(
    st.lists(st.lists(st.sampled_from("abcde"), max_size=7), max_size=12),
    st.lists(st.lists(st.sampled_from("abcde"), max_size=7), max_size=3),
    st.sampled_from([0.2, 0.5, 0.6, 0.75, 1.0]),
)
def test_near_duplicates_are_all_that_there_are(own: list[list[str]], held: list[list[str]], threshold: float) -> None:
    some, others = (
        [Prompt(str(number), (Message("user", " ".join(words)),)) for number, words in enumerate(texts)]
        for texts in (own, held)
    )
    expected: dict[int, str] = {}
    kept: list[Prompt] = []
    for number, prompt in enumerate(some):
        grams = grams_of(prompt)
        if any(similarity(grams, grams_of(other)) >= threshold for other in others):
            expected[number] = "near_held_out"
        elif any(similarity(grams, grams_of(other)) >= threshold for other in kept):
            expected[number] = "near_duplicate"
        else:
            kept.append(prompt)
    assert near_duplicates(some, others, threshold) == expected


def test_the_beginning_of_an_answer_is_kept_if_the_config_says_so(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Well,"}]
    source = write(tmp_path / "chat.jsonl", [{"messages": turns, "answer": "x"}, {"prompt": "b"}])
    artifact, (begun, plain) = imported(source, tmp_path / "out", "prefill=true", "system=Be brief.")
    system = Message("system", "Be brief.")
    assert begun.messages == (system, Message("user", "a"), Message("assistant", "Well,"))
    assert plain.messages == (system, Message("user", "b"))
    assert artifact.manifest.facts["assistant_turns_removed"] == 0
    _, (without, _) = imported(source, tmp_path / "without", "system=Be brief.")
    assert without.messages == begun.messages[:-1]
    assert begun.prompt_id != without.prompt_id
    twice = write(tmp_path / "twice.jsonl", [{"messages": [*turns, turns[1]]}])
    assert "must be one assistant's turn" in refused(twice, tmp_path / "no", "prefill=true")


def test_what_follows_a_mark_is_the_answer(tmp_path: Path) -> None:
    rows = [{"question": "2+3?", "answer": "2 #### no\n5, so\n#### 1,005 "}, {"question": "q", "answer": None}]
    _, (first, second) = imported(write(tmp_path / "gsm.jsonl", rows), tmp_path / "out", "answer_after='####'")
    assert (first.answer, second.answer) == ("1,005", None)
    source = write(tmp_path / "bad.jsonl", [*rows, {"question": "r", "answer": "5"}])
    message = refused(source, tmp_path / "no", "answer_after='####'")
    assert f"{source}, line 3: the answer '5' does not hold answer_after='####'" in message
    none = write(tmp_path / "none.jsonl", [{"question": "q"}, {"question": "r", "answer": None}])
    assert "no row has an answer, so answer_after='####' does not apply" in refused(
        none, tmp_path / "no", "answer_after='####'"
    )


def test_a_pattern_names_several_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "b").mkdir(parents=True)
    for name in ("part-1.jsonl", "part-0.jsonl", "b/part-2.jsonl", "other.jsonl", "_part-9.jsonl"):
        write(data / name, [{"prompt": name}])
    with gzip.open(data / "part-3.jsonl.gz", "wt") as file:
        file.write('{"prompt": "packed"}\n')
    artifact, prompts = imported(data / "part-*.jsonl", tmp_path / "out")
    assert texts(prompts) == ["part-0.jsonl", "part-1.jsonl"]
    assert texts(imported(data / "**/part*", tmp_path / "all")[1]) == [
        "b/part-2.jsonl", "part-0.jsonl", "part-1.jsonl", "packed",
    ]  # fmt: skip
    key = artifact.manifest.key
    assert "already published" in run(f"source={data}/part-*.jsonl", f"output={tmp_path / 'out'}").stdout
    write(data / "part-1.jsonl", [{"prompt": "changed"}])
    assert imported(data / "part-*.jsonl", tmp_path / "new")[0].manifest.key != key
    assert "nothing-*.jsonl does not exist" in refused(data / "nothing-*.jsonl", tmp_path / "no")
    assert "choose" in refused(data / "part-*.jsonl", tmp_path / "no", "split=test").replace("chooses", "choose")


def test_a_shuffle_does_not_depend_on_how_the_rows_are_held(tmp_path: Path) -> None:
    """The order is that of a list shuffled by the same seed, whose key and bytes were published before."""
    rows = [{"prompt": f"{number} é"} for number in range(50)]
    source = write(tmp_path / "many.jsonl", rows)
    expected = [row["prompt"] for row in rows]
    random.Random(derive_seed("prompts", 3)).shuffle(expected)
    assert texts(imported(source, tmp_path / "out", "shuffle_seed=3")[1]) == expected
    assert texts(imported(source, tmp_path / "some", "shuffle_seed=3", "limit=7")[1]) == expected[:7]


@pytest.mark.slow
def test_a_source_that_is_larger_than_memory_is_imported(tmp_path: Path) -> None:
    """100 MB of rows under a limit of 40 MB above what the import of one row takes."""
    source = tmp_path / "large.jsonl"
    with source.open("w") as file:
        for number in range(10_000):
            file.write(json.dumps({"prompt": f"{number} " + "x" * 10_000}) + "\n")
    small = write(tmp_path / "small.jsonl", [{"prompt": "x"}])
    peaks = []
    for name, path in (("one", small), ("many", source)):
        command = [sys.executable, "-c", IMPORT_AND_SAY_PEAK, f"source={path}", f"output={tmp_path / name}"]
        result = subprocess.run([*command, "shuffle_seed=1"], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout.split()[-1]))
    assert Artifact.open(tmp_path / "many").manifest.rows == 10_000
    assert peaks[1] - peaks[0] < 40_000


IMPORT_AND_SAY_PEAK = """
import resource, sys
from contracts.stage import run_stage
from contracts.stages.prompts import IMPORT_PROMPTS
values = dict(argument.split("=", 1) for argument in sys.argv[1:])
run_stage(IMPORT_PROMPTS, IMPORT_PROMPTS.config.model_validate({**values, "shuffle_seed": 1}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
