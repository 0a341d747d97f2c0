"""Queries the hardware of this machine: GPUs, cores, memory."""

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver sees it; sizes in bytes."""

    name: str
    total: int
    free: int


def gpu_count() -> int:
    """Number of GPUs visible to a child process; 0 if RATCHET_VARIANT=cpu."""
    if os.environ.get("RATCHET_VARIANT") == "cpu":
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name not in ("", "-1")])
    return _listed_gpus()


@functools.cache
def _listed_gpus() -> int:
    return sum(line.startswith("GPU ") for line in _nvidia_smi("-L"))


def _nvidia_smi(*arguments: str) -> list[str]:
    """The lines that nvidia-smi prints; none if it fails or does not exist."""
    try:
        result = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return result.stdout.splitlines()


def gpus() -> list[Gpu]:
    """The visible GPUs according to nvidia-smi; empty if it gives no sizes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else tuple(name.strip() for name in visible.split(",") if name.strip())
    found: list[Gpu] = []
    query = ("--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits")
    for line in _nvidia_smi(*query):
        index, uuid, total, free, name = (value.strip() for value in line.split(",", 4))
        if wanted is None or index in wanted or (wanted and uuid.startswith(wanted)):
            try:
                found.append(Gpu(name, int(total) << 20, int(free) << 20))
            except ValueError:  # "[N/A]"
                return []
    return found


def host_memory() -> int:
    """Bytes of memory still available to processes, within the limits of this control group."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) << 10
    return min([available, *_memory_limits()])


def device_names(devices: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES for the GPUs with these indices among those visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name for name in visible.split(",") if name not in ("", "-1")]
    return ",".join(names[device] if names else str(device) for device in devices)


def core_numbers(devices: Iterable[int]) -> tuple[int, ...]:
    """System-wide numbers of the cores with these indices among those that this process may use."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return tuple(usable[device] for device in devices if device < len(usable))


def _memory_limits() -> Iterator[int]:
    """Memory limits in bytes of this process's control groups (versions 1 and 2)."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in groups:
        if controllers in ("", "memory"):
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            for folder in (Path(group), *Path(group).parents):  # in a container its group is mounted as the root
                with contextlib.suppress(OSError, ValueError):
                    yield int(Path(f"/sys/fs/cgroup/{controllers}/{folder}/{name}").read_text())


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_parallel(gpus: int | None = None) -> int:
    """Default number of stages at once: 1 with GPUs, since a stage uses all; else one per two cores, at least 2.

    Args:
        gpus: the number of GPUs to assume instead of this machine's.
    """
    if gpu_count() if gpus is None else gpus:
        return 1
    return max(2, (os.cpu_count() or 2) // 2)
