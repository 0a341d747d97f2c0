"""Writes the file of a plan: the section `placement` with its expected times."""

import json
import math
from collections.abc import Iterable, Sequence

from contracts import yaml_text
from contracts.config import Role, validate
from contracts.fingerprint import digest
from pipelines.config.placement import ExpectationSection, ExpectedRoleSection, PlacementSection
from pipelines.config.run import RunConfig
from pipelines.graph import Node
from pipelines.planning.prediction import Basis, Prediction
from pipelines.planning.search.comparing import QUEUE_ERROR
from pipelines.planning.search.evaluation import ExpectedRun, SearchedRun
from pipelines.planning.search.finding import SearchResult

SAME_TIME = 0.001
"""Relative difference up to which the times of two iterations are written as one."""
LEAST_CERTAIN_FIRST: tuple[Basis, ...] = ("analytic", "scaled", "measured")
"""Bases of predictions, the least certain first."""


def planned_section(result: SearchResult, setting: SearchedRun, seed: int) -> PlacementSection:
    """The section of the adopted plan, with its expected times."""
    run = result.adopted
    expected = {
        "chosen": result.name,
        "seconds": _rounded(run.seconds),
        "error": _rounded(result.errors[result.name]),
        "iterations": max((node.iteration or 0 for node in setting.graph.nodes.values()), default=0),
        "lag": setting.graph.lag,
        "devices": setting.device.name,
        "seed": seed,
        "config": digest_of(setting.config),
        "plan": run.section.digest,
        "stages": {role: section.model_dump() for role, section in _by_role(run).items()},
    }
    return run.section.model_copy(update={"expected": validate(ExpectationSection, expected, "expected")})


def plan_text(section: PlacementSection, command: str) -> str:
    """The content of a plan file.

    Args:
        command: the command that found the plan.
    """
    data = section.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    lines = [f"# Written by: {command}", "# Read by: placement: FILE.yaml, or placement=FILE.yaml on a command line."]
    if any(key.startswith("[") for key in section.stages):
        lines.append("# A letter in brackets names one role alone: without them the key names all stages of a kind.")
    return "\n".join([*lines, yaml_text.dump(data)])


def digest_of(config: RunConfig) -> str:
    """Digest of the config fields that determine a run's results, without its date."""
    there = {key: value for key, value in config.select(Role.IDENTITY).items() if key != "date"}
    return digest(json.loads(json.dumps(there, default=str)))


def _by_role(run: ExpectedRun) -> dict[str, ExpectedRoleSection]:
    members: dict[str, list[Node]] = {}
    for node in sorted(run.simulation.order, key=lambda node: node.iteration or 0):
        if node.stage.uses_devices(node.config):
            members.setdefault(node.role, []).append(node)
    return {role: _role(found, run) for role, found in members.items()}


def _role(members: Sequence[Node], run: ExpectedRun) -> ExpectedRoleSection:
    """Expected times of a role as a report measures them: from the start of a stage by the driver to its end, including
    queue time and waiting for shards, without the job that finalizes it."""
    known = [run.simulation.predictions[node.name] for node in members]
    times = [run.simulation.times[node.name] for node in members]
    seconds = [_rounded(span.end - span.submitted - one.finish) for span, one in zip(times, known, strict=True)]
    while len(seconds) > 1 and abs(seconds[-1] - seconds[-2]) <= SAME_TIME * seconds[-1]:
        seconds.pop()
    return ExpectedRoleSection(
        seconds=seconds,
        first=members[0].iteration or 0,
        error=_rounded(max(map(_error, known))),
        basis=_worst(one.basis for one in known),
    )


def _error(one: Prediction) -> float:
    """The error of a stage including its queue time, as a share of both."""
    whole = one.queue + one.seconds
    return math.hypot(one.error * one.seconds, QUEUE_ERROR * one.queue) / whole if one.queue else one.error


def _worst(bases: Iterable[Basis]) -> Basis:
    return min(bases, key=LEAST_CERTAIN_FIRST.index)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
