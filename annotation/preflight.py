"""`python -m annotation.preflight`: what the stages of annotation would refuse, before anything runs.

See contracts/preflight.py.
"""

from collections.abc import Iterator

from annotation.__main__ import COMMANDS
from annotation.config import ScoreConfig
from contracts.preflight import Finding, Stage, serve


def check(stage: Stage) -> Iterator[Finding]:
    """The model or the function of a scorer."""
    if isinstance(stage.config, ScoreConfig):
        yield from check_scorer(stage, stage.config)


def check_scorer(stage: Stage, config: ScoreConfig) -> Iterator[Finding]:
    """A model, as its kind reads it, and the prompts, as its chat template renders them with an answer."""
    if config.model is None or not (config.model / "config.json").is_file():
        return
    from modeling.inspect import examine_model  # transformers is not loaded for rules alone

    yield from examine_model(stage, config.model, "answers" if config.kind == "reward_model" else "nothing")


if __name__ == "__main__":
    serve(COMMANDS, check)
