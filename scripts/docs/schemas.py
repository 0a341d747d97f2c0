"""Generates a JSON Schema for each file format from the record classes that the code reads and writes."""

import json
from typing import Any, get_args

import msgspec

from annotation.gating.decision import GateDecision
from contracts.config import docstrings
from contracts.manifest import Manifest, Released
from contracts.points import Point
from contracts.records import ExperienceRow, Pair, Prompt, Rollout, Score
from pipelines.run.events import AnyEvent

FORMATS: dict[str, Any] = {
    "prompts": Prompt,
    "rollouts": Rollout,
    "scores": Score,
    "pairs": Pair,
    "experience": ExperienceRow,
    "training-log": dict[str, float],
    "evaluation": dict[str, float | str | None],
    "gate": GateDecision,
    "manifest": Manifest,
    "released": Released,
    "events": AnyEvent,
    "metrics": Point,
}
"""The type of a line, or of the whole file."""
TITLES = {
    "prompts": "A line of a published prompt set",
    "rollouts": "A line of published rollouts",
    "scores": "A line of published scores",
    "pairs": "A line of published pairs",
    "experience": "A line of published experience",
    "training-log": "A line of a checkpoint's training-log.jsonl: one optimizer step",
    "evaluation": "evaluation.json of a published evaluation",
    "gate": "gate.json of a published decision of gates",
    "manifest": "manifest.json of everything published",
    "released": "released.json, next to the manifest of a checkpoint whose weights were deleted",
    "events": "A line of a run's events.jsonl",
    "metrics": "A line of a run's metrics.jsonl",
}


def texts() -> dict[str, str]:
    """The text of each schema by name."""
    return {name: json.dumps(schema(name), indent=1) + "\n" for name in FORMATS}


def schema(name: str) -> dict[str, Any]:
    """The schema of one file format, with a description of every field."""
    kind = FORMATS[name]
    made = msgspec.json.schema(kind)
    records = {record.__name__: record for record in record_classes(kind)}
    for title, definition in made.get("$defs", {}).items():
        for field, text in docstrings(records[title]).items() if title in records else ():
            if field in definition["properties"]:
                definition["properties"][field]["description"] = " ".join(text.split())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": TITLES[name], **made}


def record_classes(kind: Any) -> set[type]:
    """All record classes that a type contains."""
    found: set[type] = set()
    waiting = [kind]
    while waiting:
        item = waiting.pop()
        if isinstance(item, type) and issubclass(item, msgspec.Struct):
            if item not in found:
                found.add(item)
                waiting += [field.type for field in msgspec.structs.fields(item)]
        else:
            waiting += get_args(item)
    return found
