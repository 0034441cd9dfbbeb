"""Which engine serves CUDA tensors, and the check that the kernels which multiply themselves pass.

``UNITSFACE_FUSED_CUDA=1`` selects these. No device has been seen to run them: before the first use
on a device, they and cuBLAS with the kernels on its products compute one small case of each kind.
The verdict is kept in the package's cache folder, one for each device, driver and build.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ... import cache
from ..._version import __version__
from ...losses import REGISTRY, LossSpec
from ..streaming import CallConfig, CallTensors, driver, make_call
from . import loader
from .cuda_engine import CudaEngine
from .fused_engine import FusedEngine

Engine = type[CudaEngine]

#: Of the norm of a result. Sums are added in another order; operands and gradients are the same.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# More than a tile in every direction, and a last one in part; depths whose rows are aligned or not.
_ROWS, _COLUMNS, _DEPTHS = 141, 150, (72, 37)


def engine_class(device: torch.device) -> Engine:
    """Raises RuntimeError if fused kernels are selected and do not compute what cuBLAS does."""
    if os.environ.get("UNITSFACE_FUSED_CUDA") != "1":
        return CudaEngine
    index = torch.cuda.current_device() if device.index is None else device.index
    require_same(index)
    return FusedEngine


@functools.cache
def require_same(index: int) -> None:
    """Once per process and device."""
    device = torch.device("cuda", index)
    path = _path(device)
    found = None if path is None else _read(path)
    if found is None:
        found = differences(device)
        if path is not None:
            _write(path, found)
    if found:
        where = "" if path is None else f" (noted in {path})"
        raise RuntimeError(
            f"UNITSFACE_FUSED_CUDA=1: on {_name(device)} the fused CUDA kernels differ from cuBLAS "
            f"in {'; '.join(found)}{where}; unset UNITSFACE_FUSED_CUDA"
        )


def _losses() -> list[LossSpec]:
    """The first of each driver and kind of threshold."""
    found: dict[object, LossSpec] = {}
    for spec in REGISTRY.values():
        if spec.reduction != "nearest" and not spec.variables and spec.tiles is None:
            found.setdefault((spec.reduction, spec.topology, spec.threshold), spec)
    return list(found.values())


def differences(
    device: torch.device, engines: tuple[Engine, Engine] = (CudaEngine, FusedEngine)
) -> list[str]:
    """What the second engine has other results in than the first; empty if in nothing."""
    found = []
    with torch.no_grad(), _matmuls_in_float32():
        for spec in _losses():
            for dtype, tolerance in TOLERANCES.items():
                for depth in _DEPTHS:
                    results = [_results(spec, dtype, depth, device, e) for e in engines]
                    for key, want in results[0].items():
                        off = float((results[1][key] - want).norm() / want.norm())
                        # Written so that NaN is a difference.
                        if not off <= tolerance:
                            what = f"{spec.name} {str(dtype).split('.')[1]} D={depth} {key}"
                            found.append(f"{what} by {off:.1e}")
    return found


def _results(
    spec: LossSpec, dtype: torch.dtype, depth: int, device: torch.device, engine: Engine
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(depth)
    rows = torch.randn(_ROWS, depth, generator=generator)
    columns = torch.randn(_COLUMNS, depth, generator=generator)
    labels = torch.randint(-1, 20, (_ROWS,), generator=generator)
    rows += 2 * columns[labels.clamp(min=0)]
    config = CallConfig(
        spec=spec,
        params=spec.pack(spec.defaults()),
        reduction="mean",
        backend="native",
        compute_dtype=dtype,
        self_offset=0 if spec.topology == "pair" else None,
        need_rows=True,
        need_columns=spec.topology == "class",
    )
    by_class = spec.topology == "class"
    thresholds = 1 if spec.threshold != "per_column" else _COLUMNS if by_class else _ROWS
    tensors = CallTensors(
        rows=rows.to(device, dtype),
        row_labels=labels.to(device),
        columns=columns.to(device, dtype) if by_class else None,
        threshold=None
        if spec.threshold == "none"
        else torch.full((thresholds,), 0.3, device=device),
    )
    call = make_call(config, tensors)
    result = driver(spec).forward(call, engine(call), gradients=True)
    gradients = result.gradients
    if gradients is None or gradients.rows is None:
        weights = torch.full((call.num_losses,), 1.0 / _ROWS, device=device)
        gradients = driver(spec).backward(call, engine(call), result.state, weights)
    found = {"loss": result.loss, "rows": gradients.rows, "columns": gradients.columns}
    return {key: value.float() for key, value in found.items() if value is not None}


@contextmanager
def _matmuls_in_float32() -> Iterator[None]:
    """Else the two round to TF32 in different ways."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _path(device: torch.device) -> Path | None:
    folder = cache.folder()
    if folder is None:
        return None
    build = Path(getattr(loader.extension(), "__file__", "") or "")
    status = build.stat() if build.is_file() else None
    environment = {
        "version": __version__,
        "build": None if status is None else [status.st_size, status.st_mtime_ns],
        "device": _name(device),
        "capability": torch.cuda.get_device_capability(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()
    return folder / f"fused-cuda-{digest[:16]}.json"


def _read(path: Path) -> list[str] | None:
    try:
        content = json.loads(path.read_text())["differences"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, list) else None


def _write(path: Path, found: list[str]) -> None:
    """A verdict that cannot be kept lasts as long as the process."""
    try:
        cache.make_folder(path.parent)
        cache.write(path, (json.dumps({"differences": found}) + "\n").encode())
    except OSError:
        pass
