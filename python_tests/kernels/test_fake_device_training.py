"""Heads, optimizers, memories, metrics and ranks on a fake CUDA device; launches per step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.fake_device import BACKENDS, check_capturable, check_matmuls, check_streams, of_step
from support.grid import extended_if
from torch import distributed, nn

from bench.fake_device import FakeDevice, HostWaitError, Tape, fake_device
from bench.fake_device.calls import calls
from bench.fake_device.host_time import host_time
from bench.fake_device.steps import HeadStep, loss_step, module_step
from bench.workloads import WORKLOADS
from unitsface_kernels import (
    FeatureMemory,
    PartialFC,
    SampledAdamW,
    SampledSGD,
    clip_grad_norm_,
    fused_margin_softmax_loss,
    fused_npt_loss,
    fused_uss_loss,
    metrics,
)

CLASSES, SIZE, ROWS = 200_000, 64, 512

# --- heads and their optimizers -------------------------------------------------------------------

HEADS = {
    "gradient": HeadStep(),
    "fused": HeadStep(when="backward"),
    "sampled": HeadStep(sample_rate=0.1),
    "sampled, fused": HeadStep(sample_rate=0.1, when="backward"),
    "sampled, fused step": HeadStep(sample_rate=0.1, when="step"),
    "sampled, adamw": HeadStep(sample_rate=0.1, optimizer="adamw", when="backward"),
    "uce": HeadStep("uce", sample_rate=0.1, when="backward"),
    "epl": HeadStep("epl", sample_rate=0.1, when="backward"),
    "npt": HeadStep("npt", sample_rate=0.1),
    "vpl": HeadStep("vpl", options={"start_iteration": 0}),
    "vpl, fused": HeadStep("vpl", 0.1, when="backward", options={"start_iteration": 0}),
}
RARE = {"gradient", "uce", "vpl", "vpl, fused", "epl", "fused"}


def _head_tape(head: HeadStep, backend: str, classes: int = CLASSES) -> Tape:
    return of_step(lambda device: head.build(backend)(ROWS, classes, SIZE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=extended_if(n in ("gradient", "uce", "vpl", "vpl, fused", "epl", "fused"))
        )
        for n in HEADS
    ],
)
def test_heads(name: str, backend: str) -> None:
    # Enough classes for their gradient to be larger than any tile.
    classes = 5 * CLASSES if name == "fused" else CLASSES
    tape = _head_tape(HEADS[name], backend, classes)
    check_matmuls(tape)
    check_streams(tape, tape.work[0].stream)
    assert tape.waits() == []
    if HEADS[name].optimizer != "none" and name != "gradient":
        steps = [work for work in tape.of("triton") if work.name == "update_rows_kernel"]
        assert steps or tape.of("native")
    if HEADS[name].when:
        # docs/distributed.md: "their gradient is never stored".
        assert tape.largest_bytes < classes * SIZE * 4 / 1.5
        assert all(work.name != "aten.index_add.default" for work in tape.work)


@pytest.mark.parametrize("name", ["adaface", "magface", "elasticface"])
def test_modules_with_numbers_per_row(name: str) -> None:
    """Statistics and draws, too, are the device's."""
    with fake_device(capturing=True) as device:
        step = module_step(name, "triton")(ROWS, 5000, SIZE)
        step()
        with device.recording() as tape:
            step()
    check_matmuls(tape)
    check_capturable(tape)
    assert tape.waits() == []


def test_clipping_a_fused_head() -> None:
    def make(device: FakeDevice):
        head = PartialFC("cosface", SIZE, 5000, sample_rate=0.5, device="cuda")
        optimizer = SampledSGD(head.parameters(), lr=0.1)
        head.fuse(optimizer, "step")
        feats = torch.empty(ROWS, SIZE, device="cuda", requires_grad=True)
        labels = torch.empty(ROWS, dtype=torch.int64, device="cuda")

        def step() -> None:
            head(feats, labels).backward()
            clip_grad_norm_([feats], 1.0, [head])
            optimizer.step()
            optimizer.zero_grad()

        return step

    assert of_step(make).waits() == []


