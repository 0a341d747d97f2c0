"""vLLM inside this process, and the arguments that every vLLM of this package is started with."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracts.architectures import context_switch
from contracts.attempt import beat
from contracts.records import FinishReason
from generation.config import GenerationConfig
from generation.engine import Answer, EngineSettings, GenerationRequest

CPU_BLOCK = 128
"""Tokens per block of the KV cache on a CPU."""
CPU_STEP = 2048
"""Tokens per forward pass on a CPU."""


class VllmEngine:
    """One in-process engine."""

    def __init__(self, config: GenerationConfig, settings: EngineSettings) -> None:
        # The scheduler runs in this process, so that a batch starts when all of its requests are there: with a
        # process of its own, what is batched together would depend on how fast they arrive.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        set_environment(on_gpu=settings.on_gpu)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own use of deprecated functions
            from vllm import LLM, SamplingParams

            # Ids in, ids out: how vLLM would read the tokenizer does not matter. Its server needs one, and so do the
            # processors of models that see or hear.
            without = not has_other_inputs(config.policy)
            self._llm: Any = LLM(**engine_arguments(config, settings), skip_tokenizer_init=without)
        self._beat_with_every_step()
        self._sampling_params: Any = SamplingParams
        self._stop_ids = list(settings.stop_ids)

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> list[list[Answer]]:
        """Answer all requests as one batch."""
        outputs = self._llm.generate(
            # The salt keeps cached prefixes from one batch to the next apart: a hit computes the first token from
            # other partial sums than a miss does.
            [{"prompt_token_ids": list(request.prompt_ids), "cache_salt": batch} for request in requests],
            [self._params(request) for request in requests],
            use_tqdm=False,
        )
        return [
            [_answer(completion, request) for completion in output.outputs]
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _beat_with_every_step(self) -> None:
        """A batch can take an hour; its steps show that it goes on."""
        engine = self._llm.llm_engine
        step = engine.step

        def beating_step() -> Any:
            beat()
            return step()

        engine.step = beating_step

    def _params(self, request: GenerationRequest) -> Any:
        return self._sampling_params(
            n=request.n,
            seed=request.seed,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            max_tokens=request.sampling.max_tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # the stop ids above are the whole rule, the same for every engine
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
        )

    @contextlib.contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """vLLM's own use of torch's profiler: a trace of each of its workers."""
        self._llm.start_profile(profile_prefix=name)
        try:
            yield
        finally:
            self._llm.stop_profile()

    def close(self) -> None:
        """Nothing to end: the engine ends with this process."""


def _answer(completion: Any, request: GenerationRequest) -> Answer:
    ids = tuple(completion.token_ids)
    if list(ids) != list(completion.logprobs.token_ids):
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it sampled")
    reason: FinishReason = completion.finish_reason
    # vLLM runs n > 1 as n requests of their own, with the seeds seed, seed + 1, … (vllm/v1/engine/parallel_sampling.py)
    return Answer(ids, tuple(completion.logprobs.logprobs), reason, request.seed + completion.index)


def has_other_inputs(model: Path) -> bool:
    """Whether a model may take more than text: its config.json holds configurations of parts."""
    settings = json.loads((model / "config.json").read_text())
    return any(name.endswith("_config") and isinstance(value, dict) for name, value in settings.items())


def set_environment(*, on_gpu: bool) -> None:
    """Defaults for what vLLM reads from the environment; what the user has set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_gpu:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        return
    # On a CPU its warnings are a page about what is usual there.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # What it lets torch compile there (the rank of a log-probability, which nobody reads) takes longer to compile
    # than to compute, and needs a C++ compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def engine_arguments(config: GenerationConfig, settings: EngineSettings) -> dict[str, Any]:
    """vLLM's engine arguments, for `LLM(...)` and for the server's command line."""
    # It takes longrope's long factors only where it is prepared for sequences that need them.
    model: dict[str, Any] = json.loads((config.policy / "config.json").read_text())
    longest = max(settings.max_length, (context_switch(model) or 0) + 1)
    arguments: dict[str, Any] = {
        "model": str(config.policy),
        "dtype": settings.dtype,
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "logprobs_mode": f"{config.logprob_mode}_logprobs",
        "generation_config": "vllm",  # no sampling defaults of the model's: every parameter is ours
        "seed": 0,
        "use_tqdm_on_load": False,
    }
    if settings.traces is not None:
        arguments["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(settings.traces.absolute()),
            "torch_profiler_with_stack": False,  # it would take longer than what is to be measured
            "ignore_frontend": True,
        }
    if config.kv_cache_mib is not None:
        arguments["kv_cache_memory_bytes"] = config.kv_cache_mib << 20
    elif settings.on_gpu:
        arguments["gpu_memory_utilization"] = config.memory_utilization
    else:
        arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(config, settings)
    if not settings.on_gpu:
        arguments["enforce_eager"] = True
        # A prompt in two pieces needs a rewind of its random generator, which generators on a CPU refuse
        # ("CPU Generator does not use offset").
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(CPU_STEP, longest, config.max_num_seqs)
    return arguments


def cpu_kv_cache_bytes(config: GenerationConfig, settings: EngineSettings) -> int:
    """A KV cache for `max_num_seqs` sequences of the greatest length, between 64 MiB and 4 GiB.

    With room for all of them, no sequence is evicted and computed again.
    """
    model: dict[str, Any] = json.loads((config.policy / "config.json").read_bytes())
    model = model.get("text_config", model)
    heads = model["num_attention_heads"]
    head_dim = model.get("head_dim") or model["hidden_size"] // heads
    width = (model.get("num_key_value_heads") or heads) * head_dim * (4 if settings.dtype == "float32" else 2)
    blocks = -(-settings.max_length // CPU_BLOCK) * config.max_num_seqs
    needed: int = 2 * model["num_hidden_layers"] * width * blocks * CPU_BLOCK
    return min(max(needed, 64 << 20), 4 << 30)
