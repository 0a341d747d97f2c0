"""Reward models on real vLLM: it says what transformers says, a kill changes nothing, and what it cannot do is told."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from byte_level import write_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import annotation.models.pooled
from annotation.models.loading import open_model
from annotation.samples import Sample
from annotation.scorers import score_config
from annotation.scorers.base import Opening
from annotation.stages.score import SCORE
from contracts.artifacts import Artifact
from contracts.chat import ChatTokenizer
from contracts.errors import UserError
from contracts.ledger import Ledger
from contracts.prompts import prompt_id
from contracts.publication import Publication
from contracts.records import ROLLOUTS, SCORES, Completion, Message, Rollout, Score
from contracts.stage import run_stage
from modeling.loading import Qwen2ForProcessRewardModel
from modeling.vllm_process import set_environment

pytestmark = pytest.mark.slow
TEXTS = ["", "It is Paris.", "Ça va? 🧑‍🚀 好的", "The capital of France is Paris. " * 6, "I do not know.\n\nReally."]


@pytest.fixture(scope="module", autouse=True)
def inspected_here():
    """Have vLLM look at an architecture in this process, not in a new one, which would import vLLM first."""
    set_environment(on_gpu=torch.cuda.is_available())  # before vLLM is imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
        yield


def reward_model(folder: Path, model_type: str, head=AutoModelForSequenceClassification, **changes) -> Path:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    size |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "vocab_size": 420}
    size |= {"num_labels": 1, "pad_token_id": 0, "initializer_range": 0.3, **changes}
    config = AutoConfig.for_model(model_type, **size)
    head.from_config(config).save_pretrained(folder)
    return write_tokenizer(folder)


def rollout(number: int) -> Rollout:
    messages = (Message("user", f"Question {number}. " + "Tell me of the sea. " * (number % 5)),)
    answers = tuple(Completion(sample, (5,), text, "stop", (), None, None) for sample, text in enumerate(TEXTS))
    return Rollout(prompt_id(messages), messages, (1,), answers, "policy", 0, "processed")


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """Twelve prompts with five answers each, three prompts a shard."""
    path = tmp_path_factory.mktemp("rollouts") / "rollouts"
    publication = Publication(path, ROLLOUTS, "generation", "0" * 64)
    publication.begin()
    for shard in range(4):
        ledger = Ledger("prompts")
        ledger.keep(3)
        publication.write_rows(f"shard-{shard:05d}.jsonl", [rollout(3 * shard + one) for one in range(3)], ledger)
    manifest = {"key_parts": {}, "inputs": {}, "input_paths": {}, "weights": None, "versions": {}, "seconds": {}}
    publication.publish(**manifest, unit="prompts", facts={"bos_token_id": 1})
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return reward_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2")


def config_of(tmp_path: Path, model: Path, **keys):
    fields = {"output": tmp_path / "scores", "rollouts": tmp_path, "kind": "reward_model", "engine": "vllm"}
    return score_config(**{**fields, **keys}, model=model)


def opened(tmp_path: Path, model: Path, **keys):
    return open_model(config_of(tmp_path, model, **keys), Opening(tmp_path, lambda: 0))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_scores_equal_transformers(tmp_path: Path, model_type: str) -> None:
    path = reward_model(tmp_path / "model", model_type)
    scorer = opened(tmp_path, path)
    samples = [Sample(each, one) for each in map(rollout, range(6)) for one in each.completions]
    found = scorer(samples)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    chat = ChatTokenizer(path)
    told = set()
    for sample, score in zip(samples, found, strict=True):
        ids = chat.conversation([*sample.rollout.messages, Message("assistant", sample.completion.text)])
        model.config.pad_token_id = next(token for token in range(9) if token != ids[-1])
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        assert score.score == pytest.approx(expected, abs=1e-4)
        told.add(round(expected, 3))
    assert len(told) > 20
    assert scorer(samples[:10]) == found[:10]
    facts = scorer.facts
    assert (facts["engine"], facts["dtype"]) == ("vllm", "float32")
    assert facts["engine_version"]
    assert float(facts["engine_difference"]) < 1e-4


def test_what_exceeds_the_limit_is_dropped(tmp_path: Path, qwen: Path) -> None:
    samples = [Sample(rollout(2), one) for one in rollout(2).completions]
    chat = ChatTokenizer(qwen)
    lengths = [
        len(chat.conversation([*sample.rollout.messages, Message("assistant", sample.completion.text)]))
        for sample in samples
    ]
    limit = sorted(lengths)[-2]
    found = opened(tmp_path, qwen, max_length=limit)(samples)
    assert [score == "too_long" for score in found] == [length > limit for length in lengths]


@pytest.mark.parametrize(
    ("model_type", "changes"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen3", {})]
)
def test_a_pairwise_model_says_what_it_says_in_transformers(tmp_path: Path, model_type: str, changes: dict) -> None:
    path = reward_model(tmp_path / "model", model_type, AutoModelForCausalLM, **changes)
    samples = [Sample(each, one) for each in map(rollout, range(4)) for one in each.completions]
    scorer = opened(tmp_path, path, kind="pairwise")
    found = [score.score for score in scorer(samples)]
    plain = opened(tmp_path, path, kind="pairwise", engine="transformers")
    assert found == pytest.approx([score.score for score in plain(samples)], abs=1e-4)
    assert len({round(score, 3) for score in found}) > 10
    assert [score.score for score in scorer(samples)] == found
    assert scorer.facts["engine"] == "vllm"
    assert scorer.counts == plain.counts


def test_a_pairwise_model_of_which_vllm_would_make_something_else_is_refused(tmp_path: Path) -> None:
    for model_type, changes, said in (
        ("granite", {"logits_scaling": 8.0}, "scales or bounds what comes out of its LM head"),
        ("gemma2", {"final_logit_softcapping": 30.0}, "scales or bounds what comes out of its LM head"),
        ("phi", {}, "has a bias in its LM head"),
    ):
        path = reward_model(tmp_path / model_type, model_type, AutoModelForCausalLM, **changes)
        with pytest.raises(UserError, match=rf"{said}, which vLLM leaves out .*Set engine=transformers"):
            opened(tmp_path, path, kind="pairwise")


STEPS = ["One.\n\nTwo is more.\n\nThree.", "Ça va? 🧑‍🚀\n\n好的", "I do not know.", "a\n\n" * 5 + "b"]
PROCESS = {
    "llama, its tokens": ("llama", AutoModelForCausalLM, {"marker": "\n"}),
    "qwen2, tied": ("qwen2", AutoModelForCausalLM, {"layout": "turns"}),
    "qwen3, labels": ("qwen3", AutoModelForTokenClassification, {"marker": "\n"}),
    "Qwen2.5-Math-PRM": ("qwen2", Qwen2ForProcessRewardModel, {"marker": "\n", "differences": True}),
}


@pytest.mark.parametrize("which", PROCESS)
def test_a_process_reward_model_says_what_it_says_in_transformers(tmp_path: Path, which: str) -> None:
    """Of every step, for prompts that several responses share."""
    model_type, head, keys = PROCESS[which]
    changes = {"num_labels": 2, "tie_word_embeddings": "tied" in which}
    path = reward_model(tmp_path / "model", model_type, head, **changes)
    tokenizer = ChatTokenizer(path).tokenizer
    samples = []
    for number in range(4):
        asked = rollout(number)
        ids = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in STEPS]
        answers = tuple(
            Completion(sample, ids[sample], text, "length", (), None, None) for sample, text in enumerate(STEPS)
        )
        samples += [Sample(msgspec.structs.replace(asked, completions=answers), one) for one in answers]
    scorer = opened(tmp_path, path, kind="process_reward", **keys)
    found = scorer(samples)
    plain = opened(tmp_path, path, kind="process_reward", engine="transformers", **keys)
    for one, other in zip(found, plain(samples), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.extras["step_scores"] == pytest.approx(other.extras["step_scores"], abs=1e-4)
        assert one.token_rewards == pytest.approx(other.token_rewards, abs=1e-4)
    assert [len(score.extras["step_scores"]) for score in found[:4]] == [3, 2, 1, 6]
    assert len({round(score.score, 3) for score in found}) > 10
    assert scorer(samples) == found
    assert scorer(samples[:5]) == found[:5]
    assert scorer.counts["steps"] > 0
    assert scorer.facts["engine"] == "vllm"
    assert float(scorer.facts["engine_difference"]) < 1e-4


def test_a_process_reward_model_that_vllm_makes_something_else_of_is_refused(tmp_path: Path, monkeypatch) -> None:
    """At every token, not the last alone."""
    path = reward_model(tmp_path / "model", "qwen2", AutoModelForTokenClassification, num_labels=2)
    own = annotation.models.pooled.own_log_odds

    def others(labels, model, sequences):
        first, *rest = own(labels, model, sequences)
        return [2 + first, *rest]

    monkeypatch.setattr(annotation.models.pooled, "own_log_odds", others)
    with pytest.raises(UserError, match=r"vLLM \S+ gives \S+ for a sequence of \d+ tokens that transformers gives \S+"):
        opened(tmp_path, path, kind="process_reward", marker="\n")
    gpt = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=1, n_positions=512, vocab_size=420, num_labels=2)
    AutoModelForTokenClassification.from_config(gpt).save_pretrained(tmp_path / "gpt")
    write_tokenizer(tmp_path / "gpt")
    with pytest.raises(UserError, match=r"cannot compute .* as a process reward model\. Set engine=transformers"):
        config_of(tmp_path, tmp_path / "gpt", kind="process_reward", marker="\n").check()


def test_an_architecture_that_vllm_makes_no_classifier_of_is_told(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=1, n_positions=512, vocab_size=420)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt")
    write_tokenizer(tmp_path / "gpt")
    with pytest.raises(UserError, match=r"cannot compute .* as a pairwise model: .*Set engine=transformers"):
        opened(tmp_path, tmp_path / "gpt", kind="pairwise")


def test_a_kill_changes_nothing(tmp_path: Path, rollouts: Path, qwen: Path) -> None:
    fields = {"rollouts": rollouts, "model": qwen, "kind": "reward_model", "engine": "vllm"}
    whole = run_stage(SCORE, score_config(output=tmp_path / "whole", **fields))
    for number in range(5):  # beside other work, this process may come too late
        output = tmp_path / str(number) / "out"
        output.parent.mkdir()
        keys = [f"{name}={value}" for name, value in {**fields, "output": output}.items()]
        killed = subprocess.Popen([sys.executable, "-m", "annotation", "score", *keys])
        while not (finished := list(output.parent.glob(".out.partial-*/.receipt-shard-00000.jsonl.json"))):
            if killed.poll() is not None:
                break
            time.sleep(0.002)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() in (0, -signal.SIGKILL)
        if finished and not output.exists():
            break
    first = (finished[0].parent / "shard-00000.jsonl").stat().st_ino
    run_stage(SCORE, score_config(output=output, **fields))
    one, other = (Artifact.open(path, SCORES) for path in (whole.path, output))
    assert [shard.read_bytes() for shard in one.shards] == [shard.read_bytes() for shard in other.shards]
    assert other.shards[0].stat().st_ino == first
    assert len(list(one.rows(Score))) == 60
    assert one.manifest.key == other.manifest.key
    assert one.manifest.facts["engine"] == "vllm"
    assert one.manifest.facts["engine_version"] == one.manifest.versions.get(
        "vllm", one.manifest.facts["engine_version"]
    )


def test_an_engine_that_says_something_else_is_refused(tmp_path: Path, qwen: Path, monkeypatch) -> None:
    own = annotation.models.pooled.own_rewards
    monkeypatch.setattr(
        annotation.models.pooled, "own_rewards", lambda model, sequences: [2 + each for each in own(model, sequences)]
    )
    with pytest.raises(UserError, match=r"vLLM \S+ gives \S+ for a sequence of \d+ tokens that transformers gives \S+"):
        opened(tmp_path, qwen)


def test_processes_that_would_share_a_device_are_refused(tmp_path: Path, qwen: Path, monkeypatch) -> None:
    monkeypatch.setattr(annotation.models.pooled, "accelerators", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="replicas=N instead of starting them with a launcher"):
        opened(tmp_path, qwen)


def test_heads_that_vllm_cannot_compute_on_a_cpu_are_told(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("vLLM for GPUs")
    narrow = reward_model(tmp_path / "narrow", "qwen3", head_dim=16)
    with pytest.raises(UserError, match=r"heads of width 16 .* only 32, 64, .*Set engine=transformers"):
        config_of(tmp_path, narrow).check()


def test_what_vllm_cannot_compute_is_told(tmp_path: Path, qwen: Path) -> None:
    bloom = tmp_path / "bloom"
    config = AutoConfig.for_model("openai-gpt", n_embd=32, n_layer=1, n_head=2, vocab_size=420, num_labels=1)
    config.pad_token_id = 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(bloom)
    write_tokenizer(bloom)
    with pytest.raises(UserError, match=r"cannot compute .* as a reward model\. Set engine=transformers"):
        config_of(tmp_path, bloom).check()
    with pytest.raises(UserError, match="no engine argument of this name"):
        config_of(tmp_path, qwen, engine_args={"enforce_eagr": True}).check()
    with pytest.raises(UserError, match="max_model_len cannot be set here: set `max_length`"):
        config_of(tmp_path, qwen, engine_args={"max_model_len": 9})
    assert config_of(tmp_path, qwen).runs_in == "generation"
    assert config_of(tmp_path, qwen, environment="own").runs_in == "own"
