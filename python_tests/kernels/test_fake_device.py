"""The CUDA path on a fake device: nothing waits, the library takes every matmul, memory is bounded.

Every loss, dtype and kind of call, forward and backward, as Python would launch it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import filterfalse

import pytest
import torch
from support.cases import Case
from support.fake_device import (
    BACKENDS,
    DTYPES,
    KINDS,
    allowed_bytes,
    check_capturable,
    check_matmuls,
    check_streams,
    record,
)
from support.given_variables import streams
from support.grid import FIRST, extended_if
from torch import Tensor

from bench.fake_device import A100, B200, CHIPS, H200, Array, Chip, Gemm, HostWaitError, fake_device
from bench.fake_device.operators import refusals
from unitsface_kernels import (
    fused_clip_loss,
    fused_margin_softmax_loss,
    fused_siglip_loss,
    fused_uss_loss,
)
from unitsface_kernels.losses import REGISTRY, LossSpec

# Forms of a call whose tiles, matmuls and gradients differ most.
MAIN = ("in-batch", "memory with gradient", "classes")


def _in_short(backend: str, spec: LossSpec, name: str, dtype: torch.dtype) -> bool:
    """Whether ``make test`` has a call: of one loss per driver, of a main form or in one dtype."""
    if streams(spec):
        return False
    if spec not in FIRST or spec.threshold == "per_column":
        return dtype == torch.bfloat16 and name in ("in-batch", "classes")
    if name in MAIN and dtype == torch.float16:
        return True
    # What the native backend does with bfloat16 is captured in a test of its own.
    return dtype == torch.bfloat16 and backend == "triton"


def _grid() -> list:
    return [
        pytest.param(
            *(backend, spec, case, dtype),
            id=f"{backend}-{spec.name}-{name}-{str(dtype).split('.')[1]}",
            marks=extended_if(not _in_short(backend, spec, name, dtype)),
        )
        for backend in BACKENDS
        for spec in REGISTRY.values()
        # Native runs variables of tiles in operations of Torch.
        if backend == "triton" or not streams(spec)
        for name, case in KINDS.items()
        if case.applies(spec)
        for dtype in DTYPES
        if spec in FIRST or (dtype == torch.bfloat16 and name in MAIN)
    ]


@pytest.mark.parametrize(("backend", "spec", "case", "dtype"), _grid())
def test_calls(backend: str, spec: LossSpec, case: Case, dtype: torch.dtype) -> None:
    found = record(spec, case, dtype, backend)
    # Rows at unit length are padded by Triton's kernels alone.
    check_matmuls(found.tape, aligned=backend == "triton" or case.dim % 8 == 0)
    check_streams(found.tape, found.stream)
    assert found.tape.waits() == []
    # The result of the check of labels, in pinned memory, is all that comes to the host.
    events = [work.name for work in found.tape.of("event")]
    assert set(events) <= {"record"}
    assert found.tape.extra_bytes <= allowed_bytes(found.problem)
    assert found.tape.of(backend)
    # The search of a nearest loss has its matmul in the kernel, and its gradients need none.
    assert found.tape.of("gemm") or (spec.reduction == "nearest" and backend == "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(s, id=s.name, marks=extended_if(s not in FIRST))
        for s in filterfalse(streams, REGISTRY.values())
    ],
)
def test_a_step_can_be_captured(backend: str, spec: LossSpec) -> None:
    for name in (*MAIN, "class subset"):
        if KINDS[name].applies(spec):
            found = record(spec, KINDS[name], torch.bfloat16, backend, capturing=True)
            check_capturable(found.tape)
            check_streams(found.tape, found.stream)


@pytest.mark.parametrize(
    "chip", [pytest.param(c, id=c.name, marks=extended_if(c == H200)) for c in CHIPS.values()]
)
def test_chips(chip: Chip) -> None:
    """The configuration is that of the chip."""
    with fake_device(chip) as device:
        feats = torch.empty(20_000, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        labels = torch.empty(20_000, dtype=torch.int64, device="cuda")
        b = torch.empty((), device="cuda", requires_grad=True)
        assert torch.cuda.get_device_capability() == chip.capability
        with device.recording() as tape:
            fused_uss_loss(feats, labels, b, backend="triton").backward()
    check_matmuls(tape)
    assert tape.of("triton")
    assert tape.extra_bytes < chip.memory_bytes


@pytest.mark.parametrize("loss", [fused_clip_loss, fused_siglip_loss])
def test_towers(loss: Callable[..., Tensor]) -> None:
    """Both directions, with a learned scale and bias."""
    count = 24 << 10
    with fake_device(H200) as device:
        a, b = (
            torch.empty(count, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for _ in range(2)
        )
        numbers = [torch.empty((), device="cuda", requires_grad=True) for _ in range(2)]
        numbers = numbers if loss is fused_siglip_loss else numbers[:1]
        loss(a, b, *numbers, backend="triton").backward()
        stream = torch.cuda.current_stream().cuda_stream
        with device.recording() as tape:
            loss(a, b, *numbers, backend="triton").backward()
    check_matmuls(tape)
    check_streams(tape, stream)
    assert tape.waits() == []
    assert tape.of("triton")
    # Half of one matrix in bfloat16, of which eager code has several.
    assert tape.extra_bytes < count * count
    assert tape.largest_bytes <= 128 << 20


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_matrix_is_never_stored(backend: str) -> None:
    """README: "The N x M matrix of cosines is never stored"; memory grows with N + M."""
    peaks = []
    for count in (24 << 10, 48 << 10):
        with fake_device(H200) as device:
            feats = torch.empty(count, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            labels = torch.empty(count, dtype=torch.int64, device="cuda")
            b = torch.empty((), device="cuda", requires_grad=True)
            with device.recording() as tape:
                fused_uss_loss(feats, labels, b, backend=backend).backward()
        peaks.append(tape.extra_bytes)
        assert tape.largest_bytes <= max(4 * feats.numel(), 256 << 20)
        if count == 48 << 10:
            assert tape.extra_bytes < count * count // 4
    assert peaks[1] <= 2 * peaks[0] + (1 << 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_take_their_gradient_and_tiles(backend: str) -> None:
    with fake_device(H200) as device:
        feats = torch.empty(2048, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        weight = torch.empty(400_000, 512, dtype=torch.bfloat16, device="cuda")
        weight.requires_grad_()
        labels = torch.empty(2048, dtype=torch.int64, device="cuda")
        with device.recording() as tape:
            fused_margin_softmax_loss(feats, weight, labels, backend=backend).backward()
        assert weight.grad is not None
        assert tape.largest_shape == (400_000, 512)
        # Statistics of every panel of classes and row, in addition to the tiles.
        assert tape.extra_bytes <= weight.grad.nbytes + (1 << 30)


# --- the checks can fail --------------------------------------------------------------------------

WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x[0].tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "if": lambda x: 1 if x.max() > 0 else 2,
    "to the host": lambda x: x.cpu(),
    "to the host, not pinned": lambda x: torch.empty(4, 4).copy_(x, non_blocking=True),
    "nonzero": lambda x: torch.nonzero(x),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: torch.unique(x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "from pageable memory": lambda x: torch.ones(4, 4).to("cuda"),
    "a list": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING)
def test_waits_are_errors(wait) -> None:
    with fake_device() as device:
        x = torch.empty(4, 4, device="cuda")
        with device.recording(), pytest.raises(HostWaitError):
            wait(x)


def test_answers_are_recorded() -> None:
    with fake_device(answer=lambda name, args: 3) as device, device.recording() as tape:
        x = torch.empty(4, 4, device="cuda")
        assert int(x.sum()) == 3
    assert [work.name for work in tape.waits()] == ["aten._local_scalar_dense.default"]


def test_what_is_pinned_does_not_wait() -> None:
    with fake_device() as device:
        x = torch.empty((), dtype=torch.bool, device="cuda")
        with device.recording() as tape:
            torch.empty((), dtype=torch.bool, pin_memory=True).copy_(x, non_blocking=True)
    assert tape.waits() == []
    assert [work.kind for work in tape.work] == ["copy"]


def _matrix(shape: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype) -> Array:
    return Array(1, 0, 1 << 32, shape, stride, dtype)


def test_refused_matmuls() -> None:
    half, single = torch.bfloat16, torch.float32

    def gemm(left: Array, right: Array, out: Array) -> Gemm:
        return Gemm(8, 8, 8, left.dtype, out.dtype, False, left, right, out)

    dense = _matrix((8, 8), (8, 1), half)
    wide = _matrix((8, 8), (8, 1), single)
    assert refusals(gemm(dense, dense, wide)) == []
    assert refusals(gemm(dense, _matrix((8, 8), (1, 64), half), wide)) == []
    for left, right, out in (
        (dense, wide, wide),
        (wide, wide, dense),
        (dense, dense, _matrix((8, 8), (8, 1), torch.float16)),
        (_matrix((8, 8), (16, 2), half), dense, wide),
        (_matrix((8, 8), (4, 1), half), dense, wide),
        (_matrix((8, 8), (0, 1), half), dense, wide),
    ):
        assert refusals(gemm(left, right, out)), (left, right, out)


def test_memory_is_counted_while_it_is_held() -> None:
    with fake_device() as device:
        before = device.live_bytes
        with device.recording() as tape:
            held = torch.zeros(1000, 1000, device="cuda")
            view = held[3:]
            del held
            assert device.live_bytes - before == 4_000_256
            del view
            assert device.live_bytes == before
            torch.empty(10, device="cuda")
    assert tape.extra_bytes == tape.largest_bytes == 4_000_256
    assert tape.allocations == 2


def test_nothing_is_left_behind() -> None:
    available, to = torch.cuda.is_available, torch.Tensor.to
    with fake_device(A100), pytest.raises(ZeroDivisionError):
        _ = torch.empty(2, device="cuda").shape[0] / 0
    with fake_device(B200):
        assert torch.empty(2, device="cuda").is_cuda
    assert (torch.cuda.is_available, torch.Tensor.to) == (available, to)
    assert torch.ones(2).sum().item() == 2.0
    assert torch._C._len_torch_dispatch_stack() == 0
