"""Checks `engine_args`, which a stage with an engine passes through to vLLM. Imports neither torch nor vLLM."""

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contracts.errors import UserError, did_you_mean


def checked_arguments(value: dict[str, Any], reserved: Mapping[str, str]) -> dict[str, Any]:
    """Return a config's `engine_args`; raise ValueError if the user may not set one of them.

    Args:
        reserved: the arguments that the stage sets itself or does not pass through, with the reasons.
    """
    for name in value:
        if "-" in name or not name.isidentifier():
            raise ValueError(f"{name!r}: give vLLM's arguments as in Python, with underscores ({_plain(name)}).")
        if name in reserved:
            raise ValueError(f"{name} cannot be set here: {reserved[name]}. Take it out.")
    return value


def require_known(arguments: dict[str, Any]) -> None:
    """Raise UserError if the installed vLLM lacks one of the arguments."""
    known = _installed_arguments()
    if known and (unknown := [name for name in arguments if name not in known]):
        raise UserError(
            f"engine_args.{unknown[0]}: the installed vLLM has no engine argument of this name."
            f"{did_you_mean(unknown[0], known)} `python -m vllm.entrypoints.openai.api_server --help` lists them."
        )


@functools.cache
def _installed_arguments() -> tuple[str, ...]:
    """The fields of vLLM's EngineArgs, parsed from its source, because an import takes seconds; empty if not found."""
    found = importlib.util.find_spec("vllm")
    source = Path(found.origin).parent / "engine" / "arg_utils.py" if found and found.origin else Path()
    if not source.is_file():
        return ()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            fields = [field.target for field in node.body if isinstance(field, ast.AnnAssign)]
            return tuple(target.id for target in fields if isinstance(target, ast.Name))
    return ()


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
