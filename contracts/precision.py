"""Which number format `dtype: auto` stands for: one that the device computes in by itself, and exact enough."""

import json
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""What Linux calls the instructions of x86 (AVX512-BF16, AMX) and of ARM that multiply bfloat16."""
HALF = ("bfloat16", "float16")


def resolve_dtype(asked: str, *, on_gpu: bool, sampled: Path | None = None) -> str:
    """The number format of a model that a stage has asked for.

    `auto` is bfloat16 on a GPU. On a CPU it is float32: what is trained, and the log-probabilities that training
    compares with its own, would lose too much. A model that is only sampled from is computed in bfloat16 where the
    processor does that by itself, which emulation is several times slower than, and where the model's weights are
    stored in a half precision: then they are the same numbers.

    Args:
        sampled: the directory of a model that is only sampled from.
    """
    if asked != "auto":
        return asked
    if on_gpu or (sampled is not None and stored_dtype(sampled) in HALF and computes_bfloat16()):
        return "bfloat16"
    return "float32"


def computes_bfloat16() -> bool:
    """Whether this machine's processor multiplies bfloat16 by itself; False where nobody knows."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not BFLOAT16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def stored_dtype(model: Path) -> str:
    """The number format of a model's weights, as its config.json says; "unknown" where it does not."""
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError):
        return "unknown"
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        if isinstance(part, dict) and isinstance(name := part.get("dtype", part.get("torch_dtype")), str):
            return name
    return "unknown"
