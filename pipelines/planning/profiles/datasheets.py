"""The devices of datasheets.yaml, and which of them this machine has."""

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
"""How drivers begin the name of a GPU."""


@dataclass(frozen=True)
class DataSheet:
    """One device; rates are bytes or operations a second, of links in one direction."""

    name: str
    bf16: float
    fp32: float
    memory: int
    bandwidth: float
    """Of its own memory."""
    link: float
    """To the others of its machine."""
    pcie: float
    """To the machine's memory."""
    network: float
    """To other machines, for each device."""
    disk: float
    devices: int
    """Of a machine, as they are usually built."""
    source: str
    matches: tuple[str, ...] = ()

    @property
    def is_gpu(self) -> bool:
        """Whether it is no core of a CPU."""
        return self.name != CPU

    def rate(self, number: int) -> float:
        """Operations a second on numbers of so many bytes."""
        return self.bf16 if number <= 2 else self.fp32


@functools.cache
def data_sheets() -> dict[str, DataSheet]:
    """All of them by name."""
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
    """The one of a name, or of a device as its driver calls it; upper and lower case are one.

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
    if name.casefold().startswith(VENDOR) and (found := matching(name)) is not None:
        return found
    known = [*sheets, *itertools.chain.from_iterable(sheet.matches for sheet in sheets.values())]
    raise UserError(
        f"there is no data sheet of {name!r}.{did_you_mean(name.upper(), known, 3)} Known: {', '.join(sheets)}; "
        f"{FILE.name} has them."
    )


def sheet_of_machines(machines: MachinesSection) -> DataSheet:
    """The data sheet of a cluster's GPUs, with what its file says else.

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


def matching(device: str) -> DataSheet | None:
    """The data sheet of a device by the name that its driver gives; None where there is none."""
    fits = [(len(part), sheet) for sheet in data_sheets().values() for part in sheet.matches if _has(device, part)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def _has(device: str, part: str) -> bool:
    """Whether a name has these words, not as a part of others: an H1000 is no H100."""
    return re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", device, re.IGNORECASE) is not None


def name_of(device: str) -> str:
    """What a device is called here: by its data sheet where it is a GPU that has one, else as its driver calls it."""
    sheet = matching(device)
    return device if sheet is None else sheet.name


def device_here() -> str:
    """What this machine computes on, as profiles name it: its first GPU, else its processor."""
    if gpu_count() and (listed := gpus()):
        return listed[0].name
    return processor() or CPU


def sheet_of(device: str) -> DataSheet:
    """The data sheet of a device as profiles name it; a core's where it is no GPU that is known."""
    return data_sheets().get(device) or matching(device) or data_sheets()[CPU]
