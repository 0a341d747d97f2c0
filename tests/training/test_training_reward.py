"""Reward models on pairs that they have not seen: calibration, and models that compare two answers."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import EOS, IDS, TEMPLATE, make_model, make_pairs, publish, run_cli, run_here, training_log
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from contracts.errors import UserError
from contracts.pairwise import PairwiseChat, question
from contracts.records import PAIRS, Message, Pair
from training.calibration import calibrate, evaluate_pairs
from training.reward import held_out_prompts, question_rows

EXTRA = ["A", "B", "[CONTEXT]", "[RESPONSE", "A]", "B]", "<turn>", "user"]
NOUNS = ("film", "book", "meal")


def scores_of(margins: list[float]) -> Any:
    """Scores of better and worse answers that differ by these margins."""
    return np.array([[margin / 2, -margin / 2] for margin in margins], np.float32)


def test_calibration_by_hand() -> None:
    """Six pairs in three bins; a tie is half right in its bin, and not accurate."""
    chances = [0.5, 0.52, 0.48, 0.97, 0.96, 0.02]
    report = evaluate_pairs(scores_of([float(np.log(p / (1 - p))) for p in chances]), orders=1)
    bins = {bin.low: bin for bin in report.files["calibration.jsonl"]}
    assert len(bins) == 10
    assert [bins[low].count for low in (0.5, 0.55, 0.9, 0.95)] == [3, 0, 0, 3]
    assert (bins[0.5].confidence, bins[0.5].accuracy) == (pytest.approx((0.5 + 0.52 + 0.52) / 3), pytest.approx(0.5))
    assert (bins[0.55].confidence, bins[0.55].accuracy) == (None, None)
    assert (bins[0.95].confidence, bins[0.95].accuracy) == (pytest.approx(0.97), pytest.approx(2 / 3))
    assert bins[0.95].high == 1.0
    gaps = 3 / 6 * abs(0.5 - (0.5 + 0.52 + 0.52) / 3) + 3 / 6 * abs(2 / 3 - 0.97)
    assert report.metrics["ece"] == pytest.approx(gaps, abs=1e-6)
    assert (report.metrics["accuracy"], report.metrics["ties"]) == (pytest.approx(3 / 6), pytest.approx(1 / 6))
    assert report.metrics["loss"] == pytest.approx(-np.mean(np.log(chances)), abs=1e-6)


def test_calibration_error_of_an_honest_model_is_small_and_of_a_boaster_large() -> None:
    chance = np.random.default_rng(0)
    p = chance.uniform(0.5, 1, 20_000)
    wins = chance.random(20_000) < p
    margins = np.where(wins, 1, -1) * np.log(p / (1 - p))
    honest = evaluate_pairs(scores_of(margins.tolist()), orders=1).metrics["ece"]
    boaster = evaluate_pairs(scores_of((8 * margins).tolist()), orders=1).metrics["ece"]
    assert honest < 0.02 < 0.15 < boaster


def test_certainty_falls_into_the_last_bin() -> None:
    bins = calibrate(np.array([1.0, 0.0]))
    assert (bins[-1].count, bins[-1].accuracy) == (2, 0.5)


def test_both_orders_are_one_judgement() -> None:
    """Pairs: right in both orders; always for the first place, weakly for the better one; torn; a tie."""
    margins = [[2.0, 2.0], [3.0, -1.0], [1.0, -3.0], [0.0, 0.0]]
    metrics = evaluate_pairs(scores_of([margin for pair in margins for margin in pair]), orders=2).metrics
    assert metrics["accuracy"] == 0.5
    assert (metrics["accuracy_better_first"], metrics["accuracy_better_second"]) == (0.75, 0.25)
    assert (metrics["consistency"], metrics["ties"]) == (0.25, 0.25)


def test_a_reward_model_publishes_its_calibration(models: dict[str, Path], tmp_path: Path) -> None:
    publish(tmp_path / "pairs", PAIRS, make_pairs(40))
    settings = {"model": models["tied"], "pairs": [tmp_path / "pairs"], "eval_fraction": 0.5, "global_batch": 10}
    artifact = run_here("reward", **settings, output=tmp_path / "out")
    bins = [json.loads(line) for line in (artifact.path / "calibration.jsonl").read_text().splitlines()]
    final = artifact.manifest.facts["final"]
    assert sum(bin["count"] for bin in bins) == artifact.manifest.facts["held_out_pairs"] == 20
    assert sum(bin["count"] * abs(bin["accuracy"] - bin["confidence"]) for bin in bins if bin["count"]) / 20 == (
        pytest.approx(final["held_out_ece"])
    )
    assert sum(bin["count"] * bin["accuracy"] for bin in bins if bin["count"]) / 20 == final["held_out_accuracy"]
    assert str(artifact.manifest.ledger) == "40 pairs in = 40 kept"
    nothing = run_here("reward", **{**settings, "eval_fraction": 0.0}, output=tmp_path / "nothing")
    assert not (nothing.path / "calibration.jsonl").exists()
    assert "held_out_accuracy" not in nothing.manifest.facts["final"]


def word_tokenizer(target: Path, ids: dict[str, int]) -> None:
    """A tokenizer of whole words, in the place of the one in `target`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="</s>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(target)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer knows the words of the question."""
    ids = {**IDS, **{word: len(IDS) + number for number, word in enumerate(EXTRA)}}
    target = make_model(tmp_path_factory.mktemp("judge") / "model", vocab_size=len(ids))
    word_tokenizer(target, ids)
    return target


