"""Row optimizers with what optimizers are used with, and steps taken outside of step()."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from support.row_optimizers import (
    CLASSES,
    OPTIONS,
    SAMPLED,
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
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import unitsface_kernels
from unitsface_kernels import SampledAdamW, SampledSGD


@pytest.fixture(params=["native", "torch"])
def kernels(request, monkeypatch) -> None:
    use_kernels(request.param, monkeypatch)


# --- what optimizers are used with ----------------------------------------------------------------


def _sampled_step(optimizer, p: nn.Parameter, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(CLASSES, generator=generator)[:9].sort().values
    p.grad = sparse(index, torch.randn(9, *p.shape[1:], generator=generator), p)
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw-decay"])
def test_states_are_torchs(name, tmp_path) -> None:
    """Saved and loaded, by either class, and continued as if nothing had happened."""
    base, options = OPTIONS[name]
    p = parameter(CLASSES, 8)
    optimizer = SAMPLED[base]([p], **options)
    for seed in range(3):
        _sampled_step(optimizer, p, seed)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    copies = [twin(p) for _ in range(3)]
    through = base([copies[0]], **options)
    through.load_state_dict(copy.deepcopy(state))
    assert states_of(through, copies[0]).keys() == states_of(optimizer, p).keys()
    again = [SAMPLED[base]([q], **options) for q in copies[1:]]
    again[0].load_state_dict(state)
    again[1].load_state_dict(through.state_dict())
    for seed in range(3, 6):
        for o, q in zip([optimizer, *again], [p, *copies[1:]], strict=True):
            _sampled_step(o, q, seed)
    assert torch.equal(copies[1], p)
    assert torch.equal(copies[2], p)


@each_rule
def test_a_run_of_torchs_is_continued(name) -> None:
    """With its state, before and after its first step."""
    base, options = OPTIONS[name]
    dense = parameter(CLASSES, 8)
    torchs = base([dense], **options)
    for done in range(3):
        p = twin(dense)
        optimizer = SAMPLED[base]([p], **options)
        optimizer.load_state_dict(copy.deepcopy(torchs.state_dict()))
        dense.grad = torch.randn_like(dense)
        p.grad = sparse(torch.arange(CLASSES), dense.grad.clone(), p)
        for each in (torchs, optimizer):
            each.step()
        check_same(f"weight after {done} steps", p.detach(), dense.detach(), SAME_LOSS)


def test_schedulers_and_groups() -> None:
    """The learning rate of now, of the parameter's own group."""
    p, q = parameter(CLASSES, 4), parameter(CLASSES)
    optimizer = SampledSGD([{"params": [p], "lr": 1.0}, {"params": [q], "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    index = some_rows()
    for rate in (1.0, 0.1, 0.01):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = sparse(index, torch.ones(9, 4), p), sparse(index, torch.ones(9), q)
        optimizer.step()
        scheduler.step()
        for x, old, lr in ((p, before[0], rate), (q, before[1], 0.5 * rate)):
            check_same("weight", x.detach()[index], old[index] - lr, SAME_LOSS)


def test_closure_and_hooks() -> None:
    """The closure is evaluated with gradients; hooks run once a step, also beside Torch's class."""
    torch.optim.SGD([parameter(1)])
    p = parameter(CLASSES, 4)
    table = nn.Embedding.from_pretrained(p.detach(), freeze=False, sparse=True)
    optimizer = SampledSGD([table.weight, parameter(1)], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        optimizer.zero_grad()
        loss = table(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    assert calls == ["before", "closure", "after"]
    assert 0.0 < optimizer.step(closure).detach() < first


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_gradient_scalers(sharded, one_process) -> None:
    """Values are unscaled; with an infinite one the step is left out, whole."""
    scaler = (
        ShardedGradScaler("cpu", init_scale=8.0, process_group=one_process)
        if sharded
        else torch.amp.GradScaler("cpu", init_scale=8.0)
    )
    p, q = parameter(CLASSES, 4), parameter(3)
    r, s = twin(p), twin(q)
    scaled, plain = SampledAdamW([p, q]), SampledAdamW([r, s])
    scaler.scale(torch.zeros(()))
    for step in range(4):
        index, values = some_rows(), torch.randn(9, 4)
        factor = scaler.get_scale()
        p.grad, q.grad = sparse(index, values * factor, p), torch.ones(3) * factor
        r.grad, s.grad = sparse(index, values, r), torch.ones(3)
        if step == 2:
            p.grad._values()[3, 1] = torch.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == (8.0 if step < 2 else 4.0)
        assert torch.equal(p, r)
        assert torch.equal(q, s)


# --- steps taken while the gradient is computed ---------------------------------------------------


@pytest.mark.parametrize("indexed", [False, True])
@each_shape
@each_rule
def test_blocks_give_the_same_bits(name, shape, indexed, kernels) -> None:
    base, options = OPTIONS[name]
    p = parameter(*shape)
    q = twin(p)
    whole, blocks = SAMPLED[base]([p], **options), SAMPLED[base]([q], **options)
    for _ in range(3):
        index = torch.randperm(CLASSES)[:17] if indexed else torch.arange(CLASSES)
        gradient, count = torch.randn(len(index), *shape[1:]), len(index)
        p.grad = torch.sparse_coo_tensor(index[None], gradient, p.shape)
        whole.step()
        update = blocks.begin_row_update(q)
        for start in range(0, count, 4):
            rows = slice(start, min(start + 4, count))
            update(rows, gradient[rows].clone(), index if indexed else None, None)
    assert torch.equal(p, q)
    for key, state in states_of(whole, p).items():
        assert torch.equal(state, blocks.state[q][key])


def test_a_scale_multiplies_the_gradient(kernels) -> None:
    p = parameter(CLASSES, 7)
    q = twin(p)
    gradient = torch.randn(CLASSES, 7)
    rows = slice(0, CLASSES)
    SampledSGD([p], lr=0.5, weight_decay=0.1).begin_row_update(p)(
        rows, gradient.clone(), None, torch.tensor(0.25)
    )
    SampledSGD([q], lr=0.5, weight_decay=0.1).begin_row_update(q)(rows, gradient * 0.25, None, None)
    assert torch.equal(p, q)


def _marker(p: nn.Parameter, value: float) -> Tensor:
    return torch.sparse_coo_tensor([[0], [0]], torch.tensor([value]), p.shape, is_coalesced=True)


def test_fused_parameters_are_left_alone() -> None:
    p, q = parameter(CLASSES, 4), parameter(3)
    optimizer = SampledAdamW([p, q], weight_decay=0.5)
    optimizer.fuse(p)
    assert p in optimizer.fused
    assert q not in optimizer.fused
    before = p.detach().clone()
    for gradient in (torch.ones_like(p), _marker(p, 1.0), sparse(some_rows(), torch.ones(9, 4), p)):
        p.grad, q.grad = gradient, torch.ones(3)
        old = q.detach().clone()
        optimizer.step()
        assert p.grad is gradient
        assert not torch.equal(q, old)
    assert torch.equal(p, before)
    assert not optimizer.state[p]
    optimizer.zero_grad()
    assert p.grad is None


def test_hook_of_a_fused_parameter() -> None:
    """Called once a step, with what scaling and clipping have made of the marker."""
    p = parameter(CLASSES, 4)
    optimizer = SampledSGD([p], lr=1.0)
    factors: list[Tensor | None] = []
    optimizer.fuse(p, factors.append)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    p.grad = _marker(p, 8.0)
    scaler.unscale_(optimizer)
    p.grad._values().mul_(0.5)
    scaler.step(optimizer)
    assert factors[0] is not None
    assert factors[0].shape == ()
    assert float(factors[0]) == 0.5
    p.grad = None
    optimizer.step()
    p.grad = torch.sparse_coo_tensor(torch.empty(2, 0).long(), torch.empty(0), p.shape)
    optimizer.step()
    assert factors[1:] == [None, None]
    optimizer.fuse(p)
    optimizer.step()
    assert len(factors) == 3


def test_a_fused_parameter_is_stepped_from_its_hook() -> None:
    p = parameter(CLASSES, 4)
    q = twin(p)
    fused, plain = SampledAdamW([p]), SampledAdamW([q])
    gradient, index = torch.randn(9, 4), some_rows()

    def hook(factor: Tensor | None) -> None:
        fused.begin_row_update(p)(slice(0, 9), gradient.clone(), index, factor)

    fused.fuse(p, hook)
    p.grad, q.grad = _marker(p, 0.5), sparse(index, gradient * 0.5, q)
    fused.step()
    plain.step()
    assert torch.equal(p, q)
    assert fused.state[p]["step"] == 1


def test_copies_are_not_fused() -> None:
    p = parameter(CLASSES, 4)
    optimizer = SampledSGD([p])
    optimizer.fuse(p, lambda factor: None)
    optimizer.load_state_dict(optimizer.state_dict())
    assert p in optimizer.fused
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not other.fused
        other.step()


# --- mistakes -------------------------------------------------------------------------------------


def test_parameters_of_others() -> None:
    optimizer = SampledSGD([parameter(2)])
    for call in (optimizer.fuse, optimizer.begin_row_update):
        with pytest.raises(ValueError, match="one of the optimizer's parameters"):
            call(parameter(2))


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        (SampledSGD, {"dampening": 0.5, "momentum": 0.9}),
        (SampledSGD, {"maximize": True}),
        (SampledSGD, {"fused": True}),
        (SampledAdamW, {"amsgrad": True}),
        (SampledAdamW, {"maximize": True}),
        (SampledAdamW, {"fused": True}),
    ],
)
def test_options_that_rows_cannot_have(cls, option) -> None:
    """They are for parameters with dense gradients."""
    name = next(iter(option))
    p = parameter(CLASSES, 4)
    optimizer = cls([p], **option)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    p.grad = sparse(some_rows(), torch.ones(9, 4), p)
    for call in (
        optimizer.step,
        partial(optimizer.begin_row_update, p),
        partial(optimizer.fuse, p),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            call()
    assert torch.equal(p, before)


def test_gradients_that_a_fused_parameter_cannot_have() -> None:
    """The error is raised before anything else is stepped."""
    q, p = parameter(3), parameter(CLASSES, 4)
    before = q.detach().clone()
    optimizer = SampledSGD([q, p])
    optimizer.fuse(p, lambda factor: None)
    twice = torch.sparse_coo_tensor([[0, 0], [0, 0]], torch.ones(2), p.shape)
    for gradient in (torch.ones_like(p), twice, sparse(some_rows(), torch.ones(9, 4), p)):
        q.grad, p.grad = torch.ones(3), gradient
        with pytest.raises(ValueError, match="fused parameter"):
            optimizer.step()
    assert torch.equal(q, before)


def test_exported() -> None:
    assert unitsface_kernels.SampledSGD is SampledSGD
    assert issubclass(SampledSGD, torch.optim.SGD)
    assert issubclass(SampledAdamW, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (SampledSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (SampledAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    ],
)
def test_large_matrices_are_stepped_without_a_copy_of_their_gradient(ours, theirs, options):
    start = torch.randn(4200, 1000)
    found = []
    for kind in (ours, theirs):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1, **options)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(start.shape, generator=generator)
            kept = parameter.grad.clone()
            with _LargestResult() as largest:
                optimizer.step()
            assert torch.equal(parameter.grad, kept)
        # The states are there from the first step on.
        assert (largest.nbytes < start.nbytes) == (kind is ours)
        found.append((parameter.detach(), *states_of(optimizer, parameter).values()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class _LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operator made anew."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        new = isinstance(result, torch.Tensor) and not any(result is a for a in args)
        if new and function.overloadpacket not in _VIEWS:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


_VIEWS = (torch.ops.aten.detach, torch.ops.aten.view, torch.ops.aten.slice)
