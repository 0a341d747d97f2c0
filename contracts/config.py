"""Base classes and parsing of stage configs, where every field is declared *identity*, *input* or *runtime*.

identity  changes the result: its value is part of the stage key.
input     a path to an artifact or a model: the digest of its content, not its name, is part of the stage key.
runtime   where and how fast the stage runs (devices, batch shapes that do not change results, output paths): not in
          the key.

Unknown keys are errors.
"""

import argparse
import ast
import difflib
import functools
import inspect
import itertools
import json
import os
import re
import reprlib
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from contracts import other_names, yaml_text
from contracts.errors import UserError, did_you_mean
from contracts.nested import leaves
from contracts.secrets import refuse_secrets

M = TypeVar("M", bound=BaseModel)


class Role(StrEnum):
    """The role of a config field in the stage key."""

    IDENTITY = "identity"
    INPUT = "input"
    RUNTIME = "runtime"


def identity(default: Any = ..., *, later: bool = False, was: str = "", **constraints: Any) -> Any:
    """Declare a field that changes the result.

    Args:
        later: whether the field was added after stage keys were published. It is then left out of the key while it has
            its default, which must give the same result as before.
        was: former names of the key in the same section, separated by spaces; a config that uses one is refused with a
            message that gives the new name.
    """
    extra: dict[str, Any] = {"role": Role.IDENTITY, "later": later, "was": was}
    return Field(default, json_schema_extra=extra, validate_default=True, **constraints)


def input_path(default: Any = ..., *, was: str = "", **constraints: Any) -> Any:
    """Declare a field with the paths of artifacts or models: `Path`, `list[Path]`, `dict[str, Path]` or None."""
    return Field(default, json_schema_extra={"role": Role.INPUT, "was": was}, **constraints)


def runtime(default: Any = ..., *, was: str = "", **constraints: Any) -> Any:
    """Declare a field that changes where or how fast a stage runs, but not its result."""
    extra: dict[str, Any] = {"role": Role.RUNTIME, "was": was}
    return Field(default, json_schema_extra=extra, validate_default=True, **constraints)


def _declared(field: FieldInfo) -> dict[str, Any]:
    """The arguments with which `identity`, `input_path` or `runtime` declared a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


PATTERN_DESCRIPTIONS: dict[str, str] = {}
"""Descriptions of the texts that match a pattern, by pattern."""


def described_pattern(pattern: str, words: str) -> str:
    """Register a description of a pattern, for the message to a user whose text does not match; return the pattern."""
    PATTERN_DESCRIPTIONS[pattern] = words
    return pattern


class Section(BaseModel):
    """Base of every configuration model. A subclass with an unclassified field cannot be defined."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, defer_build=True
    )

    roles: ClassVar[dict[str, Role]] = {}
    """Role of each field."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError for a class with a field that has no role."""
        super().__pydantic_init_subclass__(**kwargs)
        for name, field in cls.model_fields.items():
            if "role" not in _declared(field):
                raise TypeError(f"{cls.__name__}.{name} must be declared with identity(), input_path() or runtime()")
        cls.roles = {name: _declared(field)["role"] for name, field in cls.model_fields.items()}

    @field_validator("*")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return _expand_paths(value)

    @classmethod
    def variants(cls) -> "Mapping[str, type[Section]]":
        """For a section whose keys depend on its key `kind`: the classes for its values."""
        return {}

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


def _expand_paths(value: Any) -> Any:
    """Expand the ~ at the beginning of each path in a nested value to the user's home directory."""
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    if isinstance(value, list):
        return [_expand_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: _expand_paths(item) for key, item in value.items()}
    return value


def expand_home(text: str) -> str:
    """Expand a ~ at the beginning of a path, or of `~/file.py:function`, to the user's home directory."""
    return os.path.expanduser(text) if text.startswith("~") else text


