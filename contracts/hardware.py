"""Records the hardware that a stage ran on, and its peak usage, for the manifest. Does not import torch."""

import contextlib
import os
import platform
import resource
import socket
import sys
from pathlib import Path
from typing import Any

VARIANT = "RATCHET_VARIANT"
"""Environment variable: `cpu` if GPUs must not be used."""
_children_before, _cpu_before = 0, 0.0


def hardware() -> dict[str, Any]:
    """Describe the machine, its CPU, its GPU if there is one, and the resources that were used.

    `cpu_seconds` is the CPU time since `begin_measuring` of this process and of its children that have ended.
    `peak_bytes` is the largest resident size since `begin_measuring` of this process or of such a child;
    `gpu_peak_bytes` is the most memory that torch has reserved in this process on one GPU.
    """
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "processor": processor(),
        "gpu": gpu(),
        "cpu_seconds": round(_cpu_seconds() - _cpu_before, 3),
        "peak_bytes": _peak(),
        "gpu_peak_bytes": _gpu_peak(),
    }
    return {name: value for name, value in found.items() if value}


def begin_measuring() -> None:
    """Start measuring now, because the process may have run another stage before."""
    global _children_before, _cpu_before
    _cpu_before = _cpu_seconds()
    _children_before = _largest(resource.RUSAGE_CHILDREN)
    with contextlib.suppress(OSError):  # another system, or a container without it
        Path("/proc/self/clear_refs").write_text("5")
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()


def processor() -> str:
    """The model name of the CPU according to the system; empty if unknown."""
    return _field(Path("/proc/cpuinfo"), "model name")


def gpu() -> str:
    """The model name of the first visible GPU according to its driver; empty if there is none."""
    if os.environ.get(VARIANT) == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    for place in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        if name := _field(place, "Model"):
            return name
    cuda = _cuda()
    return str(cuda.get_device_name()) if cuda is not None else ""


def _field(path: Path, name: str) -> str:
    """The value in the line `NAME: VALUE` of a system file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _peak() -> int:
    own = _field(Path("/proc/self/status"), "VmHWM").split()
    largest = int(own[0]) << 10 if own else _largest(resource.RUSAGE_SELF)
    children = _largest(resource.RUSAGE_CHILDREN)
    return max(largest, children) if children > _children_before else largest


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _largest(who: int) -> int:
    """Bytes of the largest resident size."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu_peak() -> int:
    cuda = _cuda()
    return 0 if cuda is None else max(map(cuda.max_memory_reserved, range(cuda.device_count())), default=0)


def _cuda() -> Any:
    """torch.cuda if this process has initialized it, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
