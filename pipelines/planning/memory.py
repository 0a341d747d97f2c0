"""Compares the memory estimates of a run's stages with the devices, and prints them in a dry run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from contracts.errors import UserError
from contracts.outlook import Memory
from pipelines.config.executor import LOCAL_KINDS
from pipelines.config.run import RunConfig
from pipelines.graph import Graph, Node
from pipelines.machine import gpu_count, gpus, host_memory
from pipelines.planning.cluster import cluster_of
from pipelines.planning.estimates import GraphOutlook, memory
from pipelines.planning.hub import name_and_revision
from pipelines.planning.placement import place
from pipelines.planning.preflight import origin_of
from pipelines.progress import tracked
from pipelines.text import echo


def estimate_memory(graph: Graph, *, on_gpu: bool) -> tuple[dict[str, Memory], dict[str, list[Path]]]:
    """The estimated memory of each placed node, and for nodes without an estimate the models whose size is unknown."""
    needs: dict[str, Memory] = {}
    unknown: dict[str, list[Path]] = {}
    outlook = GraphOutlook(graph)
    for node in tracked(graph.nodes.values(), "estimating memory"):
        need = memory(node, graph, on_gpu=on_gpu)
        if need is not None:
            needs[node.name] = need
        elif models := model_paths(node):
            unknown[node.name] = [origin_of(model, graph) for model in models if outlook.size_of(model) is None]
    return needs, unknown


@dataclass(frozen=True)
class Device:
    """A device that estimates are compared with."""

    name: str
    bytes: int
    gpus: int
    """Number of GPUs; 0 for the CPU."""


def device_of(config: RunConfig) -> Device:
    """The smallest GPU of this machine; without any, the GPU of the config's `hardware`, or else the CPU."""
    listed = gpus() if gpu_count() else []
    if listed:
        smallest = min(gpu.total for gpu in listed)
        return Device(f"{len(listed)} GPU of {format_bytes(smallest)} of this machine", smallest, len(listed))
    if config.hardware is not None:
        room = int(config.hardware.gib * (1 << 30))
        return Device(
            f"{config.hardware.gpus} GPU of {format_bytes(room)}, as `hardware` says", room, config.hardware.gpus
        )
    room = host_memory()
    return Device(f"the CPU of this machine, which has {format_bytes(room)} free", room, 0)


def require_memory(graph: Graph, config: RunConfig, device: Device, needs: Mapping[str, Memory]) -> None:
    """Raise UserError if a stage on this machine, or on machines simulated as one, needs more memory than it has."""
    for name, need in needs.items():
        room = int(need.share * device.bytes)
        wanted = need.total * (1 if device.gpus else need.processes)
        if wanted > room and config.executor.entry(graph.nodes[name]).kind in LOCAL_KINDS:
            raise UserError(
                f"stage {name} is estimated to take {format_bytes(wanted)} of {device.name}, but it may use "
                f"{format_bytes(room)}. {graph.nodes[name].stage.memory_fix}"
            )


def print_memory(console: Console, graph: Graph, config: RunConfig) -> None:
    """Print for every stage with a model its peak memory, the parts of it, the largest first, and whether it fits."""
    device = device_of(config)
    placed = place(graph, cluster_of(config, device.gpus))
    needs, unknown = estimate_memory(placed, on_gpu=device.gpus > 0)
    lines = [f"memory, estimated for {device.name}:"]
    for names, need in group_estimates(needs):
        processes = 1 if device.gpus else need.processes
        room = int(need.share * device.bytes)
        verdict = "fits" if need.total * processes <= room else "no room"
        parts = sorted(((part, name) for name, part in need.parts.items() if part), reverse=True)
        made = ", ".join(f"{name} {format_bytes(part)}" for part, name in parts)
        each = f" in each of {need.processes} processes" if need.processes > 1 else ""
        lines.append(
            f"{verdict:<8} {shorten(names)}: {format_bytes(need.total)} of {format_bytes(room)}{each} ({made})"
        )
    for models, names in _by_models(unknown):
        lines.append(f"unknown  {shorten(names)}: {'; '.join(map(_why_unknown, models))}")
    echo(console, *lines)


def _by_models(unknown: dict[str, list[Path]]) -> Iterator[tuple[list[Path], list[str]]]:
    """Group stages without an estimate by the models whose size is unknown."""
    groups: dict[tuple[Path, ...], list[str]] = {}
    for name, models in unknown.items():
        groups.setdefault(tuple(models), []).append(name)
    yield from ((list(models), names) for models, names in groups.items())


def _why_unknown(model: Path) -> str:
    if not str(model).startswith("hf:"):
        return f"the shape of {model} cannot be read from its config.json"
    name, revision = name_and_revision(model)
    at = f" --revision {revision}" if revision else ""
    return f"{model} is not in the local cache; `hf download {name} config.json{at}` is enough for an estimate"


def group_estimates(needs: dict[str, Memory]) -> Iterator[tuple[list[str], Memory]]:
    """Group stages with equal estimates, across iterations."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, need in needs.items():
        groups.setdefault((name.rpartition("/")[2], str(need)), []).append(name)
    for names in groups.values():
        yield names, needs[names[0]]


def model_paths(node: Node) -> list[Path]:
    """The models that a stage reads."""
    return [use.path for use in node.stage.models(node.config)]


def shorten(names: list[str]) -> str:
    """The first two names, and the number of the others."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def format_bytes(count: int) -> str:
    """A number of bytes in readable units."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << power:
            return f"{count / (1 << power):.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
