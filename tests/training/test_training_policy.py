"""Training the policy on its own samples, and the critic: what the engine said is compared, nothing is mixed up."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import EOS, IDS, SPECIAL, publish, run_cli, run_here, training_log
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from contracts.artifacts import Artifact, model_fingerprint
from contracts.errors import UserError
from contracts.models import VALUE_HEAD
from contracts.records import EXPERIENCE, ExperienceRow, ExperienceSample
from training.config import PolicyConfig
from training.policy import sample_rows


@torch.no_grad()
def logprobs_of(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> list[float]:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def make_experience(
    target: Path, model: Path, *, prompts: int = 9, k: int = 3, shift: float = 0.0, policy: str | None = None
) -> Path:
    """Answers of uneven length whose log-probabilities are the model's own, plus `shift`."""
    chance = random.Random(2)
    words = range(len(SPECIAL), len(IDS))
    network = AutoModelForCausalLM.from_pretrained(model).eval()
    rows = []
    for number in range(prompts):
        prompt = (IDS["<s>"], *chance.choices(words, k=1 + number % 4))
        samples = []
        for sample in range(k):
            ids = (*chance.choices(words, k=chance.randint(1, 9)), EOS)
            own = logprobs_of(network, prompt, ids)
            columns = {name: tuple(chance.uniform(-1, 1) for _ in ids) for name in ("advantages", "values", "returns")}
            behaviour = tuple(value + shift for value in own)
            reference = tuple(value - 0.1 for value in own)
            samples.append(ExperienceSample(sample, ids, "stop", 1.0, behaviour, reference=reference, **columns))
        fingerprint = policy or model_fingerprint(model)
        rows.append(ExperienceRow(f"prompt-{number}", prompt, tuple(samples), fingerprint, 1))
    publish(target, EXPERIENCE, rows)
    return target


