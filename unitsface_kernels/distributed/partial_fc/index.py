"""Index of a checkpoint's folder: file and offset of every block of rows.

``index.json`` holds it as JSON, with a checksum in a second line. The files of a save end with its
identifier, which is also in the index: a file of another save is refused before anything is read.
``.metadata`` has the same content for other readers of ``torch.distributed.checkpoint``. It is a
pickle, and the only index in folders of format 1, which :mod:`.plain_pickle` reads.
"""

from __future__ import annotations

import io
import json
import math
import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .plain_pickle import DamagedError, PlainUnpickler

INDEX, METADATA = "index.json", ".metadata"
FORMAT = 2
SHARED = "shared"
ID_BYTES = 16

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
        *(torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Place:
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Block:
    """Rows ``first:first + rows`` of a tensor, as a file of ``torch.save`` at ``place``."""

    first: int
    rows: int
    place: Place


@dataclass(frozen=True)
class Saved:
    """A tensor with all its rows, and the blocks of it in their order."""

    dtype: torch.dtype
    size: tuple[int, ...]
    blocks: list[Block]


@dataclass(frozen=True)
class Index:
    format: int
    tensors: dict[str, Saved]
    shared: Place


def write_index(folder: Path, tensors: dict[str, Saved], shared: Place, save: str) -> None:
    """Writes ``index.json`` to the disk, after all other files."""
    files: dict[str, int] = {}
    for place in (shared, *(b.place for saved in tensors.values() for b in saved.blocks)):
        end = place.offset + place.length + ID_BYTES
        files[place.file] = max(files.get(place.file, 0), end)
    content = {
        "format": FORMAT,
        "save": save,
        "files": files,
        "metadata": _checksum((folder / METADATA).read_bytes()),
        "shared": _listed(shared),
        "tensors": {
            name: {
                "dtype": str(saved.dtype).removeprefix("torch."),
                "size": saved.size,
                "blocks": [[b.first, b.rows, *_listed(b.place)] for b in saved.blocks],
            }
            for name, saved in tensors.items()
        },
    }
    text = json.dumps(content).encode() + b"\n"
    with open(folder / INDEX, "wb") as file:
        file.write(text + _checksum(text).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: Path) -> Index:
    """Reads the index; all files that it names must exist, be complete and of one save.

    Raises:
        OSError: a file is missing.
        DamagedError: one is damaged or of another save.
        Exception: any kind, for an index with a valid checksum and invalid content.
    """
    try:
        data = (folder / INDEX).read_bytes()
    except FileNotFoundError:
        return _checked(folder, _read_metadata((folder / METADATA).read_bytes()))
    content = _read_json(data)
    if _checksum((folder / METADATA).read_bytes()) != content["metadata"]:
        raise DamagedError(f"{METADATA} is damaged, or of another save than {INDEX}")
    _check_files(folder, content["files"], bytes.fromhex(content["save"]))
    tensors = {
        _text(name): Saved(
            DTYPES[_text(saved["dtype"])],
            _naturals(saved["size"]),
            [Block(first, rows, Place(*place)) for first, rows, *place in saved["blocks"]],
        )
        for name, saved in content["tensors"].items()
    }
    return _checked(folder, Index(FORMAT, tensors, Place(*content["shared"])))


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _listed(place: Place) -> list[Any]:
    return [place.file, place.offset, place.length]


def _read_json(data: bytes) -> Any:
    text, end = data[:-9], data[-9:]
    if end != _checksum(text).encode() + b"\n":
        raise DamagedError(f"{INDEX} has a wrong checksum: the file is damaged")
    content = json.loads(text)
    if content["format"] > FORMAT:
        raise DamagedError(
            f"it is of format {content['format']}, of a newer version; this one reads formats up "
            f"to {FORMAT}: update unitsface_kernels"
        )
    return content


def _check_files(folder: Path, sizes: dict[str, int], save: bytes) -> None:
    for name, size in sizes.items():
        with open(folder / _plain_name(name), "rb") as file:
            found = os.fstat(file.fileno()).st_size
            file.seek(max(0, found - ID_BYTES))
            own = file.read(ID_BYTES) == save
        if found != size:
            raise DamagedError(
                f"{name} has {found} bytes, not {size}: it is cut off or of another save"
            )
        if not own:
            raise DamagedError(f"{name} is damaged at its end, or of another save than {INDEX}")


def _checked(folder: Path, index: Index) -> Index:
    """Checks that every tensor has each row once, and every block the size of its rows."""
    places = [index.shared]
    for name, saved in index.tensors.items():
        row_bytes = math.prod(saved.size[1:]) * saved.dtype.itemsize
        end = 0
        for block in sorted(saved.blocks, key=lambda b: _natural(b.first)):
            if block.first != end or _natural(block.rows) * row_bytes > _natural(
                block.place.length
            ):
                raise DamagedError(f"{name} has not each of its rows once")
            end += block.rows
            places.append(block.place)
        if not saved.size or end != saved.size[0]:
            raise DamagedError(f"{name} has {end} rows of a size of {saved.size}")
    used: Counter[str] = Counter()
    for place in places:
        size = (folder / _plain_name(place.file)).stat().st_size
        used[place.file] += _natural(place.length)
        if _natural(place.offset) + place.length > size or used[place.file] > size:
            raise DamagedError(f"{place.file} is cut off")
    return index


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise DamagedError("a size or place that is no natural number")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(_natural(value) for value in values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DamagedError("a name that is no text")
    return value


def _plain_name(name: Any) -> str:
    """A file in the folder, not one elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise DamagedError(f"a file called {str(name)[:80]!r}")
    return name


# -- .metadata of torch.distributed.checkpoint ----------------------------------------------------

# Classes in the metadata, with their fields.
_MODULE = "torch.distributed.checkpoint."
_FIELDS = {
    f"{_MODULE}metadata.{name}": set(fields.split())
    for name, fields in {
        "Metadata": "state_dict_metadata planner_data storage_data storage_meta version",
        "TensorStorageMetadata": "properties size chunks",
        "ChunkStorageMetadata": "offsets sizes",
        "BytesStorageMetadata": "",
        "MetadataIndex": "fqn offset index",
        "StorageMeta": "checkpoint_id save_id load_id modules",
        "TensorProperties": "",
    }.items()
} | {
    f"{_MODULE}filesystem._StorageInfo": {
        *("relative_path", "offset", "length", "transform_descriptors")
    }
}
_PATHS = {
    f"{module}.{kind}Path"
    for module in ("pathlib", "pathlib._local")
    for kind in ("Posix", "Windows", "PurePosix", "PureWindows", "")
}
_FUNCTIONS = {
    "torch.Size",
    "torch.serialization._get_layout",
    f"{_MODULE}metadata._MEM_FORMAT_ENCODING",
    *_PATHS,
}


class _Instance:
    """Fields of an object, in its place. As a key of a dict it equals itself only."""

    def __init__(self, cls: str) -> None:
        self.cls = cls
        self.fields: dict[str, Any] = {}
        self.state: Any = None


class _Unpickler(PlainUnpickler):
    def key(self, key: Any) -> Any:
        return key if isinstance(key, _Instance) else super().key(key)

    def name(self, name: str) -> Any:
        if name in _FIELDS or name in _FUNCTIONS:
            return name
        dtype = DTYPES.get(name.removeprefix("torch."))
        if dtype is None or not name.startswith("torch."):
            raise DamagedError(f"metadata with {name[:80]}")
        return dtype

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function not in _FUNCTIONS:
            raise DamagedError("metadata with a call of what is no function")
        # The results of other calls are not used: layouts are strided, and folders may be moved.
        return _naturals(arguments[0]) if function == "torch.Size" else None

    def new(self, cls: Any) -> _Instance:
        if cls not in _FIELDS:
            raise DamagedError("metadata with an instance of what is no class")
        return _Instance(cls)

    def set_state(self, target: Any, state: Any) -> None:
        if not isinstance(target, _Instance) or target.state is not None:
            raise DamagedError("metadata with a state for what has none")
        target.state = state
        if isinstance(state, dict):
            if not state.keys() <= _FIELDS[target.cls]:
                raise DamagedError(f"metadata with unknown fields of {target.cls}")
            target.fields = state


def _read_metadata(data: bytes) -> Index:
    metadata = _unpickled(data)
    places = {}
    for index, info in _fields(metadata, "Metadata")["storage_data"].items():
        known, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise DamagedError("metadata of transformed files")
        values = (place["relative_path"], place["offset"], place["length"])
        offset = known.get("offset")
        at = None if offset is None else _naturals(offset)
        places[_text(known["fqn"]), at] = Place(*values)
    tensors, blocks_left = {}, len(places)
    for name, saved in metadata.fields["state_dict_metadata"].items():
        if saved.cls.endswith(".BytesStorageMetadata"):
            continue
        fields = _fields(saved, "TensorStorageMetadata")
        dtype = fields["properties"].state[0]
        if not isinstance(dtype, torch.dtype):
            raise DamagedError(f"metadata without a type of {name}")
        blocks = []
        for chunk in fields["chunks"]:
            blocks_left -= 1  # a list may be that of any number of tensors
            if blocks_left < 0:
                raise DamagedError("metadata with more chunks than places of them")
            known = _fields(chunk, "ChunkStorageMetadata")
            first = _naturals(known["offsets"])
            blocks.append(Block(first[0], known["sizes"][0], places[name, first]))
        blocks.sort(key=lambda block: block.first)
        tensors[_text(name)] = Saved(dtype, _naturals(fields["size"]), blocks)
    return Index(1, tensors, places[SHARED, None])


def _unpickled(data: bytes) -> _Instance:
    try:
        metadata = _Unpickler(io.BytesIO(data), len(data)).load()
    except DamagedError:
        raise
    except Exception as error:  # damaged files raise errors of any kind
        raise DamagedError(
            f"{METADATA} is no metadata, or damaged ({type(error).__name__})"
        ) from error
    if not isinstance(metadata, _Instance):
        raise DamagedError(f"{METADATA} is no metadata")
    return metadata


def _fields(value: Any, cls: str) -> dict[str, Any]:
    if not isinstance(value, _Instance) or not value.cls.endswith(f".{cls}"):
        raise DamagedError(f"metadata without {cls}")
    return value.fields
