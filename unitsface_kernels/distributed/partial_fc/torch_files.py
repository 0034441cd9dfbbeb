"""Files of ``torch.save``, read within their own size, with their checksums compared.

``torch.load`` compares no checksums, accepts any sizes and strides over a storage (a tensor of
terabytes over four bytes, which its first copy allocates), and unpacks compressed records. Here
every record is read once with its stated length, a tensor has at most the elements of its storage,
and all tensors together have at most a few times the size of the file.

Both formats are read: ZIP archives (``data.pkl`` and a record per storage, each with a CRC32), and
the plain sequence of pickles before Torch 1.6, which has no checksums.
"""

from __future__ import annotations

import collections
import contextlib
import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .plain_pickle import DamagedError, PlainUnpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CHUNK = 2**24
# Tied weights are stored once; a copy of the values may hold them once per use.
_SHARED = 8
_DEPTH = 64
_DTYPES = {
    name: value
    for name in dir(torch)
    if isinstance(value := getattr(torch, name), torch.dtype)
    and not value.is_complex
    # Quantized tensors have more than their elements.
    and not re.match("qu?int|bits", str(value).removeprefix("torch."))
} | {"complex64": torch.complex64, "complex128": torch.complex128}
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
_FUNCTIONS = {
    "_codecs.encode",
    "__builtin__.set",
    "builtins.set",
    "builtins.complex",
    "__builtin__.complex",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}


@dataclass
class _Storage:
    dtype: torch.dtype
    data: Tensor  # of bytes


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


class _Unknown(str):
    """A name that is not known here; what it would make is a dict of its items, with no state."""


class _Unpickler(PlainUnpickler):
    def __init__(
        self, file: io.BytesIO, size: int, storages: Storages, *, unknown: bool = False
    ) -> None:
        super().__init__(file, size)
        self._storages, self._unknown = storages, unknown

    def name(self, name: str) -> Any:
        if name in _FUNCTIONS:
            return name
        module, _, last = name.rpartition(".")
        if module == "torch" and last in _DTYPES:
            return _DTYPES[last]
        kind = last.removesuffix("Storage")
        if module in ("torch", "torch.storage") and last != kind and kind in _STORAGES:
            return _StorageType(_STORAGES[kind])
        if self._unknown:
            return _Unknown(name)
        raise DamagedError(
            f"it refers to {name[:80]}; a file of tensors and plain values is expected, such as "
            "torch.save(model.state_dict(), FILE) writes"
        )

    def persistent_load(self, place: Any) -> _Storage:
        kind, storage_type, key, _, count = place[:5]
        if kind != "storage" or (len(place) > 5 and place[5] is not None):
            raise DamagedError("a storage of an unknown kind")
        if not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise DamagedError("a storage without type or name")
        dtype = storage_type.dtype
        return _Storage(dtype, self._storages.get(key, _natural(count) * dtype.itemsize, dtype))

    def new(self, cls: Any) -> Any:
        return {} if isinstance(cls, _Unknown) else super().new(cls)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if isinstance(function, _Unknown):
            return {}
        if not isinstance(function, str) or function not in _FUNCTIONS:
            raise DamagedError("a call of what is no function")
        name = function.rsplit(".", 1)[-1]
        if name.startswith("_rebuild_tensor"):
            return self._tensor(*arguments, with_dtype=name.endswith("v3"))
        if name == "_rebuild_parameter":
            if not isinstance(arguments[0], Tensor):
                raise DamagedError("a parameter without a tensor")
            return arguments[0]
        if name == "encode":
            return self.encode(arguments)
        if name == "Size":
            return torch.Size([_natural(n) for n in arguments[0]])
        if name == "device":
            return torch.device(*arguments)
        if name == "complex":
            real, imaginary = arguments
            return complex(float(real), float(imaginary))
        if name == "set":
            return {self.key(key) for items in arguments for key in items}
        made: dict[Any, Any]
        made = collections.Counter() if name == "Counter" else collections.OrderedDict()
        for items in arguments:
            for key, value in items.items() if isinstance(items, dict) else items:
                made[self.key(key)] = value
        return made

    def set_state(self, target: Any, state: Any) -> None:
        """Versions of a state dict's modules, its only attribute."""
        if self._unknown and type(target) is dict:
            return
        if not isinstance(target, collections.OrderedDict) or not isinstance(state, dict):
            raise DamagedError(f"a state for {type(target).__name__}")
        if "_metadata" in state:
            target._metadata = state["_metadata"]  # type: ignore[attr-defined]

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        dtype: Any = None,
        metadata: Any = None,
        *,
        with_dtype: bool,
    ) -> Tensor:
        if not isinstance(storage, _Storage) or len(size) != len(stride):
            raise DamagedError("a tensor without storage or strides")
        kind = dtype if with_dtype else storage.dtype
        if not isinstance(kind, torch.dtype):
            raise DamagedError("a tensor without a type")
        size, stride = [_natural(n) for n in size], [_natural(n) for n in stride]
        room, elements = storage.data.numel() // kind.itemsize, math.prod(size)
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if elements > room or (elements and _natural(offset) + reach > room):
            raise DamagedError(f"a tensor of size {_shown(size)} in a storage of {room} elements")
        tensor = torch.empty(0, dtype=kind)
        if not elements:
            return tensor.reshape(size)
        return tensor.set_(storage.data.untyped_storage(), offset, size, stride)  # type: ignore[arg-type]


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise DamagedError("a size that is no natural number")
    return value


