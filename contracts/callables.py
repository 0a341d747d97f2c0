"""Finds and loads the user's own functions, which a config names by file or by import path.

`path/to/file.py:function` always means that file; a relative path is relative to the working directory of the command.
`package.module:function` is resolved by Python: first among Ratchet's packages, then in the libraries of the
environment, the working directory, and PYTHONPATH. So a user's file never shadows a module of a library; a file with
such a name must be given by its path.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts import stopping
from contracts.attempt import supervised
from contracts.errors import UserError, as_user_error, did_you_mean, is_transient
from contracts.fingerprint import digest

OWN_PACKAGES = (
    "annotation",
    "contracts",
    "embedded",
    "generation",
    "modeling",
    "pipelines",
    "reallocation",
    "tracking",
    "training",
)
"""Ratchet's packages, which the user's modules never shadow."""


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
    function = getattr(load_module(module_name, f"function {path!r}"), name, None)
    if not callable(function):
        raise UserError(f"function {path!r}: {module_name} has no function {name!r}.")
    return function  # type: ignore[no-any-return]


def load_module(name: str, what: str) -> Any:
    """Import `package.module` or `path/to/file.py`; messages call it `what`.

    The module can itself import modules from the working directory and from the directory of the file. Installed
    libraries come first, so that a file cannot shadow one of their modules.

    Raises:
        UserError: it does not exist, or its import fails.
    """
    sys.path += [str(folder) for folder in _folders(name) if str(folder) not in sys.path]
    try:
        return _load_file(Path(name), what) if name.endswith(".py") else importlib.import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{what} cannot be imported: {type(error).__name__}: {error}. Check the spelling, and that what it imports "
            "is installed in the environment of the stage; or give a file by its path."
        ) from error


def _load_file(path: Path, what: str) -> Any:
    if not path.is_file():
        raise UserError(f"{what}: the file {path} does not exist.")
    name = f"_ratchet_user_{digest(str(path.resolve()))[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def as_user_mistake(what: str) -> Iterator[None]:
    """Report exceptions of a user's function that is called inside as the user's mistake, with file and line.

    Transient failures and stop requests are raised unchanged. The traceback is printed to the log of a supervised
    stage, but not to a terminal.

    Args:
        what: the beginning of the message.

    Raises:
        UserError: the function failed.
    """
    try:
        yield
    except stopping.Stopped:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, Exception) and (is_transient(error) or as_user_error(error)):
            raise
        text = f"{what}: {type(error).__name__}: {error}{place_of(error)}."
        if supervised():
            traceback.print_exc()
            text += " The log has its traceback."
        raise UserError(text) from error


def place_of(error: BaseException) -> str:
    """The origin of an error as " (FILE, line N)": the innermost line in the user's own code, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_installed(frame.filename)]
    return "".join(f" ({frame.filename}, line {frame.lineno})" for frame in (own or frames)[-1:])


