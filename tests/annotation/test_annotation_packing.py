"""Scores do not depend on how sequences are packed: each equals transformers' own forward pass of it alone."""

import random

import msgspec
import numpy as np
import pytest
import torch
from annotation_world import make_rollouts, save_model, tiny_config
from byte_level import CHATML, CHATML_TOKENS, GEMMA, GEMMA_TOKENS, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

import annotation.models.reader
from annotation.models.batching import chunks, prefetch, row_batches, shared_row
from annotation.models.loading import open_model
from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.scorers.base import Opening
from contracts.chat import ChatTokenizer
from contracts.prompts import prompt_id
from contracts.records import Completion, Message, Rollout, Sampling, Score
from modeling.packing import tokens_of
from modeling.rows import Response, Row

TEXTS = [
    "", "a", "Hello, world!", "Ça va? Très bien.", "好的", "🧑‍🚀🚀 é vs é", "\u200bzero width\n\n\n",
    " leading", "The capital of France is Paris. " * 4, "مرحبا بالعالم", "Hello, world! And more.",
]  # fmt: skip


def rollout(number: int, k: int) -> Rollout:
    rng = random.Random(number)
    messages = (Message("user", f"{number}: {rng.choice(TEXTS)} {'Tell me of the sea. ' * (number % 4)}"),)
    completions = tuple(
        Completion(sample, (5,), rng.choice(TEXTS), "stop", (0.0,), 0, Sampling(1.0, 1.0, 0, 1)) for sample in range(k)
    )
    return Rollout(prompt_id(messages), messages, (1,), completions, "policy", 0, "processed", None)


def samples_of(rollouts):
    return [Sample(each, completion) for each in rollouts for completion in each.completions]


def open_scorer(tmp_path, model, kind="reward_model", **keys):
    config = score_config(output=tmp_path / "scores", rollouts=tmp_path, kind=kind, model=model, **keys)
    return open_model(config, Opening(tmp_path, lambda: 0))


