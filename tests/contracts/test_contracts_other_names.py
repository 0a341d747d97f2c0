"""Keys of other tools: each is answered with a key that exists here, or with what to do."""

from pathlib import Path

import pytest

from contracts import other_names
from contracts.config import fields_at, validate
from contracts.errors import UserError
from pipelines.config.run import RunConfig
from training.config import PolicyConfig
from training.registry import BUILT_IN, describe

PAGE = Path(__file__).resolve().parents[2] / "docs/coming-from-trl.md"


@pytest.mark.parametrize("entry", other_names.TABLE, ids=lambda entry: entry.names[0])
def test_what_the_table_names_exists(entry: other_names.Alias) -> None:
    assert entry.ours or entry.note
    assert len(entry.ours.split()) <= 1
    if not entry.ours:
        return
    *parents, last = entry.ours.split(".")
    if parents == ["training", "settings"]:
        assert any(last in describe(algorithm).settings for algorithm in BUILT_IN)
    elif parents == ["scorers"]:
        assert last == "reward"
    else:
        assert last in fields_at(RunConfig, list(parents))


def test_the_page_shows_the_table() -> None:
    assert other_names.markdown() in PAGE.read_text(), "renew it with `python -m contracts.other_names`"


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        ({"training": {"beta": 0.1}}, ["unknown key 'training.beta'. Ratchet has 'training.settings.beta' for it"]),
        ({"training": {"settings": {"kl_coef": 1}}}, ["no setting 'kl_coef'. Ratchet has 'experience.kl_coefficient'"]),
        ({"training": {"settings": {"epsilon": 1}, "algorithm": "grpo"}}, ["Did you mean 'clip'?"]),
        ({"training": {"num_generations": 4}}, ["Ratchet has 'generation.k' for it"]),
        ({"sft": {"num_train_epochs": 1}}, ["Ratchet has 'sft.epochs' for it"]),
        ({"reward_model": {"training": {"per_device_train_batch_size": 1}}},
         ["Ratchet has 'reward_model.training.micro_batch_tokens' for it"]),
        ({"deepspeed": "ds.json"}, ["'training.parallel.zero'"]),
        ({"load_in_4bit": True}, ["Ratchet has no such key. Quantised training is not supported"]),
        ({"training": {"peft_config": {"lora_alpha": 16, "r": 8}}}, ["'training.lora.alpha'", "'training.lora.rank'"]),
        ({"actor_rollout_ref": {"rollout": {"n": 4}, "actor": {"optim": {"lr": 1}}}},
         ["'actor_rollout_ref.rollout.n': Ratchet has 'generation.k'", "Ratchet has 'training.learning_rate'"]),
        ({"training": {"learning_rat": 1}}, ["Did you mean 'training.learning_rate'?"]),
    ],
)  # fmt: skip
def test_a_key_of_another_tool_is_answered_with_ours(data: dict[str, object], answers: list[str]) -> None:
    base = {"name": "x", "policy": "p", "scorers": {"reward": {"kind": "rule", "function": "a:b"}}}
    prompts = {"train": {"source": "a"}, "heldout": {"source": "b"}}
    with pytest.raises(UserError) as error:
        validate(RunConfig, {**base, "prompts": prompts, **data}, "x.yaml")
    for answer in answers:
        assert answer in str(error.value)


def test_a_stage_alone_answers_with_its_own_keys() -> None:
    with pytest.raises(UserError, match=r"Ratchet has 'global_batch' for it.*accumulation is derived"):
        validate(PolicyConfig, {"output": "x", "model": "m", "gradient_accumulation_steps": 4}, "x")
