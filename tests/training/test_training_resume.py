"""A training that was killed or asked to stop goes on where it was, under every launch, to the same bytes."""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dpo_settings, interrupted_after, make_model, run_here, training_log
from safetensors.torch import load_file, save_file

import training.fit
import training.loop
from contracts import stopping
from contracts.artifacts import Artifact
from contracts.errors import UserError

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {"dp": 2},
    "zero2": {"dp": 2, "zero": 2},
    "zero3": {"dp": 2, "zero": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied embeddings in which the row of a token that no pair has is -0.0: nothing changes it, and it must stay."""
    folder = make_model(tmp_path_factory.mktemp("model") / "gqa", tied=False, seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][0] = -0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def saved_state(output: Path) -> Path:
    """Where the state of an unfinished training lies."""
    (partial,) = output.parent.glob(f".{output.name}.partial-*")
    return partial / "state" / "training.safetensors"


def is_saved(output: Path) -> bool:
    return any(output.parent.glob(f".{output.name}.partial-*/state/training.safetensors"))


@pytest.mark.chaos
@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_kills_and_requests_to_stop_it_ends_with_the_same_bytes(
    layout: str, model: Path, models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path, start: Any
) -> None:
    epochs = 3 if "zero" in LAYOUTS[layout] else 8
    settings = dpo_settings(
        models, pairs, tmp_path / "out", model=model, epochs=epochs, nll_coefficient=0.1, weight_decay=0.1,
        micro_batch_tokens=96, parallel=LAYOUTS[layout],
    )  # fmt: skip

    fresh = layout == "ddp"  # whose launcher then starts the process that it forks ranks from
    whole = start(settings, output=tmp_path / "whole", fresh=fresh)
    steps = 1

    killed = start(settings, checkpoint_seconds=0)
    killed.wait_for(lambda: is_saved(settings["output"]))
    if layout == "ddp":  # one process of several, by the system
        os.kill(killed.processes("rank 1")[0], signal.SIGKILL)
        assert killed.end() == 1
        assert {"transient"} <= {failure["kind"] for failure in killed.failures()}
    else:
        killed.process.send_signal(signal.SIGKILL)
        assert killed.end() == -signal.SIGKILL
    assert (killed.attempt / "heartbeat").exists()
    assert {path.suffix for path in saved_state(settings["output"]).parent.iterdir()} <= {".safetensors", ".tmp"}
    if layout == "zero3":
        shutil.copytree(saved_state(settings["output"]).parents[1], tmp_path / "moved")

    if number := {"one": signal.SIGUSR1, "ddp": signal.SIGTERM}.get(layout):
        stopped = start(settings, checkpoint_seconds=1000, fresh=fresh)
        stopped.wait_for(lambda: stopped.steps)
        steps = stopped.steps
        stopped.process.send_signal(number)
        asked = time.monotonic()
        assert stopped.end() == 128 + number
        assert time.monotonic() - asked < stopping.DEFAULT_GRACE + 10
        assert {failure["kind"] for failure in stopped.failures()} == {"stopped"}
        assert "Traceback" not in (stopped.attempt / "log").read_text()

    for process in (whole, start(settings)):
        assert process.end() == 0, (process.attempt / "log").read_text()
    end, expected = Artifact.open(tmp_path / "out"), Artifact.open(tmp_path / "whole")
    assert end.manifest.files == expected.manifest.files
    assert end.manifest.facts["parallel"]["zero"] == LAYOUTS[layout].get("zero", 0)
    assert end.manifest.facts["resumed_steps"] >= steps
    assert end.manifest.facts["resumed_steps"] < end.manifest.facts["steps"]
    assert not (tmp_path / "out" / "state").exists()
    unused = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"][0]
    assert bool(torch.signbit(unused).all())

    if layout == "zero3":  # go on in another layout: here, without DeepSpeed, in one process
        one = settings | {"parallel": {}}
        other = run_here("policy", **one | {"output": tmp_path / "other"})
        (tmp_path / "moved").rename(hidden(other, tmp_path / "elsewhere"))
        moved = run_here("policy", **one | {"output": tmp_path / "elsewhere"})
        assert moved.manifest.facts["resumed_steps"] > 0
        for line, again in zip(training_log(other.path), training_log(moved.path), strict=True):
            assert again == pytest.approx(line, abs=1e-4)


def hidden(artifact: Artifact, output: Path) -> Path:
    """The hidden directory of a stage with the key of `artifact` and another output."""
    return output.parent / f".{output.name}.partial-{artifact.manifest.key[:16]}"


def interrupt(after: int, **settings: Any) -> Path:
    """Train in this process, save after every step, and break off after some; return the saved state."""
    with interrupted_after(after):
        run_here("policy", **settings, checkpoint_seconds=0)
    return saved_state(settings["output"])


def cut(content: bytes) -> bytes:
    return content[:-100]


def garble(content: bytes) -> bytes:
    return b"garbage" * 1000


def empty(content: bytes) -> bytes:
    return b""


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, garble, empty, flip])
def test_a_damaged_state_is_reported_and_not_used(
    damage: Callable[[bytes], bytes],
    models: dict[str, Path],
    pairs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out", max_steps=4)
    whole = run_here("policy", **settings | {"output": tmp_path / "whole"})
    state = interrupt(2, **settings)
    state.write_bytes(damage(state.read_bytes()))
    again = run_here("policy", **settings)
    assert capsys.readouterr().err.count(f"{state} is damaged; the training starts from its beginning.\n") == 1
    assert again.manifest.facts["resumed_steps"] == 0
    assert again.manifest.files == whole.manifest.files


def test_resumed_steps(models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out")
    state = interrupt(3, **settings)
    assert state == interrupt(7, **settings)
    artifact = run_here("policy", **settings)
    assert (artifact.manifest.facts["resumed_steps"], artifact.manifest.facts["steps"]) == (7, 12)
    assert [line["step"] for line in training_log(artifact.path)] == list(range(1, 13))


def test_the_state_of_another_model_is_an_error(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path
) -> None:
    foreign = interrupt(1, **dpo_settings(models, pairs, tmp_path / "gqa", model=models["gqa"]))
    settings = dpo_settings(models, pairs, tmp_path / "out")
    state = interrupt(1, **settings)
    shutil.copy(foreign, state)
    with pytest.raises(UserError, match=r"of another model: its .*lm_head.* has shape \(.* instead of None"):
        run_here("policy", **settings)


def test_a_full_disk_leaves_the_state_before(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dpo_settings(models, pairs, tmp_path / "out")
    before = interrupt(2, **settings).read_bytes()

    def usage(path: Path) -> Any:
        return disk_usage(path)._replace(free=1 << 30 if path == tmp_path else len(before) // 2)

    disk_usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", usage)
        with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}.*training.safetensors"):
            run_here("policy", **settings, checkpoint_seconds=0)
    assert saved_state(tmp_path / "out").read_bytes() == before
    assert run_here("policy", **settings).manifest.facts["resumed_steps"] == 2


def test_a_stop_while_the_final_model_is_measured_loses_no_step(
    models: dict[str, Path], pairs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> Any:
        monkeypatch.setattr(stopping, "_requested", signal.SIGUSR2)
        return measure(*arguments)

    measure = training.fit.measure
    settings = {"model": models["tied"], "pairs": [pairs["pairs"]], "eval_fraction": 0.2, "global_batch": 6}
    whole = run_here("reward", **settings, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training.fit, "measure", stop)
        with pytest.raises(stopping.Stopped, match=str(128 + signal.SIGUSR2)):
            run_here("reward", **settings, output=tmp_path / "out")
    monkeypatch.setattr(stopping, "_requested", None)
    artifact = run_here("reward", **settings, output=tmp_path / "out")
    assert artifact.manifest.facts["resumed_steps"] == artifact.manifest.facts["steps"]
    assert artifact.manifest.files == whole.manifest.files
