"""Process reward models: a step's score is that of transformers at its marker, and rewards the policy's own token."""

import json
import math
import re

import msgspec
import pytest
import torch
from annotation_world import publish_rollouts, run_cli, tiny_config
from byte_level import CHATML, CHATML_TOKENS, write_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, Qwen2Config

import annotation.models.reader
from annotation.models.loading import open_model
from annotation.models.steps import aggregate, divide, token_rewards
from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.scorers.base import Opening
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.prompts import prompt_id
from contracts.records import Completion, Message, Rollout, Sampling

MARKER, TWO = "<extra_0>", "\n\n"
ANSWERS = [
    "First, 2 + 2.\n\nThat is 4.\n\nSo the answer is 4.",
    "No separators at all: café 🧑‍🚀, 好的",
    "Ça va?\n\n🧑‍🚀🚀 é vs é\n\n\n\nこんにちは\n\n好的",
    "",
    " \n\n ",
    "First, 2 + 2.\n\nThat is 5.\n\n",
    "I say <extra_0> and <|im_end|> myself.\n\nDone <extra_0>",
]
SEPARATOR = re.compile(TWO)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy's tokenizer, with other tokens than the model's."""
    return write_tokenizer(tmp_path_factory.mktemp("policy"), eos="<end>", extra=[])


def process_model(path, auto, **changes):
    tokens = {**CHATML_TOKENS, "extra": ["<|im_start|>", MARKER]}
    write_tokenizer(path, CHATML, **tokens)
    known = tiny_config().to_dict()
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim".split()
    torch.manual_seed(0)
    config = Qwen2Config(
        **{key: known[key] for key in keys}, vocab_size=420, max_position_embeddings=512, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    auto.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return process_model(tmp_path_factory.mktemp("classifier"), AutoModelForTokenClassification, num_labels=2)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return process_model(tmp_path_factory.mktemp("causal"), AutoModelForCausalLM)


def rollout(policy, texts=ANSWERS, question="What is 2 + 2?"):
    chat = ChatTokenizer(policy)
    messages = (Message("user", question),)
    completions = tuple(
        Completion(
            number, (*chat.tokenizer(text, add_special_tokens=False)["input_ids"], *chat.stop_ids), text, "stop",
            (0.0,), 0, Sampling(1.0, 1.0, 0, 1),
        )
        for number, text in enumerate(texts)
    )  # fmt: skip
    return Rollout(prompt_id(messages), messages, (1,), completions, "policy", 0, "processed", None)


def config_of(tmp_path, model, policy, **keys):
    keys = {"marker": MARKER, **keys} if keys.get("layout") != "turns" else keys
    fields = {"output": tmp_path / "scores", "rollouts": tmp_path, "kind": "process_reward", "model": model}
    return score_config(**fields, tokenizer=policy, **keys)


def scored(tmp_path, model, policy, rollouts, **keys):
    config = config_of(tmp_path, model, policy, **keys)
    scorer = open_model(config, Opening(tmp_path, lambda: 0))
    return scorer, scorer([Sample(each, one) for each in rollouts for one in each.completions])


def plain(tokenizer, text):
    """Token ids in which no special token is read."""
    tokenizer.backend_tokenizer.encode_special_tokens = True
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.backend_tokenizer.encode_special_tokens = False
    return list(ids)


def expected(model, rollout, text, *, turns=False):
    """The probabilities of the steps, by transformers' own forward pass of the whole conversation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def encode(role, *parts):
        said = [token for part in parts for token in part]
        return [start, *plain(tokenizer, f"{role}\n"), *said, end, *plain(tokenizer, "\n")]

    steps = [text[step.start : step.end] for step in divide(text, SEPARATOR)]
    good, bad = (tokenizer.convert_tokens_to_ids(one) for one in "+-")
    if turns:
        ids, places = [], []
        for number, step in enumerate(steps):
            said = f"{rollout.messages[0].content} {step}" if number == 0 else step
            ids += encode("user", plain(tokenizer, said))
            reply = encode("assistant", [good])
            places.append(len(ids) + reply.index(good) - 1)
            ids += reply
    else:
        marker = tokenizer.convert_tokens_to_ids(MARKER)
        ids = encode("user", plain(tokenizer, rollout.messages[0].content))
        ids += encode("assistant", *([*plain(tokenizer, step), marker] for step in steps))
        places = [place for place, token in enumerate(ids) if token == marker]
    is_causal = json.loads((model / "config.json").read_text())["architectures"][0].endswith("CausalLM")
    auto = AutoModelForCausalLM if is_causal else AutoModelForTokenClassification
    with torch.no_grad():
        logits = auto.from_pretrained(model, attn_implementation="eager").eval()(torch.tensor([ids])).logits[0, places]
    pair = logits[:, [bad, good]] if is_causal else logits
    return pair.softmax(-1)[:, 1].tolist()


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("way", ["classifier", "marker", "turns"])
def test_steps_are_scored_as_transformers_does(tmp_path, request, policy, way, packing, monkeypatch):
    if packing == "padded":
        monkeypatch.setattr(annotation.models.reader, "support_of", lambda config: "padded")
    model = request.getfixturevalue("classifier" if way == "classifier" else "causal")
    keys = {"layout": "turns"} if way == "turns" else {}
    asked = [rollout(policy), rollout(policy, ANSWERS[:1], "And 3 + 3?")]
    scorer, found = scored(tmp_path, model, policy, asked, batch_tokens=150, **keys)
    assert scorer.facts["packing"] == packing
    samples = [(each, one) for each in asked for one in each.completions]
    told = set()
    for (each, one), score in zip(samples, found, strict=True):
        steps = expected(model, each, one.text, turns=way == "turns")
        assert score.extras["step_scores"] == pytest.approx(steps, abs=1e-4)
        assert score.score == min(score.extras["step_scores"])
        told.update(round(step, 3) for step in steps)
    assert len(told) > 8