def _shown(size: list[int]) -> str:
    return f"({', '.join(map(str, size[:8]))}{', ...' if len(size) > 8 else ''})"


class Storages:
    """The storages of a file by their names, each of which is read or allocated once."""

    def __init__(self, left: int) -> None:
        self._left = left
        self._known: dict[str, tuple[torch.dtype, Tensor]] = {}

    def get(self, key: str, size: int, dtype: torch.dtype) -> Tensor:
        if key not in self._known:
            self._left -= size
            if self._left < 0:
                raise DamagedError("larger storages than the file has room for")
            self._known[key] = dtype, self.load(key, size, dtype)
        found = self._known[key][1]
        if found.numel() < size:
            raise DamagedError("a storage of two sizes")
        return found

    def load(self, key: str, size: int, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


class _Archive(Storages):
    """A ZIP archive of ``torch.save``, with nothing in it packed or encrypted."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(size)
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        packed = any(e.compress_type != zipfile.ZIP_STORED or e.flag_bits & 1 for e in entries)
        if packed or sum(entry.file_size for entry in entries) > size:
            raise DamagedError("packed records, which torch.save does not write")
        # torch.serialization.set_crc32_options(False) writes none.
        self._checked = any(entry.CRC for entry in entries)
        roots = [e.filename[: -len("data.pkl")] for e in entries if e.filename.endswith("data.pkl")]
        if len(roots) != 1:
            raise DamagedError("an archive without data.pkl, or with several")
        self._root = roots[0]
        order = self._root + "byteorder"
        self._swapped = order in self._zip.namelist() and self.record("byteorder") == b"big"

    def record(self, name: str) -> bytes:
        with self._open(name) as record:
            return record.read()

    def load(self, key: str, size: int, dtype: torch.dtype) -> Tensor:
        data = torch.empty(size, dtype=torch.uint8)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        name = f"data/{key}"
        with self._open(name) as record:
            if self._zip.getinfo(self._root + name).file_size != size:
                raise DamagedError(f"record {name[:80]} is not of {size} bytes")
            for start in range(0, size, _CHUNK):
                part = view[start : start + _CHUNK]
                if record.readinto(part) != len(part):  # type: ignore[attr-defined]
                    raise DamagedError(f"record {name[:80]} is cut off")
            record.read()  # the end of the record: compares the checksum
        if self._swapped:
            data.untyped_storage().byteswap(dtype)
        return data

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with self._zip.open(self._root + name) as record:
                if not self._checked:
                    record._expected_crc = None  # type: ignore[attr-defined]
                yield record
        except zipfile.BadZipFile as error:
            wrong = f"record {name[:80]} has a wrong checksum: the file is damaged"
            raise DamagedError(wrong if "CRC" in str(error) else str(error)) from error
        except KeyError as error:
            raise DamagedError(f"record {name[:80]} is missing") from error


class _Sequence(Storages):
    """Storages that follow the pickles; zeros until :meth:`fill`."""

    def load(self, key: str, size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8)

    def fill(self, file: io.BytesIO, keys: Any) -> None:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise DamagedError("a list of storages that is none")
        if set(keys) != self._known.keys():
            raise DamagedError("a list of storages that is not that of the tensors")
        for key in keys:
            dtype, data = self._known[key]
            (count,) = struct.unpack("<q", file.read(8))
            content = file.read(data.numel())
            if count * dtype.itemsize != data.numel() or len(content) != data.numel():
                raise DamagedError("the file is cut off")
            data.numpy()[:] = bytearray(content)


def read(file: BinaryIO, size: int, *, unknown: bool = False) -> Any:
    """Reads a file of ``size`` bytes, tensors on the CPU; parameters become tensors.

    With ``unknown``, dicts stand in for objects of other types, of which nothing is executed.

    Raises:
        OSError: it cannot be read.
        DamagedError: with the reason, in one line.
    """
    try:
        if file.read(4) == b"PK\x03\x04":
            file.seek(0)
            archive = _Archive(file, size)
            pickled = archive.record("data.pkl")
            values = _Unpickler(io.BytesIO(pickled), size, archive, unknown=unknown).load()
        else:
            file.seek(0)
            values = _read_sequence(io.BytesIO(file.read()), size, unknown)
        _check_extent(values, size)
        return values
    except (OSError, DamagedError):
        raise
    except Exception as error:  # damaged files raise errors of any kind
        reason = "it is cut off" if isinstance(error, EOFError) else _reason(error)
        raise DamagedError(f"not a file of torch.save, or damaged ({reason})") from error


def _check_extent(values: Any, size: int) -> None:
    """Bounds the work of walking through the values or copying them: repeated uses add up."""
    left = tensors_left = _SHARED * size
    open_values = [(values, 0)]
    while open_values:
        value, depth = open_values.pop()
        left -= 1
        if isinstance(value, Tensor):
            tensors_left -= value.nbytes
        elif isinstance(value, dict | list | tuple):
            items = value.values() if isinstance(value, dict) else value
            open_values += [(item, depth + 1) for item in items]
        if left < len(open_values) or tensors_left < 0 or depth > _DEPTH:
            raise DamagedError(
                "values that are nested or repeated beyond what the file has room for"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError) and isinstance(error.args[0], int):
        return f"no opcode {error.args[0]:#04x}"
    text = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}{': ' if text else ''}{text[:120]}"


def _read_sequence(file: io.BytesIO, size: int, unknown: bool) -> Any:
    if not size:
        raise DamagedError("empty file")
    storages = _Sequence(size)
    if _Unpickler(file, size, storages).load() != _LEGACY_MAGIC:
        raise DamagedError("not a file of torch.save")
    if _Unpickler(file, size, storages).load() != _LEGACY_PROTOCOL:
        raise DamagedError("an unknown protocol of torch.save")
    system = _Unpickler(file, size, storages).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise DamagedError("another order of bytes")
    values = _Unpickler(file, size, storages, unknown=unknown).load()
    storages.fill(file, _Unpickler(file, size, storages).load())
    return values


def read_file(path: str | os.PathLike[str], *, unknown: bool = False) -> Any:
    """:func:`read` of the file at ``path``."""
    with open(path, "rb") as file:
        return read(file, os.fstat(file.fileno()).st_size, unknown=unknown)
