"""Run a command, and end it and everything it started when this process's parent ends, however it ends.

    python -m generation.guard PARENT_PID COMMAND...

A killed vLLM server leaves its engine process behind, which holds the device. This process leads the group of both:
the kernel sends it a SIGTERM when the parent dies, and it ends the group.
"""

import os
import signal
import subprocess
import sys
from typing import Any

from contracts.processes import die_with_parent

GRACE = 5.0
"""Seconds that the command has to end by itself."""


def main() -> None:
    """Never returns: ends with its group."""
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    process = subprocess.Popen(sys.argv[2:])
    try:
        process.wait()
    except SystemExit:
        process.terminate()
        process.wait(GRACE)
    finally:
        os.killpg(0, signal.SIGKILL)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
