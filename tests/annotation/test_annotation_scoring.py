"""The score stage: what the models give, what is dropped, and that nothing depends on who works."""

import json
import shutil
import signal
import subprocess
import sys
import time

import msgspec
import pytest
import torch
from annotation_world import (
    EOS,
    IDS,
    ROOT,
    make_rollouts,
    publish_rollouts,
    publish_scores,
    run_cli,
    save_model,
    tiny_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from warm_stages import start_stage

from annotation.scorers import score_config
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.errors import UserError
from contracts.records import SCORES, Message, Pair, Rollout, Score
from contracts.stage import run_stage

RULE = """
def contains_bad(messages, response, finish_reason, answer):
    assert messages[-1]["role"] == "user" and answer == "great"
    return None if "awful" in response else response.count(answer) + (finish_reason == "stop") * 0.5
"""


def score(output, rollouts, **keys):
    return run_stage(SCORE, score_config(output=output, rollouts=rollouts.path, **keys))


def by_key(artifact):
    return {(row.prompt_id, row.sample): row for row in artifact.rows(Score)}


def samples_of(rollouts):
    return {
        (rollout.prompt_id, completion.sample): (rollout, completion)
        for rollout in rollouts.rows(Rollout)
        for completion in rollout.completions
    }


@pytest.fixture
def rule(tmp_path):
    path = tmp_path / "rule.py"
    path.write_text(RULE)
    return f"{path}:contains_bad"


@pytest.mark.parametrize("which", ["reward", "reward_pad_is_eos"])
def test_rewards_equal_scoring_one_conversation_at_a_time(tmp_path, rollouts, models, which):
    """Also with pad == eos, where the head of transformers alone would read the token before the last."""
    found = by_key(score(tmp_path / "scores", rollouts, kind="reward_model", model=models[which], batch_tokens=100))
    model = AutoModelForSequenceClassification.from_pretrained(models[which]).eval()
    tokenizer = AutoTokenizer.from_pretrained(models[which])
    assert len(found) == 40
    for key, (rollout, completion) in samples_of(rollouts).items():
        turns = [{"role": m.role, "content": m.content} for m in rollout.messages]
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": completion.text}], tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids.count(IDS["<s>"]) == 1
        assert ids[-1] == EOS
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state
            expected = model.score(hidden[0, -1]).item()
        assert found[key].score == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("which", ["causal", "tied"])
def test_logprobs_equal_a_naive_forward(tmp_path, rollouts, models, which):
    found = by_key(score(tmp_path / "scores", rollouts, kind="logprobs", model=models[which], batch_tokens=90))
    model = AutoModelForCausalLM.from_pretrained(models[which]).eval()
    assert_naive(model, rollouts, found)


def assert_naive(model, rollouts, found):
    assert len(found) == len(samples_of(rollouts))
    for key, (rollout, completion) in samples_of(rollouts).items():
        ids = torch.tensor([[*rollout.prompt_ids, *completion.response_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :, 0]
        assert found[key].token_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
        assert found[key].score == pytest.approx(expected.sum().item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2Config", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 32}),
        ("CohereConfig", {"logit_scale": 0.1}),
        ("GraniteConfig", {"logits_scaling": 3.0}),
        ("MixtralConfig", {"num_local_experts": 2}),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 1, "n_positions": 64}),
    ],
)
def test_logprobs_of_architectures_that_change_their_logits(tmp_path, rollouts, tokenizer, family, changes):
    import transformers

    known = tiny_config().to_dict()
    keys = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range")
    if family != "GPT2Config":
        keys += (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings",
        )  # fmt: skip
    config = getattr(transformers, family)(**{key: known[key] for key in keys}, **changes)
    path = save_model(tmp_path / "model", AutoModelForCausalLM, config, tokenizer)
    found = by_key(score(tmp_path / "scores", rollouts, kind="logprobs", model=path))
    assert_naive(AutoModelForCausalLM.from_pretrained(path).eval(), rollouts, found)


def test_logits_in_several_chunks_change_nothing(tmp_path, rollouts, models, monkeypatch):
    import annotation.models.logprobs

    whole = by_key(score(tmp_path / "whole", rollouts, kind="logprobs", model=models["causal"]))
    monkeypatch.setattr(annotation.models.logprobs, "LOGITS_AT_ONCE", 3 * len(IDS))
    chunked = by_key(score(tmp_path / "chunked", rollouts, kind="logprobs", model=models["causal"]))
    assert whole.keys() == chunked.keys()
    for key, row in whole.items():
        assert row.token_logprobs == pytest.approx(chunked[key].token_logprobs, abs=1e-5)


