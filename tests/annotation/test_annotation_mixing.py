"""Pairs from elsewhere and from earlier iterations: every layout of people's, and parts of published pairs."""

import json

import pytest
from annotation_world import EOS, IDS, publish_scores

from annotation.data.mixing import PairsSampleConfig, PreferencesImportConfig, PreferencesScoresConfig
from annotation.pairing.config import PairsConfig
from annotation.stages.mixing import IMPORT_PREFERENCES, PREFERENCES_SCORES, SAMPLE_PAIRS
from annotation.stages.pairs import CHOOSE_PAIRS
from contracts.errors import UserError
from contracts.prompts import PromptsConfig
from contracts.records import Message, Pair, Rollout
from contracts.stage import run_stage
from contracts.stages.prompts import IMPORT_PROMPTS

USER = {"role": "user", "content": "review the film"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("great .", "awful ."))
LAYOUTS = {
    "TRL, explicit prompt": {"prompt": "review the film", "chosen": "great .", "rejected": "awful ."},
    "TRL, conversations, explicit prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, conversations, implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "UltraFeedback": {
        "prompt": "review the film", "prompt_id": "7", "chosen": [USER, GOOD], "rejected": [USER, BAD],
        "messages": [USER, GOOD], "score_chosen": 8.5, "score_rejected": 6,
    },
    "HH-RLHF": {
        "chosen": "\n\nHuman: review the film\n\nAssistant: great .",
        "rejected": "\n\nHuman: review the film\n\nAssistant: awful .",
    },
    "HH-RLHF with a prompt": {
        "prompt": "\n\nHuman: review the film\n\nAssistant:", "chosen": " great .", "rejected": " awful .",
    },
    "ShareGPT": {
        "chosen": [{"from": "human", "value": "review the film"}, {"from": "gpt", "value": "great ."}],
        "rejected": [{"from": "human", "value": "review the film"}, {"from": "gpt", "value": "awful ."}],
    },
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(folder, rows, models, **keys):
    """The rollouts and the pairs of these rows."""
    source = write(folder / "source.jsonl", rows)
    own = {name: keys.pop(name) for name in ("exclude", "shard_size") if name in keys}
    config = PreferencesImportConfig(
        output=folder / "rollouts", source=source, tokenizer=models["causal"], **keys, **own
    )
    rollouts = run_stage(IMPORT_PREFERENCES, config)
    read = PreferencesScoresConfig(output=folder / "scores", source=source, rollouts=rollouts.path, **keys)
    scores = run_stage(PREFERENCES_SCORES, read)
    chosen = PairsConfig(output=folder / "pairs", rollouts=rollouts.path, scores=scores.path)
    return rollouts, run_stage(CHOOSE_PAIRS, chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, models, layout):
    rollouts, pairs = imported(tmp_path, [LAYOUTS[layout]], models)
    (pair,) = pairs.rows(Pair)
    assert pair.messages == (Message("user", "review the film"),)
    ids = [IDS[token] for token in ("<s>", "<|user|>", "review", "the", "film", "<|assistant|>")]
    assert list(pair.prompt_ids) == ids
    assert pair.chosen_ids == (IDS["great"], IDS["."], EOS)
    assert pair.rejected_ids == (IDS["awful"], IDS["."], EOS)
    scored = "score_chosen" in LAYOUTS[layout]
    assert (pair.chosen_score, pair.rejected_score) == ((8.5, 6) if scored else (1, 0))
    (rollout,) = rollouts.rows(Rollout)
    assert (rollout.policy, rollout.completions[0].logprobs) == ("imported", ())


