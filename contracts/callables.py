"""Functions of the user's own, named in a config by import path."""

import ast
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contracts.errors import UserError
from contracts.fingerprint import digest


@functools.cache
def load_callable(path: str) -> Callable[..., Any]:
    """Import `package.module:function` or `file.py:function`.

    Raises:
        UserError: the form is wrong, or the module or function does not exist.
    """
    module_name, separator, name = path.rpartition(":")
    if not separator or not module_name or not name:
        raise UserError(
            f"cannot read the function {path!r}: write package.module:function or path/to/file.py:function."
        )
    try:
        module = _load_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"function {path!r} cannot be imported: {type(error).__name__}: {error}. Check the spelling, and that what "
            "it imports is installed in the environment of the stage; or give a file: path/to/file.py:function."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"function {path!r}: {module_name} has no function {name!r}.")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"function file {path} does not exist.")
    name = f"_ratchet_user_{digest(str(path.resolve()))[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def source_file(path: str) -> Path:
    """The source file of `package.module:function` or `file.py:function`, found and checked without running it.

    Its content enters the stage key, so that an edit of the function is seen.

    Raises:
        UserError: there is no such module or file, it is no Python, or nothing in it has the function's name.
    """
    module_name = path.rpartition(":")[0]
    if module_name.endswith(".py"):
        file = Path(module_name)
    else:
        try:
            spec = importlib.util.find_spec(module_name) if module_name else None
        except ModuleNotFoundError:
            spec = None
        file = Path(spec.origin) if spec and spec.origin else Path(module_name or path)
    if not file.is_file():
        raise UserError(f"function {path!r}: no module or file {module_name or path!r} was found. Check the spelling.")
    _require_name(file, path)
    return file


def _require_name(file: Path, path: str) -> None:
    """Raise UserError unless the source can be read and defines, or imports, the function's name at its top level."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"function {path!r}: {file} is not valid Python: {error}.") from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    wanted = path.rpartition(":")[2]
    if wanted not in names and "*" not in names:
        raise UserError(f"function {path!r}: {file} has no function {wanted!r}. Check the spelling.")
