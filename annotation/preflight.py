"""What the stages of annotation would refuse, before anything runs. See contracts/preflight.py."""

import functools
from collections.abc import Iterator

from annotation.config import CheckpointEvaluationConfig
from annotation.pairing.config import PairsConfig
from annotation.scorers.base import ScoreConfig
from contracts.preflight import Finding, Inspected
from contracts.trial import Call, mistake_in


def check_scorer(stage: Inspected) -> Iterator[Finding]:
    """What a kind of scorer would refuse."""
    config: ScoreConfig = stage.config
    yield from config.preflight(stage)


def check_evaluation(stage: Inspected) -> Iterator[Finding]:
    """The function of an evaluation of the user's own, imported, and whether it can be called."""
    config: CheckpointEvaluationConfig = stage.config
    if mistake := _mistake_in(Call(config.function, ("checkpoint", "output"), tuple(config.keywords))):
        yield Finding("error", mistake)


def check_pairs(stage: Inspected) -> Iterator[Finding]:
    """A strategy of the user's own, imported, and whether it can be called."""
    config: PairsConfig = stage.config
    if config.is_own and (
        mistake := _mistake_in(Call(config.strategy, ("candidates", "prompt"), tuple(config.settings)))
    ):
        yield Finding("error", mistake)


_mistake_in = functools.cache(mistake_in)
