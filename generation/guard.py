"""Runs a command in a process group that is killed when the command or this process's parent ends, for any reason.

    python -m generation.guard PARENT_PID COMMAND...

A vLLM server that is killed leaves its engine process behind, which keeps the device. This process leads the group of
both: when the parent dies, the kernel sends it a SIGTERM, and it kills the group.
"""

import os
import signal
import subprocess
import sys
from typing import Any

from contracts.processes import die_with_parent

GRACE_SECONDS = 5.0
"""Seconds that the command has to exit after SIGTERM, before its group is killed."""


def main() -> None:
    """Run the command; never returns, because this process is killed with its group."""
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(int(sys.argv[1]), signal.SIGTERM)
    process = subprocess.Popen(sys.argv[2:])
    try:
        process.wait()
    except SystemExit:
        process.terminate()
        process.wait(GRACE_SECONDS)
    finally:
        os.killpg(0, signal.SIGKILL)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
