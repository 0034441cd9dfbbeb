"""Pickles of plain values, read without running any of their code.

A pickle is a program: it names callables and calls them. Here names and calls are looked up in a
table of the reader, and all others are refused. The base is the standard library's unpickler in
Python: unlike the one in C, its table of opcodes can be reduced (no instances of classes, no
registered extensions, no buffers), and its memo is a dict, where the one in C allocates up to any
index in a file. The memory of all values is in proportion to the file.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

_OPCODES = (
    "MARK STOP FRAME PROTO POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING "
    "BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE SHORT_BINUNICODE "
    "BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS GLOBAL STACK_GLOBAL BINPERSID"
)


class DamagedError(Exception):
    """A file is damaged or of another kind; the text is one line."""


class PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Lists, dicts, numbers and text; subclasses add names and calls."""

    stack: list[Any]
    append: Any
    pop_mark: Any

    def __init__(self, file: io.BytesIO, size: int, encoding: str = "ASCII") -> None:
        super().__init__(file, encoding=encoding)
        #: Characters that may yet be encoded: each has come out of a byte of the file.
        self._encoded_left = size

    def name(self, name: str) -> Any:
        """The value of a global, such as a dtype; a function for :meth:`call` stays its name."""
        raise DamagedError(f"it refers to {name[:80]}")

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        raise DamagedError(f"it calls {str(function)[:80]}")

    def new(self, cls: Any) -> Any:
        raise DamagedError(f"it has an instance of {str(cls)[:80]}")

    def set_state(self, target: Any, state: Any) -> None:
        raise DamagedError(f"it has a state for {type(target).__name__}")

    def key(self, key: Any) -> Any:
        """A key of a dict or item of a set. Hashing deep tuples would exhaust the stack."""
        plain = (str, int, float, bytes, type(None))
        items = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(item, plain) for item in items):
            raise DamagedError(f"a key of type {type(key).__name__}")
        return key

    def encode(self, arguments: tuple[Any, ...]) -> bytes:
        """Bytes, which protocol 2 stores as encoded text."""
        text, codec = arguments
        if not isinstance(text, str) or codec != "latin1":
            raise DamagedError("text in another encoding than latin1")
        self._encoded_left -= len(text)
        if self._encoded_left < 0:
            raise DamagedError("more bytes than the file has")
        return text.encode("latin1")

    def find_class(self, module: str, name: str) -> Any:
        return self.name(f"{module}.{name}")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise DamagedError("a call without arguments")
        self.append(self.call(function, arguments))

    def _newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if arguments != ():
            raise DamagedError("an instance with arguments")
        self.append(self.new(cls))

    def _build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    # The library's versions accept any object with such methods, tensors among them.

    def _setitems(self) -> None:
        self._set(self.pop_mark())

    def _setitem(self) -> None:
        self._set([self.stack.pop(-2), self.stack.pop()])

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise DamagedError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def _appends(self) -> None:
        self._add(self.pop_mark(), list, list.extend)

    def _append(self) -> None:
        self._add([self.stack.pop()], list, list.extend)

    def _additems(self) -> None:
        self._add([self.key(key) for key in self.pop_mark()], set, set.update)

    def _add(self, items: list[Any], kind: type, add: Any) -> None:
        if not isinstance(self.stack[-1], kind):
            raise DamagedError(f"items for what is no {kind.__name__}")
        add(self.stack[-1], items)

    dispatch = {  # type: ignore[assignment]
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # type: ignore[attr-defined]
        for name in _OPCODES.split()
    } | {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _newobj,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.ADDITEMS[0]: _additems,
    }
