"""Tensors of which every rank holds consecutive rows, in ``torch.distributed.checkpoint``.

``DTensor`` knows the split of ``torch.chunk`` only; here each rank says where its rows begin. They
are written in blocks, so that neither a copy to the host nor a read needs memory for a shard.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
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
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..collectives import Group

METADATA = ".metadata"
SHARED = "shared"
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

    def whole(self) -> ChunkStorageMetadata:
        return self._chunk(self.start, self.tensor.shape)

    def _chunk(self, first: int, shape: torch.Size) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([first, *[0] * (len(shape) - 1)]), shape)

    @property
    def global_size(self) -> torch.Size:
        return torch.Size([self.total, *self.tensor.shape[1:]])


class _SavePlanner(dcp.DefaultSavePlanner):
    """Blocks of this rank's rows, and from the coordinator what all ranks share."""

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


class _Unpickler(pickle.Unpickler):
    """Metadata is pickled: of all that a pickle may ask for, only what metadata consists of."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            # The folder it was once written to; another system may not have such paths.
            return lambda *parts: "/".join(map(str, parts))
        known = (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        if module == "torch.distributed.checkpoint.metadata" and "." not in name:
            known = True
        if not known:
            raise pickle.UnpicklingError(f"metadata with {module}.{name}")
        return super().find_class(module, name)


def complete_metadata(folder: Path) -> Metadata:
    """What is in a checkpoint, if all its files are there.

    Raises:
        OSError: a file is missing or too short.
        Exception: of any kind, if the metadata are damaged.
    """
    with open(folder / METADATA, "rb") as file:
        metadata = _Unpickler(file).load()
    for place in metadata.storage_data.values():
        if place.offset + place.length > (folder / place.relative_path).stat().st_size:
            raise OSError(f"{place.relative_path} is cut off")
    return metadata


class Stored:
    """A checkpoint's folder, for reading. Nothing in here communicates.

    Attributes:
        shared: what the ranks share.
        tensors: what is known of those in it, with all their rows.

    Raises:
        Exception: of any kind that a missing or damaged file may cause.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = complete_metadata(folder)
        self._places = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: saved
            for name, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }
        self.shared: dict[str, Any] = self._load(MetadataIndex(SHARED))

    def size(self, name: str) -> torch.Size:
        return self.tensors[name].size

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].properties.dtype

    def read(self, wanted: dict[str, Rows]) -> None:
        """Fills the rows, which may be on any device."""
        for name, rows in wanted.items():
            if not rows.tensor.numel():
                continue
            items = create_read_items_for_chunk_list(name, self.tensors[name], [rows.whole()])
            for item in items:
                block = self._load(item.storage_index)
                part = _narrowed(rows.tensor.detach(), item.dest_offsets, item.lengths)
                part.copy_(_narrowed(block, item.storage_offsets, item.lengths))

    def _load(self, index: MetadataIndex) -> Any:
        place = self._places[index]
        with open(self._folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        # torch.save leaves checksums, which torch.load does not look at.
        if zipfile.ZipFile(data).testzip() is not None:
            raise zipfile.BadZipFile(f"wrong checksum in {place.relative_path}")
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)


def _narrowed(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def write(folder: Path, parts: dict[str, Rows], shared: dict[str, Any], group: Group) -> None:
    """Every rank writes its rows, the first one ``shared``; to the disk, not only to its cache.

    Raises:
        OSError: on every rank, if one could not write.
    """
    with warnings.catch_warnings():
        # Without a group there is one process, as it guesses aloud.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.save(
                {**parts, SHARED: shared},
                storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
                planner=_SavePlanner(),
                process_group=group,
            )
        except dcp.CheckpointException as error:
            rank, (mistake, _) = min(error.failures.items(), key=lambda failure: failure[0])
            raise OSError(
                f"cannot write checkpoint: {type(mistake).__name__} on rank {rank}: {mistake}"
            ) from error
