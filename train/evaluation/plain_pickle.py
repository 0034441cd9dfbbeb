"""Pickles of lists, numbers, byte strings and numpy arrays, read without running any of their code.

A pickle is a program: it names callables and calls them. Here every name stands for a marker of
ours, and only markers are called; what they build is checked byte by byte by the code below, so
that not even numpy's own unpickling (dtypes, object arrays) sees the file. This is the standard
library's unpickler in Python, not the one in C, for three reasons: its table of opcodes can be cut
down to those that such values need (no persistent ids, no registered extensions, which the one in C
takes from a cache without asking, no instances), calls and state go through methods that can be
replaced, and its memo is a dict, where the other allocates whatever index the file claims.
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

from train.errors import UserError

_OPCODES = (
    "MARK STOP FRAME PROTO GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING "
    "SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE BINUNICODE "
    "BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS GLOBAL "
    "STACK_GLOBAL"
)

# Names that numpy's and Python's own pickles of arrays and bytes hold, old and new.
_NAMES = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")
        for module, name in (
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
        )
    },
}
_MOST_OPCODES = 1_000_000  # and one for 16 bytes
_MOST_DIMENSIONS = 64  # numpy's own limit
_DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    MemoryError,
)


@dataclass(frozen=True)
class Marker:
    """An allowed name."""

    name: str


@dataclass
class DType:
    """Booleans and integers only: nothing that holds references."""

    code: str
    order: str = "<"

    def set(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or _text(state[1]) not in tuple("<>|="):
            raise pickle.UnpicklingError("a dtype with an unknown state")
        self.order = _text(state[1])

    def values(self, data: bytes) -> NDArray[Any]:
        return np.frombuffer(data, np.dtype(self.order + self.code))


@dataclass
class Array:
    """The contents of a numpy array, never made one here."""

    data: bytes = b""
    shape: tuple[int, ...] = (0,)
    dtype: DType | None = None

    def set(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array with an unknown state")
        _, shape, dtype, _, data = state
        if not isinstance(data, bytes) or not isinstance(dtype, DType):
            raise pickle.UnpicklingError("an array of objects")
        # Bounded, or the product of many long numbers would take hours.
        whole = isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
        if not whole or math.prod(shape) * int(dtype.code[1]) != len(data):
            raise pickle.UnpicklingError("an array whose shape is not that of its data")
        self.data, self.shape, self.dtype = data, shape, dtype

    def values(self) -> NDArray[Any]:
        """Flat."""
        return np.zeros(0) if self.dtype is None else self.dtype.values(self.data)


def _text(value: Any) -> str:
    """A string of Python 3, or of Python 2, which arrives as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):  # of nested lists the text may have no end
        raise pickle.UnpicklingError(f"text expected, {type(value).__name__} found")
    return value


class _Opcodes(dict[int, Any]):
    """The table of opcodes, for a number of them: one byte of a file may make a list of 60."""

    left = 0

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError("more values than such a file has")
        return super().__getitem__(code)


class _Unpickler(pickle._Unpickler):
    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)
        super().__init__(self.file, encoding="bytes")
        self.dispatch = _Opcodes(type(self).dispatch)  # type: ignore[misc]
        # An image takes some 15, and has hundreds of bytes.
        self.dispatch.left = _MOST_OPCODES + len(data) // 16
        # Each character came out of at least a byte of the file. A file that has one string
        # encoded over and over would fill the memory.
        self.encoded_left = len(data)

    def find_class(self, module: str, name: str) -> Marker:
        try:
            return Marker(_NAMES[module, name])
        except KeyError:
            asked = f"{module[:60]}.{name[:60]}"
            raise pickle.UnpicklingError(f"it asks for {asked}") from None

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Marker) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call of what is no function")
        self.append(self._call(function.name, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (Array, DType)):
            raise pickle.UnpicklingError("state for what has none")
        target.set(state)

    def bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "dtype":
            code = _text(arguments[0])
            if not re.fullmatch("b1|[iu][1248]", code):
                raise pickle.UnpicklingError(f"an array of dtype {code[:20]!r}")
            return DType(code)
        if name == "_reconstruct":
            if arguments[0] != Marker("ndarray"):
                raise pickle.UnpicklingError("an array of another class than numpy.ndarray")
            return Array()
        if name == "_frombuffer":
            data, dtype, shape, _ = arguments
            array = Array()
            array.set((1, shape, dtype, False, data))
            return array
        if name == "scalar":
            dtype, data = arguments
            if not isinstance(dtype, DType) or not isinstance(data, bytes):
                raise pickle.UnpicklingError("a number that is an object")
            return dtype.values(data).item()
        if name == "encode":
            text, codec = arguments
            if not isinstance(text, str) or codec != "latin1":
                raise pickle.UnpicklingError("text in another encoding than latin1")
            self.encoded_left -= len(text)
            if self.encoded_left < 0:
                raise pickle.UnpicklingError("more bytes than the file has")
            return text.encode("latin1")
        raise pickle.UnpicklingError(f"a call of {name}")

    dispatch = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _OPCODES.split()
    } | {pickle.REDUCE[0]: reduce, pickle.BUILD[0]: build, pickle.BYTEARRAY8[0]: bytearray8}


def read_plain(path: Path) -> Any:
    """Lists, tuples, numbers, bytes, text and :class:`Array` out of a pickle.

    Raises:
        UserError: if the file cannot be read, is damaged, or holds anything else.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    unpickler = _Unpickler(data)
    try:
        return unpickler.load()
    except _DAMAGED as error:
        at = unpickler.file.tell()
        raise UserError(f"{path} refused near byte {at}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return f"{error}; expected a pickle of lists, numbers, byte strings and numpy arrays"
    if isinstance(error, KeyError) and isinstance(error.args[0], int):  # not in the table
        return f"no opcode {error.args[0]:#04x} in a pickle of plain values"
    if isinstance(error, EOFError):
        return "it is cut off"
    return f"not a pickle of plain values, or damaged ({type(error).__name__})"
