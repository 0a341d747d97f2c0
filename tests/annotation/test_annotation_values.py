"""The scorer kind `values`: one value per response token, equal to reading one sequence position by position."""

import json
import shutil

import msgspec
import pytest
import torch
from annotation_world import EOS, IDS, make_rollout, make_rollouts, publish, publish_rollouts, save_model, tiny_config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from annotation.scorers import score_config
from annotation.scorers.base import ScoreConfig
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.config import validate
from contracts.errors import UserError
from contracts.records import ROLLOUTS, Rollout, Score
from contracts.stage import run_stage


def value(output, rollouts, model, **keys):
    config = score_config(output=output, rollouts=rollouts.path, kind="values", name="values", model=model, **keys)
    return run_stage(SCORE, config)


def sample(target, rows, model) -> Artifact:
    """Publish rollouts that say, as generation does, by which vocabulary their ids are to be read."""
    return publish_rollouts(target, rows, facts={"vocabulary": ChatTokenizer(model).vocabulary})


def naive(model, prompt_ids, response_ids):
    """The value of each state, from a forward pass over nothing but that state."""
    ids = [*prompt_ids, *response_ids]
    values = []
    for position in range(len(prompt_ids), len(ids)):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([ids[:position]])).last_hidden_state[0, -1]
            values.append(model.score(hidden).item())
    return values


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reward", "reward_pad_is_eos", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [30, 100, 100_000])
def test_values_equal_a_forward_pass_for_each_state(tmp_path, models, tokenizer, which, batch_tokens):
    """Answers of one token, truncated ones, and padding of every length."""
    if which == "gpt2":
        from transformers import GPT2Config

        config = GPT2Config(
            vocab_size=len(IDS), n_embd=32, n_layer=2, n_head=1, n_positions=64, num_labels=1, pad_token_id=0
        )
        models = {which: save_model(tmp_path / which, AutoModelForSequenceClassification, config, tokenizer)}
    short = make_rollout(90, ["", "great", "great ."])  # the first is EOS alone below
    answers = list(short.completions)
    answers[0] = msgspec.structs.replace(answers[0], response_ids=(EOS,), finish_reason="stop", logprobs=(-1.0,))
    prompt = msgspec.structs.replace(short, prompt_ids=short.prompt_ids[:2], completions=tuple(answers))
    rollouts = sample(tmp_path / "rollouts", [*make_rollouts(9, 4), prompt], models[which])
    found = value(tmp_path / "values", rollouts, models[which], batch_tokens=batch_tokens)
    model = AutoModelForSequenceClassification.from_pretrained(models[which]).eval()
    rows = {(row.prompt_id, row.sample): row for row in found.rows(Score)}
    seen = 0
    lengths, reasons = set(), set()
    for rollout in rollouts.rows(Rollout):
        for completion in rollout.completions:
            row = rows[rollout.prompt_id, completion.sample]
            expected = naive(model, rollout.prompt_ids, completion.response_ids)
            assert row.token_values == pytest.approx(expected, abs=1e-4)
            assert row.score == row.token_values[0]
            assert row.token_logprobs is None
            lengths.add(len(completion.response_ids))
            reasons.add(completion.finish_reason)
            seen += 1
    assert seen == len(rows) == 39
    assert 1 in lengths
    assert max(lengths) > 8
    assert reasons == {"stop", "length"}
    facts = found.manifest.facts
    assert facts["kind"] == "values"
    assert facts["vocabulary"] == rollouts.manifest.facts["vocabulary"]


def test_the_first_value_is_that_of_the_prompt_whatever_the_answer(tmp_path, models):
    rollouts = sample(tmp_path / "rollouts", make_rollouts(3, 4), models["reward"])
    rows = list(value(tmp_path / "values", rollouts, models["reward"]).rows(Score))
    for prompt in {row.prompt_id for row in rows}:
        scores = [row.score for row in rows if row.prompt_id == prompt]
        assert scores == pytest.approx([scores[0]] * 4, abs=1e-5)
    assert len({round(row.score, 4) for row in rows}) == 3