@pytest.fixture(scope="module")
def experience(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_experience(tmp_path_factory.mktemp("experience") / "experience", models["gqa"])


def settings_for(models: dict[str, Path], experience: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": models["gqa"], "experience": experience, "output": output, "algorithm": "ppo", "global_batch": 4,
        "epochs": 2, "learning_rate": 1e-3, **changes,
    }  # fmt: skip


def test_the_engine_is_compared_and_the_first_step_has_ratio_one(
    models: dict[str, Path], experience: Path, tmp_path: Path
) -> None:
    artifact = run_here("policy", **settings_for(models, experience, tmp_path / "out"))
    log, drift = training_log(artifact.path), artifact.manifest.facts["drift"]
    assert drift["fresh"] is True
    assert drift["mean"] < 1e-5
    assert drift["outside"] == 0
    assert log[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert log[0]["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert log[-1]["approx_kl"] > 1e-5
    assert len(log) == 6
    assert artifact.manifest.facts["settings"]["clip"] == 0.2
    assert str(artifact.manifest.ledger) == "9 prompts in = 9 kept"


def test_a_drift_beyond_the_limit_stops(models: dict[str, Path], tmp_path: Path) -> None:
    shifted = make_experience(tmp_path / "shifted", models["gqa"], shift=0.2)
    settings = settings_for(models, shifted, tmp_path / "out")
    with pytest.raises(UserError, match=r"differ from the trainer's by 0\.2 nats .* outside \[0.9, 1.1\]: 100.0%"):
        run_here("policy", **settings)
    assert not (tmp_path / "out").exists()
    drift = run_here("policy", **settings, max_drift=0.3).manifest.facts["drift"]
    assert (drift["mean"], drift["p95"]) == pytest.approx((0.2, 0.2), abs=1e-5)
    # Samples of another policy differ for a better reason.
    stale = make_experience(tmp_path / "stale", models["gqa"], shift=0.2, policy="an earlier one")
    facts = run_here("policy", **settings_for(models, stale, tmp_path / "stale-out")).manifest.facts
    assert facts["drift"]["fresh"] is False


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", ["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "raft", "decoupled_ppo", "cispo"]
)
def test_packing_and_micro_batches_change_nothing(
    algorithm: str, models: dict[str, Path], experience: Path, tmp_path: Path
) -> None:
    logs, weights = [], []
    shared = settings_for(models, experience, tmp_path, algorithm=algorithm, optimizer="sgd", learning_rate=0.1)
    for name, changes in {
        "one": {}, "small": {"micro_batch_tokens": 40}, "padded": {"packing": "padded", "micro_batch_tokens": 60},
        "flat": {"packing": "flat"},
    }.items():  # fmt: skip
        artifact = run_here("policy", **shared | {"output": tmp_path / name}, **changes)
        logs.append(training_log(artifact.path))
        weights.append(load_file(artifact.path / "model.safetensors"))
    for log, found in zip(logs[1:], weights[1:], strict=True):
        for line, expected in zip(log, logs[0], strict=True):
            assert line == pytest.approx(expected, abs=1e-4, rel=1e-4)
        for name, value in weights[0].items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_train_actor_and_critic_alike(models: dict[str, Path], experience: Path, tmp_path: Path) -> None:
    for stage, more in (("policy", ["algorithm=ppo"]), ("critic", [])):
        arguments = [
            stage, f"model={models['gqa']}", f"experience={experience}", "global_batch=4", "max_steps=3",
            "optimizer=sgd", "learning_rate=0.1", *more,
        ]  # fmt: skip
        run_cli(*arguments, f"output={tmp_path / stage}-one")
        run_cli(*arguments, f"output={tmp_path / stage}-two", "parallel.dp=2", "micro_batch_tokens=40")
        one, two = (training_log(tmp_path / f"{stage}-{name}") for name in ("one", "two"))
        for line, other in zip(one, two, strict=True):
            assert other == pytest.approx(line, abs=1e-4)


def test_the_critic_learns_the_returns(models: dict[str, Path], experience: Path, tmp_path: Path) -> None:
    settings = {"model": models["gqa"], "experience": experience, "output": tmp_path / "out", "clip": 10.0}
    artifact = run_here("critic", **settings, epochs=60, global_batch=9, learning_rate=1e-2)
    log = training_log(artifact.path)
    assert log[-1]["squared_error"] < 0.2 * log[0]["squared_error"]
    config = json.loads((artifact.path / "config.json").read_text())
    assert (config["architectures"], len(config["id2label"])) == (["LlamaForSequenceClassification"], 1)


def test_a_policy_that_is_its_own_critic(models: dict[str, Path], experience: Path, tmp_path: Path) -> None:
    """The value head is trained with the policy, published beside it, and goes on in the next iteration."""
    settings = settings_for(models, experience, tmp_path / "one", value_head=True, learning_rate=1e-2)
    one = run_here("policy", **settings)
    head = load_file(one.path / VALUE_HEAD)["weight"]
    assert tuple(head.shape) == (1, 64)
    assert float(head.abs().max()) > 0
    assert [path.name for path in one.path.glob("*.safetensors")] == ["model.safetensors"], "what an engine reads"
    log = training_log(one.path)
    assert log[0]["value_loss"] > 0
    again = run_here("policy", **settings | {"output": tmp_path / "two", "model": one.path, "max_drift": 9.0})
    assert not np.allclose(load_file(again.path / VALUE_HEAD)["weight"], head)
    network = AutoModelForCausalLM.from_pretrained(one.path).eval()
    with torch.no_grad():
        hidden = network.model(torch.tensor([[1, 7, 8]])).last_hidden_state[0]
    assert bool((hidden @ head.T).isfinite().all())


def test_the_experience_of_another_algorithm_is_refused(
    models: dict[str, Path], experience: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its advantages would be taken for this one's."""
    artifact = Artifact.open(experience)
    made = msgspec.structs.replace(artifact.manifest, key_parts={"config": {"algorithm": "rloo"}})
    with monkeypatch.context() as patch:
        patch.setattr(Artifact, "open", lambda *_: Artifact(experience, made))
        with pytest.raises(UserError, match=r"advantages of algorithm=rloo, which are not those of algorithm=ppo"):
            list(sample_rows(PolicyConfig(**settings_for(models, experience, tmp_path / "out")), set()))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{'kl': batch.token_mean(batch.logprobs)}", r"`loss` among them; found \['kl'\]"),
        ("batch.token_mean(batch.logprobs)", "found Tensor"),
        ("{'loss': batch.logprobs}", r"returned 'loss' as a tensor of shape \(\d+,\)"),
        ("{'loss': batch.token_mean(batch.logprobs), 'x': 3.0}", "returned 'x' as float"),
        ("{'loss': batch.token_mean(batch.logprobs.detach())}", "a loss without gradient"),
        ("{'loss': batch.token_mean(batch.logprobs), 'step': batch.mean(batch.weights)}", "a metric named 'step'"),
    ],
)
def test_what_a_loss_returns_is_checked(
    result: str, message: str, models: dict[str, Path], experience: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"READS = 'samples'\nNEEDS = ()\n\ndef advantages(experience): ...\n\ndef loss(batch):\n    return {result}\n"
    )
    with pytest.raises(UserError, match=message):
        run_here("policy", **settings_for(models, experience, tmp_path / "out", algorithm=str(file)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "dpo"}, "reads pairs: set pairs="),
        ({"algorithm": "grpo", "value_head": True}, "needs no values"),
        ({"nll_coefficient": 0.1}, "nll_coefficient is for pairs"),
        ({"settings": {"clp": 0.1}}, "Did you mean 'clip'"),
        ({"experience": None}, "reads samples: set experience="),
    ],
)
def test_configs_that_cannot_be(
    changes: dict[str, Any], message: str, models: dict[str, Path], experience: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run_here("policy", **settings_for(models, experience, tmp_path / "out") | changes)
