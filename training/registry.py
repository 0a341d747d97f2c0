"""Finds the algorithm that a config names, reads its declarations from the source, checks settings, and loads it.

Only `load` imports an algorithm, which needs torch; everything else also runs in the driver.
"""

import ast
import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import ConfigDict, FiniteFloat, StringConstraints, TypeAdapter, ValidationError

from contracts import other_names
from contracts.callables import load_module, source_file, source_files
from contracts.errors import UserError, did_you_mean
from training.settings import LIMIT, Setting, Value, settings_of

FOLDER = Path(__file__).parent / "algorithms"
BUILT_IN = tuple(sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "parts")))
NEEDS_OF = {
    "pairs": ("reference", "reference_model", "tokens", "entropy", "collision"),
    "samples": ("reference", "reference_model", "values", "greedy", "token_rewards"),
}
PENALTY_FUNCTIONS = {"penalised_rewards", "kl_penalties"}
"""Functions of `training/algorithms/parts.py` that put a KL penalty into the reward."""
FUNCTIONS = ("loss", "statistics", "update", "advantages")
Level: TypeAlias = Literal["token", "sequence", "geometric"]
"""The unit that an importance correction gives a weight to: see `training.config.CorrectionSection`."""
Limits = Annotated[str, StringConstraints(pattern=f"^{LIMIT}(,{LIMIT})*$")]
STRICT = ConfigDict(strict=True)
CONSTANTS: dict[str, tuple[TypeAdapter[Any], str]] = {
    "READS": (TypeAdapter(Literal["pairs", "samples"], config=STRICT), 'READS = "pairs" or READS = "samples"'),
    "NEEDS": (TypeAdapter(tuple[str, ...] | list[str], config=STRICT), 'NEEDS = ("reference",), or NEEDS = ()'),
    "LIMITS": (TypeAdapter(dict[str, Limits], config=STRICT), 'LIMITS = {"beta": "> 0", "gamma": ">= 0, <= 1"}'),
    "STATE": (TypeAdapter(dict[str, FiniteFloat], config=STRICT), 'STATE = {"mean": 0.0}'),
    "OFF_POLICY": (TypeAdapter(bool, config=STRICT), "OFF_POLICY = True"),
    "CORRECTIONS": (
        TypeAdapter(tuple[Level, ...] | list[Level], config=STRICT),
        'CORRECTIONS = ("sequence", "geometric")',
    ),
}
"""The constants that an algorithm may declare: type, and an example for messages."""


@dataclass(frozen=True)
class Description:
    """The declarations of an algorithm, as read from its source."""

    algorithm: str
    """Its name in the config."""
    reads: str
    """`pairs` or `samples`."""
    needs: tuple[str, ...]
    settings: dict[str, Setting]
    functions: dict[str, tuple[str, ...]]
    """The settings that each of `loss`, `statistics`, `update` and `advantages` takes, for those that exist."""
    sources: dict[str, Path]
    """The files that define it: its own, and the user's own modules that it imports."""
    state: dict[str, float]
    """Initial values of the state that `update` carries from one optimizer step to the next."""
    compares_answers: bool = False
    """Whether it compares the responses to a prompt, so that each prompt needs several."""
    off_policy: bool = False
    """Whether it is correct for answers of an older policy than the one that is trained."""
    corrections: tuple[str, ...] = ()
    """Levels of importance correction that make it correct for such answers, if `off_policy` is false."""
    penalises_divergence: bool = True
    """Whether its `advantages` puts a KL penalty into the reward; assumed for a user's own, as only a run can tell."""

    @property
    def needs_reference(self) -> bool:
        """Whether it compares the policy with a reference."""
        return "reference" in self.needs or "reference_model" in self.needs

    @property
    def defaults(self) -> dict[str, Value]:
        """Every setting's default."""
        return {name: setting.default for name, setting in self.settings.items()}

    def arguments(self, function: str, settings: Mapping[str, Value]) -> dict[str, Value]:
        """Select the settings that `function` takes."""
        return {name: settings[name] for name in self.functions[function]}


def describe(algorithm: str) -> Description:
    """Read the source of an algorithm: `dpo`, `path/to/mine.py` or `package.mine`.

    Raises:
        UserError: there is no such algorithm, or it does not follow `training/algorithm.py`.
    """
    return _describe_built_in(algorithm) if algorithm in BUILT_IN else _read_description(algorithm)


@functools.cache
def _describe_built_in(algorithm: str) -> Description:
    """Cached description of a built-in algorithm, whose source does not change during a run."""
    return _read_description(algorithm)


