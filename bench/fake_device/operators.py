"""What Torch's operators ask a CUDA device for: their kind, their operands, and matmuls.

Torch has several kernels for some operators and chooses at run time; launches are those of the
usual one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from .records import Array, Gemm

_NAMES = {
    "gemm": "mm addmm addmm_ bmm baddbmm baddbmm_ mv addmv addmv_",
    "allocation": "empty empty_strided new_empty new_empty_strided empty_like",
    "fill": "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like "
    "scalar_tensor fill_ fill zero_ arange eye _foreach_zero_",
    "copy": "copy_ clone _to_copy cat stack repeat _foreach_copy_ constant_pad_nd flip roll",
    "reduction": "sum mean prod amax amin aminmax max min any all norm linalg_vector_norm cumsum "
    "logsumexp argmax argmin std var _foreach_norm dot",
    "index": "index index_select gather scatter scatter_ scatter_add scatter_add_ scatter_reduce "
    "scatter_reduce_ index_put index_put_ index_add index_add_ index_copy index_copy_ "
    "index_fill index_fill_ searchsorted take embedding isin",
    "sort": "sort argsort topk",
    # Not of the device: metadata of sparse tensors.
    "view": "_unsafe_view _reshape_alias _sparse_coo_tensor_with_dims_and_tensors "
    "_coalesced_ is_coalesced sym_size sym_stride _indices _values _nnz sparse_dim dense_dim "
    "_version is_pinned set_ record_stream",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
#: Operators whose results, or their sizes, the host has to wait for.
_DATA_DEPENDENT = (
    "_local_scalar_dense item nonzero nonzero_numpy _unique _unique2 unique_dim "
    "unique_consecutive masked_select bincount equal is_nonzero _assert_async histc"
)
DATA_DEPENDENT = frozenset(_DATA_DEPENDENT.split())
#: Launches of the usual CUDA implementation, where it is not one.
_LAUNCHES = {"sort": 4, "argsort": 4, "topk": 3, "isin": 6}
_SORTED_ACCUMULATION = 6
#: Operators that take no value from the tensors that they are given.
_FACTORIES = (
    "new_zeros new_ones new_full zeros_like ones_like full_like new_empty empty_like "
    "new_empty_strided"
)
_SHAPES_ONLY = frozenset(_FACTORIES.split())


def name_of(func: OpOverload) -> str:
    """Name of an operator without namespace and overload."""
    return func._schema.name.partition("::")[2]


def kind_of(func: OpOverload) -> str:
    """ "elementwise" for whatever is not known otherwise."""
    name = name_of(func)
    if func.namespace == "c10d":
        return "collective"
    known = _KINDS.get(name)
    if known is not None:
        return known
    returns = func._schema.returns
    if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return "view"
    return "elementwise"


def launches_of(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    name = name_of(func)
    if name in ("index_put", "index_put_"):
        accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
        return _SORTED_ACCUMULATION if accumulate else 1
    return _LAUNCHES.get(name, 1)


def waits(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether the host waits for the device, for the sake of what is in a tensor."""
    name = name_of(func)
    if name in DATA_DEPENDENT:
        return True
    if name == "repeat_interleave":
        return func._overloadname == "Tensor"
    if name in ("index", "index_put", "index_put_"):
        masks = (torch.bool, torch.uint8)
        return any(isinstance(t, Tensor) and t.dtype in masks for t in args[1])
    return False


def operands(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: object
) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that an operator reads, and that it writes."""
    reads: list[Tensor] = []
    writes = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    written = {id(t) for t in writes}
    name = name_of(func)
    if name in _SHAPES_ONLY:
        return [], writes
    overwrites = name in ("copy_", "fill_", "zero_")
    for argument, value in _named(func, args, kwargs):
        alias = argument.alias_info
        for tensor in tree_leaves(value):
            if not isinstance(tensor, Tensor):
                continue
            into = alias is not None and alias.is_write
            if into and id(tensor) not in written:
                writes.append(tensor)
            if not into or not (overwrites or argument.name == "out"):
                reads.append(tensor)
    return reads, writes


def _named(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]):
    arguments = func._schema.arguments
    yield from zip(arguments, args, strict=False)
    for argument in arguments[len(args) :]:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def bytes_of(kind: str, reads: list[Array], writes: list[Array]) -> int:
    """Every element once for each time that it is read or written."""
    written = sum(t.nbytes for t in writes)
    if kind != "index":
        return sum(t.nbytes for t in reads) + written
    # A part of what is indexed: no more than the largest of the others.
    sizes = sorted((t.nbytes for t in [*reads, *writes]), reverse=True)
    largest = min(sizes[:1], default=0)
    return sum(sizes[1:]) + min(largest, sizes[1] if len(sizes) > 1 else largest)


# --- matmuls --------------------------------------------------------------------------------------

_OPERANDS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "addmm": (1, 2),
    "addmm_": (1, 2),
    "baddbmm": (1, 2),
    "baddbmm_": (1, 2),
    "addmv": (1, 2),
    "addmv_": (1, 2),
}


def gemm_of(func: OpOverload, args: tuple[Any, ...], out: Array, arrays: dict[int, Array]) -> Gemm:
    """The matmul of an operator of kind "gemm"; ``arrays``: of its tensors, by identity."""
    name = name_of(func)
    left, right = (arrays[id(args[place])] for place in _OPERANDS[name])
    return Gemm(
        m=left.shape[-2],
        n=right.shape[-1] if len(right.shape) > 1 else 1,
        k=left.shape[-1],
        dtype=left.dtype,
        out_dtype=out.dtype,
        accumulates=name.startswith(("add", "badd")),
        left=left,
        right=right,
        out=out,
        batch=left.shape[0] if len(left.shape) == 3 else 1,
    )


def refusals(gemm: Gemm) -> list[str]:
    """Why the library would refuse a matmul, or Torch copy an operand of it first.

    The rules of ``at::native`` for cuBLAS (``cuda/Blas.cpp``): factors have one dtype, a result of
    another is float32 for factors of 16 bits, and in each matrix one dimension is contiguous and
    the other's stride is at least its length; other matrices are copied.
    """
    found = []
    if gemm.left.dtype != gemm.right.dtype:
        found.append(f"factors of {gemm.left.dtype} and {gemm.right.dtype}")
    halves = (torch.float16, torch.bfloat16)
    if gemm.out_dtype != gemm.dtype and not (
        gemm.dtype in halves and gemm.out_dtype == torch.float32
    ):
        found.append(f"a result of {gemm.out_dtype} from {gemm.dtype}")
    for name, matrix in (("left", gemm.left), ("right", gemm.right), ("out", gemm.out)):
        if not _is_blas_matrix(matrix):
            found.append(f"{name} of shape {matrix.shape} has strides {matrix.stride}")
    return found


def _is_blas_matrix(matrix: Array) -> bool:
    if len(matrix.shape) < 2 or 0 in matrix.shape:
        return True
    (rows, columns), (row, column) = matrix.shape[-2:], matrix.stride[-2:]
    by_rows = column == 1 and row >= max(columns, 1)
    by_columns = row == 1 and column >= max(rows, 1)
    # A single row or column has any stride.
    return by_rows or by_columns or (rows == 1 and column == 1) or (columns == 1 and row == 1)


def is_aligned(gemm: Gemm) -> bool:
    """Whether rows and starts of the factors are aligned to 16 bytes, as fast loads need it."""
    for matrix in (gemm.left, gemm.right):
        leading = max((s for s in matrix.stride[-2:]), default=1)
        if matrix.address % 16 or leading * matrix.dtype.itemsize % 16:
            return False
    return True