@pytest.fixture(scope="module", params=["chatml", "gemma"])
def reward(request, tmp_path_factory):
    """A reward model with a byte-level tokenizer: without BOS, or with one that the template writes."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_config(vocab_size=420, num_labels=1, max_position_embeddings=512, pad_token_id=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    chatml = request.param == "chatml"
    write_tokenizer(path, CHATML if chatml else GEMMA, **(CHATML_TOKENS if chatml else GEMMA_TOKENS))
    return path


def conversation(model, sample):
    turns = [*sample.rollout.messages, Message("assistant", sample.completion.text)]
    return ChatTokenizer(model).conversation(turns)


def own_reward(model, ids):
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("batch_tokens", [40, 16384])
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_rewards_equal_the_models_own_whatever_is_beside_them(tmp_path, reward, batch_tokens, packing, monkeypatch):
    if packing == "padded":
        monkeypatch.setattr(annotation.models.reader, "support_of", lambda config: "padded")
    samples = samples_of([rollout(number, k) for number, k in enumerate([4, 1, 8, 3, 2, 4])])
    scorer = open_scorer(tmp_path, reward, batch_tokens=batch_tokens)
    assert scorer.facts["packing"] == packing
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    expected = [own_reward(model, conversation(reward, sample)) for sample in samples]
    assert len({round(each, 3) for each in expected}) > 10
    assert [score.score for score in scorer(samples)] == pytest.approx(expected, abs=1e-5)


def test_what_is_at_the_limit_is_scored_and_what_is_over_it_dropped(tmp_path, reward):
    samples = samples_of([rollout(3, 8)])
    lengths = [len(conversation(reward, sample)) for sample in samples]
    limit = sorted(set(lengths))[-2]
    whole = open_scorer(tmp_path, reward)(samples)
    for one, length, score in zip(
        open_scorer(tmp_path, reward, max_length=limit)(samples), lengths, whole, strict=True
    ):
        if length > limit:
            assert one == "too_long"
        else:
            assert one.score == pytest.approx(score.score, abs=1e-5)


def test_a_shard_is_scored_alike_whatever_was_scored_before(tmp_path, reward):
    first, second = (samples_of([rollout(number, 4) for number in numbers]) for numbers in (range(6), range(6, 9)))
    scorer = open_scorer(tmp_path, reward)
    alone = scorer(second)
    scorer(first)
    assert scorer(second) == alone


@pytest.mark.parametrize("kind", ["reward_model", "logprobs", "values"])
def test_a_model_that_sharing_changes_reads_padded_batches(tmp_path, models, kind, monkeypatch):
    model = models["causal" if kind == "logprobs" else "reward"]
    samples = samples_of(make_rollouts(5, 4))
    shared = open_scorer(tmp_path, model, kind)
    expected = shared(samples)
    packed = annotation.models.reader.ModelReader._shared
    monkeypatch.setattr(
        annotation.models.reader.ModelReader,
        "_shared",
        lambda self, rows: [[[each + 1e-3 for each in one] for one in row] for row in packed(self, rows)],
    )
    scorer = open_scorer(tmp_path, model, kind, max_length=63)  # another one than is held
    assert (shared.facts["packing"], scorer.facts["packing"]) == ("shared", "padded")
    assert (shared.facts.get("layers"), scorer.facts.get("layers")) == ("onednn", None)
    assert scorer.model.config._attn_implementation == scorer.facts["attention"] == "sdpa"
    for one, other in zip(scorer(samples), expected, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)


ARCHITECTURES = {
    "MistralConfig": ({"sliding_window": 7}, "shared"),
    "Gemma2Config": ({"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32, "sliding_window": 7}, "shared"),
    "Qwen2Config": ({}, "shared"),
    "GPTNeoXConfig": ({}, "shared"),
    "GPT2Config": ({"n_embd": 32, "n_layer": 2, "n_head": 1, "n_positions": 64}, "shared"),
    "BloomConfig": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, "padded"),
    "BertConfig": ({}, "padded"),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_classifiers_of_every_kind_of_attention(tmp_path, tokenizer, family):
    import transformers

    changes, packing = ARCHITECTURES[family]
    known = tiny_config().to_dict()
    keys = ["vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"]
    if family not in ("GPT2Config", "BloomConfig"):
        keys += ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        keys += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
    config = getattr(transformers, family)(**{key: known[key] for key in keys}, num_labels=1, **changes)
    path = save_model(tmp_path / "model", AutoModelForSequenceClassification, config, tokenizer)
    scorer = open_scorer(tmp_path, path)
    assert scorer.facts["packing"] == packing
    samples = samples_of(make_rollouts(5, 4))
    model = AutoModelForSequenceClassification.from_pretrained(path, attn_implementation="eager").eval()
    for sample, score in zip(samples, scorer(samples), strict=True):
        ids = conversation(path, sample)
        model.config.pad_token_id = next(token for token in range(9) if token != ids[-1])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score.score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["logprobs", "values"])
def test_token_scores_do_not_depend_on_the_packing(tmp_path, models, kind, monkeypatch):
    """Also of an answer without tokens, and of one alone."""
    model = models["causal" if kind == "logprobs" else "reward"]
    rollouts = make_rollouts(4, 4)
    answers = list(rollouts[1].completions)
    answers[2] = Completion(2, (), "", "length", (), 0, answers[2].sampling)
    rollouts[1] = msgspec.structs.replace(rollouts[1], completions=tuple(answers))
    samples = samples_of(rollouts)[:-3]
    found = open_scorer(tmp_path, model, kind)(samples)
    monkeypatch.setattr(annotation.models.reader, "support_of", lambda config: "padded")
    for one, other in zip(found, open_scorer(tmp_path, model, kind, max_length=63)(samples), strict=True):
        if isinstance(one, str):
            assert one == other == "empty"
            continue
        name = "token_logprobs" if kind == "logprobs" else "token_values"
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=3e-5)
        assert isinstance(other, Score)


rows = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(0, 30), min_size=1, max_size=6)), min_size=1, max_size=8
)


@given(rows, st.integers(1, 120), st.integers(1, 120))
def test_each_response_is_in_one_batch_that_fits(sizes, one, other):
    budget, limit = sorted((one, other))
    made = [Row("", np.arange(width), tuple(Response(np.arange(n)) for n in answers)) for width, answers in sizes]
    seen = []
    for batch in row_batches(made, budget, limit):
        if len(batch) > 1:
            assert sum(tokens_of(piece.row, "shared") for piece in batch) <= budget
        for piece in batch:
            if len(piece.row.responses) > 1:
                assert tokens_of(piece.row, "shared") <= limit
            responses = made[piece.place].responses[piece.first : piece.first + len(piece.row.responses)]
            assert piece.row.responses == responses
            seen += [(piece.place, place) for place in range(piece.first, piece.first + len(responses))]
    assert sorted(seen) == [(place, n) for place, row in enumerate(made) for n in range(len(row.responses))]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_shared_row_is_its_sequences(sequences):
    row = shared_row(sequences)
    assert [[*row.prompt, *response.ids] for response in row.responses] == sequences
    longer = len(row.prompt) + 1
    if min(map(len, sequences)) >= longer:
        assert len({tuple(each[:longer]) for each in sequences}) > 1


def test_what_is_made_ahead_comes_in_order_and_fails_where_it_did():
    assert list(prefetch(chunks(range(7), lambda _: 1, 3))) == [[0, 1, 2], [3, 4, 5], [6]]

    def failing():
        yield 1
        raise ValueError("two")

    made = prefetch(failing())
    assert next(made) == 1
    with pytest.raises(ValueError, match="two"):
        next(made)


def test_reference_logprobs_of_a_model_without_a_known_head_are_its_own(tmp_path, models, monkeypatch):
    from contracts.errors import UserError

    def unknown(model):
        raise UserError("unknown")

    samples = samples_of(make_rollouts(2, 2))
    expected = open_scorer(tmp_path, models["tied"], "logprobs")(samples)
    monkeypatch.setattr(annotation.models.reader, "logit_scaling", unknown)
    scorer = open_scorer(tmp_path, models["tied"], "logprobs", max_length=63)
    assert scorer.facts["packing"] == "padded"
    for one, other in zip(scorer(samples), expected, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-5)
