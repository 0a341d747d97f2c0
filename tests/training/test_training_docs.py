"""docs/algorithms.md is run: its files are written as they stand there, and trained with as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, training_log
from test_training_policy import make_experience

from contracts.callables import load_module
from training.algorithm import Experience, Samples
from training.registry import BUILT_IN, describe

PAGE = ROOT / "docs" / "algorithms.md"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every Python file of the page, which begins with its name as a comment."""
    folder = tmp_path_factory.mktemp("own")
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == [
        "dpo_positive.py", "gspo.py", "overlong.py", "plackett_luce.py", "token_rewards.py", "tdpo.py", "check.py",
    ]  # fmt: skip
    for name, text in blocks:
        assert len(text.splitlines()) < 60
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow
def test_the_formula_is_that_of_the_paper(files: Path) -> None:
    result = subprocess.run(
        [sys.executable, "check.py"], cwd=files, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    assert float(result.stdout) > 0


def test_an_algorithm_on_pairs(files: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    artifact = run_here(
        "policy", model=models["tied"], pairs=[pairs["pairs"]], reference=[pairs["reference"]], output=tmp_path / "out",
        algorithm=str(files / "dpo_positive.py"), settings={"lam": 1.0}, global_batch=11, learning_rate=1e-3, epochs=3,
    )  # fmt: skip
    log = training_log(artifact.path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"penalty", "accuracy"} <= log[0].keys()
    assert list(artifact.manifest.key_parts["sources"]) == ["algorithm"]
    assert artifact.manifest.facts["settings"] == {"beta": 0.3, "lam": 1.0}


def test_an_algorithm_on_samples(files: Path, models: dict[str, Path], tmp_path: Path) -> None:
    description = describe(str(files / "gspo.py"))
    assert (description.reads, description.needs) == ("samples", ("reference",))
    assert description.functions.keys() >= {"advantages", "loss"}
    experience = make_experience(tmp_path / "experience", models["tied"])
    artifact = run_here(
        "policy", model=models["tied"], experience=experience, output=tmp_path / "out", global_batch=3, epochs=2,
        algorithm=str(files / "gspo.py"), learning_rate=1e-3,
    )  # fmt: skip
    log = training_log(artifact.path)
    assert log[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert log[-1]["ratio"] != log[0]["ratio"]


def own(files: Path, name: str) -> Any:
    """A file of the page as a module."""
    return load_module(str(files / f"{name}.py"), name)


def example(**changes: Any) -> Experience:
    lengths = torch.tensor([2, 3, 1, 5])
    fields = {
        "rewards": torch.tensor([1.0, 3.0, -1.0, 2.0], dtype=torch.float64),
        "prompts": torch.tensor([0, 0, 1, 1]),
        "lengths": lengths,
        "behaviour": torch.zeros(int(lengths.sum()), dtype=torch.float64),
        "kl_coefficient": 0.0,
        "truncated": torch.tensor([False, False, False, True]),
    }
    return Experience(**{**fields, **changes})


def test_overlong_answers_pay_and_truncated_ones_are_left_out(files: Path) -> None:
    found = own(files, "overlong").advantages(example(), max_tokens=5, buffer=4)
    assert found.keep.tolist() == [True, True, True, False]
    rewards = np.array([[1.0 - 0.25, 3.0 - 0.5], [-1.0, 2.0 - 1.0]])  # beyond 1 token a quarter each
    relative = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    assert found.advantages.tolist() == pytest.approx(np.repeat(relative, [2, 3, 1, 5]))


def test_token_rewards_are_added_up_from_each_token_on(files: Path) -> None:
    rewards = torch.arange(11, dtype=torch.float64)
    found = own(files, "token_rewards").advantages(example(token_rewards=rewards), gamma=0.5)
    ends = np.repeat([2, 5, 6, 11], [2, 3, 1, 5])
    returns = np.array([sum(0.5 ** (j - i) * j for j in range(i, end)) for i, end in enumerate(ends)])
    assert found.advantages.tolist() == pytest.approx((returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8))


def test_a_ranking_is_plackett_and_luces(files: Path) -> None:
    random = torch.Generator().manual_seed(0)
    lengths, rewards = torch.tensor([2, 3, 1, 4, 2]), torch.tensor([0.1, 0.9, 0.4, 5.0, -1.0])
    logprobs, reference = (torch.randn(12, generator=random, dtype=torch.float64) for _ in range(2))
    flat = dict.fromkeys(("entropy", "proximal", "behaviour", "advantages"), logprobs)
    batch = Samples(
        logprobs=logprobs, **flat, lengths=lengths, weights=torch.ones(5, dtype=torch.float64), total=5,
        total_tokens=12, reference=reference, rewards=rewards, prompts=torch.tensor([0, 0, 0, 1, 1]), total_prompts=2,
    )  # fmt: skip
    found = own(files, "plackett_luce").loss(batch, beta=0.3)["loss"]
    h = [0.3 * float(part.sum()) for part in (logprobs - reference).split(lengths.tolist())]
    expected = 0.0
    for ranking in ([1, 2, 0], [3, 4]):
        for place, index in enumerate(ranking):
            expected -= (h[index] - np.log(sum(np.exp(h[other]) for other in ranking[place:]))) / 2
    assert float(found) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overlong", "plackett_luce", "token_rewards"])
def test_samples_of_any_kind_in_any_layout(name: str, files: Path, models: dict[str, Path], tmp_path: Path) -> None:
    algorithm = str(files / f"{name}.py")
    experience = make_experience(tmp_path / "experience", models["tied"])
    logs = []
    for layout in ({"packing": "shared"}, {"packing": "padded", "micro_batch_tokens": 40}):
        output = tmp_path / layout["packing"]  # type: ignore[operator]
        run_here(
            "policy", model=models["tied"], experience=experience, output=output, global_batch=3, epochs=2,
            algorithm=algorithm, learning_rate=1e-3, **layout,
        )  # fmt: skip
        logs.append(training_log(output))
    for line, other in zip(*logs, strict=True):
        assert other == pytest.approx(line, rel=2e-4, abs=2e-6)


@pytest.mark.slow
def test_tdpo_learns_from_the_divergences_of_whole_distributions(
    files: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    """They are 0 where policy and reference are one, and the layout changes nothing."""
    logs = []
    for number, layout in enumerate(({}, {"packing": "padded", "micro_batch_tokens": 48})):
        artifact = run_here(
            "policy", model=models["tied"], pairs=[pairs["pairs"]], reference_model=models["tied"],
            output=tmp_path / f"{number}", algorithm=str(files / "tdpo.py"), global_batch=11, epochs=3,
            learning_rate=1e-3, **layout,
        )  # fmt: skip
        logs.append(training_log(artifact.path))
        assert artifact.manifest.inputs["reference_model"] == artifact.manifest.inputs["model"]
    assert logs[0][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
    for line, other in list(zip(*logs, strict=True))[1:]:  # in the first step, rounding alone decides the accuracy
        assert other == pytest.approx(line, rel=1e-3, abs=1e-5)


def test_the_tables_name_every_algorithm_with_its_settings() -> None:
    text = PAGE.read_text().partition("## One of your own")[0]
    assert set(re.findall(r"algorithms/(\w+)\.py\)", text)) == set(BUILT_IN)
    for name in BUILT_IN:
        (line,) = [line for line in text.splitlines() if line.startswith("|") and f"/{name}.py)" in line]
        *_, needs, settings, _ = [cell.strip() for cell in line.split("|")]
        description = describe(name)
        assert needs == ", ".join(description.needs)
        shown = dict(re.findall(r"(\w+)=([^,|]+)", settings))
        for setting, value in shown.items():
            default = description.defaults[setting]
            assert str(default).lower() == value or float(default) == float(value), (name, setting)  # type: ignore[arg-type]
