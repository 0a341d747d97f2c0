"""Stages are declared once, and what they declare exists."""

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from contracts.config import StageConfig
from contracts.declaration import PACKAGES, Stage, all_stages, stages_of

STAGES = list(all_stages().values())


def functions_of(path: Path) -> set[str]:
    """Names that a module defines; without importing it, for most need torch."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def subclasses(kind: type[StageConfig]) -> set[type[StageConfig]]:
    return {kind, *(found for each in kind.__subclasses__() for found in subclasses(each))}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_function_that_a_stage_names_is_there(stage: Stage[Any], root: Path) -> None:
    for name in filter(None, (stage.run, stage.launch, stage.is_worker_node, stage.preflight)):
        module, _, function = name.partition(":")
        assert function in functions_of(root / f"{module.replace('.', '/')}.py"), name
    assert stage.conversations is None or stage.conversations in stage.config.model_fields


def test_no_stage_is_called_like_another() -> None:
    declared = [stage for package in PACKAGES for stage in stages_of(package).values()]
    assert Counter(stage.name for stage in declared).most_common(1)[0][1] == 1
    assert len(declared) == len(STAGES)


def test_every_stage_of_ours_is_declared() -> None:
    ours = {kind for kind in subclasses(StageConfig) if kind.__module__.partition(".")[0] in PACKAGES}
    named = {kind for kind in ours if "stage" in vars(kind)}
    assert named == {stage.config for stage in STAGES}
