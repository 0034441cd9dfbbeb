"""Pickles of lists, numbers, byte strings and numpy arrays, read without running any of their code.

The reader is that of the package's checkpoints. Arrays stay bytes with a checked shape, so that not
even numpy's own unpickling (dtypes, object arrays) gets at the file.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import unitsface_kernels as uk
from train.errors import UserError, reported

DamagedError = uk.partial_fc.DamagedError

# Names that numpy's and Python's own pickles of arrays and bytes hold, old and new.
_NAMES = {"numpy.ndarray", "numpy.dtype", "_codecs.encode"} | {
    f"numpy.{core}.{name}"
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
}
_MOST_OPCODES = 1_000_000  # and one for 16 bytes
_MOST_DIMENSIONS = 64  # numpy's own limit


@dataclass
class DType:
    """Booleans and integers only: nothing that holds references."""

    code: str
    order: str = "<"

    def values(self, data: bytes) -> NDArray[Any]:
        return np.frombuffer(data, np.dtype(self.order + self.code))


@dataclass
class Array:
    """The contents of a numpy array, never made one here."""

    data: bytes = b""
    dtype: DType | None = None

    def set(self, shape: Any, dtype: Any, data: Any) -> Array:
        if not isinstance(data, bytes) or not isinstance(dtype, DType):
            raise DamagedError("an array of objects")
        # Bounded, or the product of many long numbers would take hours.
        whole = isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
        if not whole or math.prod(shape) * int(dtype.code[1]) != len(data):
            raise DamagedError("an array whose shape is not that of its data")
        self.data, self.dtype = data, dtype
        return self

    def values(self) -> NDArray[Any]:
        """Flat."""
        return np.zeros(0) if self.dtype is None else self.dtype.values(self.data)


def _text(value: Any) -> str:
    """A string of Python 3, or of Python 2, which arrives as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):  # of nested lists the text may have no end
        raise DamagedError(f"text expected, {type(value).__name__} found")
    return value


class _Opcodes(dict[int, Any]):
    """The table of opcodes, for a number of them: one byte of a file may make a list of 60."""

    left = 0

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise DamagedError("more values than such a file has")
        return super().__getitem__(code)


class _Unpickler(uk.partial_fc.PlainUnpickler):
    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file, len(data), encoding="bytes")
        self.dispatch = _Opcodes(type(self).dispatch)  # type: ignore[misc]
        # An image takes some 15, and has hundreds of bytes.
        self.dispatch.left = _MOST_OPCODES + len(data) // 16

    def name(self, name: str) -> str:
        if name not in _NAMES:
            module, _, last = name.rpartition(".")
            raise DamagedError(f"it refers to {module[:60]}.{last[:60]}")
        return name

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not isinstance(function, str) or function not in _NAMES:
            raise DamagedError("a call of what is no function")
        match function.rpartition(".")[2]:
            case "dtype":
                code = _text(arguments[0])
                if not re.fullmatch("b1|[iu][1248]", code):
                    raise DamagedError(f"an array of dtype {code[:20]!r}")
                return DType(code)
            case "_reconstruct":
                if arguments[0] != "numpy.ndarray":
                    raise DamagedError("an array of another class than numpy.ndarray")
                return Array()
            case "_frombuffer":
                data, dtype, shape, _ = arguments
                return Array().set(shape, dtype, data)
            case "scalar":
                return Array().set((), *arguments).values().item()
            case "encode":
                return self.encode(arguments)
        raise DamagedError(f"a call of {function}")

    def set_state(self, target: Any, state: Any) -> None:
        match target, state:
            case DType(), (_, order, *_) if _text(order) in ("<", ">", "|", "="):
                target.order = _text(order)
            case Array(), (_, shape, dtype, _, data):
                target.set(shape, dtype, data)
            case _:
                raise DamagedError(f"an unknown state of {type(target).__name__}")

    def _bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    dispatch = uk.partial_fc.PlainUnpickler.dispatch | {pickle.BYTEARRAY8[0]: _bytearray8}


def read_plain(path: Path) -> Any:
    """Lists, tuples, numbers, bytes, text and :class:`Array` out of a pickle.

    Raises:
        UserError: if the file cannot be read, is damaged, or holds anything else.
    """
    with reported(f"cannot read {path}"):
        data = path.read_bytes()
    unpickler = _Unpickler(data)
    try:
        return unpickler.load()
    except Exception as error:  # of a damaged pickle, of many kinds
        at = unpickler.file.tell()
        raise UserError(f"{path} refused near byte {at}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, (DamagedError, pickle.UnpicklingError)):
        return f"{error}; expected a pickle of lists, numbers, byte strings and numpy arrays"
    if isinstance(error, KeyError) and isinstance(error.args[0], int):  # not in the table
        return f"no opcode {error.args[0]:#04x} in a pickle of plain values"
    if isinstance(error, EOFError):
        return "it is cut off"
    return f"not a pickle of plain values, or damaged ({type(error).__name__})"