def test_too_long_and_empty_answers_are_dropped_and_counted(tmp_path, models):
    rows = make_rollouts(10, 4)
    empty = msgspec.structs.replace(rows[0].completions[1], response_ids=(), logprobs=())
    first = (rows[0].completions[0], empty, *rows[0].completions[2:])
    rows[0] = msgspec.structs.replace(rows[0], completions=first)
    rollouts = sample(tmp_path / "rollouts", rows, models["reward"])
    every = {
        (row.prompt_id, row.sample): row for row in value(tmp_path / "all", rollouts, models["reward"]).rows(Score)
    }
    assert len(every) == 39
    assert (rows[0].prompt_id, 1) not in every
    some = value(tmp_path / "some", rollouts, models["reward"], max_length=18, max_dropped=1)
    dropped = some.manifest.ledger.dropped
    assert dropped["empty"] == 1
    assert 0 < dropped["too_long"] < 39
    for row in some.rows(Score):
        assert row.token_values == pytest.approx(every[row.prompt_id, row.sample].token_values, abs=1e-5)


def test_a_critic_of_another_vocabulary_is_refused(tmp_path, models, tokenizer):
    """Too small for the ids; as large, with two words exchanged; without a tokenizer; rollouts that do not say."""
    rollouts = sample(tmp_path / "rollouts", make_rollouts(4, 2), models["reward"])
    small = save_model(
        tmp_path / "small", AutoModelForSequenceClassification, tiny_config(num_labels=1, vocab_size=12), tokenizer
    )
    with pytest.raises(UserError, match=r"token id \d+ does not exist in .*small"):
        value(tmp_path / "scores", rollouts, small)

    exchanged = shutil.copytree(models["reward"], tmp_path / "exchanged")
    data = json.loads((exchanged / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    words["great"], words["awful"] = words["awful"], words["great"]
    (exchanged / "tokenizer.json").write_text(json.dumps(data))
    assert AutoTokenizer.from_pretrained(exchanged).convert_tokens_to_ids("great") == IDS["awful"]
    with pytest.raises(UserError, match="has another vocabulary"):
        value(tmp_path / "scores", rollouts, exchanged)
    swapped = shutil.copytree(models["causal"], tmp_path / "swapped")
    shutil.copy(exchanged / "tokenizer.json", swapped / "tokenizer.json")
    config = score_config(output=tmp_path / "scores", rollouts=rollouts.path, kind="logprobs", model=swapped)
    with pytest.raises(UserError, match="has another vocabulary"):  # nor is it a reference
        run_stage(SCORE, config)

    bare = shutil.copytree(models["reward"], tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        value(tmp_path / "scores", rollouts, bare)

    silent = publish(tmp_path / "silent", ROLLOUTS, [make_rollouts(2, 2)])
    with pytest.raises(UserError, match="does not record the vocabulary"):
        value(tmp_path / "scores", silent, models["reward"])
    assert not list(tmp_path.glob(".scores*"))


def test_what_is_no_critic_is_refused(tmp_path, models):
    rollouts = sample(tmp_path / "rollouts", make_rollouts(2, 2), models["reward"])
    for which in ("two_labels", "causal"):
        with pytest.raises(UserError, match="exactly one"):
            value(tmp_path / "scores", rollouts, models[which])
    settings = {"rollouts": rollouts.path, "output": tmp_path / "scores", "kind": "values"}
    with pytest.raises(UserError, match="kind=values needs model=DIRECTORY"):
        validate(ScoreConfig, settings, "test")
    with pytest.raises(UserError, match="is not a key of kind=values; it is one of kind="):
        validate(ScoreConfig, settings | {"model": models["reward"], "missing_eos_penalty": 1.0}, "test")