PathText: TypeAlias = Annotated[str, AfterValidator(expand_home)]
"""The type of a text that may be the path of a directory, or of a file with a function (`file.py:function`)."""


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
    further_libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries of `contracts.versions.FURTHER` whose versions affect the stage's result."""

    output: Path = runtime()
    """Directory to publish; must not exist yet, unless it was published from this configuration."""

    def input_paths(self) -> list[Path]:
        """The paths of all inputs."""
        return [Path(path) for path in leaves(self.select(Role.INPUT)) if path is not None]

    def source_files(self) -> dict[str, Path]:
        """Files of the user's own code that this stage runs; their content enters the stage key."""
        return {}

    def server_urls(self) -> list[str]:
        """URLs of the servers that this stage sends requests to, as does its preflight."""
        return []


def describe(model: type[BaseModel]) -> str:
    """Describe a configuration for --help: its summary, and its keys with meaning and default, required ones first."""
    lines = [_summary(model)]
    meanings = docstrings(model)
    for key, field in sorted(model.model_fields.items(), key=lambda item: not item[1].is_required()):
        default = field.get_default(call_default_factory=True)
        shown = "" if isinstance(default, BaseModel) or default == {} else f" (default {default})"
        meaning = " ".join(meanings.get(key, "").split())
        lines.append(f"  {key:<22} {meaning}{' (required)' if field.is_required() else shown}")
    for kind, section in (model.variants() if issubclass(model, Section) else {}).items():
        own = describe(section).splitlines()[1:]
        lines += [f"kind={kind}: {_summary(section)}", *(f"  {line}" for line in own if line not in lines)]
    return "\n".join(lines)


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring, in one line; `python -OO` drops docstrings."""
    return " ".join((model.__doc__ or model.__name__).strip().partition("\n\n")[0].split())


FOREIGN_PACKAGES = ("builtins", "msgspec", "pydantic")
"""Packages whose classes declare no config keys."""


def docstrings(kind: type) -> dict[str, str]:
    """The docstring of each field of a config or record. They are parsed from the source only when they are shown,
    because every process defines configs."""
    bases = [base for base in reversed(kind.__mro__) if base.__module__.partition(".")[0] not in FOREIGN_PACKAGES]
    return {field: text for base in bases for field, text in _own_docstrings(base).items()}


@functools.cache
def _own_docstrings(base: type) -> dict[str, str]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(body.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(docstring))):
                found[name] = docstring
    return found


class Parser(argparse.ArgumentParser):
    """A parser whose --help ends with the text that `keys` returns; it is called for --help only."""

    keys: Callable[[], str] | None = None

    def format_help(self) -> str:
        """The help text."""
        self.epilog = self.keys() if self.keys else None
        return super().format_help()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raise UserError with file and line if that fails."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"config file {path} is not a regular file; give a YAML file.")
    try:
        if (size := path.stat().st_size) > yaml_text.MOST_BYTES:
            raise UserError(f"config file {path} has {size} bytes, too many for a configuration. Name a YAML file.")
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
    """Copy a nested mapping, and set `a.b=value` items (values in YAML) in the copy."""
    data = json.loads(json.dumps(data, default=str))
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not all(key.split(".")):
            raise UserError(f"cannot read the override {item!r}: write key=value, for example seed=2.")
        try:
            value = yaml_text.load(text)
        except yaml_text.YamlError as error:
            raise UserError(f"the value of {key!r} is not valid YAML: {reprlib.repr(text)}: {error}.") from error
        if "#" in text and (value is None or (isinstance(value, str) and text.strip().startswith(value))):
            value = text.strip()  # nobody writes a comment on the command line, so `#` belongs to the value
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
    """Build `model` from `data`; raise one UserError that lists all mistakes with their places and fixes."""
    refuse_secrets(data, source)
    chosen = variant(model, data, source)
    try:
        return chosen.model_validate(data)
    except ValidationError as error:
        problems = [_explain(chosen, problem, model) for problem in error.errors()]
        raise UserError(f"{source}: " + "\n  ".join(dict.fromkeys(problems))) from error


def variant(model: type[M], data: Mapping[str, Any], source: str) -> type[M]:
    """The class for `data`: `model`, or the one of its variants that the key `kind` selects.

    Raises:
        UserError: `kind` is missing or unknown.
    """
    variants: Any = model.variants() if issubclass(model, Section) else {}
    if variants and (kind := data.get("kind")) not in variants:
        raise UserError(f"{source}: {_no_such_kind('kind', kind, variants)}")
    return variants[data["kind"]] if variants else model  # type: ignore[no-any-return]


def _no_such_kind(place: str, kind: Any, known: Iterable[str]) -> str:
    names = sorted(known)
    if kind is None:
        return f"{place!r} is required but not set. Known: {', '.join(names)}."
    hint = did_you_mean(str(kind), names)
    return f"{place!r} is {kind!r}, which does not exist.{hint} Known: {', '.join(names)}."


def _explain(model: type[BaseModel], problem: Any, among: type[BaseModel]) -> str:
    """Explain a validation error; `among` is the class that has `model` as a variant, or `model` itself."""
    location, tag = _untagged(model, problem["loc"])
    place = ".".join(map(str, location))
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _no_such_kind(f"{place}.kind", problem["ctx"].get("tag"), _kinds(model, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, last = location
        known = fields_at(model, problem["loc"][:-1])
        kinds = _kinds(model, problem["loc"]) if tag else {}
        if model is not among and issubclass(among, Section) and not parents:
            (tag,), kinds = _tags(model), dict(among.variants())
        if others := sorted(kind for kind, section in kinds.items() if last in section.model_fields):
            return f"{place!r} is not a key of kind={tag}; it is one of kind={', '.join(others)}."
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
        return f"{place!r} is required but not set.{_meaning(model, problem['loc'], place)}"
    if problem["input"] is None and location and problem["type"] != "value_error":
        return _explain_null(model, problem, place)
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type") and location:
        message = f"it is a section; its keys are {', '.join(sorted(fields_at(model, problem['loc'])))}"
    if location[-1:] == ["[key]"]:  # an invalid key of a dict, which pydantic puts into the location as well
        place = ".".join(map(str, location[:-2]))
        is_number = problem["type"] == "int_parsing"
        shown = f"{place}: {reprlib.repr(problem['input'])} is not a {'number' if is_number else 'name'}: "
        message = "the keys here are whole numbers" if is_number else message
    else:
        shown = f"{place!r} is {reprlib.repr(problem['input'])}: "
    if problem["type"] == "string_pattern_mismatch" and (words := PATTERN_DESCRIPTIONS.get(problem["ctx"]["pattern"])):
        message = f"write {words}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # a section's own check names the keys
        shown = f"{place}: " if place else ""
    return f"{shown}{message}" + ("" if message.endswith(".") else ".")


def _meaning(model: type[BaseModel], location: Sequence[Any], place: str) -> str:
    """The advice to set a missing key, with the first sentence of its documentation; empty if it has none."""
    found: list[Any] = [model]
    for part in location[:-1]:
        found, _ = _step(found, part)
    sections = [section for each in found for section in _members(each) if _is_model(section)]
    documentation = next((text for section in sections if (text := docstrings(section).get(str(location[-1])))), "")
    first = re.split(r"[.;:]\s", " ".join(documentation.split()) + " ", maxsplit=1)[0].rstrip(" .")
    return f" Set {place}=VALUE: {first}." if first else ""


def _explain_null(model: type[BaseModel], problem: Any, place: str) -> str:
    """Explain the error for a value of null, as in `prompts.heldout=null` on the command line."""
    field = fields_at(model, problem["loc"][:-1]).get(problem["loc"][-1])
    needed = field is None or field.is_required()
    if keys := fields_at(model, problem["loc"]):
        required = [f"{place}.{name}" for name, one in keys.items() if one.is_required()]
        what = f"this section is required. Set {', '.join(required or [f'{place}.KEY'])}"
        if not needed:
            what = "it is a section. Leave it out to have its defaults" + (f", or set {place}.KEY" if keys else "")
        return f"{place!r} is null, but {what}; its keys are {', '.join(sorted(keys))}."
    if problem["type"] == "dict_type":
        what = "entries by name are required" if needed else "it holds entries by name"
        return f"{place!r} is null, but {what}. Set {place}.NAME{'' if needed else ', or leave it out'}."
    message = problem["msg"].removeprefix("Input ")
    default = None if field is None or needed else field.get_default(call_default_factory=True)
    fix = "Set it" if needed else f"Leave it out to have the default ({reprlib.repr(default)}), or set it"
    return f"{place!r} is null, but {message}. {fix}."


def _elsewhere(model: type[BaseModel], parents: list[str], last: str, value: Any) -> list[str]:
    """Hints for a key of another tool, with Ratchet's name for it; empty if no tool has such a key."""
    here = fields_at(model, parents)
    if difflib.get_close_matches(last, here, n=1, cutoff=0.85):
        return []
    hints: dict[str, None] = {}
    for name in itertools.islice(other_names.dotted_names(last, value), 20):
        if (entry := other_names.find(name)) is None:
            continue
        hint = "" if name == last else f"{name!r}: "
        if entry.ours:
            # Shorten the path of the run's config to the section that is being validated.
            path = entry.ours.split(".")
            for start in range(len(path)):
                if path[start] in here and path[start] != last:
                    path = [*parents, *path[start:]]
                    break
            hint += f"Ratchet has {'.'.join(path)!r} for it."
        else:
            hint += "Ratchet has no such key."
        names_file = isinstance(value, str) and value.endswith((".json", ".yaml", ".yml"))
        note = entry.note.replace("FILE", value) if names_file else entry.note
        hints[f"{hint} {note}".strip()] = None
    return list(hints)[:5]


