"""Reads the probe of a checkpoint: log-probabilities that the trainer computed for one sequence when it published.

Whoever loads the checkpoint can compare its own log-probabilities with them.
"""

from pathlib import Path

import msgspec

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST

FACT = "probe"
"""Name of the fact in a checkpoint's manifest; like all facts, it is not part of the content digest."""


class Probe(msgspec.Struct, frozen=True):
    """One sequence and the log-probabilities of its response, at temperature 1."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    dtype: str
    """The dtype in which the trainer computed them."""


def probe_of(model: Path) -> Probe | None:
    """The probe of a published checkpoint, or None."""
    if not (model / MANIFEST).is_file():
        return None
    found = Artifact.open(model).manifest.facts.get(FACT)
    return None if found is None else msgspec.convert(found, Probe)
