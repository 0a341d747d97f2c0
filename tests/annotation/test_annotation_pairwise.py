"""The scorer kind `pairwise`: equal to asking about two answers at a time, and what pairs and evaluation make of it."""

import itertools
import shutil

import msgspec
import pytest
import torch
from annotation_world import (
    IDS,
    SPECIAL,
    TEMPLATE,
    make_rollout,
    make_rollouts,
    publish_rollouts,
    save_model,
    tiny_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from annotation.config import EvaluationConfig
from annotation.pairing.config import PairsConfig
from annotation.scorers import score_config
from annotation.stages.evaluation import EVALUATE
from annotation.stages.pairs import CHOOSE_PAIRS
from annotation.stages.score import SCORE
from contracts.errors import UserError
from contracts.records import Pair, Rollout, Score
from contracts.stage import run_stage

EXTRA = ["A", "B", "[CONTEXT]", "[RESPONSE", "A]", "B]", "<turn>", "user"]


def compare(output, rollouts, model, **keys):
    return run_stage(SCORE, score_config(output=output, rollouts=rollouts.path, kind="pairwise", model=model, **keys))


def scores_of(artifact):
    return {(row.prompt_id, row.sample): row.score for row in artifact.rows(Score)}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Random models whose tokenizer knows the words of the question."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPT2Config

    ids = {**IDS, **{word: len(IDS) + number for number, word in enumerate(EXTRA)}}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    base = tmp_path_factory.mktemp("judges")
    gpt2 = GPT2Config(vocab_size=len(ids), n_embd=32, n_layer=2, n_head=1, n_positions=64, initializer_range=0.3)
    return {
        "llama": save_model(base / "llama", AutoModelForCausalLM, tiny_config(vocab_size=len(ids)), tokenizer),
        "gpt2": save_model(base / "gpt2", AutoModelForCausalLM, gpt2, tokenizer),
    }


def naive(path):
    """A function that gives the probability that the first answer is better, asked in both orders, one at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    labels = tokenizer.convert_tokens_to_ids(["A", "B"])

    def names_first(rollout, first, second):
        text = (
            f"<s><|user|> [CONTEXT] <turn> user {rollout.messages[0].content} [RESPONSE A] {first} "
            f"[RESPONSE B] {second} <|assistant|>"
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            return model(ids).logits[0, -1, labels].softmax(-1)[0].item()

    def chance(rollout, first, second):
        return (names_first(rollout, first, second) + 1 - names_first(rollout, second, first)) / 2

    return chance


@pytest.mark.slow
@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [40, 100_000])
def test_scores_equal_asking_about_two_answers_at_a_time(tmp_path, judges, rollouts, which, batch_tokens):
    artifact = compare(tmp_path / "scores", rollouts, judges[which], batch_tokens=batch_tokens)
    found, chance = scores_of(artifact), naive(judges[which])
    assert len(found) == 40
    for rollout in rollouts.rows(Rollout):
        texts = [completion.text for completion in rollout.completions]
        for sample, text in enumerate(texts):
            others = [other for place, other in enumerate(texts) if place != sample]
            expected = sum(0.5 if text == other else chance(rollout, text, other) for other in others) / 3
            assert found[rollout.prompt_id, sample] == pytest.approx(expected, abs=1e-5)
        assert sum(found[rollout.prompt_id, sample] for sample in range(4)) == pytest.approx(2)
    assert len({round(score, 4) for score in found.values()}) > 30
    facts = artifact.manifest.facts
    assert (facts["comparisons"], facts["too_long_comparisons"]) == (60, 0)
    assert facts["consistency"] == facts["consistent"] / 60
    assert 0 < facts["consistent"] < 60


def test_identical_answers_tie_without_being_asked_about(tmp_path, judges):
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(1, ["great .", "bad .", "great ."])])
    artifact = compare(tmp_path / "scores", rollouts, judges["llama"])
    (first, second, third), (rollout,) = scores_of(artifact).values(), rollouts.rows(Rollout)
    better = naive(judges["llama"])(rollout, "great .", "bad .")
    assert first == third == pytest.approx((0.5 + better) / 2, abs=1e-6)
    assert second == pytest.approx(1 - better, abs=1e-6)
    assert artifact.manifest.facts["comparisons"] == 1


@pytest.mark.parametrize(("k", "opponents", "comparisons"), [(6, 2, 6), (6, 4, 12), (5, 4, 10), (5, 9, 10), (2, 1, 1)])
def test_opponents_are_neighbours_in_a_ring(tmp_path, judges, k, opponents, comparisons):
    words = ["great", "good", "bad", "awful", "blue", "long"][:k]
    rollouts = publish_rollouts(tmp_path / "rollouts", [make_rollout(1, [f"the {word} ." for word in words])])
    artifact = compare(tmp_path / "scores", rollouts, judges["llama"], opponents=opponents)
    assert artifact.manifest.facts["comparisons"] == comparisons
    (rollout,), chance = rollouts.rows(Rollout), naive(judges["llama"])
    texts = [completion.text for completion in rollout.completions]
    near = [texts[place % k] for place in (1, k - 1, 2, k - 2)][: min(opponents, k - 1)]
    expected = sum(chance(rollout, texts[0], other) for other in near) / len(near)
    assert scores_of(artifact)[rollout.prompt_id, 0] == pytest.approx(expected, abs=1e-5)


def test_answers_that_are_too_long_are_dropped_and_counted(tmp_path, judges):
    """The long answer fits with no other one; the others are judged by what fits."""
    rollouts = publish_rollouts(
        tmp_path / "rollouts", [make_rollout(1, ["great .", "bad .", "good " * 30 + "."])], facts={}
    )
    artifact = compare(tmp_path / "scores", rollouts, judges["llama"], max_length=40, max_dropped=0.5)
    assert artifact.manifest.ledger.dropped == {"too_long": 1}
    assert artifact.manifest.facts["too_long_comparisons"] == 2
    (rollout,) = rollouts.rows(Rollout)
    better = naive(judges["llama"])(rollout, "great .", "bad .")
    found = scores_of(artifact)
    assert found == {
        (rollout.prompt_id, 0): pytest.approx(better, abs=1e-6),
        (rollout.prompt_id, 1): pytest.approx(1 - better, abs=1e-6),
    }


def test_a_prompt_with_one_answer_has_no_opponent(tmp_path, judges, models):
    alone = [make_rollout(number, ["great ."]) for number in range(3)]
    rollouts = publish_rollouts(tmp_path / "alone", alone)
    with pytest.raises(UserError, match="at most one per prompt"):
        compare(tmp_path / "scores", rollouts, judges["llama"])
    rollouts = publish_rollouts(tmp_path / "some", [*alone[:1], *make_rollouts(4, 3, seed=1)[1:]])
    artifact = compare(tmp_path / "scores", rollouts, judges["llama"])
    assert artifact.manifest.ledger.dropped == {"no_opponent": 1}
    with pytest.raises(UserError, match="no single token for each of the labels A and B"):
        compare(tmp_path / "none", rollouts, models["causal"])
    with pytest.raises(UserError, match="must be a causal language model"):
        compare(tmp_path / "none", rollouts, models["reward"])


def test_a_comparison_that_fails_fails_for_both(tmp_path, judges):
    """An answer that the chat template refuses: neither it nor what it is compared with has a score."""
    broken = tmp_path / "broken"
    shutil.copytree(judges["llama"], broken)
    refusal = "{% if ' blue ' in messages[0].content %}{{ raise_exception('no blue') }}{% endif %}"
    (broken / "chat_template.jinja").write_text(refusal + TEMPLATE)
    rows = [make_rollout(number, [f"the {word} ." for word in ("great", "good")]) for number in range(9)]
    rows.append(make_rollout(9, ["the blue .", "the good ."]))
    rollouts = publish_rollouts(tmp_path / "rollouts", rows)
    with pytest.raises(UserError, match="no blue"):
        compare(tmp_path / "scores", rollouts, broken)
    artifact = compare(tmp_path / "scores", rollouts, broken, fail_on_error=0.2)
    assert artifact.manifest.ledger.dropped == {"failed": 2}


def test_pairs_are_chosen_by_these_scores_and_keep_the_conversation(tmp_path, judges, rollouts):
    scores = compare(tmp_path / "scores", rollouts, judges["llama"])
    pairs = run_stage(CHOOSE_PAIRS, PairsConfig(output=tmp_path / "pairs", rollouts=rollouts.path, scores=scores.path))
    found, messages = scores_of(scores), {row.prompt_id: row.messages for row in rollouts.rows(Rollout)}
    rows = list(pairs.rows(Pair))
    assert len(rows) >= 8
    for pair in rows:
        assert found[pair.prompt_id, pair.chosen_sample] == max(found[pair.prompt_id, k] for k in range(4))
        assert pair.messages == messages[pair.prompt_id]


@pytest.fixture
def heldout(tmp_path):
    """Answers of the initial policy and of a later one to the same prompts."""
    first = make_rollouts(6, 2, seed=1)
    later = make_rollouts(6, 1, seed=2)
    later[0] = msgspec.structs.replace(later[0], completions=first[0].completions[:1])
    return [publish_rollouts(tmp_path / name, rows) for name, rows in (("first", first), ("later", later))]


def evaluate(output, rollouts, reward, baseline):
    config = EvaluationConfig(output=output, rollouts=rollouts.path, scores={"reward": reward}, baseline=baseline)
    return run_stage(EVALUATE, config).manifest.facts["metrics"]


def test_the_win_rate_is_the_mean_chance_against_the_first_policy(tmp_path, judges, heldout):
    first, later = heldout
    own = compare(tmp_path / "own", first, judges["llama"], against=first.path)
    start = evaluate(tmp_path / "start", first, own.path, None)
    assert start["win_rate"] == 0.5
    assert start["reward_mean"] == pytest.approx(0.5)
    ours = compare(tmp_path / "ours", later, judges["llama"], against=first.path)
    metrics = evaluate(tmp_path / "evaluation", later, ours.path, own.path)
    chance = naive(judges["llama"])
    expected = [
        sum(0.5 if text == other.text else chance(row, text, other.text) for other in theirs.completions) / 2
        for row, theirs in zip(later.rows(Rollout), first.rows(Rollout), strict=True)
        for text in [row.completions[0].text]
    ]
    assert metrics["win_rate"] == metrics["reward_mean"] == pytest.approx(sum(expected) / 6, abs=1e-5)
    assert metrics["win_rate_prompts"] == 6
    among = compare(tmp_path / "among", first, judges["llama"])
    with pytest.raises(UserError, match="against=ROLLOUTS of the initial policy"):
        evaluate(tmp_path / "none", first, among.path, own.path)


def test_nothing_depends_on_the_number_of_shards(tmp_path, judges):
    rows = make_rollouts(6, 3)
    found = [
        scores_of(
            compare(tmp_path / f"scores-{size}", publish_rollouts(tmp_path / f"of-{size}", rows, size), judges["llama"])
        )
        for size in (1, 6)
    ]
    for one, other in itertools.pairwise(found):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"missing_eos_penalty": 1.0}, "is not a key of kind=pairwise; it is one of kind="),
        ({"pairs": "pairs"}, "leave pairs out"),
        ({"kind": "logprobs", "opponents": 2}, "'opponents' is not a key of kind=logprobs; it is one of kind=pairwise"),
        (
            {"kind": "logprobs", "against": "other"},
            "'against' is not a key of kind=logprobs; it is one of kind=pairwise",
        ),
    ],
)
def test_keys_that_do_not_fit(change, message):
    with pytest.raises(UserError, match=message):
        score_config(**{"output": "out", "rollouts": "rollouts", "kind": "pairwise", "model": "model", **change})