def test_what_is_left_out_is_counted(tmp_path, models):
    def pair(prompt, chosen, rejected, **more):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}

    one, other = [USER, GOOD], [{"role": "user", "content": "review the book"}, BAD]
    rows = [
        pair("review the film", "great .", "awful ."),
        pair("review the film", "good .", "bad ."),
        pair("review the meal", "good .", "good ."),
        pair("review the meal", "good .", " "),
        pair("review the book", "good .", "bad ."),
        {"chosen": one, "rejected": other},
        {"chosen": [USER], "rejected": [USER]},
        pair("review the long book", "good .", "bad .", score_chosen=1, score_rejected=2),
        pair("review the long film", "good .", "bad .", score_chosen=2, score_rejected=2),
        pair("review the blue film", "good .", "bad ."),
        pair("", "good .", "bad ."),
        pair([{"role": "system", "content": "review"}, {"role": "user", "content": " "}], "good .", "bad ."),
        {"chosen": [{"role": "user", "content": "\n"}, GOOD], "rejected": [{"role": "user", "content": "\n"}, BAD]},
    ]
    held = write(tmp_path / "heldout.jsonl", [{"prompt": "review the book"}])
    run_stage(IMPORT_PROMPTS, PromptsConfig(source=held, output=tmp_path / "h"))
    rollouts, pairs = imported(tmp_path, rows, models, max_dropped=0.8, exclude=[tmp_path / "h"], limit=6, shard_size=2)
    assert rollouts.manifest.ledger.dropped == {
        "identical_answers": 1, "empty": 1, "held_out": 1, "different_prompts": 1, "no_answer": 1, "scores_disagree": 1,
        "empty_prompt": 3,
    }  # fmt: skip
    assert len(rollouts.shards) == 2
    first, second, *_ = rollouts.rows(Rollout)
    assert second.prompt_id == f"{first.prompt_id}-2"  # another pair of the same prompt
    assert pairs.manifest.ledger.dropped == {"tie": 1}
    assert pairs.manifest.rows == 3


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"chosen": "good .", "rejected": "bad ."}, {}, "an answer alone, and no column prompt or question"),
        ({"prompt": "so?", "chosen": "good ."}, {}, "no column 'rejected'; found prompt, chosen"),
        ({"prompt": "so?", "chosen": "good .", "rejected": None}, {}, "the column 'rejected' is null"),
        ({"prompt": "so?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, {}, "does not contain the prompt"),
        ({"prompt": "so?", "chosen": "a", "rejected": "b", "score_chosen": "x"}, {}, "a score must be a number"),
        ({"prompt": "so?", "chosen": "a", "rejected": "b"}, {"columns": {"chosen": "choosen"}}, "mean 'chosen'"),
        ({"prompt": "so?", "chosen": "a", "rejected": "a"}, {"max_dropped": 1}, "no usable pair"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, models, row, keys, said):
    with pytest.raises(UserError) as refusal:
        imported(tmp_path, [row], models, **keys)
    assert said in str(refusal.value)
    assert not (tmp_path / "rollouts").exists()


@pytest.fixture
def pairs(tmp_path, rollouts):
    scores = publish_scores(tmp_path / "scores", rollouts, lambda r, c: float(c.sample))
    config = PairsConfig(output=tmp_path / "pairs", rollouts=rollouts.path, scores=scores.path, strategy="all")
    return run_stage(CHOOSE_PAIRS, config)


def sampled(folder, rollouts, pairs, **keys):
    config = PairsSampleConfig(output=folder, rollouts=rollouts.path, pairs=pairs.path, **keys)
    return run_stage(SAMPLE_PAIRS, config)


def test_a_share_of_pairs_is_within_every_larger_one(tmp_path, rollouts, pairs):
    everything = [pair.pair_id for pair in pairs.rows(Pair)]
    found = {}
    for share in (0.25, 0.5, 1.0):
        part = sampled(tmp_path / f"part-{share}", rollouts, pairs, share=share, seed=3)
        found[share] = [pair.pair_id for pair in part.rows(Pair)]
        assert found[share] == [name for name in everything if name in found[share]]
        assert part.manifest.ledger.rows_in == len(everything)
    assert [len(names) for names in found.values()] == [round(len(everything) * share) for share in found]
    assert set(found[0.25]) < set(found[0.5]) < set(found[1.0])
    other = sampled(tmp_path / "other", rollouts, pairs, share=0.5, seed=4)
    assert {pair.pair_id for pair in other.rows(Pair)} != set(found[0.5])


def test_a_share_beside_other_pairs(tmp_path, rollouts, pairs):
    few = sampled(tmp_path / "few", rollouts, pairs, share=0.2)
    part = sampled(tmp_path / "part", rollouts, pairs, share=0.25, beside=few.path)
    assert part.manifest.rows == round(few.manifest.rows / 3)
    most = sampled(tmp_path / "most", rollouts, pairs, share=0.9, beside=pairs.path)
    assert (most.manifest.rows, most.manifest.facts["wanted"]) == (pairs.manifest.rows, 9 * pairs.manifest.rows)
