"""A recorded step on real tensors of the CPU, as a captured graph would be replayed.

Everything that was recorded is done again in its order, on other data: operators by Torch, kernels
of the extension by a build of them for the CPU, Triton kernels by its interpreter. Nothing of the
package's Python runs, so a value that the host had put in from the data would be the old one.
Memory that was not written is NaN, or -1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .launches import Arguments
from .memory import Memory
from .records import Array, Tape, Work

_ALIGNMENT = 64


class Replay:
    """Real memory for the allocations of a tape.

    Args:
        tape: without waits.
        memory: of the device it was recorded on.
        native: extension whose ``cuda`` runs kernels on memory of the CPU; None: there is none.
    """

    def __init__(self, tape: Tape, memory: Memory, native: Any = None) -> None:
        self._tape, self._memory, self._native = tape, memory, native
        self._storages: dict[int, Tensor] = {}

    def tensor(self, array: Array) -> Tensor:
        """The real tensor at the place of a recorded one."""
        storage = self._storages.get(array.storage)
        if storage is None:
            # All bits set: NaN in every floating-point type.
            size = self._memory.size_of(array.storage)
            storage = torch.full((size + _ALIGNMENT,), 0xFF, dtype=torch.uint8)
            storage = storage[-storage.data_ptr() % _ALIGNMENT :][:size]
            self._storages[array.storage] = storage
        size = storage.numel() // array.dtype.itemsize * array.dtype.itemsize
        elements = storage[:size].view(array.dtype)
        return elements.as_strided(
            array.shape, array.stride, elements.storage_offset() + array.offset
        )

    def write(self, array: Array, values: Tensor) -> None:
        """Puts values into memory, such as those of an input."""
        self.tensor(array).copy_(values)

    @torch.no_grad()
    def run(self) -> None:
        """Does everything that was recorded."""
        for work in self._tape.work:
            if work.kind == "wait":
                raise ValueError(
                    f"a step that waits for the device cannot be replayed: {work.name}"
                )
            if work.kind == "native":
                self._run_native(work)
            elif work.kind == "triton":
                arguments = self._real(list(work.arguments.values()))
                work.call[(work.programs,)](*arguments, **work.options)
            elif work.kind != "event" and work.call is not None:
                self._run_operator(work)

    def _real(self, values: Any) -> Any:
        return tree_map(lambda v: self.tensor(v) if isinstance(v, Array) else v, values)

    def _run_native(self, work: Work) -> None:
        def pointer(value: Any) -> Any:
            if not (isinstance(value, tuple) and len(value) == 2 and value[0]):
                return value
            array = self._memory.find(*value)
            return self.tensor(array).data_ptr(), value[1]

        given = []
        for argument in work.options["given"]:
            if isinstance(argument, Arguments):
                values = {name: pointer(value) for name, value in argument.values.items()}
                given.append(getattr(self._native, argument.type)(**values))
            else:
                given.append(pointer(argument))
        getattr(self._native.cuda, work.call)(*given, 0)

    def _run_operator(self, work: Work) -> None:
        args, kwargs = self._real(work.arguments["args"]), self._real(work.arguments["kwargs"])
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if work.gemm is not None and work.gemm.out_dtype != work.gemm.dtype:
            result: Any = _mixed(work, args)
        else:
            result = work.call(*args, **kwargs)
        placed = tree_leaves(work.arguments["result"])
        for array, value in zip(placed, tree_leaves(result), strict=True):
            if isinstance(array, Array):
                target = self.tensor(array)
                if target.data_ptr() != value.data_ptr():
                    target.copy_(value)


def _mixed(work: Work, args: tuple[Any, ...]) -> Tensor:
    """A matmul of 16-bit factors into float32, which the CPU does not have."""
    *total, left, right = (a for a in args if isinstance(a, Tensor))
    product = torch.mm(left.float(), right.float())
    return product if not total else total[0] + product
