"""Optimizers that step on single rows, against Torch's own on those rows."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import run_python
from support.row_optimizers import (
    CLASSES,
    OPTIONS,
    SAMPLED,
    each_device,
    each_rule,
    each_shape,
    parameter,
    some_rows,
    sparse,
    states_of,
    twin,
    use_kernels,
)
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor, nn

from unitsface_kernels import SampledAdamW, SampledSGD, dispatch
from unitsface_kernels.backends.native import loader

STEPS = 20


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch) -> None:
    use_kernels(request.param, monkeypatch)


# --- the rules ------------------------------------------------------------------------------------


@each_device
@each_shape
@each_rule
def test_rows_are_stepped_as_torch_steps_them(name, shape, device, kernels) -> None:
    """The same rows in every step: what Torch does with a dense parameter of them."""
    base, options = OPTIONS[name]
    p = parameter(*shape, device=device)
    index = some_rows(device=device)
    before, dense = p.detach().clone(), nn.Parameter(p.detach()[index])
    rows, torchs = SAMPLED[base]([p], **options), base([dense], **options)
    for step in range(STEPS):
        gradient = torch.randn_like(dense)
        dense.grad, p.grad = gradient.clone(), sparse(index, gradient, p)
        for optimizer in (rows, torchs):
            optimizer.param_groups[0]["lr"] = options["lr"] / (1 + step % 7)
            optimizer.step()
        assert torch.equal(p.grad.to_dense()[index], gradient)
    check_same("weight", p.detach()[index], dense.detach(), SAME_LOSS)
    others = torch.ones(CLASSES, dtype=torch.bool, device=device).index_fill(0, index, False)
    assert torch.equal(p.detach()[others], before[others])
    wanted = states_of(torchs, dense)
    found = states_of(rows, p)
    assert found.keys() == wanted.keys()
    for key, state in found.items():
        check_same(key, state[index], wanted[key], SAME_LOSS)
        assert not bool(state[others].any())
    if base is torch.optim.AdamW:
        assert torch.equal(rows.state[p]["step"], torchs.state[dense]["step"])


@each_device
@each_rule
def test_every_row_is_torchs_dense_step(name, device, kernels) -> None:
    """Given as an index or as a range."""
    base, options = OPTIONS[name]
    p = parameter(CLASSES, 37, device=device)
    q, dense = twin(p), twin(p)
    optimizers = [SAMPLED[base]([x], **options) for x in (p, q)]
    torchs = base([dense], **options)
    for _ in range(STEPS):
        dense.grad = torch.randn_like(dense)
        p.grad = sparse(torch.arange(CLASSES, device=device), dense.grad.clone(), p)
        optimizers[0].step()
        optimizers[1].begin_row_update(q)(slice(0, CLASSES), dense.grad.clone(), None, None)
        torchs.step()
    assert torch.equal(p, q)
    check_same("weight", p.detach(), dense.detach(), SAME_LOSS)


@pytest.mark.parametrize("name", ["momentum", "adamw-decay"])
def test_rows_that_do_not_take_part_stay(name, kernels) -> None:
    """A hundred steps on others: neither decay nor momentum moves a row, nor its states."""
    base, options = OPTIONS[name]
    p = parameter(CLASSES, 37)
    optimizer = SAMPLED[base]([p], **options)

    def step(index: Tensor) -> None:
        p.grad = sparse(index, torch.randn(len(index), 37), p)
        optimizer.step()

    step(torch.arange(CLASSES))
    kept = torch.tensor([0, 5, 6, 22])
    others = torch.tensor([i for i in range(CLASSES) if i not in kept.tolist()])
    tensors = [p.detach(), *states_of(optimizer, p).values()]
    before = [t.clone() for t in tensors]
    for _ in range(100):
        step(others[torch.randperm(len(others))[:7].sort().values])
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now[kept], then[kept])
        assert not bool((now[others] == then[others]).any())


@each_rule
def test_dense_gradients_are_torchs(name) -> None:
    base, options = OPTIONS[name]
    p = parameter(CLASSES, 37)
    dense = twin(p)
    rows, torchs = SAMPLED[base]([p], **options), base([dense], **options)
    for _ in range(5):
        dense.grad = torch.randn_like(dense)
        p.grad = dense.grad.clone()
        rows.step()
        torchs.step()
    assert torch.equal(p, dense)
    assert rows.state_dict()["state"].keys() == torchs.state_dict()["state"].keys()


@each_rule
def test_kernel_and_torch_agree(name, monkeypatch) -> None:
    base, options = OPTIONS[name]
    p = parameter(CLASSES, 131)
    q = twin(p)
    for step in range(STEPS):
        index = some_rows(1 + step)
        gradient = torch.randn(len(index), 131)
        scale = torch.tensor(0.25)
        if not step:
            optimizers = [SAMPLED[base]([x], **options) for x in (p, q)]
        with monkeypatch.context() as patch:
            rows = slice(0, len(index))
            optimizers[0].begin_row_update(p)(rows, gradient.clone(), index, scale)
            patch.setattr(dispatch, "row_kernels", lambda device: None)
            optimizers[1].begin_row_update(q)(rows, gradient.clone(), index, scale)
    check_same("weight", p.detach(), q.detach(), SAME_LOSS)


# Run by a fresh process per instruction set: steps of every rule, and the draw of their rows.
_EVALUATE = """
import json, sys, torch
sys.path.insert(0, "python_tests")
from support.row_optimizers import OPTIONS, SAMPLED, parameter
from unitsface_kernels.distributed.partial_fc.sampling import sample_classes

