"""`python -m training.preflight`: what the stages of training would refuse, before anything runs.

See contracts/preflight.py.
"""

from collections.abc import Iterator

from contracts.preflight import Finding, Stage, serve
from training.__main__ import COMMANDS
from training.config import SftConfig, TrainingConfig


def check(stage: Stage) -> Iterator[Finding]:
    """The model that is trained, and the data where it is the user's."""
    config = stage.config
    if not isinstance(config, TrainingConfig) or not (config.model / "config.json").is_file():
        return
    if isinstance(config, SftConfig):
        yield from check_demonstrations(stage, config)


def check_demonstrations(stage: Stage, config: SftConfig) -> Iterator[Finding]:
    """The demonstrations, as the chat template of the model renders them."""
    from contracts.chat import ChatTokenizer
    from contracts.demonstrations import DemonstrationRow
    from contracts.ledger import Ledger
    from training.sft import tokenized

    ledger = Ledger("demonstrations")
    rows = (DemonstrationRow(one.messages) for one in stage.demonstrations())
    count = sum(1 for _ in tokenized(rows, ChatTokenizer(config.model), ledger))
    if count:
        yield Finding("ok", f"{config.model}: its chat template renders your demonstrations ({count} were tried)")


if __name__ == "__main__":
    serve(COMMANDS, check)
