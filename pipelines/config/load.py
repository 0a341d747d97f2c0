"""Loads the config of a run from a file or recipe and command-line overrides."""

import os
import re
from pathlib import Path
from typing import Any

from annotation.pairing.config import PairsSettings
from contracts.config import apply_overrides, expand_home, read_yaml, validate
from contracts.errors import UserError
from generation.config import GenerationSettings
from pipelines.config.changes import merge
from pipelines.config.gates import require_possible_gates
from pipelines.config.recipes import find_config
from pipelines.config.run import RunConfig
from training.config import ExperienceSettings


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Read, override and validate the config of a run, given as a file or the name of a recipe.

    Raises:
        UserError: the config is invalid; lists every mistake.
    """
    path = find_config(path)
    config = _with_inherited(validate(RunConfig, _overridden(read_yaml(path), overrides), str(path)))
    by_iteration = [config, *(config.at(iteration) for iteration in config.changes)]
    _refuse_unused(by_iteration)
    _require_lag(by_iteration)
    require_possible_gates(by_iteration)
    _require_writable(config.directory)
    return config


def _overridden(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply overrides to a file's data. The file's `settings` are dropped if an override changes the algorithm or
    strategy.

    `executor=KIND` and `placement=STRATEGY` keep the other keys of the section; `placement=FILE` replaces it.
    """
    overrides = [re.sub("^executor=(?=[a-z]+$)", "executor.kind=", text) for text in overrides]
    overrides = [re.sub("^placement=(?=[a-z]+$)", "placement.strategy=", text) for text in overrides]
    if isinstance(data.get("executor"), str):
        data = {**data, "executor": {"kind": data["executor"]}}
    files = [text for text in overrides if text.startswith("placement=")]
    data = _with_placement(apply_overrides(data, files))
    overrides = [text for text in overrides if text not in files]
    for section, owner in (("training", "algorithm"), ("pairs", "strategy")):
        current = data.get(section)
        wanted = apply_overrides({}, [text for text in overrides if text.startswith(f"{section}.{owner}=")])
        if isinstance(current, dict) and wanted:
            data = {**data, section: merge(current, wanted[section])}
    return apply_overrides(data, overrides)


def _with_placement(data: dict[str, Any]) -> dict[str, Any]:
    """Expand the section `placement` to a mapping, if it is the name of a file or a strategy."""
    placement = data.get("placement")
    if not isinstance(placement, str):
        return data
    if placement.endswith((".yaml", ".yml")):
        return {**data, "placement": read_yaml(Path(expand_home(placement)))}
    return {**data, "placement": {"strategy": placement}}


def _with_inherited(config: RunConfig) -> RunConfig:
    """Fill in the values that sections inherit: the sampling keys of `generation`, and `hardware`."""
    changes: dict[str, Any] = {"evaluation": _inherit(config.generation, config.evaluation)}
    if config.reward_model is not None:
        generation = _inherit(config.generation, config.reward_model.generation)
        changes["reward_model"] = config.reward_model.model_copy(update={"generation": generation})
    if config.executor.uses_scheduler and config.hardware is not None and config.executor.resources.gpus is None:
        resources = config.executor.resources.model_copy(update={"gpus": config.hardware.gpus})
        changes["executor"] = config.executor.model_copy(update={"resources": resources})
    return config.model_copy(update=changes)


def _inherit(base: GenerationSettings, section: GenerationSettings) -> GenerationSettings:
    """`base` with the keys that the user set in `section`."""
    return base.model_copy(update={name: getattr(section, name) for name in section.model_fields_set})


def _refuse_unused(configs: list[RunConfig]) -> None:
    """Raise UserError if a section is set that no iteration reads."""
    found = [config.description for config in configs]
    algorithms = ", ".join(dict.fromkeys(description.algorithm for description in found))
    for name, is_set, is_read, by in (
        ("pairs", [it.pairs != PairsSettings() for it in configs], [it.reads == "pairs" for it in found],
         "train on pairs"),
        ("experience", [it.experience != ExperienceSettings() for it in configs],
         [it.reads == "samples" for it in found], "train on samples"),
        ("critic", [it.critic is not None for it in configs], ["values" in it.needs for it in found], "need a critic"),
        ("reference", [it.reference != "initial" for it in configs], [it.needs_reference for it in found],
         "need a reference policy"),
    ):  # fmt: skip
        if any(is_set) and not any(is_read):
            raise UserError(
                f"`{name}` is for algorithms that {by}, but training.algorithm is {algorithms}. Take it "
                "out, or choose another algorithm."
            )


def _require_lag(configs: list[RunConfig]) -> None:
    """Raise UserError if generation is to overlap training, but has to wait for it because there is no lag."""
    if configs[0].placement.strategy == "async" and not any(config.lag for config in configs):
        raise UserError(
            "placement.strategy is async, which generates an iteration while the previous one trains, but lag is "
            "0: every iteration samples from the policy that the previous one trains. Set lag=1, which changes what is "
            "computed (docs/lag.md), or placement=separation."
        )


def _require_writable(directory: Path) -> None:
    """Raise UserError if a run's directory cannot be created in `directory`."""
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"directory {directory} cannot be made: {parent} is not a directory. Set directory=PATH.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"directory {directory} cannot be written to. Set directory=PATH.")