def test_each_steps_last_token_is_rewarded(tmp_path, classifier, policy):
    """That of the policy, whose text up to it is the answer's up to the step's end."""
    asked = rollout(policy)
    _, found = scored(tmp_path, classifier, policy, [asked])
    chat = ChatTokenizer(policy)
    for one, score in zip(asked.completions, found, strict=True):
        steps = divide(one.text, SEPARATOR)
        rewarded = [place for place, reward in enumerate(score.token_rewards) if reward]
        assert [score.token_rewards[place] for place in rewarded] == score.extras["step_scores"]
        assert len(score.token_rewards) == len(one.response_ids)
        if not one.text.strip():
            assert rewarded == [len(one.response_ids) - 1]
            continue
        for place, step in zip(rewarded, steps, strict=True):
            assert chat.text(one.response_ids[: place + 1])[: step.end] == one.text[: step.end]
            assert chat.text(one.response_ids[:place])[: step.end] != one.text[: step.end]


def test_steps_at_the_limit_are_scored_and_over_it_dropped(tmp_path, classifier, policy):
    asked = rollout(policy, ["One.\n\nTwo.", "One.\n\nTwo.\n\nThree."])
    _, whole = scored(tmp_path, classifier, policy, [asked])
    config = config_of(tmp_path, classifier, policy)
    scorer = open_model(config, Opening(tmp_path, lambda: 0))
    questions = [scorer.steps.inputs_of(Sample(asked, one), divide(one.text, SEPARATOR)) for one in asked.completions]
    shorter, longer = (len(question.ids) for question in questions)
    _, found = scored(tmp_path, classifier, policy, [asked], max_length=longer - 1)
    assert found[1] == "too_long"
    assert found[0].extras["step_scores"] == pytest.approx(whole[0].extras["step_scores"], abs=1e-6)
    _, found = scored(tmp_path, classifier, policy, [asked], max_length=longer)
    assert found[1].extras["step_scores"] == pytest.approx(whole[1].extras["step_scores"], abs=1e-6)
    assert shorter < longer


def test_two_layer_heads_are_read(tmp_path, policy):
    """As Qwen2.5-Math-PRM has one, which transformers cannot load by itself."""
    from modeling.loading import Qwen2ForProcessRewardModel, check_weights, load_token_classifier

    model = process_model(tmp_path / "model", Qwen2ForProcessRewardModel)
    assert json.loads((model / "config.json").read_text())["architectures"] == ["Qwen2ForProcessRewardModel"]
    check_weights(model, "token classifier")
    asked = rollout(policy, ANSWERS[:1])
    scorer, (found,) = scored(tmp_path, model, policy, [asked])
    question = scorer.steps.inputs_of(Sample(asked, asked.completions[0]), divide(ANSWERS[0], SEPARATOR))
    read = load_token_classifier(model, torch.float32).eval()
    with torch.no_grad():
        states = read.model(torch.tensor([question.ids])).last_hidden_state[0, question.places]
        logits = read.score[2](read.score[0](states).relu())
    assert found.extras["step_scores"] == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=1e-4)


