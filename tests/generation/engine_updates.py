"""Gives engines of this process new weights, and prints what they answer then.

python -m tests.generation.engine_updates FUNCTION POLICY FOLDER [ARGUMENT ...]
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import LlamaForCausalLM

from contracts import resident
from contracts.checkpoint_probe import Probe
from contracts.records import Sampling
from generation import run, vllm_engine
from generation.config import GenerationConfig
from generation.engine import EngineSettings, GenerationRequest, UpdateError
from tests.generation.forked_workers import fork_workers

old, folder = Path(sys.argv[2]), Path(sys.argv[3])
SETTINGS = EngineSettings((2,), 256, "float32", False, folder / "log")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6)


def main() -> None:
    function = {"in_place": in_place, "in_turn": in_turn}[sys.argv[1]]
    print(json.dumps(function(*sys.argv[4:])))


def checkpoint(name: str, seed: int, *, tied: bool) -> Path:
    path = shutil.copytree(old, folder / name)  # with its tokenizer, which a server reads
    config = LlamaForCausalLM.from_pretrained(old).config
    config.tie_word_embeddings, config.max_position_embeddings = tied, 512
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def probe(path: Path) -> Probe:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(range(5, 25))
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return Probe(ids[:8], ids[8:], [float(logprobs[place - 1, ids[place]]) for place in range(8, 20)], "float32")


def config_of(path: Path, **shape: Any) -> GenerationConfig:
    return GenerationConfig(policy=path, prompts=path, output=folder / "out", k=2, max_new_tokens=20, **shape)


def in_place() -> dict[str, Any]:
    """The engine of one process."""

    def opened(path: Path) -> vllm_engine.VllmEngine:
        return vllm_engine.VllmEngine(config_of(path), SETTINGS)

    def answers(engine: vllm_engine.VllmEngine) -> Any:
        prompts = [tuple(5 + (7 * i + j) % 30 for j in range(4 + 20 * i)) for i in range(9)]  # some exceed a block
        requests = [GenerationRequest(prompt, 2, 10 * i, SAMPLING) for i, prompt in enumerate(prompts)]
        return engine.generate(requests, "shard-00000.jsonl")

    def refused(engine: vllm_engine.VllmEngine, path: Path) -> str | None:
        try:
            engine.update(path)
        except UpdateError as error:
            return str(error)
        return None

    found: dict[str, Any] = {}
    for tied in (False, True):
        before, after = (checkpoint(f"{seed}-{tied}", seed, tied=tied) for seed in (1, 2))
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
        vllm_engine.probe_of = lambda path, other=before: probe(other)
        found[f"wrong {tied}"] = refused(engine, after)
        vllm_engine.probe_of = lambda path: None
        found[f"unknown {tied}"] = refused(engine, after)
    return found


def in_turn(shape: str, turns: str) -> list[Any]:
    """An engine of several processes, which gets the weights of one and two; a worker dies or stops where told.

    A server that has died is closed, and no other one is started.
    """
    resident.allow()
    fork_workers()
    vllm_engine.probe_of = probe
    vllm_engine.EXTENSION = "tests.generation.mortal_worker.Mortal"
    paths = {"one": checkpoint("one", 1, tied=True), "two": checkpoint("two", 2, tied=True)}
    mark = folder / "mark"
    found: list[Any] = []
    engine: Any = None
    for name, word in json.loads(turns):
        if word:
            mark.write_text(word)
            engine._update_timeout = 5.0
            if "servers" in shape:
                run.open_engine = lambda config, settings: None
                _, start = run.get_engine(config_of(paths[name], **json.loads(shape)), SETTINGS, name)
                return [*found, [name, start, engine._process.poll() is not None, mark.exists()]]
        engine, start = run.get_engine(config_of(paths[name], **json.loads(shape)), SETTINGS, name)
        said: list[Any] = []
        for i in (0, 4):  # the second exceeds a block of the KV cache
            prompt = tuple(5 + (7 * i + j) % 30 for j in range(4 + 40 * i))
            said += engine.generate([GenerationRequest(prompt, 2, 10 * i, SAMPLING)], "shard-00000.jsonl")
        found.append([name, start, [msgspec.to_builtins(said), engine.read_back()], mark.exists()])
    engine.close()
    return found


if __name__ == "__main__":
    main()
