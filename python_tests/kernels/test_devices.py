"""Calls on a device other than the current one, and what is imported; no GPU is needed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from support.helpers import run_python

from unitsface_kernels import validate
from unitsface_kernels.backends.triton import launch, matmul
from unitsface_kernels.distributed import collectives
from unitsface_kernels.validate import label_ranges

SECOND = torch.device("cuda", 1)


class OnSecond(torch.Tensor):
    """A CPU tensor that reports the second GPU as its device."""

    is_cuda = True
    device = SECOND


class Events:
    """Events, streams and the current device of a machine with two GPUs."""

    def __init__(self, monkeypatch) -> None:
        self.current, self.recorded, self.asked, self.busy = 0, [], [], set()
        events = self

        class Event:
            def record(self, stream=None) -> None:
                self.device = events.current if stream is None else stream
                events.recorded.append(self.device)

            def query(self) -> bool:
                return self.device not in events.busy

        @contextmanager
        def guard(device):
            before, self.current = self.current, torch.device(device).index
            yield
            self.current = before

        def capturing() -> bool:
            self.asked.append(self.current)
            return False

        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", guard)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device.index)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        monkeypatch.setattr(label_ranges, "_pending", [])


def test_labels_are_checked_on_their_device(monkeypatch) -> None:
    events = Events(monkeypatch)
    validate.in_range("labels", torch.tensor([0, 5]).as_subclass(OnSecond), -1, 5)
    assert events.recorded == events.asked == [1]
    assert events.current == 0
    events.busy.add(1)
    label_ranges.report_pending()
    # A busy device does not keep what another has found.
    first = torch.tensor([7]).as_subclass(OnSecond)
    monkeypatch.setattr(OnSecond, "device", torch.device("cuda", 0))
    validate.in_range("class_index", first, 0, 7)
    with pytest.raises(ValueError, match="class_index must be in"):
        label_ranges.report_pending()


def test_the_tensors_device_decides_launches(monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    found = {0: (8, 0), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index])
    assert launch.capability(SECOND) == 90
    assert launch.capability(torch.device("cuda", 0)) == 80


# --- matmul ---------------------------------------------------------------------------------------


@pytest.fixture
def factors() -> tuple[torch.Tensor, ...]:
    matmul._mixes.cache_clear()
    yield torch.zeros(2, 2), *(torch.eye(2, dtype=torch.bfloat16) for _ in range(2))
    matmul._mixes.cache_clear()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_X")]
)
def test_errors_are_no_refusal(monkeypatch, factors, error) -> None:
    """The error is raised by a trial matmul as by a real one, and does not persist."""
    calls = []

    def addmm(total, left, right, **options) -> None:
        calls.append(total.shape)
        if fails[0]:
            raise error

    monkeypatch.setattr(torch, "addmm", addmm)
    fails = [True]
    with pytest.raises(type(error), match=str(error)):
        matmul._addmm_mixed(*factors)
    fails[0] = False
    matmul._addmm_mixed(*factors)
    assert calls[-1] == (2, 2)
    fails[0] = True
    with pytest.raises(type(error), match=str(error)):
        matmul._addmm_mixed(*factors)
    fails[0] = False
    matmul._addmm_mixed(*factors)
    assert calls[-1] == (2, 2)


def test_a_refusal_is_cached(monkeypatch, factors) -> None:
    calls = []

    def addmm(total, left, right, **options) -> None:
        calls.append(total.shape)
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    total, left, right = factors
    for _ in range(3):
        matmul._addmm_mixed(total, left, right)
    assert len(calls) == 1
    assert torch.equal(total, 3 * torch.eye(2))


# --- process groups -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "device"), [("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda:1")]
)
def test_numbers_of_the_host_travel_past_the_device(monkeypatch, backend, device) -> None:
    monkeypatch.setattr(collectives, "world_size", lambda group=None: 2)
    monkeypatch.setattr(collectives.dist, "get_backend_config", lambda group=None: backend)

    class Group:
        bound_device_id = SECOND

    assert collectives.host_device(Group()) == torch.device(device)


def test_training_opens_a_group_for_both(monkeypatch) -> None:
    from train import distributed

    opened = []
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    dist = distributed.dist
    monkeypatch.setattr(distributed, "choose_device", lambda *a: SECOND)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        dist, "init_process_group", lambda *a, **k: opened.append(a[0] if a else k["backend"])
    )
    monkeypatch.setattr(dist, "destroy_process_group", lambda *a: None)
    with distributed.open_world("cuda") as world:
        assert (world.rank, world.size, world.device) == (0, 2, SECOND)
    assert opened == ["cpu:gloo,cuda:nccl"]


# --- imports --------------------------------------------------------------------------------------


def test_neither_import_nor_eager_calls_import_compilers() -> None:
    """They take longer to import than Torch itself."""
    code = """
import sys, torch, unitsface_kernels as uk
feats = torch.randn(8, 4, requires_grad=True)
labels = torch.arange(8) % 3
loss = uk.UniTSFaceLoss(uk.CosFaceLoss(4, 3), uk.USSLoss())(feats, labels)
(loss + uk.UCELoss(4, 3)(feats, labels) + uk.NPTLoss(4, 3)(feats, labels)).backward()
memory = uk.FeatureMemory(3, 4)
memory.update(feats, labels)
uk.metrics.tar_at_far(feats, labels, far=(0.1,))
print(sorted({"torch._dynamo", "torch._inductor", "triton", "sympy"} & sys.modules.keys()))
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
