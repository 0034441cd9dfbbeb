"""A CUDA device that exists in Python only: tensors are fake, launches are recorded.

The CUDA path of the package runs in it on a machine without a GPU, forward and backward, with
the shapes of real workloads, since nothing has memory::

    with fake_device(H200) as device:
        feats = torch.empty(32768, 512, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        labels = torch.empty(32768, dtype=torch.int64, device="cuda")
        b = torch.empty((), device="cuda", requires_grad=True)
        step = lambda: fused_uss_loss(feats, labels, b, backend="triton").backward()
        step()                           # once before: caches, gradients of the leaves
        with device.recording() as tape:
            with device.section("step"):
                step()
    for work in tape.work: ...           # Work: kind, name, operands, bytes, stream, order

A Triton launch has ``call`` (the kernel), ``programs``, ``arguments`` (by parameter name, tensors
as :class:`Array`) and ``options`` (constants, ``num_warps``, ``num_stages``, ``maxnreg``): all that
``triton.compile`` needs. A matmul has ``gemm``. ``tape.peak_bytes``, ``tape.launches`` and
``tape.waits()`` summarize.

Where the host would wait for the device (``.item()``, a copy to memory that is not pinned, an
operator whose result's size depends on data, a synchronization) :class:`HostWaitError` is raised,
unless ``answer`` gives what the host would read; then it is recorded as work of kind "wait".

:meth:`FakeDevice.replay` does what was recorded on real tensors of the CPU, and
:func:`.host_time.host_time` times the host's part of a step.

Tensors of the CPU stay real. Fake tensors are Torch's (``FakeTensorMode``); see
:class:`recorder.FakeMode` for how they are on CUDA in a build without it. The recorder counts what
Python requests: kernels that an operator of Torch launches beyond one are approximate, and memory
that it takes and frees inside is not seen.
"""

from .chips import A100, B200, CHIPS, H100, H200, RTX4090, Chip
from .device import FakeDevice, fake_device
from .recorder import HostWaitError
from .records import Array, Gemm, Tape, Work

__all__ = [
    "A100",
    "B200",
    "CHIPS",
    "H100",
    "H200",
    "RTX4090",
    "Array",
    "Chip",
    "FakeDevice",
    "Gemm",
    "HostWaitError",
    "Tape",
    "Work",
    "fake_device",
]