@pytest.mark.parametrize("kind", ["reward_model", "logprobs"])
def test_too_long_inputs_are_dropped_and_counted_never_cut(tmp_path, rollouts, models, kind):
    model = models["reward" if kind == "reward_model" else "causal"]
    every = by_key(score(tmp_path / "all", rollouts, kind=kind, model=model))
    some = score(tmp_path / "some", rollouts, kind=kind, model=model, max_length=18, max_dropped=1)
    ledger = some.manifest.ledger
    assert 0 < ledger.dropped["too_long"] < 40
    assert ledger.rows_in == 40 == ledger.kept + ledger.dropped["too_long"]
    for key, row in by_key(some).items():
        assert row.score == pytest.approx(every[key].score, abs=1e-4)
    with pytest.raises(UserError, match=r"too_long is more than max_dropped=0\.1"):
        score(tmp_path / "none", rollouts, kind=kind, model=model, max_length=18)


def test_truncated_answers_pay_the_penalty(tmp_path, rollouts, models):
    plain = by_key(score(tmp_path / "plain", rollouts, kind="reward_model", model=models["reward"]))
    fined = by_key(
        score(tmp_path / "fined", rollouts, kind="reward_model", model=models["reward"], missing_eos_penalty=2.5)
    )
    reasons = set()
    for key, (_, completion) in samples_of(rollouts).items():
        reasons.add(completion.finish_reason)
        fine = 2.5 if completion.finish_reason == "length" else 0.0
        assert fined[key].score == pytest.approx(plain[key].score - fine)
    assert reasons == {"stop", "length"}


def test_a_rule_sees_the_answer_and_what_it_cannot_judge_is_counted(tmp_path, rollouts, rule):
    scores = score(tmp_path / "scores", rollouts, kind="rule", function=rule, name="gold", max_dropped=1)
    found = by_key(scores)
    for key, (_, completion) in samples_of(rollouts).items():
        if "awful" in completion.text:
            assert key not in found
        else:
            expected = completion.text.count("great") + 0.5 * (completion.finish_reason == "stop")
            assert found[key].score == expected
    ledger = scores.manifest.ledger
    assert ledger.dropped == {"unscored": 40 - len(found)}
    assert scores.manifest.facts["scorer"] == "gold"


def test_only_the_completions_of_the_pairs_are_scored(tmp_path, rollouts, models):
    rewards = publish_scores(tmp_path / "rewards", rollouts, lambda rollout, completion: float(completion.sample))
    run_cli("pairs", f"rollouts={rollouts.path}", f"scores={rewards.path}", f"output={tmp_path / 'pairs'}")
    found = score(tmp_path / "s", rollouts, kind="logprobs", model=models["causal"], pairs=tmp_path / "pairs")
    pairs = list(Artifact.open(tmp_path / "pairs").rows(Pair))
    assert {key for pair in pairs for key in ((pair.prompt_id, 0), (pair.prompt_id, 3))} == by_key(found).keys()
    assert found.manifest.ledger.rows_in == 20
    assert [path.name for path in found.shards] == [path.name for path in rollouts.shards]
    others = publish_rollouts(tmp_path / "others", make_rollouts(3, 2, seed=5))
    with pytest.raises(UserError, match="made from other rollouts"):
        score(tmp_path / "x", others, kind="logprobs", model=models["causal"], pairs=tmp_path / "pairs")


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.integers(1, 9), k=st.integers(1, 4), shard=st.integers(1, 4), seed=st.integers(0, 99))
def test_sharding_and_dropping_lose_and_repeat_nothing(tmp_path_factory, rule, prompts, k, shard, seed):
    base = tmp_path_factory.mktemp("property")
    rollouts = publish_rollouts(base / "rollouts", make_rollouts(prompts, k, seed=seed), shard)
    scores = score(base / "scores", rollouts, kind="rule", function=rule, max_dropped=1)
    expected = {key for key, (_, completion) in samples_of(rollouts).items() if "awful" not in completion.text}
    rows = [(row.prompt_id, row.sample) for row in scores.rows(Score)]
    assert len(rows) == len(set(rows))
    assert set(rows) == expected
    assert scores.manifest.ledger.rows_in == prompts * k
    assert scores.manifest.ledger.kept == len(rows) == scores.manifest.rows


@pytest.mark.slow
def test_two_replicas_give_the_same_bytes_as_one(tmp_path, models):
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(24, 4), shard=2)
    common = ["score", f"rollouts={rollouts.path}", "kind=logprobs", f"model={models['causal']}"]
    one = score(tmp_path / "one", rollouts, kind="logprobs", model=models["causal"])
    run_cli(*common, f"output={tmp_path / 'two'}", "replicas=2")
    assert Artifact.open(tmp_path / "two", SCORES).manifest.digest == one.manifest.digest