def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python, a library or Ratchet."""
    return file.startswith(("<", *_installed_folders()))


@functools.cache
def _installed_folders() -> tuple[str, ...]:
    here = Path(__file__).resolve().parents[1]
    found = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(sorted(f"{folder}/" for folder in {*found, *(str(here / name) for name in OWN_PACKAGES)}))


def source_file(path: str) -> Path:
    """Find the source file of `package.module:function` or `file.py:function`, and check it without running it.

    Its content enters the stage key, so that an edit of the function is noticed.

    Raises:
        UserError: the module or file does not exist, is not valid Python, or does not define the function's name.
    """
    module_name, _, name = path.rpartition(":")
    if not module_name and name.endswith(".py"):
        raise UserError(f"cannot read the function {path!r}: write path/to/file.py:function, so {path}:NAME.")
    named = Path(module_name) if module_name.endswith(".py") else _module_file(module_name)
    file = named or Path(module_name or path)
    if not file.is_file():
        raise UserError(
            f"function {path!r}: no module or file {module_name or path!r} was found. {_advice(module_name, name)}"
        )
    names = _outline_of(file, path).names
    if name not in names and "*" not in names:
        advice = f"{_advice(module_name, name)}{did_you_mean(name, names)}"
        raise UserError(f"function {path!r}: {file} has no function {name!r}. {advice}")
    return file


def _module_file(name: str) -> Path | None:
    """The source file of a module, as a stage would find it with the working directory on its path."""
    if not name:
        return None
    try:
        if importlib.util.find_spec(name.partition(".")[0]) is None and _file_here(name).is_file():
            return _file_here(name)
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _file_here(module: str) -> Path:
    return Path(*module.split(".")).with_suffix(".py")


def _advice(module: str, name: str) -> str:
    if not module or module.endswith(".py") or not (here := _file_here(module)).is_file():
        return "Check the spelling."
    return f"Check the spelling; or, if your own {here} is meant, whose name a library has too, write {here}:{name}."


def source_files(path: str) -> dict[str, Path]:
    """Find the source files of `package.module:function` or `file.py:function`, and of the user's modules it imports.

    The user's modules are those in the working directory, which is the same for driver and stages, and those in the
    directory of the file. Libraries enter the stage key by their versions, Ratchet's packages by `code_version`.

    Raises:
        UserError: as in `source_file`.
    """
    found = {"function": source_file(path)}
    todo = list(found.values())
    folders = _folders(path.rpartition(":")[0])
    known = {file.resolve() for file in todo}
    while todo:
        file = todo.pop()
        for name, imported in _own_imports(file, _outline_of(file, path), folders):
            if imported.resolve() not in known:
                known.add(imported.resolve())
                found[name] = imported
                todo.append(imported)
    return found


@dataclass(frozen=True)
class _Outline:
    """The names and imports of a source file."""

    names: frozenset[str]
    """All names that it defines or imports, in any scope."""
    imports: tuple[tuple[int, tuple[str, ...]], ...]
    """For each import, its level (number of leading dots; 0 if absolute) and the modules that it may refer to."""


def _folders(module: str) -> list[Path]:
    """The directories of the user's own modules: the working directory, and the directory of a named file."""
    parent = [Path(module).absolute().parent] if module.endswith(".py") else []
    return list(dict.fromkeys([Path.cwd(), *parent]))


def _own_imports(file: Path, outline: _Outline, folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield name and file of each of the user's own modules that a source file imports, in any scope."""
    for level, imports in outline.imports:
        starts = [file.absolute().parents[level - 1]] if level else folders
        for name in dict.fromkeys(part for imported in imports for part in _with_parents(imported)):
            if name.partition(".")[0] not in OWN_PACKAGES:
                yield from _first_module(name, starts)


def _with_parents(name: str) -> list[str]:
    """A module with its parent packages, which are imported before it: a, a.b, a.b.c for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts)) if name]


def _first_module(name: str, folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Yield the file of a module in the first folder that has it; an empty `__init__.py` is skipped."""
    for folder in folders:
        place = folder.joinpath(*name.split("."))
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if candidate.is_file():
                if candidate.name != "__init__.py" or candidate.stat().st_size:
                    yield name, candidate
                return


def _outline_of(file: Path, path: str) -> _Outline:
    """The outline of a file, cached until the file changes.

    Raises:
        UserError: it is not valid Python.
    """
    status = file.stat()
    try:
        return _outline(file, (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"function {path!r}: {file} is not valid Python: {error}.") from error


@functools.lru_cache(maxsize=1024)
def _outline(file: Path, version: tuple[int, ...]) -> _Outline:
    names: set[str] = set()
    imports: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(file.read_bytes(), str(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
            if isinstance(node, ast.Import):
                imports.append((0, tuple(alias.name for alias in node.names)))
            else:
                module = node.module or ""
                found = (module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names))
                imports.append((node.level, found))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return _Outline(frozenset(names), tuple(imports))
