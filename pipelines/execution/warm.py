"""Forks stages from processes that have imported their libraries already; see contracts/warm.py.

The driver starts one warm process for each locked environment that several stages still need, one stage before the
first of them runs. A stage's supervisor asks it for a fork (contracts/forks.py), and so does a stage with replicas. If
no fork is possible (the process has died, or the source has changed), the stage is started in the ordinary way: warm
processes save time, and nothing depends on them.
"""

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from contracts.fingerprint import digest
from contracts.forks import ANSWER_SECONDS, socket_folder, start_warm
from contracts.processes import end_groups
from contracts.warm import RELEASED, ForkRequest

END_SECONDS = 5.0


class WarmProcesses:
    """The warm processes of one driver, which end with it."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._devices: dict[str, set[str]] = {}

    def has(self, package: str, python: str, environment: Mapping[str, str]) -> bool:
        """Whether a warm process exists for a package in this environment."""
        return _name(package, python, environment) in self._processes

    def address(
        self,
        package: str,
        python: str,
        environment: Mapping[str, str],
        directory: str,
        libraries: Iterable[str] = (),
    ) -> Path:
        """The socket of a warm process, which is started if necessary and imports what stages with `libraries` need."""
        name = _name(package, python, environment)
        self._folder = self._folder or socket_folder()
        path = self._folder / name
        if name not in self._processes:
            self._devices[name] = devices_of(environment)
            log = self._logs / f"{package}.log"
            self._processes[name] = start_warm(
                path, package, python, environment, log=log, directory=directory, libraries=libraries
            )
        return path

    def release(self, devices: set[str], keep: str) -> None:
        """Have warm processes free what they keep loaded on some devices, except for stages with the label `keep`.

        Args:
            devices: names as in CUDA_VISIBLE_DEVICES; empty: all.
        """
        for name, process in self._processes.items():
            here = self._devices[name]
            if process.poll() is None and (not devices or not here or devices & here):
                assert self._folder is not None
                _release(self._folder / name, keep)

    def close(self) -> None:
        """End all warm processes."""
        for process in self._processes.values():
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        end_groups(list(self._processes.values()), END_SECONDS)
        self._processes.clear()
        self._devices.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def devices_of(environment: Mapping[str, str]) -> set[str]:
    """The GPUs that a process sees, if its environment names them."""
    return set(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(",")))


def _release(path: Path, keep: str) -> None:
    """Ask the process behind a socket to end its idle forks; if it does not answer, it keeps them."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(str(path))
        connection.sendall(msgspec.json.encode(ForkRequest([], {}, "", "", keep)) + b"\n")
        connection.recv(len(RELEASED))


def _name(package: str, python: str, environment: Mapping[str, str]) -> str:
    return digest([package, python, sorted(environment.items())])[:12]
