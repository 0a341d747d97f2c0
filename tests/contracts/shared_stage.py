"""A stage whose shards several processes share; test_contracts_workers runs it."""

import os
import time
from collections.abc import Callable
from typing import ClassVar

from contracts.config import StageConfig, identity, runtime
from contracts.declaration import Stage
from contracts.ledger import Ledger
from contracts.records import PROMPTS, Message, Prompt
from contracts.stage import Context, Outcome, main
from contracts.workers import share_shards


class SharedConfig(StageConfig):
    """Shards that name themselves; each that is begun or made is noted in a file beside the output."""

    stage: ClassVar[str] = "shared"
    code_version: ClassVar[int] = 1

    shards: int = identity(4)
    """How many."""
    word: str = identity("new")
    """Part of every row."""
    held: int | None = runtime(None)
    """The shard from which on each takes until the file `go` is beside the output; None: all are quick."""


def run(config: SharedConfig, context: Context) -> Outcome:
    """Make the shards that are missing."""
    log = config.output.with_name("log")

    def note(*words: str) -> None:
        with log.open("a") as file:
            file.write(" ".join([os.environ.get("RANK", "0"), *words]) + "\n")

    def open_worker() -> Callable[[str], None]:
        note("engine")

        def make(name: str) -> None:
            note("begins", name)
            while config.held is not None and name >= f"shard-{config.held:05d}" and not log.with_name("go").exists():
                time.sleep(0.01)
            ledger = Ledger("prompts")
            ledger.keep()
            context.publication.write_rows(name, [Prompt(name, (Message("user", config.word),))], ledger)
            note("made", name)

        return make

    share_shards(context, [f"shard-{number:05d}.jsonl" for number in range(config.shards)], open_worker)
    return Outcome("prompts", weights=config.word) if context.publishes else Outcome("prompts")


if __name__ == "__main__":
    main({"shared": Stage(SharedConfig, PROMPTS, "shared_stage:run")}, "shared_stage")