def fields_at(model: type[BaseModel], location: Sequence[Any]) -> dict[str, FieldInfo]:
    """The fields of the section at `location`, inside unions, lists and dictionaries too.

    A union's tag, which pydantic puts into the location, selects the section with that tag.
    """
    found: list[Any] = [model]
    for part in location:
        found, _ = _step(found, part)
    return {name: field for section in found if _is_model(section) for name, field in section.model_fields.items()}


def _step(candidates: list[Any], part: Any) -> tuple[list[Any], bool]:
    """The types that `part` of a location leads to, and whether it is the tag of a union instead of a key."""
    inside = [annotation for candidate in candidates for annotation in _members(candidate)]
    sections = [candidate for candidate in inside if _is_model(candidate)]
    if tagged := [section for section in sections if len(sections) > 1 and part in _tags(section)]:
        return tagged, True
    found = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
    for container in inside:
        if get_origin(container) in (dict, list) and get_args(container):
            found.append(get_args(container)[-1])
    return [member for annotation in found for member in _members(annotation)], False


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of a section's field `kind`, which are its tags in a union."""
    kind = section.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None and get_origin(kind.annotation) is Literal else ()


def _untagged(model: type[BaseModel], location: Sequence[Any]) -> tuple[list[Any], str]:
    """A location without the tags of unions, as the user wrote it, and the last of these tags."""
    found: list[Any] = [model]
    written, tag = [], ""
    for part in location:
        found, is_tag = _step(found, part)
        if is_tag:
            tag = part
        else:
            written.append(part)
    return written, tag


def _kinds(model: type[BaseModel], location: Sequence[Any]) -> dict[str, type[BaseModel]]:
    """The sections of the last union on the path to `location`, by their tags."""
    found: list[Any] = [model]
    union: list[Any] = []
    for part in location:
        before = found
        found, is_tag = _step(found, part)
        union = before if is_tag else union
    sections = [section for section in union or found if _is_model(section)]
    return {tag: section for section in sections for tag in _tags(section)}
