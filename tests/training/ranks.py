"""Runs several trainings one after the other as one of several ranks, because starting takes most of the time.

    python -m tests.training.ranks FILE

FILE: a JSON list of trainings, each with `stage`, `settings`, and optionally `interrupt_after`, the number of steps
after which it is interrupted.
"""

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from contracts.config import validate
from contracts.declaration import stages_of
from contracts.stage import run_stage
from training.launch import exit_without_teardown, join_ranks


@contextlib.contextmanager
def interrupted_after(after: int | None) -> Iterator[None]:
    """Interrupt the training in the context after `after` steps; never if that is None."""
    import training.loop

    def rate(step: int, total: int, **options: Any) -> float:
        if step == after:
            raise InterruptedError
        return learning_rate(step, total, **options)

    learning_rate = training.loop.learning_rate
    with mock.patch.object(training.loop, "learning_rate", rate):
        try:
            yield
        except InterruptedError:
            if after is None:
                raise
        else:
            assert after is None, f"the training has ended before step {after}"


def main() -> None:
    join_ranks()
    for training in json.loads(Path(sys.argv[1]).read_text()):
        command = stages_of("training")[training["stage"]]
        with interrupted_after(training.get("interrupt_after")):
            run_stage(command, validate(command.config, training["settings"], "test"))


if __name__ == "__main__":
    with exit_without_teardown():
        try:
            main()
        except BaseException:
            traceback.print_exc()
            raise
        sys.exit(0)
