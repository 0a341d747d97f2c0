"""Validates `engine_args`, which are passed on to vLLM; some arguments can only be set by the stage itself."""

from typing import Any

from contracts import engine_args

RESERVED = {
    "model": "it is the stage's policy",
    "tokenizer": "it is the policy's own",
    "skip_tokenizer_init": "engines are given token ids, and a tokenizer where they need one",
    "dtype": "set `dtype`",
    "max_model_len": "it follows from the prompts and max_new_tokens",
    "max_num_seqs": "set `max_num_seqs`",
    "gpu_memory_utilization": "set `memory_utilization`",
    "kv_cache_memory_bytes": "set `kv_cache_mib`",
    "tensor_parallel_size": "set `tensor_parallel`",
    "pipeline_parallel_size": "an engine has `tensor_parallel` GPUs; several engines are `replicas`",
    "data_parallel_size": "several engines are `replicas`",
    "distributed_executor_backend": "an engine has the GPUs of one process",
    "logprobs_mode": "set `logprob_mode`",
    "seed": "every sample has its own seed, derived from the stage's",
    "generation_config": "every sampling parameter is the stage's",
    "override_generation_config": "every sampling parameter is the stage's",
    "logits_processors": "it would change the samples, and no record would show it",
    "reasoning_config": "set `thinking`",
    "profiler_config": "set `profile_shards`",
    "worker_extension_cls": "it is how weights are updated in place",
    "runner": "the stage generates",
    "convert": "the stage generates",
    "trust_remote_code": "code of a model is never run",
    "use_tqdm_on_load": "the stage's log is not a terminal",
    "disable_log_stats": "the stage has metrics of its own",
    "host": "servers listen on loopback only",
    "port": "servers take a free port",
    "api_key": "every server has a random one",
}
"""Arguments that the stage sets itself or does not support, with the reason."""


def checked_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """Return a config's `engine_args`.

    Raises:
        ValueError: one of them can only be set by the stage.
    """
    return engine_args.checked_arguments(value, RESERVED)
