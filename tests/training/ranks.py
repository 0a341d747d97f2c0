"""Runs several trainings one after the other as one of several ranks, because starting takes most of the time.

    torchrun --nproc_per_node 2 ranks.py FILE

FILE: a JSON list of trainings, each with `stage`, `settings`, and optionally `interrupt_after`, the number of steps
after which it is interrupted.
"""

import json
import sys
import traceback
from pathlib import Path

from conftest import interrupted_after

from contracts.config import validate
from contracts.declaration import stages_of
from contracts.stage import run_stage
from training.launch import exit_without_teardown


def main() -> None:
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
