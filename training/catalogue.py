"""The algorithms that can be named in a configuration: read without running them, checked, and loaded.

Only `load` imports an algorithm, which needs torch; the rest runs in the driver too.
"""

import ast
import difflib
import functools
import importlib
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracts import other_names
from contracts.callables import load_module, source_file, source_files
from contracts.errors import UserError

Value = bool | int | float | str | None

FOLDER = Path(__file__).parent / "algorithms"
BUILT_IN = tuple(sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "parts")))
NEEDS_OF = {
    "pairs": ("reference", "reference_model", "tokens", "entropy", "collision"),
    "samples": ("reference", "reference_model", "values", "greedy", "token_rewards"),
}
FUNCTIONS = ("loss", "statistics", "update", "advantages")
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
LIMIT = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str, "None": type(None)}


@dataclass(frozen=True)
class Setting:
    """One keyword argument of an algorithm's functions."""

    default: Value
    kinds: tuple[str, ...] = ()
    """Which of bool, int, float, str and None a value may be; empty where the source does not say so simply."""
    choices: tuple[Value, ...] = ()
    """The values of a `Literal`."""
    limits: str = ""
    """What a number must be, as LIMITS has it: `> 0, <= 1`; empty: anything finite."""

    def within_limits(self, value: Value) -> bool:
        """Whether a value of the right kind makes sense; what is no number always does."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        limits = self.limits.split(",") if self.limits else []
        return all(COMPARISONS[sign](value, number) for sign, number in map(_limit, limits))


@dataclass(frozen=True)
class Description:
    """What an algorithm's source says about it."""

    algorithm: str
    """As it is named in the configuration."""
    reads: str
    """`pairs` or `samples`."""
    needs: tuple[str, ...]
    settings: dict[str, Setting]
    functions: dict[str, tuple[str, ...]]
    """The settings that each of `loss`, `statistics`, `update` and `advantages` takes, for those that exist."""
    sources: dict[str, Path]
    """The files that define it: its own, and the user's own modules that it imports."""
    state: dict[str, float]
    """What `update` keeps from one optimizer step to the next, with its first values."""
    compares_answers: bool = False
    """Whether it looks at which responses answer the same prompt, of which there must then be several."""
    penalises_divergence: bool = True
    """Whether its `advantages` has a KL penalty in the reward; of the user's own, only a run can tell."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""
        return "reference" in self.needs or "reference_model" in self.needs

    @property
    def defaults(self) -> dict[str, Value]:
        """Every setting's default."""
        return {name: setting.default for name, setting in self.settings.items()}

    def arguments(self, function: str, settings: Mapping[str, Value]) -> dict[str, Value]:
        """Those of `settings` that `function` takes."""
        return {name: settings[name] for name in self.functions[function]}