@pytest.mark.slow
def test_processes_of_a_launcher_share_the_shards(tmp_path, rule):
    """As under `accelerate launch`, which sets the same variables as torchrun."""
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(24, 4), shard=2)
    one = score(tmp_path / "one", rollouts, kind="rule", function=rule, max_dropped=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "-m", "annotation"]
    arguments = ["score", f"rollouts={rollouts.path}", "kind=rule", f"function={rule}", "max_dropped=1"]
    subprocess.run([*launcher, *arguments, f"output={tmp_path / 'three'}"], cwd=ROOT, check=True, timeout=200)
    assert Artifact.open(tmp_path / "three", SCORES).manifest.digest == one.manifest.digest
    assert not list(tmp_path.glob(".three*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rule", "logprobs"])
def test_tasks_and_a_publisher_give_what_one_process_does(tmp_path, rule, models, kind):
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(24, 4), shard=2)
    known = {"function": rule} if kind == "rule" else {"model": models["causal"]}
    config = {"kind": kind, "max_dropped": 1, "replicas": 2, **known}
    one = score(tmp_path / "one", rollouts, **{**config, "replicas": 1}).manifest
    command = ["score", f"rollouts={rollouts.path}", *(f"{name}={value}" for name, value in config.items())]
    shared = tmp_path / "shared"
    assert (
        "12 of 12 shards are missing"
        in run_cli(*command, f"output={shared}", check=False, RATCHET_ROLE="publisher").stderr
    )
    for rank in ("1", "2"):
        run_cli(*command, f"output={shared}", RATCHET_ROLE="task", RANK=rank, WORLD_SIZE="3")
    assert not shared.exists()
    run_cli(*command, f"output={shared}", RATCHET_ROLE="publisher")
    made = Artifact.open(shared, SCORES).manifest
    assert (made.digest, made.key, made.weights, made.facts) == (one.digest, one.key, one.weights, one.facts)
    assert not list(tmp_path.glob(".shared*"))


def test_a_killed_scorer_continues_with_the_shards_that_it_finished(tmp_path):
    rollouts = publish_rollouts(tmp_path / "rollouts", make_rollouts(24, 2), shard=2)
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import pathlib, time\nLOG = pathlib.Path(__file__).with_name('calls')\n"
        "def judge(messages, response, finish_reason, answer):\n"
        "    with LOG.open('a') as log: log.write('x')\n"
        "    while LOG.stat().st_size >= int(LOG.with_name('last').read_text() or 0): time.sleep(0.01)\n"
        "    return len(response) / 7\n"
    )
    command = ["score", f"rollouts={rollouts.path}", "kind=rule", f"function={slow}:judge"]
    last = tmp_path / "last"  # the number of the call that waits
    last.write_text("1000")
    run_cli(*command, f"output={tmp_path / 'whole'}")
    (tmp_path / "calls").unlink()
    last.write_text("14")
    process = start_stage("annotation", *command, f"output={tmp_path / 'killed'}")
    deadline = time.monotonic() + 200

    def noted() -> int:
        """Judgements of the shard in hand that have been written down."""
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob(".killed.partial-*/state/judged-*.jsonl"))

    while not (tmp_path / "calls").exists() or (tmp_path / "calls").stat().st_size < 14 or noted() != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    assert len(list(tmp_path.glob(".killed.partial-*/.receipt-*.json"))) == 3
    last.write_text("1000")
    run_cli(*command, f"output={tmp_path / 'killed'}")
    assert (tmp_path / "calls").stat().st_size == 14 + 48 - (4 * 3 + 1)
    digests = {Artifact.open(tmp_path / name, SCORES).manifest.digest for name in ("whole", "killed")}
    assert len(digests) == 1


