"""Stage configs: every field is declared *identity*, *input* or *runtime*, and unknown keys are errors.

identity  changes what is computed: part of the stage key.
input     a path to an artifact or a model: its content's digest, not its name, is part of the stage key.
runtime   where and how fast: devices, batch shapes that do not change results, output paths. Not in the key.
"""

import argparse
import ast
import difflib
import inspect
import itertools
import json
import reprlib
import textwrap
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from contracts import other_names, yaml_text
from contracts.errors import UserError
from contracts.nested import leaves
from contracts.secrets import refuse_secrets

M = TypeVar("M", bound=BaseModel)


class Role(StrEnum):
    """What a config field means for the stage key."""

    IDENTITY = "identity"
    INPUT = "input"
    RUNTIME = "runtime"


def identity(default: Any = ..., *, later: bool = False, was: str = "", **constraints: Any) -> Any:
    """A field that changes what is computed.

    Args:
        later: added after stage keys were published; left out of the key while it has its default, which must compute
            what was computed before.
        was: former names of the key in the same section, separated by blanks; a config that uses one is refused with
            the new name.
    """
    extra: dict[str, Any] = {"role": Role.IDENTITY, "later": later, "was": was}
    return Field(default, json_schema_extra=extra, validate_default=True, **constraints)


def input_path(default: Any = ..., *, was: str = "", **constraints: Any) -> Any:
    """A field that holds the path(s) of artifacts or models: `Path`, `list[Path]`, `dict[str, Path]` or None."""
    return Field(default, json_schema_extra={"role": Role.INPUT, "was": was}, **constraints)


def runtime(default: Any = ..., *, was: str = "", **constraints: Any) -> Any:
    """A field that changes where or how fast, but not what is computed."""
    extra: dict[str, Any] = {"role": Role.RUNTIME, "was": was}
    return Field(default, json_schema_extra=extra, validate_default=True, **constraints)


def _declared(field: FieldInfo) -> dict[str, Any]:
    """The arguments of `identity`, `input_path` or `runtime`."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


class Section(BaseModel):
    """Base of every configuration model. A subclass with an unclassified field cannot be defined."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )

    roles: ClassVar[dict[str, Role]] = {}
    """Role of each field."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that has an unclassified field."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if "role" not in _declared(field):
                raise TypeError(f"{cls.__name__}.{name} must be declared with identity(), input_path() or runtime()")
        cls.roles = {name: _declared(field)["role"] for name, field in cls.model_fields.items()}

    def select(self, role: Role) -> dict[str, Any]:
        """The fields of one role as plain data, nested sections included."""
        chosen: dict[str, Any] = {}
        for name, declared in self.roles.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                if nested := value.select(role):
                    chosen[name] = nested
            elif declared is role and not self._is_left_out(name, value):
                chosen[name] = _plain(value, role)
        return chosen

    def _is_left_out(self, name: str, value: Any) -> bool:
        """Whether a `later` field has its default."""
        field = type(self).model_fields[name]
        return bool(_declared(field).get("later") and value == field.default)


def _plain(value: Any, role: Role) -> Any:
    if isinstance(value, Section):
        return value.select(role)
    if isinstance(value, dict):
        return {str(key): _plain(item, role) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, role) for item in value]
    return str(value) if isinstance(value, Path) else value


class StageConfig(Section):
    """Base of every stage's config.

    `stage` is the stage's name; raise `code_version` whenever the stage's results change.
    """

    stage: ClassVar[str]
    code_version: ClassVar[int]

    output: Path = runtime()
    """Directory to publish; must not exist yet, or hold what this very configuration makes."""

    def input_paths(self) -> list[Path]:
        """All inputs."""
        return [Path(path) for path in leaves(self.select(Role.INPUT)) if path is not None]

    def source_files(self) -> dict[str, Path]:
        """Files of the user's own code that this stage runs; their content enters the stage key."""
        return {}


def describe(model: type[BaseModel]) -> str:
    """A configuration's first line and its keys with their meaning and default, required ones first, for --help."""
    lines = [(model.__doc__ or model.__name__).strip().splitlines()[0]]  # `python -OO` drops docstrings
    meanings = docstrings(model)
    for key, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        default = field.get_default(call_default_factory=True)
        shown = "" if isinstance(default, BaseModel) or default == {} else f" (default {default})"
        meaning = " ".join(meanings.get(key, "").split())
        lines.append(f"  {key:<22} {meaning}{' (required)' if field.is_required() else shown}")
    return "\n".join(lines)


def docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a config or record, from the source: read when it is to be shown, since every
    process defines configs."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in ("builtins", "msgspec", "pydantic"):
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            for field, text in itertools.pairwise(body.body):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                        found[name] = said
    return found


