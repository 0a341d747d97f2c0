"""Preflight checks of the generation stage; see contracts/preflight.py."""

from collections.abc import Iterator

from contracts.preflight import Finding, Inspected
from generation.config import GenerationConfig
from generation.prompts import check_policy
from modeling.inspect import examine_model
from modeling.loading import check_weights


def check(stage: Inspected) -> Iterator[Finding]:
    """Check the policy as an engine reads it, and render prompts with its chat template."""
    config: GenerationConfig = stage.config
    if (config.policy / "config.json").is_file():
        check_policy(config)
        yield from examine_model(stage, config.policy, "prompts")
        check_weights(config.policy, "causal")