def compared(count: int, seed: int = 0) -> list[Pair]:
    """Pairs of which the better answer says great or good, and the worse one bad or awful."""
    chance = random.Random(seed)
    pairs = []
    for pair in make_pairs(count):
        texts = [
            " ".join(["the", chance.choice(NOUNS), "was", *["long"] * chance.randrange(3), chance.choice(words), "."])
            for words in (("great", "good"), ("bad", "awful"))
        ]
        ids = [(*(IDS[word] for word in text.split()), EOS) for text in texts]
        prompt = f"review the {chance.choice(NOUNS)}"
        pairs.append(
            msgspec.structs.replace(
                pair, prompt=prompt, messages=(Message("user", prompt),),
                chosen=texts[0], rejected=texts[1], chosen_ids=ids[0], rejected_ids=ids[1],
            )
        )  # fmt: skip
    return pairs


def test_the_question_holds_the_whole_conversation_and_both_answers() -> None:
    turns = [Message("user", "Q"), Message("assistant", "R"), Message("user", "S")]
    assert question(turns, "one", "two") == (
        "[CONTEXT] \n\n<turn> user\n Q\n<turn> assistant\n R\n<turn> user\n S\n [RESPONSE A] one [RESPONSE B] two \n"
    )


def test_rows_of_a_pairwise_model(judge: Path) -> None:
    chat, pairs = PairwiseChat(judge), compared(200)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    first, second = question_rows(pairs[0], True, chat=chat, seed=0)
    for row, texts, labels in (
        (first, (pairs[0].chosen, pairs[0].rejected), "AB"), (second, (pairs[0].rejected, pairs[0].chosen), "BA")
    ):  # fmt: skip
        assert tokenizer.decode(row.prompt) == (
            f"<s> <|user|> [CONTEXT] <turn> user {pairs[0].prompt} [RESPONSE A] {texts[0]} [RESPONSE B] {texts[1]} "
            "<|assistant|>"
        )
        assert [tokenizer.decode(response.ids) for response in row.responses] == list(labels)
    trained = [question_rows(pair, False, chat=chat, seed=0) for pair in pairs]
    right = [tokenizer.decode(rows[0].responses[0].ids) for rows in trained]
    assert {len(rows) for rows in trained} == {1}
    assert 70 < right.count("A") < 130
    again = [question_rows(pair, False, chat=chat, seed=1) for pair in pairs]
    assert [tokenizer.decode(rows[0].responses[0].ids) for rows in again] != right


