"""How an answer becomes token ids: the same way in supervised fine-tuning and for answers that are imported."""

import json
from pathlib import Path
from typing import Any

import pytest
from byte_level import CHATML, GEMMA, GEMMA_TOKENS, write_tokenizer
from conftest import run_here

from annotation.config import RlhflowImportConfig
from annotation.stages.rlhflow import RLHFLOW_IMPORT
from contracts.chat import ChatTokenizer, PromptAndAnswer
from contracts.records import Message, Rollout
from contracts.stage import run_stage

USER = Message("user", "Name a bird.")
THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
NO_END = CHATML.replace("+ '<|im_end|>\n' ", "")


def write_model(folder: Path, template: str = CHATML, **options: Any) -> Path:
    """A tiny model that can be trained, with a byte-level tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder, template, **options)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256, eos_token_id=ChatTokenizer(folder).tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    stops = folder / "generation_config.json"
    kept = stops.read_bytes() if stops.exists() else None
    LlamaForCausalLM(config).save_pretrained(folder)
    if kept is not None:
        stops.write_bytes(kept)
    return folder


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(chat: ChatTokenizer, answer: Message | str) -> PromptAndAnswer:
    last = Message("assistant", answer) if isinstance(answer, str) else answer
    found = chat.prompt_and_answer([USER, last])
    assert isinstance(found, PromptAndAnswer), found
    return found


@pytest.mark.parametrize("start", ["\n", "\n\n", "\n\n\n  ", " ", "\t", "a"])
def test_an_answer_goes_on_from_the_prompt_that_generation_makes(tmp_path: Path, start: str) -> None:
    chat = ChatTokenizer(write_tokenizer(tmp_path))
    found = answered(chat, f"{start}An owl.")
    assert found.prompt == chat.conversation([USER], for_answer=True)
    assert found.response[-1] == chat.end_id == chat.tokenizer.eos_token_id
    assert chat.tokenizer.decode(found.response[:-1]) == f"{start}An owl."
    text = chat.render([USER, Message("assistant", f"{start}An owl.")])
    assert chat.tokenizer.decode([*found.prompt, *found.response]) == text.removesuffix("\n")
    whole = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    merges = whole[: len(found.prompt)] != found.prompt
    assert merges is start.startswith("\n")  # else this tests nothing
    if not merges:
        assert [*found.prompt, *found.response] == whole[: len(found.prompt) + len(found.response)]


def test_a_stage_goes_on_where_an_answer_merges_with_the_prompt(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": f"{start}An owl."}]}
        for start in ("", "\n", "\n\nQuote <|im_start|> it: ", "It is <|im_end|> ")
    ]
    artifact = run_here(
        "sft", model=model, demonstrations=write(tmp_path / "demonstrations.jsonl", *rows), output=tmp_path / "out",
        global_batch=1, max_dropped=0.5,
    )  # fmt: skip
    assert artifact.manifest.ledger.kept == 3
    assert artifact.manifest.ledger.dropped == {"stop_inside": 1}
    assert artifact.manifest.facts["answers_with_special_tokens"] == 1


@pytest.mark.parametrize(
    ("template", "options", "end"),
    [
        (GEMMA, {**GEMMA_TOKENS, "stop": ["<eos>", "<end_of_turn>"]}, "<end_of_turn>"),
        (CHATML, {}, "<|im_end|>"),
        (CHATML, {"eos": "<|endoftext|>", "extra": ["<|im_start|>", "<|im_end|>"],
                  "stop": ["<|endoftext|>", "<|im_end|>"]}, "<|im_end|>"),
        (NO_END, {}, "<|im_end|>"),
    ],
    ids=["gemma", "chatml", "qwen", "no end"],
)  # fmt: skip
def test_an_answer_ends_the_same_way_wherever_it_comes_from(
    tmp_path: Path, template: str, options: dict[str, Any], end: str
) -> None:
    model = write_tokenizer(tmp_path / "model", template, **options)
    chat = ChatTokenizer(model)
    texts = ["An owl.", "\nA finch."]
    trained = [answered(chat, text) for text in texts]
    assert {found.response[-1] for found in trained} == {chat.tokenizer.convert_tokens_to_ids(end)}
    source = write(
        tmp_path / "rlhflow.jsonl", {"prompt": [{"role": "user", "content": "Name a bird."}], "responses": texts}
    )
    config = RlhflowImportConfig(output=tmp_path / "rollouts", source=source, tokenizer=model)
    (rollout,) = run_stage(RLHFLOW_IMPORT, config).rows(Rollout)
    assert list(rollout.prompt_ids) == trained[0].prompt == trained[1].prompt
    assert [list(completion.response_ids) for completion in rollout.completions] == [row.response for row in trained]


def test_answers_of_models_that_think(tmp_path: Path) -> None:
    chat = ChatTokenizer(write_tokenizer(tmp_path, THINKING))
    assert chat.prompt_and_answer([USER, Message("assistant", "An owl.")]) == "no_thinking"
    forms = [
        Message("assistant", "It flies.\n</think>\n\nAn owl."),
        Message("assistant", "<think>\nIt flies.\n</think>\n\nAn owl."),
        Message("assistant", "An owl.", reasoning_content="It flies."),
    ]
    for form in forms:
        found = answered(chat, form)
        assert chat.text(found.response) == "It flies.\n</think>\n\nAn owl."
        assert found.prompt == chat.conversation([USER], for_answer=True)
    plain = ChatTokenizer(write_tokenizer(tmp_path / "plain"))
    assert plain.prompt_and_answer([USER, forms[2]]) == "left_out"


def test_a_stop_token_anywhere_in_an_answer_is_counted(tmp_path: Path) -> None:
    """Such an answer would be cut off there without a word."""
    chat = ChatTokenizer(write_tokenizer(tmp_path, THINKING))
    call = {"type": "function", "function": {"name": "find", "arguments": {"text": "<|im_end|>"}}}
    for last in (
        Message("assistant", "An owl <|im_end|> or two."),
        Message("assistant", "An owl.", reasoning_content="It says <|im_end|> here."),
        Message("assistant", "", tool_calls=(call,)),
    ):
        assert chat.prompt_and_answer([USER, last]) == "stop_inside"
