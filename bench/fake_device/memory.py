"""Memory of a fake device: addresses, and how much is allocated."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from .records import Array

#: Torch's allocator rounds sizes up to this.
ALIGNMENT = 512
FIRST_ADDRESS = 1 << 32


class Memory:
    """Allocations, identified by the storages of fake tensors; no address is used twice.

    Attributes:
        live: bytes that are allocated.
        on_allocation: called with the bytes and the shape of every new allocation.
    """

    def __init__(self) -> None:
        self.live = 0
        self.on_allocation: Callable[[int, tuple[int, ...]], None] = lambda size, shape: None
        self._numbers: dict[int, int] = {}
        self._bases: list[int] = [FIRST_ADDRESS]
        self._sizes: list[int] = [0]
        #: The tensor whose address was last read, by address and bytes.
        self._pointers: dict[tuple[int, int], Array] = {}

    def array(self, tensor: Tensor) -> Array:
        """The record of a fake tensor; its storage counts as allocated from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        number = self._numbers.get(key)
        if number is None:
            number = self._new(storage, key, tuple(tensor.shape))
        offset = tensor.storage_offset()
        return Array(
            storage=number,
            offset=offset,
            address=self._bases[number] + offset * tensor.element_size(),
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()),
            dtype=tensor.dtype,
        )

    def address(self, tensor: Tensor) -> int:
        """Stands in for ``tensor.data_ptr()``."""
        array = self.array(tensor)
        self._pointers[array.address, tensor.nbytes] = array
        return array.address

    def _new(self, storage: torch.UntypedStorage, key: int, shape: tuple[int, ...]) -> int:
        size = storage.nbytes()
        number = len(self._bases)
        self._bases.append(self._bases[-1] + max(rounded(self._sizes[-1]), ALIGNMENT))
        self._sizes.append(size)
        self._numbers[key] = number
        self.live += rounded(size)
        # Called when the last tensor on it is gone, as the allocator would be.
        weakref.finalize(storage, self._free, key, size).atexit = False
        self.on_allocation(rounded(size), shape)
        return number

    def _free(self, key: int, size: int) -> None:
        del self._numbers[key]
        self.live -= rounded(size)

    def find(self, address: int, size: int) -> Array:
        """The tensor at an address; ``size`` bytes if no tensor's was read.

        Raises:
            ValueError: they do not lie within one allocation.
        """
        known = self._pointers.get((address, size))
        if known is not None:
            return known
        number = bisect_right(self._bases, address) - 1
        offset = address - self._bases[number]
        if number < 1 or offset + size > self._sizes[number]:
            raise ValueError(f"{size} bytes at {address:#x} lie in no allocation")
        return Array(number, offset, address, (size,), (1,), torch.uint8)

    def size_of(self, number: int) -> int:
        return self._sizes[number]


def rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
