"""Finds the row that a prompt was imported from, so that messages can name its file and line."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from annotation.data.rlhflow import RlhflowFile
from contracts.artifacts import Artifact
from contracts.attempt import beat
from contracts.importing import PromptReader
from contracts.manifest import MANIFEST
from contracts.nested import leaves
from contracts.prompts import PromptsConfig, prompt_id
from contracts.records import PROMPTS, ROLLOUTS
from contracts.sources import HUB, read_rows

SECONDS = 5.0
"""Time limit for searching the sources, so that the error message is not delayed."""


def source_place(rollouts: Artifact, identity: str) -> str | None:
    """Where a prompt is in the user's own data, for example "questions.jsonl, line 7".

    None if it is not known: for data on the Hub, and for sources that were moved or take too long to read.
    """
    deadline = time.monotonic() + SECONDS
    with contextlib.suppress(Exception):  # the original error must be reported in any case
        for artifact in _with_inputs(rollouts):
            reader = READERS.get(artifact.manifest.stage)
            if reader is None or "source" not in artifact.manifest.input_paths:
                continue
            for place, found in reader(artifact):
                if found == identity:
                    return place
                if time.monotonic() > deadline:
                    return None
                beat()
    return None


def _with_inputs(artifact: Artifact) -> Iterator[Artifact]:
    """An artifact, and the prompts and rollouts artifacts that it was made from, nearest first."""
    found = {artifact.path: artifact}
    for each in (todo := [artifact]):
        yield each
        for path in {Path(str(leaf)) for leaf in leaves(each.manifest.input_paths)} - found.keys():
            if (path / MANIFEST).is_file() and (made := Artifact.open(path)).manifest.schema in (PROMPTS, ROLLOUTS):
                found[path] = made
                todo.append(made)


def _imported(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Place and prompt id of each row of an import of prompts."""
    source = str(artifact.manifest.input_paths["source"])
    if source.startswith(HUB):
        return
    settings = artifact.manifest.key_parts["config"]
    config = PromptsConfig(**{**settings, "source": Path(source), "output": artifact.path})
    reader = PromptReader(config)
    for place, row in read_rows(source, config.split):
        if (prompt := reader.read(row, place).prompt) is not None:
            yield place, prompt.prompt_id


def _imported_from_rlhflow(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """Place and prompt id of each row of an import of RLHFlow's responses."""
    settings = artifact.manifest.key_parts["config"]
    file = RlhflowFile(Path(artifact.manifest.input_paths["source"]), settings.get("answer_column"))
    for place, row in file.rows():
        yield place, prompt_id(row.prompt, row.tools)


READERS: Mapping[str, Callable[[Artifact], Iterator[tuple[str, str]]]] = {
    "prompts": _imported,
    "rlhflow-import": _imported_from_rlhflow,
}
"""Functions that read the rows of an import's source again, by stage."""