def test_separators_may_stay(tmp_path, classifier, policy):
    keys = {"keep_separators": True, "separator_pattern": r"\s*\n"}
    config = config_of(tmp_path, classifier, policy, **keys)
    scorer = open_model(config, Opening(tmp_path, lambda: 0))
    asked = rollout(policy, ["Step 1: a\nStep 2: b"])
    question = scorer.steps.inputs_of(
        Sample(asked, asked.completions[0]), divide("Step 1: a\nStep 2: b", config.pattern)
    )
    assert scorer.steps.chat.tokenizer.decode(question.ids).endswith("Step 1: a<extra_0>\nStep 2: b<extra_0>")


def test_what_cannot_be_placed_or_read_is_counted(tmp_path, classifier, policy):
    asked = rollout(policy, ["One.\n\nTwo."])
    other = msgspec.structs.replace(asked.completions[0], text="Another.\n\nText.")
    none = msgspec.structs.replace(asked.completions[0], response_ids=())
    _, found = scored(tmp_path, classifier, policy, [msgspec.structs.replace(asked, completions=(other, none))])
    assert found == ["unplaced_steps", "empty"]
    forgetful = tmp_path / "forgetful"
    process_model(forgetful, AutoModelForTokenClassification, num_labels=2)
    cut = "message.content.split('</think>')[-1]"
    (forgetful / "chat_template.jinja").write_text(CHATML.replace("message.content", cut))
    thoughts = rollout(policy, ["Let me think.\n\nYes.</think>\n\nFour."])
    assert scored(tmp_path, forgetful, policy, [thoughts])[1] == ["unread_steps"]


def test_a_stage_publishes_steps_and_refuses_another_vocabulary(tmp_path, classifier, policy):
    facts = {"vocabulary": ChatTokenizer(policy).vocabulary}
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout(policy)], facts=facts)
    fields = [f"rollouts={rollouts.path}", f"model={classifier}", "kind=process_reward", f"marker={MARKER}"]
    refused = run_cli("score", *fields, f"output={tmp_path / 'no'}", check=False)
    assert refused.returncode == 2
    assert "tokenizer=DIRECTORY" in refused.stderr
    run_cli("score", *fields, f"output={tmp_path / 'scores'}", f"tokenizer={policy}")
    known = json.loads((tmp_path / "scores/manifest.json").read_text())["facts"]
    assert known["steps"] == sum(len(divide(text, SEPARATOR)) for text in ANSWERS)
    assert 0 < known["lowest_mean"] < 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"marker": None}, "needs marker=TOKEN"),
        ({"layout": "turns", "marker": "+"}, "needs marker=TOKEN"),
        ({"separator_pattern": "("}, "not a regular expression"),
        ({"separator_pattern": "\n*"}, "matches the empty string"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, classifier, policy, keys, message):
    fields = {"output": tmp_path / "scores", "rollouts": tmp_path, "kind": "process_reward", "model": classifier}
    with pytest.raises(UserError, match=message):
        score_config(**{**fields, "marker": MARKER, **keys})


def test_models_that_judge_no_steps_are_refused(tmp_path, classifier, causal, models, policy):
    with pytest.raises(UserError, match="Set layout=marker"):
        config_of(tmp_path, classifier, policy, layout="turns").check()
    with pytest.raises(UserError, match="is not a single token of"):
        open_model(config_of(tmp_path, causal, policy, marker="no token"), Opening(tmp_path, lambda: 0))
    with pytest.raises(UserError, match="are the same token"):
        open_model(config_of(tmp_path, causal, policy, bad="+"), Opening(tmp_path, lambda: 0))
    with pytest.raises(UserError, match="2 labels for each token"):
        score_config(output=tmp_path / "s", rollouts=tmp_path, kind="reward_model", model=classifier).check()
    with pytest.raises(UserError, match=r"process_reward reads a classifier of tokens .*set kind=reward_model"):
        config_of(tmp_path, models["reward"], policy).check()


def test_steps_and_what_is_made_of_them():
    assert [(step.start, step.end) for step in divide(" a \n\n\n\nb\n\n", SEPARATOR)] == [(1, 2), (7, 8)]
    assert divide(" \n\n", SEPARATOR) == [(0, 0)]
    scores = [0.5, 0.25, 0.75]
    found = {how: aggregate(scores, how) for how in ("min", "product", "mean", "last", "sum")}
    assert found == {"min": 0.25, "product": math.prod(scores), "mean": 0.5, "last": 0.75, "sum": 1.5}
    assert token_rewards(scores, [1, 2, 4], 6, differences=False) == (0, 0.5, 0.25, 0, 0.75, 0)
    assert token_rewards(scores, [1, 2, 4], 6, differences=True) == (0, 0.5, -0.25, 0, 0.5, 0)
    assert token_rewards(scores, [1, 1, 4], 6, differences=False) == (0, 0.75, 0, 0, 0.75, 0)
