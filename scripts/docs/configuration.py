"""Generates the configuration reference from the config classes."""

import json
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from contracts.config import Section, docstrings
from contracts.declaration import stages_of
from pipelines.config.cluster import MachinesSection
from pipelines.config.run import RunConfig

PACKAGES = ("contracts", "generation", "annotation", "training", "embedded")
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TYPE_NAMES = {
    str: "text",
    int: "int",
    float: "float",
    bool: "true or false",
    type(None): "null",
    Path: "path",
    Any: "any",
}
BEGIN = """\
# Configuration

A run is one YAML file; every key can also be set in the command, as `key=value` with dots between sections:
`pipeline run quickstart training.learning_rate=1e-4`. A mistyped key is an error that names the nearest one.
A `~` at the beginning of a path is your home directory.
For the keys of other tools see [Coming from TRL, OpenRLHF or verl](../coming-from-trl.md).

The role of a key says how a change affects published artifacts ([stage keys](../concepts.md#stage-keys)):

| role | a change |
|---|---|
| identity | changes the result: the affected stages run again |
| input | changes a path: the stages run again if the content differs |
| runtime | changes where or how fast stages run: published artifacts are still reused |

The sections of a run come first, each documented once; after them the additional keys of single stages.

"""

MACHINES = "The file of `pipeline plan simulate --cluster FILE` ([Simulation](../simulation.md)).\n"


def page() -> str:
    """The text of the page."""
    places = section_paths(RunConfig)
    titles = {model: title_of(model, places[model]) for model in places}
    several = Counter(titles.values())
    titles = {
        model: f"{title}(kind={kind_of(model)})" if several[title] > 1 else title for model, title in titles.items()
    }
    lines = [BEGIN, "## The run\n", *table(RunConfig, titles)]
    for model, paths in places.items():
        lines.append(f"## {titles[model]}\n")
        lines.append(f"{first_line(model)}\n")
        if len(paths) > 1:
            lines.append("Used in " + ", ".join(f"`{path}`" for path in paths) + ".\n")
        lines += key_tables(model, titles)
    parts = {model: f"machines.{title_of(model, paths)}" for model, paths in section_paths(MachinesSection).items()}
    lines += ["## Machines of a simulation\n", MACHINES, *table(MachinesSection, parts)]
    for model, title in parts.items():
        lines += [f"## {title}\n", f"{first_line(model)}\n", *table(model, parts)]
    lines.append("## Single stages\n")
    lines.append("Keys of a stage in addition to those of the sections above, for `python -m PACKAGE STAGE`.\n")
    for package in PACKAGES:
        stages = stages_of(package)
        for command, stage in stages.items():
            name = f"python -m {package}" + (f" {command}" if command != package else "")
            for kind, config in (stage.config.variants() or {"": stage.config}).items():
                lines += stage_section(f"{name} kind={kind}" if kind else name, config, titles)
    return "\n".join(lines)


def stage_section(name: str, config: type[Section], titles: dict[type[BaseModel], str]) -> Iterator[str]:
    """The section of a stage, with the keys that no section of the run config has."""
    yield f"### {name}\n"
    yield f"{first_line(config)}\n"
    yield from key_tables(config, titles)


def key_tables(model: type[BaseModel], titles: dict[type[BaseModel], str]) -> Iterator[str]:
    """The keys of a config class; keys inherited from a documented section become a link to it."""
    shared = next((base for base in model.__mro__[1:] if base in titles), None)
    if shared is None:
        yield from table(model, titles)
        return
    same = {key for key, field in shared.model_fields.items() if repr(model.model_fields[key]) == repr(field)}
    yield f"All keys of {link(titles[shared])}, and:\n"
    yield from table(model, titles, without=same)


def section_paths(model: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """The sections within a config class with the key paths of each, in the order of the file."""
    found: defaultdict[type[BaseModel], list[str]] = defaultdict(list)

    def walk(inside: type[BaseModel], prefix: str) -> None:
        for key, field in inside.model_fields.items():
            for section, suffix in sections_in(field.annotation):
                path = f"{prefix}{key}{suffix}"
                found[section].append(path)
                walk(section, f"{path}.")

    walk(model, "")
    return dict(found)


def sections_in(annotation: Any, suffix: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the sections that a type contains, each with the suffix that follows the key in its path."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, suffix
        return
    further = ".NAME" if get_origin(annotation) is dict else "[]" if get_origin(annotation) is list else ""
    for argument in get_args(annotation):
        yield from sections_in(argument, suffix + further)


def title_of(model: type[BaseModel], paths: list[str]) -> str:
    """The heading of a section: the first of its paths with the least depth."""
    return min(paths, key=lambda path: path.count("."))


def kind_of(model: type[BaseModel]) -> str:
    """The value of the key `kind` that selects a section among the variants of one key."""
    return str(get_args(model.model_fields["kind"].annotation)[0])


def link(title: str) -> str:
    """A link to a section's heading, with the anchor that both GitHub and the site generate."""
    anchor = "".join(sign for sign in title.lower() if sign.isalnum() or sign in "_-")
    return f"[`{title}`](#{anchor})"


def table(
    model: type[BaseModel], titles: dict[type[BaseModel], str], without: set[str] | frozenset[str] = frozenset()
) -> list[str]:
    """The table of a config class's keys, required ones first."""
    texts = docstrings(model)
    fields = {key: field for key, field in model.model_fields.items() if key not in without}
    roles = model.roles if issubclass(model, Section) else {}
    lines = ["| key | type | default | role | meaning |", "|---|---|---|---|---|"]
    for key, field in sorted(fields.items(), key=lambda item: not item[1].is_required()):
        text = " ".join(texts.get(key, "").split()).replace("|", "\\|").replace("**", "\\*\\*")
        role = str(roles[key]) if key in roles else ""
        lines.append(f"| `{key}` | {type_text(field, titles)} | {default_text(field)} | {role} | {text} |")
    return [*lines, ""]


def type_text(field: FieldInfo, titles: dict[type[BaseModel], str]) -> str:
    """The type of a field and its bounds, as Markdown."""
    signs = [
        f"{SIGNS[name]} {getattr(bound, name):g}" for bound in field.metadata for name in SIGNS if hasattr(bound, name)
    ]
    return " ".join([type_words(field.annotation, titles), ", ".join(signs)]).strip()


def type_words(kind: Any, titles: dict[type[BaseModel], str]) -> str:
    """A type, as Markdown."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in titles:
        return link(titles[kind])
    if origin is Annotated:
        return type_words(arguments[0], titles)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(argument, titles) for argument in arguments)
    if origin in (list, tuple, set):
        return f"list of {type_words(arguments[0], titles)}"
    if origin is dict:
        return f"map of {type_words(arguments[0], titles)} to {type_words(arguments[1], titles)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return TYPE_NAMES.get(kind) or getattr(kind, "__name__", str(kind))


def default_text(field: FieldInfo) -> str:
    """The default as in YAML; empty for a section, whose keys have their own defaults."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel) or default == {}:
        return ""
    if isinstance(default, str | Path):
        text = str(default)
        return f"`{text if text.strip() and text.isprintable() else json.dumps(text)}`"
    return f"`{json.dumps(default, default=str)}`"


def first_line(model: type[BaseModel]) -> str:
    """The first paragraph of a section's docstring."""
    return " ".join((model.__doc__ or "").strip().split("\n\n")[0].split())