def describe(algorithm: str) -> Description:
    """Read an algorithm's source: `dpo`, `path/to/mine.py` or `package.mine`.

    Raises:
        UserError: there is no such algorithm, or its source does not say what `training/algorithm.py` asks for.
    """
    source = _Source(algorithm, _file(algorithm))
    reads = source.constant("READS")
    if reads not in NEEDS_OF:
        raise UserError(f'{source.what}: READS is {reads!r}; write READS = "pairs" or READS = "samples".')
    needs = source.constant("NEEDS")
    if isinstance(needs, str):
        raise UserError(f'{source.what}: NEEDS is {needs!r}; write a tuple with a comma: NEEDS = ("{needs}",).')
    if not isinstance(needs, tuple | list):
        raise UserError(f"{source.what}: NEEDS is {needs!r}; write a tuple of names, perhaps empty: NEEDS = ().")
    for need in needs:
        if need not in NEEDS_OF[reads]:
            raise UserError(
                f"{source.what}: NEEDS has {need!r}, but an algorithm that reads {reads} can only need "
                f"{', '.join(NEEDS_OF[reads])}."
            )
    found = {name: source.function(name) for name in FUNCTIONS}
    for name, required in (("loss", True), ("advantages", reads == "samples")):
        if required and found[name] is None:
            raise UserError(
                f"{source.what}: there is no function {name!r}, which an algorithm that reads {reads} needs."
            )
    if reads == "pairs" and found["advantages"]:
        raise UserError(f"{source.what}: only an algorithm with READS = \"samples\" has a function 'advantages'.")
    settings: dict[str, Setting] = {}
    functions: dict[str, tuple[str, ...]] = {}
    limits: dict[str, str] = {}
    for name, function in found.items():
        if function is None:
            continue
        own = dict(_settings(f"{source.what}: function {name!r}", function.node))
        functions[name] = tuple(own)
        limits |= function.source.limits()
        for setting, value in own.items():
            if repr(settings.setdefault(setting, value)) != repr(value):
                raise UserError(
                    f"{source.what}: the setting {setting!r} has one default or type in the function {name!r} "
                    "and another one before; give it the same in both."
                )
    for setting in source.limits():
        if setting not in settings:
            raise UserError(
                f"{source.what}: LIMITS has {setting!r}, which is no setting.{_nearest(setting, settings)} Name a "
                "keyword argument of its functions."
            )
    for setting, text in (limits | source.limits()).items():
        if setting in settings:
            settings[setting] = replace(settings[setting], limits=text)
            if not settings[setting].within_limits(settings[setting].default):
                raise UserError(
                    f"{source.what}: the default of the setting {setting!r} is {settings[setting].default!r}, but "
                    f"LIMITS says {text!r}. Change one of them."
                )
    state = source.state()
    if state and found["update"] is None:
        raise UserError(f"{source.what}: STATE is kept by a function 'update', which there is not.")
    names = _attributes(found["advantages"])
    return Description(
        algorithm,
        reads,
        tuple(needs),
        settings,
        functions,
        _sources(source),
        state,
        compares_answers="prompts" in names | _attributes(found["loss"]),
        penalises_divergence="penalised_rewards" in names or algorithm not in BUILT_IN,
    )


def check_settings(description: Description, given: Mapping[str, Any]) -> dict[str, Value]:
    """All settings of an algorithm: the given ones, and the defaults of the others.

    Raises:
        UserError: there is no such setting, or a value has the wrong type, is not finite or outside of its limits.
    """
    known = description.settings
    for name in given:
        if name not in known:
            settings = f"Its settings: {', '.join(sorted(known))}." if known else "It has no settings."
            raise UserError(
                f"algorithm {description.algorithm!r} has no setting {name!r}.{_elsewhere(str(name), known)} {settings}"
            )
    return description.defaults | {name: _checked(description, name, value) for name, value in given.items()}


def load(algorithm: str) -> Any:
    """Import the algorithm's module.

    Raises:
        UserError: it cannot be imported.
    """
    if algorithm in BUILT_IN:
        return importlib.import_module(f"training.algorithms.{algorithm}")
    return load_module(algorithm, f"algorithm {algorithm!r}")


def _file(algorithm: str) -> Path:
    if algorithm in BUILT_IN:
        return FOLDER / f"{algorithm}.py"
    if algorithm.endswith(".py"):
        if not Path(algorithm).is_file():
            raise UserError(f"algorithm {algorithm!r}: there is no such file. Check the path.")
        return Path(algorithm)
    if "." in algorithm and "/" not in algorithm:
        return source_file(f"{algorithm}:loss")
    here = f" Did you mean your file '{algorithm}.py'?" if Path(f"{algorithm}.py").is_file() else ""
    raise UserError(
        f"there is no algorithm {algorithm!r}.{here or _nearest(algorithm, BUILT_IN)} "
        f"Built in: {', '.join(BUILT_IN)}; or name your own file (path/to/mine.py) or module (package.mine)."
    )


def _sources(source: "_Source") -> dict[str, Path]:
    """The files that define an algorithm. What it imports of Ratchet itself is known by the stages' code versions."""
    others = {} if source.algorithm in BUILT_IN else source_files(f"{source.algorithm}:loss")
    return {"algorithm": source.file} | {name: file for name, file in others.items() if name != "function"}