@pytest.mark.parametrize("kind", [SampledSGD, SampledAdamW])
def test_large_parameters_are_stepped_in_one_launch(kind: type) -> None:
    def make(device: FakeDevice):
        weight = nn.Parameter(torch.empty(20_000, 256, device="cuda"))
        optimizer = kind([weight], lr=0.1)

        def step() -> None:
            weight.grad = torch.empty_like(weight)
            optimizer.step()

        return step

    tape = of_step(make)
    assert [work.name for work in tape.work] == ["update_rows"]
    # No more than the gradient of the caller.
    assert tape.extra_bytes <= 20_000 * 256 * 4
    check_capturable(tape)


def test_memory_of_features() -> None:
    def make(device: FakeDevice):
        memory = FeatureMemory(10_000, SIZE).to("cuda")
        feats = torch.empty(ROWS, SIZE, device="cuda")
        labels = torch.empty(ROWS, dtype=torch.int64, device="cuda")
        return lambda: memory.update(feats, labels)

    tape = of_step(make)
    assert tape.waits() == []
    # Nothing of the size of the memory but a number for each identity, and rows of the batch.
    assert tape.largest_bytes <= max(10_000 * 8, ROWS * SIZE * 4) + 512


# --- metrics --------------------------------------------------------------------------------------


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts go to the host, once a pass and nothing else; the answers are those of the CPU."""
    feats, labels = torch.randn(700, 16), torch.randint(0, 50, (700,))
    counts: list[torch.Tensor] = []
    scores = metrics.tiles.Scores
    count = scores.count

    def remembered(*args, **kwargs) -> torch.Tensor:
        counts.append(count(*args, **kwargs))
        return counts[-1]

    monkeypatch.setattr(scores, "count", remembered)
    want = metrics.tar_at_far(feats, labels, (1e-3, 1e-1), backend="native")
    monkeypatch.setattr(scores, "count", count)
    known = iter(counts)
    with fake_device(answer=lambda name, args: next(known)) as device:
        on_device = feats.to("cuda"), labels.to("cuda")
        with device.recording() as tape:
            got = metrics.tar_at_far(*on_device, (1e-3, 1e-1), backend="native")
    assert torch.equal(got.tar, want.tar)
    assert torch.equal(got.threshold, want.threshold)
    passes = [work.name for work in tape.waits() if work.name == "copy to the host"]
    assert len(passes) == len(counts)
    assert len(tape.of("native")) >= 3 * len(counts)
    check_matmuls(tape)


# --- ranks ----------------------------------------------------------------------------------------


@contextmanager
def _ranks(size: int) -> Iterator[distributed.ProcessGroup]:
    """A group of which this process is the second rank; the others have the same rows."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("cpu:fake,cuda:fake", rank=1, world_size=size, store=FakeStore())
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_pairs_across_ranks(exchange: str, backend: str) -> None:
    with _ranks(4) as group:

        def make(device: FakeDevice):
            feats = torch.empty(4000, SIZE, device="cuda", requires_grad=True)
            labels = torch.empty(4000, dtype=torch.int64, device="cuda")
            b = torch.empty((), device="cuda", requires_grad=True)
            return lambda: fused_uss_loss(
                feats, labels, b, group=group, exchange=exchange, backend=backend
            ).backward()

        tape = of_step(make)
    check_matmuls(tape)
    check_streams(tape, tape.work[0].stream)
    assert tape.waits() == []
    assert tape.of("collective")
    if exchange == "ring":
        # docs/usage.md: "a rank never holds more than one batch of others".
        sent = [array for work in tape.of("collective") for array in work.reads + work.writes]
        assert max(array.shape[0] for array in sent if len(array.shape) == 2) <= 2000


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_across_ranks(backend: str) -> None:
    with _ranks(4):
        tape = _head_tape(HeadStep(sample_rate=0.1, when="backward"), backend)
    check_matmuls(tape)
    check_streams(tape, tape.work[0].stream)
    assert tape.waits() == []
    assert tape.of("collective")


# --- what waits today -----------------------------------------------------------------------------


def _filtered(topology: str, backend: str):
    def step() -> None:
        feats = torch.empty(300, SIZE, device="cuda", requires_grad=True)
        labels = torch.empty(300, dtype=torch.int64, device="cuda")
        columns = torch.empty(500, SIZE, device="cuda", requires_grad=topology == "class")
        if topology == "class":
            options = {"skip_tolerance": 1e-4, "backend": backend}
            loss = fused_margin_softmax_loss(feats, columns, labels, **options)
        else:
            memory = {"memory": columns, "memory_labels": labels.new_empty(500)}
            options = {} if topology == "pair" else memory
            options |= {"skip_tolerance": 1e-4, "backend": backend}
            loss = fused_uss_loss(feats, labels, 1.0, **options)
        loss.backward()

    return step