torch.manual_seed(0)
found = {}
for name, (base, options) in OPTIONS.items():
    p = parameter(50, 37)
    optimizer = SAMPLED[base]([p], **options)
    for step in range(5):
        index = sample_classes(torch.tensor([3, 4]), 50, 20, seed=0, rank=0, step=step)[0]
        optimizer.begin_row_update(p)(slice(0, 20), torch.randn(20, 37), index, None)
    found[name] = p.tolist()
print(json.dumps([index.tolist(), found]))
"""


@pytest.mark.extended
def test_instruction_sets_agree() -> None:
    results = []
    for isa in loader.extension().cpu.usable_isas():
        done = run_python("-c", _EVALUATE, UNITSFACE_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    wanted_rows, wanted = results.pop()
    for rows, found in results:
        assert rows == wanted_rows
        for name, values in found.items():
            check_same(name, torch.tensor(values), torch.tensor(wanted[name]), SAME_LOSS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["nesterov", "adamw-decay"])
def test_other_dtypes(name, dtype) -> None:
    """In float32 at least, rounded once per step: the float32 result, rounded."""
    base, options = OPTIONS[name]
    p = nn.Parameter(torch.randn(CLASSES, 5).to(dtype))
    wide = nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32)))
    index = some_rows()
    dense = nn.Parameter(wide.detach()[index])
    optimizer, torchs = SAMPLED[base]([p], **options), base([dense], **options)
    dense.grad = torch.randn(len(index), 5).to(dtype).to(dense.dtype)
    p.grad = sparse(index, dense.grad.to(dtype), p)
    optimizer.step()
    torchs.step()
    assert p.dtype == dtype
    assert all(t.dtype == dtype for t in states_of(optimizer, p).values())
    if dtype == torch.float64:
        check_same("weight", p.detach()[index], dense.detach(), SAME_LOSS)
    else:
        assert torch.equal(p.detach()[index], dense.detach().to(dtype))


# --- gradients ------------------------------------------------------------------------------------


def test_accumulated_gradients_are_added_up_first() -> None:
    """Two backward passes: a row in both takes one step with the sum."""
    p = parameter(CLASSES, 8)
    q = twin(p)
    first, second = (
        sparse(some_rows(), torch.randn(9, 8), p),
        sparse(some_rows(), torch.ones(9, 8), p),
    )
    p.grad = torch.sparse_coo_tensor(
        torch.cat([first._indices(), second._indices()], dim=1),
        torch.cat([first._values(), second._values()]),
        p.shape,
    )
    assert not p.grad.is_coalesced()
    q.grad = first.to_dense() + second.to_dense()
    touched = q.grad.abs().sum(dim=1) > 0
    SampledSGD([p], lr=0.1, momentum=0.9).step()
    torch.optim.SGD([q], lr=0.1, momentum=0.9).step()
    check_same("weight", p.detach(), q.detach(), SAME_LOSS)
    assert 9 < int(touched.sum()) < 18


def test_embedding() -> None:
    """A sparse gradient that was not made for this."""
    table = nn.Embedding(CLASSES, 4, sparse=True)
    optimizer = SampledAdamW(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()
    table(torch.tensor([3, 3, 7])).sum().backward()
    optimizer.step()
    changed = (table.weight.detach() != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [3, 7]


def test_no_rows_at_all() -> None:
    p = parameter(CLASSES, 4)
    before = p.detach().clone()
    for optimizer in (SampledSGD([p], momentum=0.9, weight_decay=0.1), SampledAdamW([p])):
        p.grad = sparse(torch.empty(0, dtype=torch.int64), torch.empty(0, 4), p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        optimizer.zero_grad()
        assert p.grad is None
        optimizer.step()
    assert torch.equal(p, before)


def test_an_old_graph_notices() -> None:
    """As with any step in place between forward and backward pass."""
    p = parameter(CLASSES, 4)
    loss = (p * p).sum()
    optimizer = SampledSGD([p], lr=0.1)
    optimizer.begin_row_update(p)(slice(0, 1), torch.ones(1, 4), None, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
