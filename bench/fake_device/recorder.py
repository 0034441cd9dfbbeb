"""The mode under which CUDA tensors are fake, and all work of the device is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from . import operators
from .memory import Memory
from .records import Array, Tape, Work

META = torch.device("meta")
_SPARSE_PARTS = {"_indices": 0, "_values": 1, "_nnz": 2}
#: Answers what the host waits for: the operator's name and its arguments.
Answer = Callable[[str, tuple[Any, ...]], Any]


class HostWaitError(RuntimeError):
    """The host would wait for the device."""


class FakeMode(FakeTensorMode):
    """Fake tensors of the meta device, whose device is ``cuda:0`` to Python.

    A build of Torch without CUDA has no guard for its devices, and autograd, ``Tensor.to`` and
    ``out=`` of a fake tensor on such a device fail ("PyTorch is not linked with support for cuda
    devices"). To C++ the fake device is therefore "meta"; what Torch does on it, such as the
    tensors that its composite operators create, is the same as on CUDA.
    """

    # Never creates a context, whatever ``torch.cuda.is_available`` returns.
    avoid_device_init = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.allow_meta = True


class Recorder(TorchDispatchMode):
    """Records operators on fake tensors; runs those on tensors of the CPU as they are.

    Attributes:
        tape: what is recorded to; None: nothing is.
        answer: of what the host waits for; None: :class:`HostWaitError` is raised.
        stream: returns the handle of the current stream.
    """

    def __init__(self, stream: Callable[[], int], answer: Answer | None) -> None:
        super().__init__()
        self.mode = FakeMode()
        self.memory = Memory()
        self.memory.on_allocation = self._allocated
        self.tape: Tape | None = None
        self.answer, self.stream = answer, stream
        self.section = ""
        #: While Torch's own fake kernels run, fake tensors are on the meta device to Python, too.
        self.inside = 0
        self._pinned: set[int] = set()
        #: Indices and values of sparse tensors, which Torch's fake ones do not keep.
        self._sparse: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # -- tapes ------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Collects the device's work inside."""
        live = self.memory.live
        before, self.tape = self.tape, Tape(start_bytes=live, peak_bytes=live)
        try:
            yield self.tape
        finally:
            self.tape = before

    def add(self, kind: str, name: str, **fields: Any) -> None:
        if self.tape is None:
            return
        live = self.memory.live
        self.tape.work.append(
            Work(
                order=len(self.tape.work),
                kind=kind,
                name=name,
                stream=self.stream(),
                section=self.section,
                live_bytes=live,
                **fields,
            )
        )

    def _allocated(self, size: int, shape: tuple[int, ...]) -> None:
        tape = self.tape
        if tape is None:
            return
        tape.peak_bytes = max(tape.peak_bytes, self.memory.live)
        tape.allocations += 1
        tape.requested_bytes += size
        if size > tape.largest_bytes:
            tape.largest_bytes, tape.largest_shape = size, shape

    def wait(self, name: str, *args: Any) -> Any:
        """What the host waits for, from the answers."""
        if self.answer is None:
            raise HostWaitError(f"the host waits for the device: {name}")
        self.add("wait", name, launches=0)
        with unset_fake_temporarily():
            return self.answer(name, args)

    # -- operators --------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(isinstance(t, FakeTensor) for t in tensors)
        target = kwargs.get("device")
        if target is not None and target.type == "cuda":
            kwargs["device"] = target = META
        if not on_device and (target is None or target.type != "meta"):
            return self._on_host(func, args, kwargs)
        name = str(func)
        if on_device and target is not None and target.type == "cpu":
            return self._to_host(func, args, kwargs)
        if name == "aten.copy_.default" and not isinstance(args[0], FakeTensor):
            return self._into_host(*args, **kwargs)
        if operators.waits(func, args):
            return self.wait(name, *args)
        part = self._part_of_sparse(func, args)
        if part is not None:
            return part
        from_host = [t for t in tensors if not isinstance(t, FakeTensor) and t.dim()]
        if from_host and name in ("aten._to_copy.default", "aten.copy_.default"):
            self._from_host(from_host[0], bool(kwargs.get("non_blocking") or args[2:3] == (True,)))
        if name == "aten._to_copy.default" and self._is_same(args[0], kwargs):
            func, kwargs = torch.ops.aten.alias.default, {}
        result = self._run(func, *args, **kwargs)
        self._keep_sparse(func, args, result)
        self._record(func, args, kwargs, result)
        return result

    def _run(self, func: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """An operator by Torch's fake kernels."""
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1

    def _part_of_sparse(self, func: OpOverload, args: tuple[Any, ...]) -> Any:
        """Indices, values or their number of a sparse tensor; None for another operator."""
        place = _SPARSE_PARTS.get(operators.name_of(func))
        parts = None if place is None else self._sparse.get(args[0])
        if place is None or parts is None:
            return None
        if place == 2:
            return parts[0].shape[1]
        return self._run(torch.ops.aten.alias.default, parts[place])

    def _keep_sparse(self, func: OpOverload, args: tuple[Any, ...], result: Any) -> None:
        if not isinstance(result, FakeTensor) or result.layout != torch.sparse_coo:
            return
        if operators.name_of(func) == "_sparse_coo_tensor_with_dims_and_tensors":
            self._sparse[result] = args[3], args[4]
        elif args and self._sparse.get(args[0]) is not None:
            self._sparse[result] = self._sparse[args[0]]

    def _on_host(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.get("pin_memory")
        if pinned:
            kwargs["pin_memory"] = False
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
            if pinned:
                # Nothing is ever copied there: defined all the same.
                result.zero_()
                self._pinned.add(result.untyped_storage()._cdata)
        return result

    def _to_host(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy of a tensor of the device: the host waits, as its memory is not pinned."""
        return self.wait("copy to the host", *args)

    def _into_host(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not (non_blocking and self.is_pinned(target)):
            target.copy_(self.wait("copy to the host", source))
        self.add("copy", "copy to pinned memory", reads=(self.memory.array(source),))
        return target

    def _from_host(self, source: Tensor, non_blocking: bool) -> None:
        if not (non_blocking and self.is_pinned(source)):
            # Without waiting for the device's earlier work, but no capture of a graph has it.
            self.add("wait", "copy from pageable memory", launches=0)
            if self.answer is None and self.tape is not None:
                raise HostWaitError("a copy from memory of the host that is not pinned")

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    @staticmethod
    def _is_same(source: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether a conversion between devices has both on this one, and changes nothing else."""
        dtype = kwargs.get("dtype")
        return (
            isinstance(source, FakeTensor)
            and kwargs.get("device") is not None
            and kwargs.get("memory_format") is None
            and dtype in (None, source.dtype)
        )

    def _record(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        kind = operators.kind_of(func)
        arrays: dict[int, Array] = {}

        def array(tensor: Tensor) -> Array:
            found = arrays.get(id(tensor))
            if found is None:
                found = arrays[id(tensor)] = self.memory.array(tensor)
            return found

        for tensor in tree_leaves(result):
            # Allocated now, recording or not.
            if _has_memory(tensor):
                array(tensor)
        if self.tape is None or kind in ("view", "allocation"):
            return
        reads, writes = operators.operands(func, args, kwargs, result)
        read = [array(t) for t in reads if _has_memory(t)]
        written = [array(t) for t in writes if _has_memory(t)]

        def plain(value: Any) -> Any:
            return array(value) if _has_memory(value) else value

        launches = operators.launches_of(func, args, kwargs)
        if not any(t.numel for t in written):
            launches = 0
        gemm = None
        if kind == "gemm":
            gemm = operators.gemm_of(func, args, written[0], arrays)
        self.add(
            kind,
            str(func),
            reads=tuple(read),
            writes=tuple(written),
            bytes=operators.bytes_of(kind, read, written),
            launches=launches,
            gemm=gemm,
            arguments={
                "args": tree_map(plain, args),
                "kwargs": tree_map(plain, kwargs),
                "result": tree_map(plain, result),
            },
            call=func,
        )


def _has_memory(value: object) -> bool:
    """Whether it is a tensor of the device with elements of its own; a sparse one has none."""
    return isinstance(value, FakeTensor) and value.layout == torch.strided
