"""Sampling engine on vLLM in this process, and the arguments and in-place weight updates shared with the server."""

import contextlib
import json
import multiprocessing
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from contracts import resident
from contracts.architectures import context_switch
from contracts.checkpoint_probe import Probe, probe_of
from contracts.errors import TransientError, UserError
from contracts.fingerprint import digest
from contracts.records import FinishReason
from generation.config import GenerationConfig
from generation.engine import Answer, EngineSettings, GenerationRequest, UpdateError
from modeling.vllm_process import CPU_BLOCK, CPU_STEP, beat_with_every_step, set_environment

PROBE_EXACT = 1e-2
"""Maximum difference between the engine's and the trainer's log-probability of a token in float32 (nats)."""
PROBE_HALF = 1.0
"""The same limit in half precision, where engine and trainer round differently (by a quarter of it on average)."""

EXTENSION = "generation.weight_update.WeightUpdate"
"""Class whose methods vLLM adds to its workers."""
WORKER = "VllmWorker"
"""Name prefix of vLLM's worker processes."""
UPDATE_SECONDS = 120.0
"""Seconds that workers may take to update weights, in addition to five times their startup time."""


class UpdatableEngine(ABC):
    """A vLLM engine, in this process or a server, whose weights can be updated in place."""

    dtype: str
    max_length: int
    """Maximum tokens of a sequence."""
    read_back_digest: str | None = None
    """Fingerprint of the weights that were read back after the last update; None before the first update."""

    @abstractmethod
    def call_workers(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of `WeightUpdate` in every worker, and return the results.

        Raises:
            Exception: a worker has ended, does not answer, or failed.
        """
        ...

    @abstractmethod
    def sequence_logprobs(self, ids: list[int]) -> list[float]:
        """Log-probabilities of all tokens of a sequence but the first, given the tokens before them."""
        ...

    @abstractmethod
    def reset(self) -> None:
        """Prepare for a new stage: clear the prefix cache, because cache salts repeat, with other prompts or weights.

        Raises:
            Exception: the engine no longer works.
        """
        ...

    def update(self, policy: Path) -> None:
        """Reload all weights in place, and verify them.

        Every weight is first set to NaN, so that no old one remains unnoticed: vLLM keeps weights that the checkpoint
        lacks. Then the engine must compute the same log-probabilities of one sequence as the trainer that published the
        checkpoint.

        Raises:
            UpdateError: the checkpoint has no such sequence, a weight was not loaded, or log-probabilities differ.
        """
        probe = probe_of(policy)
        if probe is None:
            raise UpdateError(f"an update to the weights of {policy} cannot be verified: it has no probe")
        found = self.call_workers("replace_weights", str(policy))
        lost = [name for worker in found for name in worker["lost"]]
        if lost:
            raise UpdateError(f"{policy} has no weights for {', '.join(lost[:3])}")
        self.reset()
        self._check_probe(probe, policy)
        self.read_back_digest = _fingerprint(found)

    def _check_probe(self, probe: Probe, policy: Path) -> None:
        """Compare the engine's log-probabilities of the probe with the trainer's."""
        ids = [*probe.prompt_ids, *probe.response_ids][: self.max_length - 1]
        found = self.sequence_logprobs(ids)[len(probe.prompt_ids) - 1 :]
        difference = max((abs(one - other) for one, other in zip(found, probe.logprobs, strict=False)), default=0.0)
        allowed = PROBE_EXACT if {probe.dtype, self.dtype} == {"float32"} else PROBE_HALF
        if not difference <= allowed:
            raise UpdateError(
                f"with the weights of {policy} the engine's log-probabilities differ from the trainer's by "
                f"{difference:.3g} nats, more than {allowed:g}"
            )

    def read_back(self) -> str:
        """Fingerprint of the weights that the workers compute with: equal for equal weights in the same layout."""
        return _fingerprint(self.call_workers("read_weights"))


def _fingerprint(workers: list[dict[str, Any]]) -> str:
    return digest([worker["digest"] for worker in workers])


class VllmEngine(UpdatableEngine):
    """A vLLM engine in this process; with `tensor_parallel` > 1 its workers are other processes."""

    def __init__(self, config: GenerationConfig, settings: EngineSettings) -> None:
        # The scheduler runs in this process, so that a batch starts when all of its requests have been added: in
        # another process, batching would depend on how fast they arrive.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        set_environment(on_gpu=settings.on_gpu, parts=config.tensor_parallel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own use of deprecated functions
            from vllm import LLM, SamplingParams
            from vllm.exceptions import VLLMValidationError
            from vllm.sampling_params import StructuredOutputsParams

            # The engine gets and returns token ids, so it needs no tokenizer, except for multimodal models (their
            # processors) and for settings that look at the text of answers. vLLM's server always needs one.
            decodes_text = bool(config.stop or config.guided or config.thinking)
            no_tokenizer = not (is_multimodal(config.policy) or decodes_text)
            start = time.monotonic()
            with resident.outliving_attempt():
                self._llm: Any = LLM(**engine_arguments(config, settings), skip_tokenizer_init=no_tokenizer)
        self._update_timeout = UPDATE_SECONDS + 5 * (time.monotonic() - start)
        self._workers = [each for each in multiprocessing.active_children() if each.name.startswith(WORKER)]
        beat_with_every_step(self._llm)
        self._sampling_params: Any = SamplingParams
        self._structured_outputs: Any = StructuredOutputsParams
        self._guided = structured_outputs(config)
        self._validation_error: type[Exception] = VLLMValidationError
        self.dtype = settings.dtype
        self.max_length: int = self._llm.llm_engine.model_config.max_model_len
        self._stop_ids = list(settings.stop_ids)

    def generate(self, requests: Sequence[GenerationRequest], batch: str) -> list[list[Answer]]:
        """Answer all requests as one batch."""
        try:
            outputs = self._llm.generate(
                # The salt prevents hits in the prefix cache between batches: after a hit, the first token is computed
                # from other partial sums than after a miss.
                [{"prompt_token_ids": list(request.prompt_ids), "cache_salt": batch} for request in requests],
                [self._params(request) for request in requests],
                use_tqdm=False,
            )
        except self._validation_error as error:
            if self._guided:
                raise UserError(
                    f"guided: vLLM cannot constrain answers to this format ({error}). Change it."
                ) from error
            raise
        except Exception as error:
            if dead := self._dead_workers():
                raise TransientError(f"a process of the engine was killed or has died: {dead}") from error
            raise
        return [
            [_answer(completion, request) for completion in output.outputs]
            for output, request in zip(outputs, requests, strict=True)
        ]

    def _params(self, request: GenerationRequest) -> Any:
        parameters = sampling_parameters(request, self._stop_ids)
        if self._guided:
            parameters["structured_outputs"] = self._structured_outputs(**self._guided)
        return self._sampling_params(
            **parameters,
            logprobs=0,  # only that of the sampled token
            flat_logprobs=True,
            detokenize="stop" in parameters,
        )

    def _dead_workers(self) -> str:
        """Names and exit codes of dead workers; if one is killed, vLLM ends the others as well."""
        return ", ".join(f"{each.name} (exit code {each.exitcode})" for each in self._workers if not each.is_alive())

    def call_workers(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of each worker."""
        if dead := self._dead_workers():
            raise TransientError(f"a process of the engine was killed or has died: {dead}")
        found: list[Any] = self._llm.collective_rpc(method, timeout=self._update_timeout, args=arguments)
        return found

    def sequence_logprobs(self, ids: list[int]) -> list[float]:
        """Compute them as the log-probabilities of a prompt."""
        params = self._sampling_params(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": ids}], [params], use_tqdm=False)
        return [output.prompt_logprobs[place][ids[place]].logprob for place in range(1, len(ids))]

    def reset(self) -> None:
        """Clear the prefix cache."""
        self.call_workers("check_health")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    @contextlib.contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Trace each worker with vLLM's integration of torch's profiler."""
        self._llm.start_profile(profile_prefix=name)
        try:
            yield
        finally:
            self._llm.stop_profile()

    def close(self) -> None:
        """Stop the worker processes; a worker in this process ends with it."""
        if self._workers:
            self._llm.llm_engine.engine_core.shutdown()


def _answer(completion: Any, request: GenerationRequest) -> Answer:
    ids = tuple(completion.token_ids)
    if list(ids) != list(completion.logprobs.token_ids):
        raise RuntimeError("vLLM returned log-probabilities of other tokens than it sampled")
    reason, stop_string = reason_of(completion.finish_reason, completion.stop_reason)
    # vLLM runs n > 1 as n separate requests, with the seeds seed, seed + 1, … (vllm/v1/engine/parallel_sampling.py)
    return Answer(ids, tuple(completion.logprobs.logprobs), reason, request.seed + completion.index, stop_string)


def reason_of(finish_reason: FinishReason, stop_reason: int | str | None) -> tuple[FinishReason, str | None]:
    """Our finish reason for vLLM's, which is "stop" for stop strings too; and the stop string that ended it, if any."""
    return ("stop_string", stop_reason) if isinstance(stop_reason, str) else (finish_reason, None)


def sampling_parameters(request: GenerationRequest, stop_ids: list[int]) -> dict[str, Any]:
    """vLLM's sampling parameters for a request, in process or by HTTP: all of them, so that no default is used."""
    sampling = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in msgspec.structs.asdict(request.sampling).items()
        if value is not msgspec.UNSET
    }
    sampling.pop("guided", None)  # only a label; see `structured_outputs`
    if "thinking_tokens" in sampling:
        sampling["thinking_token_budget"] = sampling.pop("thinking_tokens")
    return {
        "n": request.n,
        "seed": request.seed,
        **sampling,
        "stop_token_ids": stop_ids,
        "ignore_eos": True,  # only the stop ids above end an answer, in every engine
    }


def structured_outputs(config: GenerationConfig) -> dict[str, Any]:
    """vLLM's parameters for `guided`."""
    if config.guided is None:
        return {}
    name, value = config.guided.form
    return {"json" if name == "json_schema" else name: value}


def is_multimodal(model: Path) -> bool:
    """Whether a model may be multimodal: its config.json has a section for a submodel, such as `vision_config`."""
    settings = json.loads((model / "config.json").read_text())
    return any(name.endswith("_config") and isinstance(value, dict) for name, value in settings.items())


def engine_arguments(config: GenerationConfig, settings: EngineSettings) -> dict[str, Any]:
    """vLLM's engine arguments, for `LLM(...)` and for the server's command line."""
    # vLLM uses longrope's long factors only if max_model_len needs them.
    model: dict[str, Any] = json.loads((config.policy / "config.json").read_text())
    longest = max(settings.max_length, (context_switch(model) or 0) + 1)
    arguments: dict[str, Any] = {
        "model": str(config.policy),
        "dtype": settings.dtype,
        "max_model_len": longest,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "logprobs_mode": f"{config.logprob_mode}_logprobs",
        "generation_config": "vllm",  # ignores the model's sampling defaults
        "seed": 0,
        "use_tqdm_on_load": False,
        "worker_extension_cls": EXTENSION,
    }
    if config.thinking is not None:
        marks = {"reasoning_start_str": config.thinking.start, "reasoning_end_str": config.thinking.end}
        arguments["reasoning_config"] = marks
    if settings.traces is not None:
        arguments["profiler_config"] = {
            "profiler": "torch",
            "torch_profiler_dir": str(settings.traces.absolute()),
            "torch_profiler_with_stack": False,  # it would take longer than the work to be measured
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
        # A chunked prompt needs its random generator rewound, which CPU generators do not support ("CPU Generator does
        # not use offset").
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(CPU_STEP, longest, config.max_num_seqs)
    return arguments | config.engine_args


def cpu_kv_cache_bytes(config: GenerationConfig, settings: EngineSettings) -> int:
    """Bytes of a KV cache for `max_num_seqs` sequences of maximum length in each process, between 64 MiB and 4 GiB.

    With room for all of them, no sequence is preempted and recomputed.
    """
    model: dict[str, Any] = json.loads((config.policy / "config.json").read_bytes())
    model = model.get("text_config", model)
    heads = model["num_attention_heads"]
    head_dim = model.get("head_dim") or model["hidden_size"] // heads
    width = (model.get("num_key_value_heads") or heads) * head_dim * (4 if settings.dtype == "float32" else 2)
    width = -(-width // config.tensor_parallel)
    blocks = -(-settings.max_length // CPU_BLOCK) * config.max_num_seqs
    needed: int = 2 * model["num_hidden_layers"] * width * blocks * CPU_BLOCK
    return min(max(needed, 64 << 20), 4 << 30)
