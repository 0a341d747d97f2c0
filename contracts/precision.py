"""Resolves `dtype: auto` to a dtype that the device supports natively and that is precise enough."""

import json
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Linux's names of the x86 (AVX512-BF16, AMX) and ARM instructions that multiply bfloat16."""
HALF = ("bfloat16", "float16")


def resolve_dtype(dtype: str, *, on_gpu: bool, sampled: Path | None = None) -> str:
    """Resolve the `dtype` of a stage's config for a model.

    `auto` is bfloat16 on a GPU. On a CPU it is float32, because training, and the log-probabilities that training
    compares with its own, would lose too much precision. A model that is only sampled from is computed in bfloat16 if
    the CPU supports that natively (emulation is several times slower) and the weights are stored in half precision,
    because then they are the same numbers.

    Args:
        sampled: the directory of a model that is only sampled from.
    """
    if dtype != "auto":
        return dtype
    if on_gpu or (sampled is not None and stored_dtype(sampled) in HALF and computes_bfloat16()):
        return "bfloat16"
    return "float32"


def computes_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 natively; False if that is unknown."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BFLOAT16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def stored_dtype(model: Path) -> str:
    """The dtype of a model's weights according to its config.json; "unknown" if it has none."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return "unknown"
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(part, dict) and isinstance(name := part.get("dtype", part.get("torch_dtype")), str):
            return name
    return "unknown"
