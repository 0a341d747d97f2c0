"""New weights in an engine that is loaded: its answers are those of an engine that has loaded them."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from contracts import resident
from contracts.attempt import ATTEMPT
from contracts.errors import UserError
from generation import run
from generation.config import GenerationConfig
from generation.engine import EngineSettings
from generation.server_key import KEY, RequireKey
from generation.vllm_engine import UpdatableEngine

SCRIPT = """
import json, shutil, sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from contracts.checkpoint_probe import Probe
from contracts.records import Sampling
from generation import vllm_engine
from generation.config import GenerationConfig
from generation.engine import EngineSettings, GenerationRequest, UpdateError

old, folder = Path(sys.argv[1]), Path(sys.argv[2])


def checkpoint(name, seed, tied):
    path = shutil.copytree(old, folder / name)  # with its tokenizer, which a server reads
    config = LlamaForCausalLM.from_pretrained(old).config
    config.tie_word_embeddings, config.max_position_embeddings = tied, 512
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def probe(path):
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(range(5, 25))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return Probe(ids[:8], ids[8:], [float(logprobs[place - 1, ids[place]]) for place in range(8, 20)], "float32")


def opened(path):
    config = GenerationConfig(policy=path, prompts=path, output=folder / "out", k=2, max_new_tokens=20)
    return vllm_engine.VllmEngine(config, EngineSettings((2,), 256, "float32", False, folder / "log"))


def answers(engine):
    prompts = [tuple(5 + (7 * i + j) % 30 for j in range(4 + 20 * i)) for i in range(9)]  # some longer than a block
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=20)
    requests = [GenerationRequest(prompt, 2, 10 * i, sampling) for i, prompt in enumerate(prompts)]
    return engine.generate(requests, "shard-00000.jsonl")


def refused(engine, path):
    try:
        engine.update(path)
    except UpdateError as error:
        return str(error)
    return None


found = {}
for tied in (False, True):
    before, after = checkpoint(f"before-{tied}", 1, tied), checkpoint(f"after-{tied}", 2, tied)
    fresh = answers(opened(after))
    engine = opened(before)
    first = answers(engine)
    vllm_engine.probe_of = probe
    engine.update(after)
    engine.reset()
    found[f"differs {tied}"] = first != fresh
    found[f"same {tied}"] = answers(engine) == fresh
    engine.update(before)
    found[f"back {tied}"] = answers(engine) == first
    vllm_engine.probe_of = lambda path: probe(before)
    found[f"wrong {tied}"] = refused(engine, after)
    vllm_engine.probe_of = lambda path: None
    found[f"unknown {tied}"] = refused(engine, after)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_with_new_weights_answers_as_one_that_has_loaded_them(policy: Path, tmp_path: Path) -> None:
    """Also where the output matrix is tied to the embeddings, of which vLLM keeps a packed copy on a CPU."""
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    command = [sys.executable, "-c", SCRIPT, str(policy), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for tied in (False, True):
        assert found[f"differs {tied}"]
        assert found[f"same {tied}"]
        assert found[f"back {tied}"]
        assert "differ from the trainer's by" in found[f"wrong {tied}"]
        assert "cannot be verified" in found[f"unknown {tied}"]


WORKERS = '''
import os, signal
from pathlib import Path

from generation.weight_update import WeightUpdate, _poison


class Mortal(WeightUpdate):
    """Its last rank ends, or stops, with half of an update done, where a file says so."""

    def replace_weights(self, policy):
        mark = Path(os.environ["MARK"])
        if mark.exists() and self.rank == int(os.environ["LAST"]):
            number = signal.Signals[mark.read_text()]
            mark.unlink()
            _poison(self.get_model())
            os.kill(os.getpid(), number)
        return super().replace_weights(policy)
'''

IN_TURN = (
    SCRIPT.partition("def opened")[0]
    + """
import msgspec

from contracts import resident
from generation import run

settings = EngineSettings((2,), 256, "float32", False, folder / "log")
shape = json.loads(sys.argv[3])
mark = Path(sys.argv[4])


def held(path):
    config = GenerationConfig(policy=path, prompts=path, output=folder / "out", k=2, max_new_tokens=20, **shape)
    engine, start = run.get_engine(config, settings, path.name)
    said = []
    for i in range(5):
        prompt = tuple(5 + (7 * i + j) % 30 for j in range(4 + 40 * i))
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=20)
        said += engine.generate([GenerationRequest(prompt, 2, 10 * i, sampling)], "shard-00000.jsonl")
    return engine, start, [msgspec.to_builtins(said), engine.read_back()]


if __name__ == "__main__":
    resident.allow()
    vllm_engine.probe_of = probe
    vllm_engine.EXTENSION = "mortal.Mortal"
    one, two = checkpoint("one", 1, True), checkpoint("two", 2, True)
    found = []
    turns = [(one, ""), (two, ""), (one, ""), (two, "SIGKILL"), (two, ""), (one, "SIGSTOP")]
    for path, word in turns[:int(sys.argv[5])]:
        if word:
            mark.write_text(word)
            engine._update_timeout = 5.0
        engine, start, said = held(path)
        found.append([path.name, start, said, mark.exists()])
    engine.close()
    print(json.dumps(found))
"""
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("shape", "last", "steps"),
    [({"tensor_parallel": 2}, 1, 6), ({"servers": 1}, 0, 5)],
    ids=["tensor parallel", "server"],
)
def test_engines_of_several_processes_take_two_policies_in_turn(
    shape: dict[str, int], last: int, steps: int, policy: Path, tmp_path: Path
) -> None:
    """Where a worker dies or stops in the middle of an update, the engine is loaded anew; it then answers, and is read
    back, as one that was updated."""
    pytest.importorskip("vllm", reason="vLLM is in the generation environment only", exc_type=ImportError)
    (tmp_path / "mortal.py").write_text(WORKERS)
    script, mark = tmp_path / "script.py", tmp_path / "mark"
    script.write_text(IN_TURN)
    variables = {
        "OMP_NUM_THREADS": "1", "MARK": str(mark), "LAST": str(last),
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
    }  # fmt: skip
    command = [sys.executable, script, policy, tmp_path, json.dumps(shape), mark, str(steps)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    starts = ["loaded", "updated", "updated", "loaded", "kept", "loaded"][:steps]
    assert [start for _, start, _, _ in found] == starts, done.stderr[-3000:]
    assert not any(unused for *_, unused in found)
    said = {name: [each for other, _, each, _ in found if other == name] for name in ("one", "two")}
    assert said["one"][0] != said["two"][0]
    for name in ("one", "two"):
        assert said[name] == [said[name][0]] * len(said[name]), name


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