@functools.lru_cache(maxsize=256)
def _parsed(file: Path, version: tuple[int, ...]) -> ast.Module:
    """A file as it is at a version of its content."""
    return ast.parse(file.read_bytes(), str(file))


@dataclass(frozen=True)
class _Function:
    node: ast.FunctionDef
    source: "_Source"
    """Where it is defined."""


def _attributes(function: _Function | None) -> set[str]:
    """The names of all attributes that a function looks at."""
    nodes = [] if function is None else ast.walk(function.node)
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


class _Source:
    """The top level of one source file."""

    def __init__(self, algorithm: str, file: Path):
        self.algorithm, self.file = algorithm, file
        self.what = f"algorithm {algorithm!r} ({file})"
        status = file.stat()
        version = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        try:
            self.body = _parsed(file, version).body
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{self.what} is not valid Python: {error}.") from error

    def constant(self, name: str, default: Any = ...) -> Any:
        """The value of a constant that is written out."""
        for node in reversed(self.body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _names(*targets) == [name]:
                try:
                    return ast.literal_eval(node.value)
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"{self.what}: {name} is read without running the file; write its value out, not "
                        f"{ast.unparse(node.value)}."
                    ) from error
        if default is not ...:
            return default
        example = '"pairs" or READS = "samples"' if name == "READS" else '("reference",), or NEEDS = ()'
        raise UserError(f"{self.what}: {name} is missing; write {name} = {example} at the top level.")

    def limits(self) -> dict[str, str]:
        """LIMITS."""
        found = self.constant("LIMITS", {})
        example = 'LIMITS = {"beta": "> 0", "gamma": ">= 0, <= 1"}'
        if not isinstance(found, dict):
            raise UserError(f"{self.what}: LIMITS is {found!r}; write {example}.")
        for setting, text in found.items():
            if not isinstance(text, str) or not all(map(LIMIT.fullmatch, text.split(","))):
                raise UserError(f"{self.what}: LIMITS says {text!r} of {setting!r}; write comparisons: {example}.")
        return found

    def state(self) -> dict[str, float]:
        """STATE."""
        found = self.constant("STATE", {})
        if not isinstance(found, dict) or any(
            type(value) not in (int, float) or not math.isfinite(value) for value in found.values()
        ):
            raise UserError(f'{self.what}: STATE is {found!r}; write numbers by name: STATE = {{"mean": 0.0}}.')
        return {str(name): float(value) for name, value in found.items()}

    def function(self, name: str) -> _Function | None:
        """A function that the file defines, or imports by `from module import name`."""
        for node in reversed(self.body):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return _Function(node, self)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._imported(node).function(alias.name)
                        if found is None:
                            raise UserError(f"{self.what}: {ast.unparse(node)!r} imports no function {alias.name!r}.")
                        return found
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if name in _names(*targets) or name == getattr(node, "name", None):
                raise UserError(
                    f"{self.what}: {name!r} is read without running the file; define it by 'def {name}', or import it "
                    f"by 'from module import {name}'."
                )
        return None

    def _imported(self, node: ast.ImportFrom) -> "_Source":
        module = node.module or ""
        if node.level:
            file = self.file.parents[node.level - 1].joinpath(*module.split(".")).with_suffix(".py")
        elif module.startswith("training.algorithms."):
            file = FOLDER / f"{module.rpartition('.')[2]}.py"
        else:
            file = Path.cwd().joinpath(*module.split(".")).with_suffix(".py")
        if not file.is_file():
            raise UserError(
                f"{self.what}: {ast.unparse(node)!r} is followed without running it, and {file} does not exist. "
                "Import from training.algorithms or from your own modules in the working directory."
            )
        return _Source(str(file), file)


