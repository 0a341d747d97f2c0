"""The engines from inside: sampling of the transformers engine, and the life of a vLLM server."""

import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generation_runs import generate, processes_with_argument, publish_prompts, rows, start
from safetensors.torch import load_file

from contracts.records import Sampling
from generation.config import GenerationConfig
from generation.engine import Answer, EngineSettings, GenerationRequest
from generation.run import open_engine
from generation.vllm_server import VllmServer
from modeling.vllm_process import CPU_STEP

PROMPT = (1, 4, 9, 5)


def sample(policy: Path, requests: list[GenerationRequest], **values: Any) -> list[list[Answer]]:
    config = GenerationConfig(policy=policy, prompts=policy, output=policy, engine="transformers", **values)
    settings = EngineSettings(stop_ids=(2,), max_length=64, dtype="float32", on_gpu=False, log=Path("unused"))
    return open_engine(config, settings).generate(requests, "batch")


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (1.5, 6, 1.0), (1.3, 0, 0.9), (2.0, 9, 0.8)]
)
def test_transformers_engine_samples_the_distribution(
    policy: Path, temperature: float, top_k: int, top_p: float
) -> None:
    """4,000 first tokens against the probabilities they report: every one within five standard errors."""
    count = 4000
    request = GenerationRequest(PROMPT, count, 11, Sampling(temperature, top_p, top_k, 1))
    ((answers),) = sample(policy, [request], max_num_seqs=count)
    seen = Counter(answer.response_ids[0] for answer in answers)
    probability = {answer.response_ids[0]: math.exp(answer.logprobs[0]) for answer in answers}
    assert 1 < len(seen) <= (top_k or 64)
    assert sum(probability.values()) == pytest.approx(1, abs=0.02)
    for token, share in probability.items():
        assert abs(seen[token] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


def test_transformers_engine_gives_a_sample_the_same_answer_in_any_batch(policy: Path) -> None:
    sampling = Sampling(1.0, 1.0, 0, 20)
    requests = [
        GenerationRequest((1, 4, *range(6, 6 + length), 5), 3, 100 * length, sampling) for length in (1, 30, 4, 11)
    ]
    together = sample(policy, requests, max_num_seqs=64)
    assert {answer.finish_reason for group in together for answer in group} == {"stop", "length"}
    for size in (1, 5):
        for one, two in zip(together, sample(policy, requests, max_num_seqs=size), strict=True):
            assert [answer.response_ids for answer in one] == [answer.response_ids for answer in two]
            for first, second in zip(one, two, strict=True):
                assert first.logprobs == pytest.approx(second.logprobs, abs=1e-4)


def test_guard_ends_everything_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The command is a shell that starts another process, as a server starts its engine."""
    mark = tmp_path / "started"
    command = f"sleep 3601 & echo $! >> {mark}; echo $$ >> {mark}; wait"
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys, os, time\n"
         "subprocess.Popen([sys.executable, '-m', 'generation.guard', str(os.getpid()), 'sh', '-c', sys.argv[1]],"
         " start_new_session=True)\ntime.sleep(3600)", command]
    )  # fmt: skip
    _wait_for(lambda: mark.exists() and len(mark.read_text().split()) == 2, 20)
    started = [int(number) for number in mark.read_text().split()]
    parent.kill()
    parent.wait()
    _wait_for(lambda: not any(Path(f"/proc/{number}").exists() for number in started), 60)


@pytest.mark.slow
def test_killed_stage_takes_its_server_along(
    changed_policy: Callable[..., Path], prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    policy = changed_policy()  # a path of its own, to find the processes by
    stage = start(tmp_path / "out", policy=policy, prompts=prompts, max_new_tokens=8, servers=1)
    _wait_for(lambda: len(processes_with_argument(policy)) >= 2, 60)  # the guard, the server
    processes = [Path(f"/proc/{number}") for number in processes_with_argument(policy)]
    environments = b"\0".join((process / "environ").read_bytes() for process in processes)
    (key,) = set(re.findall(rb"VLLM_API_KEY=([^\0]+)", environments))
    assert all(key not in (process / "cmdline").read_bytes() for process in processes)
    stage.send_signal(signal.SIGKILL)
    stage.communicate()
    _wait_for(lambda: processes_with_argument(policy) == [], 20)


@pytest.mark.slow
def test_server_that_dies_while_starting_shows_its_log(changed_policy: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    policy = changed_policy(config={"architectures": ["UnheardOfForCausalLM"], "model_type": "unheard_of"})
    config = GenerationConfig(policy=policy, prompts=policy, output=policy, servers=1)
    settings = EngineSettings(stop_ids=(2,), max_length=64, dtype="float32", on_gpu=False, log=tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)ended while it was starting.*unheard_of"):
        VllmServer(config, settings)
    assert processes_with_argument(tmp_path) == []


@pytest.mark.slow
def test_tied_weights_are_stored_once(engine: str, policy: Path, prompts: Path, tmp_path: Path) -> None:
    """Both engines tie the LM head to the embedding where a checkpoint has none, as training publishes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = shutil.copytree(policy, tmp_path / "tied")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(policy, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    settings = {"engine": engine, "logprob_mode": "raw", "k": 1, "count": 4, "max_new_tokens": 4}
    made = generate(tmp_path / "out", policy=tied, prompts=prompts, **settings)
    for row in rows(made):
        answer = row.completions[0]
        with torch.no_grad():
            logprobs = model(torch.tensor([[*row.prompt_ids, *answer.response_ids]])).logits[0].log_softmax(-1)
        found = [float(logprobs[len(row.prompt_ids) - 1 + i, token]) for i, token in enumerate(answer.response_ids)]
        assert found == pytest.approx(answer.logprobs, abs=1e-4)


@pytest.mark.slow
def test_vllm_takes_more_prompt_tokens_than_fit_one_step(policy: Path, tmp_path: Path) -> None:
    """Seeded requests whose prompts are cut in two pieces break vLLM on a CPU."""
    pytest.importorskip("vllm", exc_type=ImportError)
    texts = [" ".join(f"w{(number * 7 + word * (number + 1)) % 58}" for word in range(130)) for number in range(20)]
    prompts = publish_prompts(tmp_path / "prompts", texts)
    made = generate(tmp_path / "out", policy=policy, prompts=prompts, k=1, max_new_tokens=3)
    assert made.manifest.facts["prompt_tokens"] > CPU_STEP
    assert made.manifest.rows == 20


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.05)
