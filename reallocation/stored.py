"""Reads any part of any tensor of a checkpoint on disk, which is whole or divided into a set of files for each rank.

A divided checkpoint is written by `pipeline reshard`:

    reallocation.json                     the layout, and the names and safetensors headers of the original whole files
    model-rank-R-part-P.safetensors       the parts of rank R; ranks with equal parts share the files of the first
    master/model-rank-R-part-P.safetensors    the same for the remainders to fp32, if the checkpoint has them
    config.json, tokenizer                unchanged
    origin/                               the other files of the checkpoint, including its manifest
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from contracts.errors import UserError
from contracts.fingerprint import ADAPTER
from contracts.models import MASTER, VALUE_HEAD
from contracts.weights import AGAIN, DIVIDED, StoredTensor, read_header, stored_tensors
from reallocation.layouts import REMAINDER, Division, GlobalTensor, LocalPart, RankLayout, flat_part
from reallocation.planning import PartIndex, Transfer, intersection, item_bytes, replicas, runs_in_order

RECORD = DIVIDED
ORIGIN = "origin"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
VALUE_HEAD_NAME = "value_head/weight"
"""The name of the value head's tensor next to those of the model."""


class WholeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weights file of an undivided checkpoint."""

    name: str
    header: str
    """The safetensors header, including the spaces at its end."""


class DividedRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of reallocation.json."""

    version: int
    layout: str
    key: str
    """A digest that identifies the input and the layout."""
    config: dict[str, Any]
    """The config.json of the model; for an adapter, that of its base model."""
    files: tuple[WholeFile, ...]
    ranks: dict[str, tuple[str, ...]]
    """The files of each rank that has files of its own."""
    replicas: dict[str, int]
    """For each other rank, the rank whose files it shares."""


@dataclass(frozen=True)
class StoredPart:
    """A part of a tensor, with the rank that has it and the stored tensor that holds it."""

    rank: int
    part: LocalPart
    stored: StoredTensor


class StoredModel:
    """A checkpoint directory in any layout."""

    def __init__(self, path: Path, *, base: Path | None = None) -> None:
        """Read the headers of the checkpoint's files.

        Args:
            base: for an adapter, the directory of its base model; by default the one that the adapter names.

        Raises:
            UserError: the directory is no checkpoint, or is incomplete.
        """
        self.path = path
        self.record = _read_record(path / RECORD) if (path / RECORD).is_file() else None
        if self.record is None:
            self.layout = RankLayout()
            self.config = _config_of(path, base)
            self.files = tuple(_whole_files(path))
        else:
            self.layout = RankLayout.parse(self.record.layout)
            self.config = self.record.config
            self.files = self.record.files
        self.file_tensors: dict[str, dict[str, StoredTensor]] = {
            file.name: _tensors_in(file, path / file.name) for file in self.files
        }
        self.tensors: dict[str, GlobalTensor] = {}
        for name, file_tensors in self.file_tensors.items():
            prefix = REMAINDER if name.startswith(REMAINDER) else ""
            for tensor in file_tensors.values():
                self.tensors[prefix + tensor.name] = GlobalTensor(prefix + tensor.name, tensor.dtype, tensor.shape)

    def division(self, layout: RankLayout) -> Division:
        """The division of the checkpoint by a layout.

        Raises:
            UserError: the layout does not divide it.
        """
        return Division(layout, self.config, self.tensors, str(self.path))

    @cached_property
    def sources(self) -> dict[str, tuple[StoredPart, ...]]:
        """The distinct stored parts of each tensor."""
        if self.record is None:
            parts: dict[str, tuple[StoredPart, ...]] = {}
            for file, file_tensors in self.file_tensors.items():
                for stored in file_tensors.values():
                    name = (REMAINDER if file.startswith(REMAINDER) else "") + stored.name
                    tensor = self.tensors[name]
                    parts[name] = (StoredPart(0, flat_part(tensor, 0, tensor.elements, tensor.shape), stored),)
            return parts
        division = self.division(self.layout)
        held = {int(rank): _rank_tensors(self.path, files) for rank, files in self.record.ranks.items()}
        return {
            name: tuple(self._stored_parts(tensor, division.parts(name), held)) for name, tensor in self.tensors.items()
        }

    @cached_property
    def _places(self) -> dict[str, PartIndex]:
        return {name: PartIndex([each.part for each in held]) for name, held in self.sources.items()}

    def _stored_parts(
        self, tensor: GlobalTensor, parts: Mapping[int, LocalPart], held: Mapping[int, Mapping[str, StoredTensor]]
    ) -> Iterator[StoredPart]:
        """The distinct stored parts of a tensor of a divided checkpoint."""
        for ranks in replicas(tensor, parts).values():
            rank = next((rank for rank in ranks if rank in held), ranks[0])
            stored = held.get(rank, {}).get(tensor.name)
            if stored is None or (stored.dtype, stored.shape) != (tensor.dtype, parts[rank].shape):
                raise UserError(f"{self.path} does not hold what rank {rank} has of {tensor.name}. Divide it again.")
            yield StoredPart(rank, parts[rank], stored)

    def transfers(self, name: str, part: LocalPart) -> list[Transfer]:
        """The transfers that make up a part of a tensor, by position in it; `source` is an index into `sources`."""
        item, sources = item_bytes(self.tensors[name].dtype), self._places[name]
        transfers = [
            transfer._replace(source=number, tensor=name)
            for number in sources.candidates(part)
            for transfer in intersection(sources.parts[number], part, item)
        ]
        return sorted(transfers, key=lambda each: each.target_start)

    def read(self, name: str, part: LocalPart, into: memoryview) -> None:
        """Read a part of a tensor, and no other bytes of its files.

        Args:
            into: a buffer of the part's size.
        """
        sources, transfers = self.sources[name], self.transfers(name, part)
        with _Opened(sources[transfer.source].stored.file for transfer in transfers) as files:
            for number, offset, begin, length in runs_in_order(transfers):
                stored = sources[number].stored
                read_exactly(files[stored.file], into[offset : offset + length], stored.start + begin, stored.file)

    def value_head(self) -> StoredTensor | None:
        """The value head's tensor, if the checkpoint is a policy that is its own critic."""
        for folder in (self.path, self.path / ORIGIN):
            if (folder / VALUE_HEAD).is_file():
                return read_header(folder / VALUE_HEAD)["weight"]
        return None