def _sampled(rows: int):
    def step() -> None:
        head = PartialFC("cosface", SIZE, 1000, sample_rate=0.1, device="cuda")
        feats = torch.empty(rows, SIZE, device="cuda", requires_grad=True)
        head(feats, torch.empty(rows, dtype=torch.int64, device="cuda")).backward()

    return step


def _triplets_of_a_fused_head() -> None:
    HeadStep("npt", when="backward").build("native")(64, 1000, SIZE)()


#: Every path that waits for the host by design. One that no longer does is taken out of here.
KNOWN_WAITS = {
    "gradient filtering in a batch": _filtered("pair", "native"),
    "gradient filtering against a memory": _filtered("memory", "native"),
    "gradient filtering over classes": _filtered("class", "native"),
    "more rows than sampled classes": _sampled(200),
    "triplets of a fused head": _triplets_of_a_fused_head,
}


@pytest.mark.parametrize("step", KNOWN_WAITS.values(), ids=KNOWN_WAITS)
def test_known_waits(step) -> None:
    with fake_device() as device, device.recording(), pytest.raises(HostWaitError):
        step()


@pytest.mark.parametrize("topology", ["pair", "memory", "class"])
def test_gradient_filtering_on_triton_does_not_wait(topology: str) -> None:
    with fake_device() as device, device.recording():
        _filtered(topology, "triton")()


def test_other_triplets_and_draws_do_not_wait() -> None:
    with fake_device() as device:
        _sampled(50)()
        feats = torch.empty(300, SIZE, device="cuda", requires_grad=True)
        weight = torch.empty(500, SIZE, device="cuda", requires_grad=True)
        labels = torch.empty(300, dtype=torch.int64, device="cuda")
        with device.recording():
            fused_npt_loss(feats, weight, labels).backward()


# --- launches and host time -----------------------------------------------------------------------

TABLE = Path(__file__).resolve().parents[1] / "data" / "fake_device_launches.json"
#: Upper bounds of launches per step, by backend and workload.
LAUNCHES: dict[str, dict[str, int]] = json.loads(TABLE.read_text())
LARGE_STEPS = ("class-1m", "memory-glint")


def _launches(backend: str, name: str) -> int:
    if name.startswith("head "):
        shape, build = (1024, 1_000_000, 512), HEADS[name.removeprefix("head ")].build(backend)
    elif name.startswith("module "):
        shape, build = (512, 100_000, 512), module_step(name.removeprefix("module "), backend)
    else:
        workload = WORKLOADS[name]
        shape = (workload.rows, workload.columns, workload.size)
        build = loss_step(workload, backend)
    return of_step(lambda device: build(*shape)).launches


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(b, n, marks=extended_if(n in LARGE_STEPS or b == "native"))
        for b in BACKENDS
        for n in LAUNCHES[b]
    ],
)
def test_launches_of_a_step(backend: str, name: str) -> None:
    """More launches than the table has are a regression; fewer belong into the table."""
    assert _launches(backend, name) <= LAUNCHES[backend][name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_host_time(backend: str) -> None:
    """Small tensors take the launches of the true ones, which is checked there."""
    workload = WORKLOADS["class-100k"]
    build = loss_step(workload, backend)
    found = host_time(build, 512, 100_000, 512, repeats=3)
    assert 0.0 < found.fastest <= found.seconds
    # Two matmuls a tile in two passes, and what they are between.
    assert found.tape.launches > 15
    assert torch.ones(1).device.type == "cpu"


# Of Python and of C functions together, with Python 3.11 and Torch 2.13, and a twentieth more.
CALLS = {"pair-8k": 408, "class-100k": 600, "sampled, fused": 1195}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_a_step(name: str) -> None:
    """The host's work of a small step, which is most of its time there."""
    build, shape = HEADS["sampled, fused"].build("triton"), (1024, 1_000_000)
    if name in WORKLOADS:
        workload = WORKLOADS[name]
        build, shape = loss_step(workload, "triton"), (workload.rows, workload.columns)
    found = calls(build, *shape)
    assert 100 < found.python + found.c <= CALLS[name], found


@pytest.mark.extended
def test_host_time_of_a_head() -> None:
    found = host_time(HEADS["sampled, fused"].build("triton"), 1024, 1_000_000, repeats=3)
    assert 0.0 < found.fastest <= found.seconds
