"""What `modeling.inspect` says of tokenizers that are right, and of each fault that they can have."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from annotation_world import IDS, TEMPLATE

from modeling.inspect import Finding, inspect


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A causal model of one's own to spoil."""
    return Path(shutil.copytree(models["causal"], tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def set_template(model: Path, template: str) -> None:
    edit(model / "tokenizer_config.json", chat_template=None)
    (model / "chat_template.jinja").write_text(template)


def bad(model: Path) -> Finding:
    """The only finding that is not ok."""
    (finding,) = [finding for finding in inspect(model) if finding.level != "ok"]
    return finding


def texts(model: Path) -> str:
    findings = inspect(model)
    assert {finding.level for finding in findings} == {"ok"}
    return "\n".join(finding.found for finding in findings)


def test_a_model_that_is_right(models: dict[str, Path]) -> None:
    found = texts(models["causal"])
    assert "knows its architecture (llama)" in found
    assert f"has {len(IDS)} tokens for {len(IDS)} rows" in found
    assert "renders a conversation of 2 turns" in found
    assert "begin with one BOS ('<s>')" in found
    assert "as continuations of the prompts that generation renders" in found
    assert "turn ends with '</s>', EOS" in found
    assert "padding is '<pad>'" in found


def test_a_reward_model_needs_no_stop_tokens(models: dict[str, Path]) -> None:
    found = texts(models["reward"])
    assert "renders a conversation" in found
    assert "turn ends" not in found


def test_no_template(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=None)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    finding = bad(model)
    assert finding.level == "error"
    assert "has no chat template" in finding.found
    assert "chat_template.jinja" in finding.found


def test_an_empty_template(model: Path) -> None:
    set_template(model, "")
    assert bad(model).level == "error"


def test_a_template_that_fails(model: Path) -> None:
    set_template(model, "{{ messages[7].content }}")
    finding = bad(model)
    assert finding.level == "error"
    assert "chat template" in finding.found


def test_two_bos_in_the_template(model: Path) -> None:
    set_template(model, "{{ bos_token }}" + TEMPLATE)
    finding = bad(model)
    assert finding.level == "error"
    assert "two BOS" in finding.found


def add_bos_by_itself(model: Path) -> None:
    """Have the tokenizer put BOS before every text, as those of Llama do."""
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    edit(
        model / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [IDS["<s>"]], "tokens": ["<s>"]}},
        },
    )


def test_bos_of_both_template_and_tokenizer(model: Path) -> None:
    add_bos_by_itself(model)
    finding = bad(model)
    assert finding.level == "warning"
    assert "its tokenizer adds another" in finding.found
    assert finding.fix is not None
    assert "add_special_tokens=False" in finding.fix


def test_bos_of_the_tokenizer_alone(model: Path) -> None:
    add_bos_by_itself(model)
    set_template(model, TEMPLATE.replace("{{ bos_token }}", ""))
    finding = bad(model)
    assert finding.level == "warning"
    assert "writes none" in finding.found
    assert finding.fix is not None
    assert "{{ bos_token }}" in finding.fix


def test_no_bos_at_all(model: Path) -> None:
    set_template(model, TEMPLATE.replace("{{ bos_token }}", ""))
    assert "begin with no BOS" in texts(model)


def test_a_turn_that_ends_where_generation_does_not(model: Path) -> None:
    set_template(model, TEMPLATE.replace("{{ eos_token }}", "<unk>"))
    finding = bad(model)
    assert finding.level == "error"
    assert "ends an assistant's turn with '<unk>'" in finding.found
    assert finding.fix == f'Add {IDS["<unk>"]} to the list "eos_token_id" in generation_config.json.'
    edit(model / "generation_config.json", eos_token_id=[IDS["</s>"], IDS["<unk>"]])
    assert "turn ends with '<unk>', a stop token" in texts(model)


def test_a_turn_that_ends_with_plain_text(model: Path) -> None:
    set_template(model, TEMPLATE.replace("{{ eos_token }}", " blue "))
    assert bad(model).level == "warning"


def test_a_turn_that_ends_with_nothing(model: Path) -> None:
    set_template(model, TEMPLATE.replace("{{ eos_token }}", ""))
    finding = bad(model)
    assert finding.level == "warning"
    assert "writes nothing after" in finding.found


def test_no_eos(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    for name in ("config.json", "generation_config.json"):
        edit(model / name, eos_token_id=None)
    set_template(model, TEMPLATE.replace("{{ eos_token }}", "</s>"))
    finding = bad(model)
    assert finding.level == "error"
    assert "names no EOS token" in finding.found


def test_an_eos_that_the_model_does_not_know(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token="<|never seen|>")
    (finding,) = [finding for finding in inspect(model) if "rows" in finding.found]
    assert finding.level == "error"
    assert "its EOS '<|never seen|>' would be an error" in finding.found
    assert finding.fix is not None
    assert "resize_token_embeddings" in finding.fix


def test_padding_that_is_eos_is_said_to_be_fine(model: Path) -> None:
    edit(model / "tokenizer_config.json", pad_token="</s>")
    assert "its padding is its EOS, which is fine" in texts(model)
    edit(model / "tokenizer_config.json", pad_token=None)
    assert "no padding token, which is fine" in texts(model)


def test_prompts_that_begin_to_think(model: Path) -> None:
    set_template(model, TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|> <think> {% endif %}"))
    finding = bad(model)
    assert finding.level == "warning"
    assert "drops demonstrations without thoughts" in finding.found


def test_code_of_its_own_is_never_run(model: Path, tmp_path: Path) -> None:
    (model / "its_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(model / "config.json", model_type="its_own", auto_map={"AutoConfig": "its_own.Config"})
    finding = bad(model)
    assert finding.level == "error"
    assert "trust_remote_code is off" in finding.found
    assert finding.fix is not None
    assert "never run" in finding.fix
    edit(model / "config.json", auto_map=None)
    assert "does not know its model_type 'its_own'" in bad(model).found
    edit(model / "config.json", model_type="llama", auto_map={"AutoConfig": "its_own.Config"})
    assert "auto_map) is not used" in texts(model)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["its_own.Tokenizer", None]}, tokenizer_class="X")
    inspect(model)
    assert not (tmp_path / "ran").exists()


def test_weights_in_another_format(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    finding = bad(model)
    assert finding.level == "error"
    assert "other formats can run code" in finding.found


def test_a_tokenizer_that_cannot_be_loaded(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    finding = bad(model)
    assert finding.level == "error"
    assert "tokenizer.json cannot be read as a tokenizer" in finding.found
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    assert "tokenizer.model alone" in bad(model).found
    assert "save_pretrained" in bad(model).found


@pytest.mark.parametrize("value", ["</s>", -1, [1.5]])
def test_a_stop_token_that_is_no_number(model: Path, value: Any) -> None:
    edit(model / "generation_config.json", eos_token_id=value)
    assert re.search("eos_token_id in .* is .*: give the ids of the tokens", bad(model).found)


def test_a_stop_token_that_nothing_has(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None)
    edit(model / "generation_config.json", eos_token_id=128009)
    assert (bad(model).level, "eos_token_id is 128009), so no answer would ever end" in bad(model).found) == (
        "error",
        True,
    )


def test_a_list_of_templates_without_any(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    edit(model / "tokenizer_config.json", chat_template=[{"name": "default"}])
    assert "not of objects with `name` and `template`" in bad(model).found
