"""New weights in an engine that is loaded: its answers are those of an engine that has loaded them."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from generation_runs import LIBRARIES
from warm_stages import run_stage_warm

from contracts import resident
from contracts.attempt import ATTEMPT
from contracts.errors import UserError
from generation import run
from generation.config import GenerationConfig
from generation.engine import EngineSettings
from generation.server_key import KEY, RequireKey
from generation.vllm_engine import UpdatableEngine


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_with_new_weights_answers_as_one_that_has_loaded_them(policy: Path, tmp_path: Path) -> None:
    """Also where the output matrix is tied to the embeddings, of which vLLM keeps a packed copy on a CPU."""
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    found, _ = updates("in_place", policy, tmp_path)
    for tied in (False, True):
        assert found[f"differs {tied}"]
        assert found[f"same {tied}"]
        assert found[f"back {tied}"]
        assert "differ from the trainer's by" in found[f"wrong {tied}"]
        assert "cannot be verified" in found[f"unknown {tied}"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", [{"tensor_parallel": 2}, {"servers": 1}], ids=["tensor parallel", "server"])
def test_engines_of_several_processes_take_two_policies_in_turn(
    shape: dict[str, int], policy: Path, tmp_path: Path
) -> None:
    """Where a worker dies or stops in the middle of an update, the engine is loaded anew; it then answers, and is read
    back, as one that was updated."""
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    turns = [("one", ""), ("two", ""), ("one", ""), ("two", "SIGKILL")]
    starts = ["loaded", "updated", "updated", "loaded"]
    last = 0
    if "tensor_parallel" in shape:
        turns += [("two", ""), ("one", "SIGSTOP")]
        starts += ["kept", "loaded"]
        last = 1
    variables = {"MARK": str(tmp_path / "mark"), "LAST": str(last)}
    found, err = updates("in_turn", policy, tmp_path, json.dumps(shape), json.dumps(turns), **variables)
    assert [start for _, start, _, _ in found] == starts, err
    assert not any(unused for *_, unused in found)
    if "servers" in shape:
        assert found.pop()[2], "the dead server is not closed"
    said = {name: [each for other, _, each, _ in found if other == name] for name in ("one", "two")}
    assert said["one"][0] != said["two"][0]
    for name in ("one", "two"):
        assert said[name] == [said[name][0]] * len(said[name]), name


def updates(function: str, policy: Path, folder: Path, *arguments: str, **variables: str) -> tuple[Any, str]:
    """What a function of engine_updates.py has found, and the end of its stderr."""
    done = run_stage_warm(
        "generation", function, policy, folder, *arguments,
        module="tests.generation.engine_updates", environment=variables, libraries=LIBRARIES, timeout=900.0,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr[-3000:]


class Engine(UpdatableEngine):
    """One that nobody can give other weights."""

    dtype, max_length = "float32", 256

    def __init__(self) -> None:
        self.closed = self.broken = False

    def call_workers(self, method: str, *arguments: str) -> list[Any]:
        return [{"lost": ["model.layers.0"], "digest": ""}]

    def sequence_logprobs(self, ids: list[int]) -> list[float]:
        raise AssertionError("its weights are not there")

    def reset(self) -> None:
        if self.broken:
            raise RuntimeError("a worker has died")

    def close(self) -> None:
        self.closed = True


def test_an_engine_that_fails_costs_a_start_and_a_damaged_checkpoint_is_refused(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resident, "_allowed", True)
    monkeypatch.setattr(resident, "_residents", {})
    monkeypatch.setattr(run, "open_engine", lambda *_: Engine())
    config = GenerationConfig(policy=policy, prompts=policy, output=tmp_path)
    settings = EngineSettings((2,), 64, "float32", False, tmp_path / "log")

    def held(fingerprint: str) -> tuple[Any, str]:
        return run.get_engine(config, settings, fingerprint)

    first, start = held("1")
    assert start == "loaded"
    assert held("1") == (first, "kept")
    first.broken = True
    second, start = held("1")
    assert (start, first.closed, second is first) == ("loaded", True, False)
    assert "the engine could not be kept and is loaded again" in capsys.readouterr().err
    third, start = held("2")
    assert (start, second.closed, third is second) == ("loaded", True, False)
    assert "cannot be verified" in capsys.readouterr().err
    monkeypatch.setattr(run, "input_damage", lambda source: [f"{source}/model.safetensors has other bytes"])
    with pytest.raises(UserError, match=r"is damaged: .*model.safetensors has other bytes"):
        held("3")


def test_a_checkpoint_that_is_cut_off_is_refused(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed_policy: Any
) -> None:
    monkeypatch.setattr(resident, "_allowed", True)
    monkeypatch.setattr(resident, "_residents", {})
    monkeypatch.setattr(run, "open_engine", lambda *_: Engine())
    settings = EngineSettings((2,), 64, "float32", False, tmp_path / "log")
    torn = changed_policy()
    weights = torn / "model.safetensors"
    run.get_engine(GenerationConfig(policy=policy, prompts=policy, output=tmp_path), settings, "1")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        run.get_engine(GenerationConfig(policy=torn, prompts=policy, output=tmp_path), settings, "2")


def test_what_stays_between_stages_is_no_part_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor ends all processes that are marked as parts of it."""
    monkeypatch.setenv(ATTEMPT, "here")
    for allowed, seen in [(False, "here"), (True, None)]:
        monkeypatch.setattr(resident, "_allowed", allowed)
        with resident.outliving_attempt():
            assert os.environ.get(ATTEMPT) == seen
        assert os.environ[ATTEMPT] == "here"


@pytest.mark.parametrize(
    ("path", "given", "allowed"),
    [
        ("/health", None, True),
        ("/collective_rpc", b"Bearer secret", True),
        ("/collective_rpc", b"Bearer other", False),
        ("/collective_rpc", None, False),
        ("/reset_prefix_cache", b"secret", False),
    ],
)
def test_nobody_without_its_key_asks_a_server(
    path: str, given: bytes | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    asked: list[str] = []
    sent: list[dict[str, Any]] = []

    async def server(scope: dict[str, Any], receive: Any, send: Any) -> None:
        asked.append(scope["path"])

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [] if given is None else [(b"authorization", given)]
    asyncio.run(RequireKey(server)({"type": "http", "path": path, "headers": headers}, None, send))
    assert asked == ([path] if allowed else [])
    assert [message["status"] for message in sent if "status" in message] == ([] if allowed else [401])
