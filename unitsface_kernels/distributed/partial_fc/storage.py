"""Tensors of which every rank holds consecutive rows, in ``torch.distributed.checkpoint``.

``DTensor`` supports the split of ``torch.chunk`` only; here each rank has its own first row. Rows
are written in blocks, so that neither a copy to the host nor a read needs memory for a shard.
"""

from __future__ import annotations

import io
import os
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from ..collectives import Group
from . import torch_files
from .index import FORMAT, INDEX, METADATA, SHARED, Block, Place, Saved, read_index, write_index
from .plain_pickle import DamagedError

BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Rows:
    """Rows ``start:start + len(tensor)`` of a tensor with ``total`` rows."""

    tensor: Tensor
    start: int
    total: int

    def blocks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        row_bytes = self.tensor.element_size() * max(1, self.tensor[:1].numel())
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(0, len(self.tensor), step):
            block = self.tensor[first : first + step]
            yield self._chunk(self.start + first, block.shape), block

    def _chunk(self, first: int, shape: torch.Size) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([first, *[0] * (len(shape) - 1)]), shape)

    @property
    def global_size(self) -> torch.Size:
        return torch.Size([self.total, *self.tensor.shape[1:]])


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans blocks of this rank's rows, and on the coordinator the values that ranks share."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, value in self.state_dict.items():
            if isinstance(value, Rows):
                items += [self._block(name, value, chunk, block) for chunk, block in value.blocks()]
            elif self.is_coordinator:
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def _block(
        self, name: str, rows: Rows, chunk: ChunkStorageMetadata, block: Tensor
    ) -> WriteItem:
        index = MetadataIndex(name, chunk.offsets)
        self._blocks[index] = block
        data = TensorWriteData(chunk, TensorProperties(dtype=block.dtype), rows.global_size)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._blocks[index] if index in self._blocks else self.state_dict[index.fqn]


class Stored:
    """A checkpoint's folder, for reading, without communication.

    Attributes:
        shared: values that the ranks share.
        tensors: index entries of the tensors with all C rows.

    Raises:
        Exception: any kind, for missing or damaged files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = read_index(folder)
        self.tensors = self._index.tensors
        self.shared: dict[str, Any] = self._load(self._index.shared)
        _check_shared(self.shared, self._index.format)

    def size(self, name: str) -> torch.Size:
        return torch.Size(self.tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, wanted: dict[str, Rows]) -> None:
        """Fills the rows, which may be on any device."""
        for name, rows in wanted.items():
            saved = self.tensors[name]
            if rows.global_size != saved.size:
                raise DamagedError(f"{name} is of size {saved.size}, not {tuple(rows.global_size)}")
            target, end = rows.tensor.detach(), rows.start + len(rows.tensor)
            for block in saved.blocks:
                first, last = max(block.first, rows.start), min(block.first + block.rows, end)
                if first < last:
                    values = self._block(saved, block)[first - block.first : last - block.first]
                    target[first - rows.start : last - rows.start].copy_(values)

    def _block(self, saved: Saved, block: Block) -> Tensor:
        values = self._load(block.place)
        size = (block.rows, *saved.size[1:])
        if not isinstance(values, Tensor) or (values.dtype, values.shape) != (saved.dtype, size):
            raise DamagedError(f"{block.place.file} does not hold the rows that the index says")
        return values

    def _load(self, place: Place) -> Any:
        with open(self._folder / place.file, "rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        try:
            return torch_files.read(io.BytesIO(data), len(data))
        except DamagedError as error:
            raise DamagedError(f"{place.file}: {error}") from error


def _check_shared(shared: Any, index_format: int) -> None:
    """Checks all types, so that readers need not."""
    if not isinstance(shared, dict):
        raise DamagedError("what the ranks share is missing")
    if shared.get("format") != index_format:
        wanted = f"{INDEX} is missing" if index_format < FORMAT else "files of another format"
        raise DamagedError(f"format {shared.get('format')} of the ranks' part: {wanted}")
    tensors, optimizer, step = shared.get("tensors"), shared.get("optimizer"), shared.get("step")
    fine = _all(shared.get("identity"), dict, str | int | float | bool | None)
    fine = fine and type(step) is int and 0 <= step < 2**62
    fine = fine and "extra" in shared and _all(tensors, dict, Tensor)
    if optimizer is not None:
        fine = fine and isinstance(optimizer, dict) and _all(optimizer.get("state"), dict, dict)
        fine = fine and _all(optimizer.get("param_groups"), list, dict)
        fine = fine and _all([g.get("params") for g in optimizer["param_groups"]], list, list)
    if not fine:
        raise DamagedError("what the ranks share is not that of a checkpoint")


def _all(values: Any, kind: type, item: Any) -> bool:
    if not isinstance(values, kind):
        return False
    items: Any = values.values() if isinstance(values, dict) else values
    return all(isinstance(value, item) for value in items)


@dataclass(frozen=True)
class _Part:
    """Prefix of a rank's file names, and the identifier at the end of its files."""

    prefix: str
    save: str


class _Writer(dcp.FileSystemWriter):
    """Files end with the save's identifier, and the index is written beside the metadata."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self._folder = folder

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._save = uuid.uuid4().hex
        return [
            replace(plan, storage_data=_Part(f"__{rank}_", self._save))
            for rank, plan in enumerate(plans)
        ]

    def write_data(
        self, plan: SavePlan, planner: dcp.SavePlanner
    ) -> torch.futures.Future[list[WriteResult]]:
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.wait()}:
            _append(self._folder / name, bytes.fromhex(plan.storage_data.save))
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        _append(self._folder / METADATA, b"")
        places = {
            result.index: Place(info.relative_path, info.offset, info.length)
            for result in chain(*results)
            for info in (result.storage_data,)
        }
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            if isinstance(saved, TensorStorageMetadata):
                blocks = [
                    Block(c.offsets[0], c.sizes[0], places[MetadataIndex(name, c.offsets)])
                    for c in saved.chunks
                ]
                blocks.sort(key=lambda block: block.first)
                tensors[name] = Saved(saved.properties.dtype, tuple(saved.size), blocks)
        write_index(self._folder, tensors, places[MetadataIndex(SHARED)], self._save)


def _append(path: Path, data: bytes) -> None:
    """Appends and flushes to the disk."""
    with open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write(folder: Path, parts: dict[str, Rows], shared: dict[str, Any], group: Group) -> None:
    """Every rank writes its rows, the first one ``shared`` too; flushed to the disk.

    Raises:
        OSError: on every rank, if one could not write.
    """
    with warnings.catch_warnings():
        # Without a group there is one process, which dcp.save assumes with a warning.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.save(
                {**parts, SHARED: shared},
                storage_writer=_Writer(folder),
                planner=_SavePlanner(),
                process_group=group,
            )
        except dcp.CheckpointException as error:
            rank, (mistake, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise OSError(
                f"cannot write checkpoint: {type(mistake).__name__} on rank {rank}: {mistake}"
            ) from error
