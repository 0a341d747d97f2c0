"""What the stages of annotation would refuse, before anything runs. See contracts/preflight.py."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from annotation.config import CheckpointEvaluationConfig, ScoreConfig
from annotation.rule import check_function
from contracts.models import ModelInfo
from contracts.preflight import Finding, Inspected
from contracts.trial import Call, mistake_in

if TYPE_CHECKING:
    from modeling.inspect import Renders

RENDERS: "dict[str, Renders]" = {"reward_model": "answers", "pairwise": "comparisons"}
"""What a kind of scorer renders by its model's chat template."""
IMPORT_SECONDS = 60.0
"""How long a rule's function may take to be imported until it is no longer waited for."""


def check_scorer(stage: Inspected) -> Iterator[Finding]:
    """A function, imported; or a model, as its kind reads it, and the prompts, as its template renders them."""
    config: ScoreConfig = stage.config
    if config.function is not None:
        inputs = None if config.inputs is None else tuple(config.inputs)
        yield from _findings_of_function(config.function, inputs)
    if config.model is None or not (config.model / "config.json").is_file():
        return
    from modeling.inspect import examine_model  # torch and transformers are not loaded for rules alone
    from modeling.loading import check_weights

    yield from examine_model(stage, config.model, RENDERS.get(config.kind, "nothing"))
    classifies = config.kind == "reward_model" or (
        config.kind == "values" and not ModelInfo.read(config.model).has_value_head
    )
    check_weights(config.model, "classifier" if classifies else "causal")


@functools.cache
def _findings_of_function(function: str, inputs: tuple[Path, ...] | None) -> tuple[Finding, ...]:
    late = check_function(function, inputs, IMPORT_SECONDS)
    return () if late is None else (Finding("warning", late),)


def check_evaluation(stage: Inspected) -> Iterator[Finding]:
    """The function of an evaluation of the user's own, imported, and whether it can be called."""
    config: CheckpointEvaluationConfig = stage.config
    if mistake := _mistake_in(Call(config.function, ("checkpoint", "output"), tuple(config.keywords))):
        yield Finding("error", mistake)


_mistake_in = functools.cache(mistake_in)
