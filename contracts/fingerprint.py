"""Computes digests of files, of plain data, and of models."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.weights import stored_tensors

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
ADAPTER = "adapter_config.json"
"""Marks a directory written by PEFT."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that engines read for models with inputs other than text; training copies them, fingerprints omit them."""
RELEASED = "released.json"
"""Name of the list of files that `pipeline gc` has deleted from a published directory."""
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


STABLE_NANOSECONDS = 2_000_000_000
"""A digest is cached only if its file has been unchanged for this long, because file systems' clocks are coarse."""
_known: dict[tuple[tuple[str | int, ...], ...], str] = {}
"""This process's cache of fingerprints, by the states of the files."""


def digest(data: Any) -> str:
    """SHA-256 of plain data as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model directory, sorted.

    Raises:
        UserError: the directory does not exist, is not a model, lacks some or all of its weights, or has them only in
            another format.
    """
    if model.is_file():
        raise UserError(f"model {model} is a file. Give the directory written by save_pretrained.")
    if not model.is_dir():
        raise UserError(
            f"model directory {model} does not exist. Give a directory written by save_pretrained, or hf:ORG/NAME."
        )
    if (model / ADAPTER).is_file():
        base = _base_of(model / ADAPTER)
        raise UserError(
            f"{model} holds an adapter (PEFT) of {base or 'another model'}, not a model. Merge the two into one: "
            f"`python -m training merge model={base or 'BASE'} adapter={model} output=DIRECTORY`, and give DIRECTORY."
        )
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a model: it has no config.json. Give a directory written by save_pretrained.")
    if (model / RELEASED).is_file():
        raise UserError(
            f"the weights of {model} were deleted by `pipeline gc`. Pin the run that it belongs to and recompute them "
            "there with --force STAGE; or give another model."
        )
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{model} has no *.safetensors weights; other formats can run code on loading and are not read. "
            "Convert it: load the model in transformers and call save_pretrained(...)."
        )
    stored_tensors(model)
    return files


def _base_of(adapter: Path) -> str | None:
    """The base model that an adapter's config names."""
    try:
        found = json.loads(adapter.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and found else None


def weights_fingerprint(model: Path) -> str:
    """Digest of a model's weights, configuration and tokenizer.

    It identifies a policy everywhere: in stage keys, in every rollout, and when the weights that an engine has loaded
    are checked. It does not depend on the directory's name.
    """
    files = [*weight_files(model), *(model / name for name in MODEL_FILES if (model / name).is_file())]
    states = tuple((file.name, *_state(file)) for file in files)
    if states not in _known:
        known = digest({file.name: file_sha256(file) for file in files})
        if max(state[-1] for state in states) > time.time_ns() - STABLE_NANOSECONDS:
            return known  # a change right after this one could leave the same times
        _known[states] = known
    return _known[states]


def _state(file: Path) -> tuple[int, int, int, int, int]:
    """The metadata that changes with a file's content: device and inode, size, and modification times."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, max(found.st_mtime_ns, found.st_ctime_ns)
