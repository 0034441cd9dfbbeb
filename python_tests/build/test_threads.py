"""The threads of the CPU kernels: their number, several callers, forked processes, races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.cases import problem
from support.helpers import ROOT, run_python
from torch import Tensor

from unitsface_kernels import fused_uss_loss
from unitsface_kernels.backends.native import rows
from unitsface_kernels.losses import REGISTRY

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and fork")
#: In a process: the threads it has, and a loss with several tiles.
_PRELUDE = """
import os, sys
sys.path.insert(0, "python_tests")
import torch
from support.cases import problem
from unitsface_kernels.losses import REGISTRY

def threads():
    return len(os.listdir("/proc/self/task"))

def evaluate(rows=300, columns=400, dim=70, loss="margin_softmax"):
    p = problem(REGISTRY[loss], rows=rows, columns=columns, dim=dim)
    value, gradients = p.evaluate("native")
    return [value, *gradients.values()]

"""


def _run(code: str, **environment: str) -> str:
    done = run_python("-c", _PRELUDE + code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("sanitizer", [None, "thread", "address,undefined"])
def test_loops_in_the_compiler_s_sanitizers(sanitizer: str | None, tmp_path: Path) -> None:
    """csrc/cpu/test_pool.cpp: every chunk once, calls from several threads and inside chunks."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "test_pool"
    sources = [ROOT / "csrc" / "cpu" / name for name in ("pool.cpp", "test_pool.cpp")]
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-I{ROOT / 'csrc'}"]
    if sanitizer is not None:
        options.append(f"-fsanitize={sanitizer}")
    command = [compiler, *options, *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if sanitizer is not None and built.returncode:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    assert built.returncode == 0, built.stderr
    # ThreadSanitizer needs addresses that some kernels do not choose at random otherwise.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*fixed, program], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@linux
def test_the_number_of_threads_is_that_of_the_call() -> None:
    """``torch.set_num_threads`` holds from the next call on; a single thread starts none."""
    code = """
torch.set_num_threads(1)
first = evaluate()
print(threads() - START)
torch.set_num_threads(4)
again = evaluate()
print(threads() - START >= 3)
torch.set_num_threads(2)
last = evaluate()
print(all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(first, last)))
"""
    assert _run("START = threads()\n" + code).split() == ["0", "True", "True"]


@linux
def test_a_forked_process_has_threads_of_its_own() -> None:
    """As a data loader's worker: it computes the same, although the parent had threads."""
    code = """
torch.set_num_threads(3)
from unitsface_kernels.backends.native import rows

def draws():
    return rows.drawn(7, 100_000, 100_000, torch.arange(0))

want, before = draws(), threads()
child = os.fork()
if child == 0:
    found, started = draws(), threads() == 3
    os._exit(0 if started and found.tolist() == want.tolist() else 1)
_, status = os.waitpid(child, 0)
print(before >= 3, os.waitstatus_to_exitcode(status), torch.equal(draws(), want))
"""
    assert _run(code) == "True 0 True"


def test_calls_from_several_threads_at_once() -> None:
    """The kernels' threads serve one call at a time; the others compute alone, and the same."""
    p = problem(REGISTRY["margin_softmax"], rows=150, columns=900, dim=40)

    def evaluate(_: int) -> list[Tensor]:
        loss, gradients = p.evaluate("native")
        return [loss, *gradients.values()]

    want = evaluate(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(evaluate, range(24)):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_all_threads_treat_denormals_as_the_calling_one() -> None:
    """``torch.set_flush_denormal`` concerns the calling thread; the others exist already."""
    tiny = torch.full((2000, 64), 1e-39)
    for flush in (False, True, False):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor does not flush denormals")
        try:
            weight = torch.zeros_like(tiny)
            scalars = {"step_size": -1.0, "weight_decay": 0.0, "momentum": 0.0}
            threads = torch.get_num_threads()
            torch.set_num_threads(4)
            rows.update_rows(0, weight, tiny, None, 0, None, (), scalars)
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
        assert bool((weight == (0.0 if flush else 1e-39)).all())


def test_kernels_of_losses_flush_denormals() -> None:
    """On all their threads, and for as long as they run: csrc/cpu/denormals.h."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor does not flush denormals")
    feats = torch.randn(2100, 8, requires_grad=True)
    # Half of the smallest sigmoid, e^-87, is denormal.
    loss = fused_uss_loss(
        *(feats, torch.arange(2100), 300.0),
        scale=0.5,
        margin=0.0,
        reduction="sum",
        backend="native",
    )
    loss.backward()
    assert loss.item() > 0.0
    assert not bool(feats.grad.any())
    # The calling thread keeps its mode.
    assert bool((torch.full((8,), 1e-39) * torch.ones(8)).all())


@linux
def test_threads_are_not_bound_to_the_core_of_the_calling_one() -> None:
    """An OpenMP runtime with OMP_PROC_BIND binds the thread from which they inherit."""
    code = """
torch.set_num_threads(2)
before = set(os.listdir("/proc/self/task"))
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from unitsface_kernels.backends.native import rows
rows.drawn(7, 100_000, 100_000, torch.arange(0))
(new,) = set(os.listdir("/proc/self/task")) - before
import time
deadline = time.monotonic() + 20
while len(os.sched_getaffinity(int(new))) != CORES and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(os.sched_getaffinity(int(new))))
"""
    cores = len(os.sched_getaffinity(0))
    prefix = f"CORES = {cores}\n"
    assert _run(prefix + code, OMP_PROC_BIND="close") == str(cores)
    assert _run("CORES = 1\n" + code, OMP_PROC_BIND="false") == "1"
