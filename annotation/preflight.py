"""Preflight checks of the annotation stages: report what a stage would refuse, before anything runs. See
contracts/preflight.py."""

import functools
from collections.abc import Iterator

from annotation.config import CheckpointEvaluationConfig
from annotation.pairing.config import PairsConfig
from annotation.scorers.base import ScoreConfig
from contracts.callable_check import Call, mistake_in
from contracts.preflight import Finding, Inspected


def check_scorer(stage: Inspected) -> Iterator[Finding]:
    """Run the checks of a scorer's kind."""
    config: ScoreConfig = stage.config
    yield from config.preflight(stage)


def check_evaluation(stage: Inspected) -> Iterator[Finding]:
    """Import the function of a user's own evaluation, and check that its signature fits the call."""
    config: CheckpointEvaluationConfig = stage.config
    if mistake := _mistake_in(Call(config.function, ("checkpoint", "output"), tuple(config.keywords))):
        yield Finding("error", mistake)


def check_pairs(stage: Inspected) -> Iterator[Finding]:
    """Import a user's own pair strategy, and check that its signature fits the call."""
    config: PairsConfig = stage.config
    if config.is_own and (
        mistake := _mistake_in(Call(config.strategy, ("candidates", "prompt"), tuple(config.settings)))
    ):
        yield Finding("error", mistake)


_mistake_in = functools.cache(mistake_in)
