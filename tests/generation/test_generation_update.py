"""New weights in an engine that is loaded: its answers are those of an engine that has loaded them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
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
    path = folder / name
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
    engine.begin()
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
        assert "nobody can tell" in found[f"unknown {tied}"]
