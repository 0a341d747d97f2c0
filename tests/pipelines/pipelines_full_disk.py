"""Runs a command on a disk that fills up while it runs, and a second time with free space.

    unshare --map-root-user --mount python pipelines_full_disk.py DIRECTORY WHEN COMMAND ...

Mounts a small file system on DIRECTORY and runs the command. As soon as a path below DIRECTORY matches the pattern
WHEN, fills the disk to its last page and keeps it full until the command ends. Then frees the space and runs the
command again. Prints the results as JSON.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from contracts.artifacts import Artifact
from contracts.manifest import MANIFEST

SIZE = "100m"
"""More than the free space that a stage requires at its start."""
SECONDS = 200.0


def main(directory: Path, when: str, command: list[str]) -> dict[str, Any]:
    """Run the command twice. Returns exit code, output and published digests of both attempts."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(directory)], check=True)
    ballast = directory / "ballast"
    deadline = time.monotonic() + SECONDS
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not any(directory.glob(when)):
            assert process.poll() is None, "the command ended before the disk was full"
            assert time.monotonic() < deadline, f"no {when} within {SECONDS} s"
            time.sleep(0.001)
        while process.poll() is None:
            assert time.monotonic() < deadline, f"the command did not end within {SECONDS} s"
            fill(ballast)
            time.sleep(0.001)
    finally:
        process.kill()
    output = process.communicate()[0]
    first = {"code": process.returncode, "output": output, "digests": digests(directory)}
    ballast.unlink()
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS, check=False
    )
    strays = [str(path) for path in directory.rglob("*") if path.suffix == ".tmp" or ".partial-" in path.name]
    return {
        "first": first,
        "second": {"code": result.returncode, "output": result.stdout, "digests": digests(directory)},
        "strays": strays,
    }


def fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    if file.write(b"\0" * size) < size:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def digests(directory: Path) -> dict[str, str]:
    """The digests of all published artifacts by path; asserts that none is damaged."""
    found = {path.parent: Artifact.open(path.parent) for path in directory.rglob(MANIFEST)}
    assert not [problem for artifact in found.values() for problem in artifact.damage()]
    return {path.relative_to(directory).as_posix(): artifact.manifest.digest for path, artifact in found.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