class _Opened:
    """A context that opens files and yields their descriptors by path."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = dict.fromkeys(paths)
        self._files: dict[Path, int] = {}

    def __enter__(self) -> dict[Path, int]:
        try:
            for path in self._paths:
                self._files[path] = os.open(path, os.O_RDONLY)
        except BaseException:
            self.__exit__()
            raise
        return self._files

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def read_exactly(descriptor: int, into: memoryview, offset: int, file: Path) -> None:
    """Fill a buffer with an open file's bytes from `offset` on."""
    while into:
        count = os.preadv(descriptor, [into], offset)
        if count == 0:
            raise UserError(f"{file} is truncated: it ends before byte {offset}. {AGAIN}")
        into, offset = into[count:], offset + count


def read_file(file: Path, into: memoryview, offset: int) -> None:
    """Fill a buffer with a file's bytes from `offset` on."""
    with _Opened([file]) as files:
        read_exactly(files[file], into, offset, file)


def header_bytes(file: Path) -> str:
    """The verbatim safetensors header of a file."""
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little")).decode()


def rank_file(rank: int, part: int) -> str:
    """The name of a weights file of a divided checkpoint."""
    return f"model-rank-{rank}-part-{part}.safetensors"


def _read_record(file: Path) -> DividedRecord:
    try:
        record = msgspec.json.decode(file.read_bytes(), type=DividedRecord)
    except msgspec.DecodeError as error:
        raise UserError(f"{file} is damaged: {error}. Divide the checkpoint again.") from error
    if record.version != 1:
        raise UserError(f"{file} has version {record.version}; this Ratchet reads version 1. Use one that wrote it.")
    names = [*(name for files in record.ranks.values() for name in files), *(each.name for each in record.files)]
    if any(name.startswith("/") or ".." in name.split("/") for name in names):
        raise UserError(f"{file} names files outside of its directory. Divide the checkpoint again.")
    return record


def _whole_files(path: Path) -> Iterator[WholeFile]:
    if (path / ADAPTER).is_file():
        if not (path / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"{path} is an adapter (PEFT) without {ADAPTER_WEIGHTS}. Save it again in safetensors.")
        files = [path / ADAPTER_WEIGHTS]
    else:
        files = sorted({tensor.file for tensor in stored_tensors(path).values()})
    for file in [*files, *sorted((path / MASTER).glob("*.safetensors"))]:
        read_header(file)
        yield WholeFile(file.relative_to(path).as_posix(), header_bytes(file))


def _tensors_in(file: WholeFile, path: Path) -> dict[str, StoredTensor]:
    """The tensors that a whole file's header lists, by position; the file itself need not exist."""
    base = 8 + len(file.header.encode())
    tensors = []
    for name, tensor in json.loads(file.header).items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            tensors.append(StoredTensor(name, tensor["dtype"], tuple(tensor["shape"]), path, base + start, base + end))
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    previous_end = base
    for tensor in tensors:
        elements = GlobalTensor(tensor.name, tensor.dtype, tensor.shape).elements
        if tensor.start != previous_end or tensor.end - tensor.start != elements * item_bytes(tensor.dtype):
            raise UserError(
                f"{path}: the bytes of {tensor.name} ({tensor.dtype}) are not {elements} whole elements right after "
                "the previous tensor. Save the model again."
            )
        previous_end = tensor.end
    return {tensor.name: tensor for tensor in tensors}


def _rank_tensors(path: Path, files: tuple[str, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not (path / name).is_file():
            raise UserError(f"{path} lacks {name}. Divide the checkpoint again.")
        prefix = REMAINDER if name.startswith(REMAINDER) else ""
        tensors.update({prefix + key: tensor for key, tensor in read_header(path / name).items()})
    return tensors


def _config_of(path: Path, base: Path | None) -> Mapping[str, Any]:
    """The config.json with the numbers of heads and layers: the model's own, or for an adapter that of its base."""
    if not path.is_dir():
        raise UserError(f"checkpoint {path} is not a directory. Give one written by save_pretrained or by Ratchet.")
    folder = path
    if (path / ADAPTER).is_file():
        named = json.loads((path / ADAPTER).read_bytes()).get("base_model_name_or_path")
        folder = base or Path(named or "")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{path} is an adapter (PEFT) of {named or 'another model'}, whose config.json says how many heads and "
                "layers there are. Give that model's directory with --base."
            )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no config.json. Give one written by save_pretrained.")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not valid JSON: {error}. Save the model again.") from error
    return dict(config)
