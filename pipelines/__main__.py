"""`python -m pipelines` is the `pipeline` command."""

import os
import signal
import sys
from typing import NoReturn

# Ours before anything in the working directory or on PYTHONPATH that is called the same.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from contracts import surroundings


def start() -> NoReturn:
    """Run the command as a process of its own."""
    surroundings.prepare(stage=False)
    from pipelines.main import main  # the libraries, which takes most of a second

    surroundings.imported()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except SystemExit as end:  # argparse's, and of a console that nobody reads
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except KeyboardInterrupt:  # in the last instant
        code = surroundings.INTERRUPTED
    surroundings.finish(code)


if __name__ == "__main__":
    start()
