"""Runs the `pipeline` command as `python -m pipelines`."""

import os
import signal
import sys
from typing import NoReturn

# This repository's packages take precedence over namesakes in the working directory or on PYTHONPATH.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import entrypoint


def start() -> NoReturn:
    """Run the command in this process and exit with its exit code."""
    entrypoint.prepare(stage=False)
    from pipelines.main import main  # imports the libraries, which takes most of a second

    entrypoint.imported()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except SystemExit as end:  # raised by argparse, or by a console whose reader is gone
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except KeyboardInterrupt:  # after main has returned
        code = entrypoint.INTERRUPTED
    entrypoint.finish(code)


if __name__ == "__main__":
    start()
