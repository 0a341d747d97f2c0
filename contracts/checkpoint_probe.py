"""What a trainer said of one sequence when it published a checkpoint: whoever loads it can be compared with that."""

from pathlib import Path

import msgspec

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST

FACT = "probe"
"""Name of the fact in the manifest of a checkpoint; like all facts it is no part of the content."""


class Probe(msgspec.Struct, frozen=True):
    """One sequence and the log-probabilities of its response, at temperature 1."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]
    dtype: str
    """Number format that the trainer computed them in."""


def probe_of(model: Path) -> Probe | None:
    """The probe of a published checkpoint; None where there is none."""
    if not (model / MANIFEST).is_file():
        return None
    found = Artifact.open(model).manifest.facts.get(FACT)
    return None if found is None else msgspec.convert(found, Probe)