class Parser(argparse.ArgumentParser):
    """A command line whose --help ends with the text that `keys` returns, which is made only for that."""

    keys: Callable[[], str] | None = None

    def format_help(self) -> str:
        """The help text."""
        self.epilog = self.keys() if self.keys else None
        return super().format_help()


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, or a UserError that names file and line."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"config file {path} is no regular file; name a YAML file.")
    try:
        if (size := path.stat().st_size) > yaml_text.MOST_BYTES:
            raise UserError(f"config file {path} has {size} bytes, which no configuration has. Name a YAML file.")
        data = yaml_text.load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist.") from error
    except IsADirectoryError as error:
        raise UserError(f"config file {path} is a directory; name the YAML file in it.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text: {error.reason}. Save it as UTF-8.") from error
    except yaml_text.YamlError as error:
        where = f", line {error.line}" if error.line else ""
        raise UserError(f"{path}{where}: not valid YAML: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `key: value` lines, found a {type(data).__name__}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set `a.b=value` items (values in YAML) in a nested mapping, which is copied."""
    data = json.loads(json.dumps(data, default=str))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"cannot read the override {item!r}: write key=value, for example training.beta=0.2.")
        try:
            value = yaml_text.load(text)
        except yaml_text.YamlError as error:
            raise UserError(f"the value of {key!r} is not valid YAML: {reprlib.repr(text)}: {error}.") from error
        target = data
        *parents, last = key.split(".")
        for parent in parents:
            child = target.get(parent)
            if child is None:
                child = target[parent] = {}
            if not isinstance(child, dict):
                raise UserError(f"cannot set {key!r}: {parent!r} is the value {child!r}, not a section.")
            target = child
        target[last] = value
    return data


def validate(model: type[M], data: dict[str, Any], source: str) -> M:
    """Build `model` from `data`, or raise one UserError that lists every mistake with its place and its fix."""
    refuse_secrets(data, source)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        raise UserError(f"{source}: " + "\n  ".join(dict.fromkeys(problems))) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, last = problem["loc"]
        known = fields_at(model, parents)
        if now := next(
            (name for name, field in known.items() if last in _declared(field).get("was", "").split()), None
        ):
            return f"unknown key {place!r}: it is called {'.'.join([*map(str, parents), now])!r} now."
        if hints := _elsewhere(model, list(map(str, parents)), str(last), problem["input"]):
            return f"unknown key {place!r}. {' '.join(hints)}"
        nearest = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f" Did you mean {'.'.join([*map(str, parents), nearest[0]])!r}?" if nearest else ""
        return f"unknown key {place!r}.{hint} Known keys: {', '.join(sorted(known))}."
    if problem["type"] == "missing":
        return f"{place!r} is required but not set."
    message = problem["msg"].removeprefix("Value error, ")
    shown = f"{place!r} is {reprlib.repr(problem['input'])}: "
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # a section's own check names its keys
        shown = f"{place}: " if place else ""
    return f"{shown}{message}" + ("" if message.endswith(".") else ".")


def _elsewhere(model: type[BaseModel], parents: list[str], last: str, value: Any) -> list[str]:
    """Hints for a key of another tool: the name that Ratchet has for it; empty if the key is unknown there too."""
    here = fields_at(model, parents)
    if difflib.get_close_matches(last, here, n=1, cutoff=0.85):
        return []
    hints: dict[str, None] = {}
    for name in itertools.islice(other_names.flat(last, value), 20):
        if (entry := other_names.find(name)) is None:
            continue
        said = "" if name == last else f"{name!r}: "
        if entry.ours:
            # The section of the run's config that a key is in, or another section that has the key too.
            path = entry.ours.split(".")
            for start in range(len(path)):
                if path[start] in here and path[start] != last:
                    path = [*parents, *path[start:]]
                    break
            said += f"Ratchet has {'.'.join(path)!r} for it."
        else:
            said += "Ratchet has no such key."
        names_file = isinstance(value, str) and value.endswith((".json", ".yaml", ".yml"))
        note = entry.note.replace("FILE", value) if names_file else entry.note
        hints[f"{said} {note}".strip()] = None
    return list(hints)[:5]


def fields_at(model: type[BaseModel], location: list[Any]) -> dict[str, FieldInfo]:
    """The fields of the section at `location`, looking into unions, lists and dictionaries."""
    candidates: list[Any] = [model]
    for part in location:
        found: list[Any] = []
        for candidate in candidates:
            for section in _models_in(candidate):
                if part in section.model_fields:
                    found.append(section.model_fields[part].annotation)
                else:  # a list index, a dictionary key or the tag of a union
                    found.append(section)
        candidates = found
    sections = [section for candidate in candidates for section in _models_in(candidate)]
    return {name: field for section in sections for name, field in section.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _models_in(argument)]