@pytest.fixture(scope="session")
def comparer(judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pairwise model that has learnt."""
    folder = tmp_path_factory.mktemp("comparer")
    publish(folder / "pairs", PAIRS, compared(240))
    return run_here(
        "reward", kind="pairwise", model=judge, pairs=[folder / "pairs"], eval_fraction=0.2, global_batch=24, epochs=12,
        learning_rate=3e-3, output=folder / "out",
    )  # fmt: skip


@pytest.mark.slow
def test_a_pairwise_model_learns_in_both_orders(comparer: Any) -> None:
    facts = comparer.manifest.facts
    final = facts["final"]
    assert (facts["kind"], facts["training_pairs"], facts["held_out_pairs"]) == ("pairwise", 192, 48)
    assert str(comparer.manifest.ledger) == "240 pairs in = 240 kept"
    assert final["held_out_accuracy_better_first"] >= 0.9
    assert final["held_out_accuracy_better_second"] >= 0.9
    assert final["held_out_consistency"] >= 0.9
    assert training_log(comparer.path)[0]["loss"] > 0.5
    # The published model, asked by transformers alone.
    model = AutoModelForCausalLM.from_pretrained(comparer.path).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    chat = PairwiseChat(comparer.path)
    tokenizer = AutoTokenizer.from_pretrained(comparer.path)
    label_ids = torch.tensor([tokenizer.convert_tokens_to_ids(label) for label in "AB"])
    pairs = compared(240)
    held_out = held_out_prompts({pair.prompt_id for pair in pairs}, 0.2, 0)
    right = []
    for pair in (pair for pair in pairs if pair.prompt_id in held_out):
        ids = chat.token_ids(pair.messages, pair.chosen, pair.rejected, "a pair")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1, label_ids]
        right.append(bool(logits[0] > logits[1]))
    assert sum(right) / len(right) == pytest.approx(final["held_out_accuracy_better_first"])


@pytest.mark.slow
def test_figures_do_not_depend_on_processes_and_packing(judge: Path, tmp_path: Path) -> None:
    publish(tmp_path / "pairs", PAIRS, compared(22))
    settings = {
        "kind": "pairwise", "model": judge, "pairs": [tmp_path / "pairs"], "eval_fraction": 0.4, "global_batch": 6,
        "max_steps": 2, "optimizer": "sgd", "learning_rate": 0.05,
    }  # fmt: skip
    whole = run_here("reward", **settings, output=tmp_path / "whole")
    arguments = [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items() if name != "pairs"]
    layout = ["parallel.dp=2", "micro_batch_tokens=60", "packing=padded"]
    run_cli("reward", *arguments, f"pairs=[{tmp_path / 'pairs'}]", f"output={tmp_path / 'two'}", *layout)
    for line, other in zip(training_log(tmp_path / "two"), training_log(whole.path), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)
    bins = [
        [json.loads(line) for line in (tmp_path / name / "calibration.jsonl").read_text().splitlines()]
        for name in ("whole", "two")
    ]
    assert [bin["count"] for bin in bins[0]] == [bin["count"] for bin in bins[1]]
    for one, two in zip(*bins, strict=True):
        assert not one["count"] or two == pytest.approx(one, rel=1e-4)


def test_labels_are_one_token_each_whatever_stands_before_them(judge: Path, tmp_path: Path) -> None:
    """Of a byte-level tokenizer, which has "A" and " A", and in the form that the generation prompt leaves whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*pre_tokenizers.ByteLevel.alphabet(), "ĠA", "ĠB", ":A"]
    vocabulary = {token: number for number, token in enumerate(sorted(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "A"), ("Ġ", "B"), (":", "A")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    found = []
    for end in ("\n", ":"):  # behind ":" the token ":A" swallows the colon
        tokenizer.chat_template = "{{ messages[0]['content'] }}" + end
        tokenizer.save_pretrained(tmp_path)
        found.append(tokenizer.convert_ids_to_tokens(PairwiseChat(tmp_path).label_ids))
    assert found == [["A", "B"], ["ĠA", "ĠB"]]


def test_a_pairwise_model_needs_labels_and_conversations(judge: Path, models: dict[str, Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"kind": "pairwise", "pairs": [tmp_path / "pairs"], "output": tmp_path / "out"}
    publish(tmp_path / "pairs", PAIRS, compared(4))
    with pytest.raises(UserError, match=f"tokenizer of {models['tied']} has no single token"):
        run_here("reward", **settings, model=models["tied"])
    publish(tmp_path / "old", PAIRS, [msgspec.structs.replace(pair, messages=()) for pair in compared(4)])
    with pytest.raises(UserError, match="pair-0000 does not hold the conversation"):
        run_here("reward", **{**settings, "pairs": [tmp_path / "old"]}, model=judge)
    with pytest.raises(UserError, match="no usable row"):
        run_here("reward", **settings, model=judge, max_length=20)
