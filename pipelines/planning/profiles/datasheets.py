"""Reads the data sheets of devices (datasheets.yaml) and finds the one of a device by its name."""

import functools
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracts.config import read_yaml
from contracts.errors import UserError, did_you_mean
from contracts.hardware import processor
from pipelines.config.cluster import MachinesSection
from pipelines.machine import gpu_count, gpus

FILE = Path(__file__).with_name("datasheets.yaml")
CPU = "CPU"
VENDOR = "nvidia "
"""Prefix of GPU names as reported by the driver."""


@dataclass(frozen=True)
class DataSheet:
    """The data sheet of one device; rates are bytes or operations per second, of links in one direction."""

    name: str
    bf16: float
    fp32: float
    memory: int
    bandwidth: float
    """Bandwidth of its own memory."""
    link: float
    """Bandwidth to another device of its machine."""
    pcie: float
    """Bandwidth to CPU memory."""
    network: float
    """Bandwidth to other machines, per device."""
    disk: float
    devices: int
    """Usual number of devices per machine."""
    source: str
    matches: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU, not a CPU core."""
        return self.name != CPU

    def rate(self, number: int) -> float:
        """Operations per second on numbers of `number` bytes."""
        return self.bf16 if number <= 2 else self.fp32


@functools.cache
def data_sheets() -> dict[str, DataSheet]:
    """All data sheets by name."""
    found: dict[str, Any] = read_yaml(FILE)
    rates = ("bf16", "fp32", "bandwidth", "link", "pcie", "network", "disk")
    return {
        name: DataSheet(
            name,
            **{rate: float(entry[rate]) for rate in rates},
            memory=int(float(entry["memory"])),
            devices=int(entry["devices"]),
            source=entry["source"],
            matches=tuple(entry["matches"]),
        )
        for name, entry in found.items()
    }


def data_sheet(name: str) -> DataSheet:
    """The data sheet of this name, or of a device as its driver calls it; case is ignored.

    Raises:
        UserError: there is none.
    """
    sheets = data_sheets()
    for sheet in sheets.values():
        if name.casefold() == sheet.name.casefold():
            return sheet
    for sheet in sheets.values():
        if name.casefold() in map(str.casefold, sheet.matches):
            return sheet
    if name.casefold().startswith(VENDOR) and (found := matching_sheet(name)) is not None:
        return found
    known = [*sheets, *itertools.chain.from_iterable(sheet.matches for sheet in sheets.values())]
    raise UserError(
        f"there is no data sheet of {name!r}.{did_you_mean(name.upper(), known, 3)} Known: {', '.join(sheets)}; "
        f"{FILE.name} has them."
    )


def sheet_of_machines(machines: MachinesSection) -> DataSheet:
    """The data sheet of a cluster's GPUs, with the values that its file overrides.

    Raises:
        UserError: there is none.
    """
    sheet = data_sheet(machines.gpu)
    return replace(
        sheet,
        devices=machines.gpus,
        memory=sheet.memory if machines.gib is None else int(machines.gib * (1 << 30)),
        link=sheet.link if machines.link is None else 1e9 * machines.link,
        network=sheet.network if machines.network is None else 1e9 * machines.network,
    )


def matching_sheet(device: str) -> DataSheet | None:
    """The data sheet of a device by the name that its driver reports; None if there is none."""
    fits = [(len(part), sheet) for sheet in data_sheets().values() for part in sheet.matches if _has(device, part)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def _has(device: str, part: str) -> bool:
    """Whether a name contains these words as whole words: an H1000 is no H100."""
    return re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", device, re.IGNORECASE) is not None


def canonical_name(device: str) -> str:
    """The name of a device in profiles: that of its data sheet for a known GPU, else the driver's."""
    sheet = matching_sheet(device)
    return device if sheet is None else sheet.name


def device_here() -> str:
    """The device of this machine as the driver calls it: its first GPU, else its processor."""
    if gpu_count() and (listed := gpus()):
        return listed[0].name
    return processor() or CPU


def sheet_of(device: str) -> DataSheet:
    """The data sheet of a device by its name in profiles; that of a CPU core if it is no known GPU."""
    return data_sheets().get(device) or matching_sheet(device) or data_sheets()[CPU]
