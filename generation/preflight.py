"""What the generation stage would refuse, before it starts. See contracts/preflight.py."""

from collections.abc import Iterator

from contracts.preflight import Finding, Inspected
from generation.config import GenerationConfig
from generation.prompts import check_policy
from modeling.inspect import examine_model
from modeling.loading import check_weights


def check(stage: Inspected) -> Iterator[Finding]:
    """The policy, as an engine will read it, and the prompts, as its chat template renders them."""
    config: GenerationConfig = stage.config
    if (config.policy / "config.json").is_file():
        check_policy(config)
        yield from examine_model(stage, config.policy, "prompts")
        check_weights(config.policy, "causal")