def _read_description(algorithm: str) -> Description:
    source = _Source(algorithm, _file(algorithm))
    reads, needs = source.constant("READS"), tuple(source.constant("NEEDS"))
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
        own = dict(settings_of(f"{source.what}: function {name!r}", function.node))
        functions[name] = tuple(own)
        limits |= function.source.constant("LIMITS", {})
        for setting, value in own.items():
            if repr(settings.setdefault(setting, value)) != repr(value):
                raise UserError(
                    f"{source.what}: the setting {setting!r} has another default or type in the function {name!r} "
                    "than in an earlier one; give it the same in both."
                )
    for setting in source.constant("LIMITS", {}):
        if setting not in settings:
            raise UserError(
                f"{source.what}: LIMITS has {setting!r}, which is not a setting.{did_you_mean(setting, settings)} "
                "Name a keyword argument of its functions."
            )
    for setting, text in (limits | source.constant("LIMITS", {})).items():
        if setting in settings:
            settings[setting] = replace(settings[setting], limits=text)
            default = settings[setting].default
            try:
                settings[setting].check(default)
            except ValueError as error:
                raise UserError(
                    f"{source.what}: the default of the setting {setting!r} is {default!r}, but LIMITS says {text!r}. "
                    "Change one of them."
                ) from error
    state = source.constant("STATE", {})
    if state and found["update"] is None:
        raise UserError(f"{source.what}: STATE needs a function 'update', which is missing.")
    off_policy = source.constant("OFF_POLICY", reads == "pairs")
    corrects = reads == "samples" and not off_policy
    corrections = tuple(source.constant("CORRECTIONS", get_args(Level) if corrects else ()))
    if corrections and not corrects:
        raise UserError(
            f"{source.what}: CORRECTIONS is {corrections!r}, but an importance correction is for algorithms that read "
            "samples, and not for those that learn from the samples of older policies as they are (OFF_POLICY = True). "
            "Remove CORRECTIONS, or OFF_POLICY."
        )
    names = _attributes(found["advantages"])
    return Description(
        algorithm,
        reads,
        needs,
        settings,
        functions,
        _sources(source),
        state,
        compares_answers="prompts" in names | _attributes(found["loss"]),
        off_policy=off_policy,
        corrections=corrections,
        penalises_divergence=bool(PENALTY_FUNCTIONS & names) or algorithm not in BUILT_IN,
    )


def check_settings(description: Description, given: Mapping[str, Any]) -> dict[str, Value]:
    """Validate settings, and add the defaults of the others.

    Raises:
        UserError: there is no such setting, or a value has the wrong type, is not finite or outside of its limits.
    """
    known = description.settings
    checked: dict[str, Value] = {}
    for name, value in given.items():
        if name not in known:
            settings = f"Its settings: {', '.join(sorted(known))}." if known else "It has no settings."
            raise UserError(
                f"algorithm {description.algorithm!r} has no setting {name!r}.{_hint(str(name), known)} {settings}"
            )
        try:
            checked[name] = known[name].check(value)
        except ValueError as error:
            raise UserError(
                f"algorithm {description.algorithm!r}: the setting {name!r} is {value!r}, but must be {error} "
                f"(its default is {known[name].default!r})."
            ) from error
    return description.defaults | checked


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
        f"there is no algorithm {algorithm!r}.{here or did_you_mean(algorithm, BUILT_IN)} "
        f"Built in: {', '.join(BUILT_IN)}; or name your own file (path/to/mine.py) or module (package.mine)."
    )


def _sources(source: "_Source") -> dict[str, Path]:
    """The source files of an algorithm. Imports from Ratchet itself are covered by the stages' code versions."""
    others = {} if source.algorithm in BUILT_IN else source_files(f"{source.algorithm}:loss")
    return {"algorithm": source.file} | {name: file for name, file in others.items() if name != "function"}


@functools.lru_cache(maxsize=256)
def _parsed(file: Path, version: tuple[int, ...]) -> ast.Module:
    """Parse a file; `version` is the cache key, which changes with its content."""
    return ast.parse(file.read_bytes(), str(file))


@dataclass(frozen=True)
class _Function:
    node: ast.FunctionDef
    source: "_Source"
    """The file that defines it."""


def _attributes(function: _Function | None) -> set[str]:
    """Names of all attributes that a function accesses."""
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
        """The literal value of READS, NEEDS or another constant; if it is missing, `default` unless that is `...`."""
        declared, example = CONSTANTS[name]
        for node in reversed(self.body):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _names(*targets) == [name]:
                try:
                    return declared.validate_python(ast.literal_eval(node.value))
                except ValidationError as error:
                    raise UserError(f"{self.what}: {name} is {ast.unparse(node.value)}; write {example}.") from error
                except (TypeError, ValueError) as error:
                    raise UserError(
                        f"{self.what}: {name} is read without running the file; write its value out, not "
                        f"{ast.unparse(node.value)}."
                    ) from error
        if default is not ...:
            return default
        raise UserError(f"{self.what}: {name} is missing; write {example} at the top level.")

    def function(self, name: str) -> _Function | None:
        """Find a function that the file defines, or imports by `from module import name`."""
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


def _hint(name: str, known: Any) -> str:
    """A hint for an unknown setting: Ratchet's name for another framework's setting, or the most similar name."""
    if (nearest := did_you_mean(name, known)) or (entry := other_names.find(name)) is None:
        return nearest
    if not entry.ours:
        return f" Ratchet has no such key. {entry.note}"
    ours = entry.ours.removeprefix("training.settings.")
    where = f" Ratchet has {ours!r} for it" + (", which this algorithm does not have." if ours != entry.ours else ".")
    return f" Did you mean {ours!r}?" if ours in known else f"{where} {entry.note}".rstrip()