def test_rules_pairs_and_evaluations_start_without_torch():
    code = (
        "import sys, annotation.__main__, annotation.scoring, annotation.workers.rule\n"
        "import annotation.pairing.stage, annotation.evaluating.evaluation, annotation.data.rlhflow\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_weights_that_scored_are_in_the_manifest(tmp_path, rollouts, models):
    scores = score(tmp_path / "scores", rollouts, kind="reward_model", model=models["reward"])
    assert scores.manifest.weights == scores.manifest.inputs["model"]
    facts = json.loads((tmp_path / "scores/manifest.json").read_text())["facts"]
    mean = sum(row.score for row in scores.rows(Score)) / 40
    assert facts == {
        "scorer": "reward", "kind": "reward_model", "score_mean": pytest.approx(mean), "dtype": "float32",
        "device": "cpu", "start": "loaded", "packing": "shared", "attention": "sdpa", "layers": "onednn",
    }  # fmt: skip


def test_a_template_that_refuses_a_role_is_told_with_the_prompt(tmp_path, models):
    (rollout,) = make_rollouts(1, 1)
    rollout = msgspec.structs.replace(rollout, messages=(Message("system", "be good"), *rollout.messages))
    rollouts = publish_rollouts(tmp_path / "rollouts", [rollout])
    with pytest.raises(UserError, match=rf"prompt {rollout.prompt_id} \(\".*\"\), sample 0: .*refuses.*no role system"):
        score(tmp_path / "scores", rollouts, kind="reward_model", model=models["reward"])


def test_bfloat16_is_a_choice_that_the_manifest_shows(tmp_path, rollouts, models):
    exact = by_key(score(tmp_path / "exact", rollouts, kind="logprobs", model=models["causal"]))
    coarse = score(tmp_path / "coarse", rollouts, kind="logprobs", model=models["causal"], dtype="bfloat16")
    assert coarse.manifest.facts["dtype"] == "bfloat16"
    for key, row in by_key(coarse).items():
        assert row.token_logprobs == pytest.approx(exact[key].token_logprobs, abs=1.0)


def test_models_that_would_give_nonsense_are_refused(tmp_path, rollouts, models, tokenizer):
    """A checkpoint without its head, a template that doubles BOS, a smaller vocabulary."""
    headless = shutil.copytree(models["reward"], tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks score\.weight, which LlamaForSequenceClassification needs"):
        score(tmp_path / "scores", rollouts, kind="reward_model", model=headless)

    doubled = shutil.copytree(models["reward"], tmp_path / "doubled")
    template = doubled / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    with pytest.raises(UserError, match="two BOS tokens"):
        score(tmp_path / "scores", rollouts, kind="reward_model", model=doubled)

    small = save_model(tmp_path / "small", AutoModelForCausalLM, tiny_config(vocab_size=len(IDS) - 4), tokenizer)
    with pytest.raises(UserError, match="the rollouts were made with another tokenizer"):
        score(tmp_path / "scores", rollouts, kind="logprobs", model=small)
    assert not list(tmp_path.glob(".scores*"))


def test_a_share_of_the_samples_may_fail_and_is_counted(tmp_path, rollouts):
    function = tmp_path / "moody.py"
    function.write_text(
        "def judge(*, messages, response, finish_reason, answer):\n"
        "    if len(response) % 3 == 0:\n"
        "        raise KeyError('mood')\n"
        "    return float('nan') if len(response) % 3 == 1 else 1.0\n"
    )
    kind = {"kind": "rule", "function": f"{function}:judge"}
    samples = [c for row in rollouts.rows(Rollout) for c in row.completions]
    failing = sum(len(completion.text) % 3 != 2 for completion in samples)
    assert 0 < failing < len(samples)
    share = failing / len(samples)
    scores = score(tmp_path / "scores", rollouts, **kind, fail_on_error=share)
    assert scores.manifest.ledger.dropped == {"failed": failing}
    assert "KeyError: 'mood'" in " ".join(scores.manifest.facts["failures"])
    with pytest.raises(UserError, match=f"of {len(samples)} samples failed so far, more than fail_on_error="):
        score(tmp_path / "fewer", rollouts, **kind, fail_on_error=share * 0.9)
    with pytest.raises(UserError, match=r"mood|nan"):
        score(tmp_path / "none", rollouts, **kind)


def test_an_engine_that_is_not_there_is_told_before_anything_is_scored(tmp_path, models):
    config = score_config(
        output=tmp_path / "s", rollouts=tmp_path, kind="reward_model", model=models["reward"], engine="vllm"
    )
    with pytest.raises(UserError, match=r"which this environment lacks\. A run uses the generation environment"):
        config.check()
    with pytest.raises(UserError, match="engine_args is for engine=vllm"):
        score_config(
            output=tmp_path / "s", rollouts=tmp_path, kind="reward_model", model=models["reward"],
            engine_args={"enforce_eager": True},
        )  # fmt: skip


def test_an_engines_memory_has_its_cache(tmp_path, models):
    from contracts.model_size import size_from_config

    keys = {"output": tmp_path / "s", "rollouts": tmp_path, "kind": "reward_model", "model": models["reward"]}
    size = size_from_config(json.loads((models["reward"] / "config.json").read_text()))
    plain, pooled = (
        score_config(**keys, engine=engine).memory(size, None, on_gpu=False) for engine in ("transformers", "vllm")
    )
    assert pooled == {**plain, "cache": max(64 << 20, 2 * 2 * 32 * 4 * (16384 + 256 * 128))}