def _names(*targets: ast.expr | None) -> list[str]:
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _settings(what: str, node: ast.FunctionDef) -> Iterator[tuple[str, Setting]]:
    arguments = node.args
    if len(arguments.posonlyargs + arguments.args) != 1 or arguments.vararg or arguments.kwarg:
        raise UserError(
            f"{what} must take one argument and then settings by keyword: "
            f"def {node.name}(batch, *, beta: float = 0.1); found ({ast.unparse(arguments)})."
        )
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is None:
            raise UserError(f"{what}: the setting {argument.arg!r} has no default; give it one.")
        try:
            value = ast.literal_eval(default)
        except (TypeError, ValueError):
            value = ...
        if not isinstance(value, bool | int | float | str | None):
            raise UserError(
                f"{what}: the default of the setting {argument.arg!r} is read without running the file; write a "
                f"number, a text, True, False or None, not {ast.unparse(default)}."
            )
        kinds, choices = _annotation(argument.annotation, value)
        setting = Setting(value, kinds, choices)
        if not _fits(setting, value):
            raise UserError(
                f"{what}: the default of the setting {argument.arg!r} is {value!r}, not {_expected(setting)}."
            )
        yield argument.arg, setting


def _annotation(node: ast.expr | None, default: Value) -> tuple[tuple[str, ...], tuple[Value, ...]]:
    """Kinds and choices of a setting; nothing where the annotation is none of the simple ones."""
    if node is None:
        # A default of 1 does not say that 0.5 is wrong.
        kind = "float" if type(default) is int else type(default).__name__
        return ((), ()) if default is None else ((kind,), ())
    kinds: list[str] = []
    choices: list[Value] = []
    todo = [node]
    while todo:
        part = todo.pop(0)
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr):
            todo = [part.left, part.right, *todo]
        elif isinstance(part, ast.Subscript) and ast.unparse(part.value) in ("Literal", "typing.Literal"):
            values = part.slice.elts if isinstance(part.slice, ast.Tuple) else [part.slice]
            choices += [value.value for value in values if isinstance(value, ast.Constant)]  # type: ignore[misc]
        elif ast.unparse(part) in KINDS:
            kinds.append(ast.unparse(part))
        else:
            return (), ()
    return tuple(kinds), tuple(choices)


def _fits(setting: Setting, value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if not setting.kinds and not setting.choices:
        return isinstance(value, bool | int | float | str | None)
    kinds = {KINDS[kind] for kind in setting.kinds}
    return type(value) in kinds or (type(value) is int and float in kinds) or repr(value) in map(repr, setting.choices)


def _expected(setting: Setting) -> str:
    words = {
        "bool": "true or false",
        "int": "a whole number",
        "float": "a finite number",
        "str": "a text",
        "None": "null",
    }
    kinds = [words[kind] for kind in setting.kinds] + [repr(choice) for choice in setting.choices]
    return " or ".join(kinds or ["a finite number, a text, true, false or null"])


def _checked(description: Description, name: str, value: Any) -> Value:
    setting = description.settings[name]
    if not _fits(setting, value):
        raise UserError(
            f"algorithm {description.algorithm!r}: the setting {name!r} is {value!r}, but must be {_expected(setting)} "
            f"(its default is {setting.default!r})."
        )
    if not setting.within_limits(value):
        raise UserError(
            f"algorithm {description.algorithm!r}: the setting {name!r} is {value!r}, but must be {setting.limits} "
            f"(its default is {setting.default!r})."
        )
    return float(value) if type(value) is int and "int" not in setting.kinds and "float" in setting.kinds else value


def _elsewhere(name: str, known: Any) -> str:
    """What other tools' name of a setting is called here, or the setting that is spelled most like it."""
    if (nearest := _nearest(name, known)) or (entry := other_names.find(name)) is None:
        return nearest
    if not entry.ours:
        return f" Ratchet has no such key. {entry.note}"
    ours = entry.ours.removeprefix("training.settings.")
    where = f" Ratchet has {ours!r} for it" + (", which this algorithm does not have." if ours != entry.ours else ".")
    return f" Did you mean {ours!r}?" if ours in known else f"{where} {entry.note}".rstrip()


def _limit(text: str) -> tuple[str, float]:
    """Sign and number of a comparison such as `> 0`."""
    found = LIMIT.fullmatch(text)
    assert found is not None
    return found[1], float(found[2])


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
