"""The example of docs/gates.md, as it stands there: a reward that pays for length is stopped by its gate."""

import re
from pathlib import Path

import pytest
import yaml
from pipelines_smallest import pipeline

from contracts.artifacts import Artifact


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (root / "docs/gates.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_a_reward_that_pays_for_length_is_stopped_when_answers_get_too_long(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(blocks(root, "python")[0])
    config = yaml.safe_load(next(block for block in blocks(root, "yaml") if "name: hacked" in block))
    (tmp_path / "hacked.yaml").write_text(yaml.safe_dump(config))
    result = pipeline("run", "hacked.yaml", "--iters", "6")
    assert result.returncode == 3, result.stderr
    said = re.search(r"the gate long stops the run after iteration (\d): response_length is", result.stderr)
    assert said, result.stderr
    stopped = int(said[1])
    run = tmp_path / "runs/hacked"
    assert not (run / f"iteration-{stopped + 1:03d}").exists()
    first, last = (
        Artifact.open(run / f"iteration-{iteration:03d}/evaluation").manifest.facts["metrics"]
        for iteration in (0, stopped)
    )
    assert last["response_length"] > 1.3 * first["response_length"]
    assert last["reward_mean"] > first["reward_mean"]
    assert last["gold_reward_mean"] < first["gold_reward_mean"]
    again = pipeline("run", "hacked.yaml", "--iters", "6")
    # Before that, on a busy machine, what takes long is said.
    assert (again.returncode, again.stderr.splitlines()[-1]) == (3, result.stderr.splitlines()[-1])
