"""Modules: parameters, copies, pickles, compilation, training, data parallelism."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch
from support.grid import extended_if
from support.helpers import TARGETS, Target
from support.tolerances import SAME_GRADIENT, SAME_LOSS, check_same
from torch import Tensor, nn

import unitsface_kernels
from unitsface_kernels import CLASS_LOSSES, PAIR_LOSSES, UniTSFaceLoss
from unitsface_kernels.losses import REGISTRY, TOWERS
from unitsface_kernels.modules import DERIVED

each_target = pytest.mark.parametrize("target", TARGETS, ids=str)


def _unitsface(backend: str) -> UniTSFaceLoss:
    torch.manual_seed(3)
    class_loss = CLASS_LOSSES["cosface"](8, 4, scale=8.0, backend=backend)
    return UniTSFaceLoss(
        class_loss, PAIR_LOSSES["uss"](scale=8.0, init_threshold=1.0, backend=backend)
    )


@each_target
def test_compile_of_modules(target: Target) -> None:
    module = _unitsface(target.backend).to(target.device)
    feats = torch.randn(9, 8, device=target.device, requires_grad=True)
    labels = torch.arange(9, device=target.device) % 4
    module(feats, labels).backward()
    want = [feats.grad, *(p.grad for p in module.parameters())]
    for leaf in (feats, *module.parameters()):
        leaf.grad = None
    torch.compiler.reset()
    torch.compile(module, fullgraph=True, backend="aot_eager")(feats, labels).backward()
    for i, leaf in enumerate((feats, *module.parameters())):
        check_same(f"gradient {i}", leaf.grad, want[i], SAME_GRADIENT)


# One of each base class, and those that keep something between steps.
COMPILED = {
    *("cosface", "uce", "npt", "uss", "pair_softmax", "epl", "unpg", "vpl", "adaface", "adacos"),
    *("curricularface", "elasticface", "proxy_anchor"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=extended_if(name not in COMPILED))
        for name in [*CLASS_LOSSES, *PAIR_LOSSES]
    ],
)
def test_compile_of_every_module(name: str) -> None:
    """Compiled and moved, in one graph where nothing looks at data on the way."""
    torch.manual_seed(5)
    module = MODULES[name]()
    for part in ("start_epoch", "start_iteration"):
        if hasattr(module, part):
            setattr(module, part, 0)
    module = module.to("cpu", torch.float32)
    other = copy.deepcopy(module)
    whole = name not in ("unpg", "vpl")
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=whole, backend="aot_eager")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        feats = torch.randn(9, 8, generator=generator).requires_grad_()
        labels = torch.randint(0, 4, (9,), generator=generator)
        leaves = [feats, *module.parameters()]
        want = torch.autograd.grad(module(feats, labels), leaves)
        got = torch.autograd.grad(compiled(feats, labels), [feats, *other.parameters()])
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            check_same(f"gradient {i} of step {step}", a, b, SAME_GRADIENT)
    for (key, a), b in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


# --- processes ------------------------------------------------------------------------------------


class _Model(nn.Module):
    """A layer and its losses in one module, as data parallelism requires."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = _unitsface("auto")
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.layer(x), labels)


def _share(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5 + rank, 6, generator=generator)
    return x, torch.randint(0, 4, (5 + rank,), generator=generator)


def _worker(rank: int, store: str, queue) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    model = nn.parallel.DistributedDataParallel(_Model())
    model(*_share(rank)).backward()
    queue.put({name: p.grad.tolist() for name, p in model.module.named_parameters()})


def test_data_parallel_gradients_are_averages(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = [(rank, str(tmp_path / "store"), queue) for rank in range(2)]
    workers = [context.Process(target=_worker, args=a, daemon=True) for a in arguments]
    for worker in workers:
        worker.start()
    try:
        found = [queue.get(timeout=120) for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
    model = _Model()
    sum(model(*_share(rank)) / 2 for rank in range(2)).backward()
    for name, parameter in model.named_parameters():
        for gradients in found:
            check_same(name, torch.tensor(gradients[name]), parameter.grad, SAME_GRADIENT)


@pytest.mark.parametrize("margin_type", ["C", "A"])
@pytest.mark.parametrize("classes", [2, 50, 10_000])
def test_sphereface2_starts_where_its_bias_has_no_gradient(margin_type: str, classes: int) -> None:
    """Features at right angles to every class weight; the published start."""
    module = CLASS_LOSSES["sphereface2"](8, classes, margin_type=margin_type)
    with torch.no_grad():
        module.weight.zero_()[:, 0] = 1.0
    feats = torch.zeros(3, 8)
    feats[:, 1] = 1.0
    target = module(feats, torch.tensor([0, 1, 1]))
    (gradient,) = torch.autograd.grad(target, module.bias)
    moved = module.bias.detach() + 0.1
    with torch.no_grad():
        module.bias.copy_(moved)
    (elsewhere,) = torch.autograd.grad(module(feats, torch.tensor([0, 1, 1])), module.bias)
    assert abs(float(gradient)) < 1e-3 * float(elsewhere)


@pytest.mark.parametrize("name", ["uss", "pair_bce"])
def test_thresholds_start_from_the_first_batch(name: str) -> None:
    """As published; what was saved while waiting, or after, goes on from there."""

    def fresh() -> nn.Module:
        return PAIR_LOSSES[name](**({} if name == "uss" else {"num_identities": 4}))

    torch.manual_seed(0)
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, -1])
    want = unitsface_kernels.uss_threshold_init(feats, labels)
    module = fresh()
    unused = copy.deepcopy(module)
    empty = {"memory": torch.randn(4, 8), "memory_labels": torch.full((4,), -1)}
    module(feats, labels, **empty)
    module.eval()(feats, labels)
    assert not bool(module.initialized)
    assert not bool(module.threshold.any())
    module.train()
    loss = module(feats, labels)
    assert bool((module.threshold == want).all())
    module(-feats, labels).backward()
    assert bool((module.threshold == want).all())
    module.zero_grad()
    for start in (module, unused):
        loaded = fresh()
        loaded.load_state_dict(start.state_dict())
        assert torch.equal(loaded(feats, labels), loss)
        assert bool((loaded.threshold == want).all())
    torch.compiler.reset()
    compiled = fresh()
    assert torch.equal(torch.compile(compiled, backend="eager")(feats, labels), loss)
    assert bool((compiled.threshold == want).all())


# --- modules --------------------------------------------------------------------------------------


def _pair_module(cls: type[nn.Module]) -> nn.Module:
    known = inspect.signature(cls).parameters
    given = {"num_identities": 4, "init_threshold": 2.0, "scale": 9.0, "beta": 9.0}
    given |= {"negative_margin": 2.5, "r": 2.5}
    return cls(**{name: value for name, value in given.items() if name in known})


# A parameter of each, which its representation shows.
SHOWN = {key: {"scale": 9.0} for key in (*CLASS_LOSSES, *PAIR_LOSSES, "unitsface")}
SHOWN |= {"npt": {"margin": 2.5}, "multi_similarity": {"beta": 9.0}, "adacos": {"dynamic": False}}
SHOWN |= {"contrastive": {"negative_margin": 2.5}, "batch_hard": {"margin": 2.5}}
SHOWN |= {"simple": {"r": 2.5}, "simple_proxy": {"r": 2.5}, "proxy_anchor": {"alpha": 2.5}}
SHOWN |= {name: {} for name in DERIVED if "scale" not in REGISTRY[name].defaults()}
MODULES = {
    **{name: lambda c=c, n=name: c(8, 4, **SHOWN[n]) for name, c in CLASS_LOSSES.items()},
    **{name: lambda c=c: _pair_module(c) for name, c in PAIR_LOSSES.items()},
    "unitsface": lambda: _unitsface("auto"),
}


def test_every_module_is_tested() -> None:
    assert MODULES.keys() >= CLASS_LOSSES.keys() | PAIR_LOSSES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_modules_copy_and_pickle(name: str) -> None:
    # In training the statistics and draws of some move with every call.
    module = MODULES[name]().eval()
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, -1])
    want = module(feats, labels)
    assert want.shape == ()
    assert float(want.detach()) > 0
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh = MODULES[name]().eval()
    for parameter in fresh.parameters():
        nn.init.constant_(parameter, 0.5)
    if list(fresh.parameters()):
        assert not torch.equal(fresh(feats, labels), want)
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(feats, labels), want)
        assert [k for k, _ in other.named_parameters()] == [k for k, _ in module.named_parameters()]
        assert repr(other) == repr(module)
        assert all(f"{parameter}=" in repr(module) for parameter in SHOWN[name])


@pytest.mark.parametrize("name", MODULES)
def test_modules_train(name: str) -> None:
    """Every parameter gets a gradient, and following it lowers the loss."""
    module = MODULES[name]()
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    # Without parameters the features are what learns.
    learned = list(module.parameters()) or [feats.requires_grad_()]
    optimizer = torch.optim.SGD(learned, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = module(feats, labels)
        loss.backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in learned)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@each_target
def test_modules_are_their_functions(target: Target) -> None:
    feats = torch.randn(6, 8, device=target.device)
    labels = torch.tensor([0, 1, 2, 3, 0, -1], device=target.device)
    presets = {
        "normface": {"m1": 1.0, "m2": 0.0, "m3": 0.0},
        "cosface": {"m1": 1.0, "m2": 0.0, "m3": 0.3},
        "arcface": {"m1": 1.0, "m2": 0.3, "m3": 0.0},
        "sphereface": {"m1": 1.3, "m2": 0.0, "m3": 0.0},
    }
    module = CLASS_LOSSES["npt"](8, 4, 0.7, 2, "sum", target.backend).to(target.device)
    options = {"margin": 0.7, "k": 2, "reduction": "sum", "backend": target.backend}
    want = unitsface_kernels.fused_npt_loss(feats, module.weight, labels, **options)
    assert torch.equal(module(feats, labels), want)
    margins = {"cosface": 0.3, "arcface": 0.3, "sphereface": 1.3}
    for name, values in presets.items():
        margin = {"margin": margins[name]} if name in margins else {}
        module = CLASS_LOSSES[name](8, 4, scale=9.0, **margin, backend=target.backend)
        module = module.to(target.device)
        want = unitsface_kernels.fused_margin_softmax_loss(
            feats, module.weight, labels, scale=9.0, **values, backend=target.backend
        )
        assert torch.equal(module(feats, labels), want)
    for name in ("uce", "class_bce"):
        values = {"margin": 0.3, "negative_weight": 0.5}
        module = CLASS_LOSSES[name](8, 4, scale=9.0, **values, backend=target.backend)
        module = module.to(target.device)
        want = unitsface_kernels.fused_uce_loss(
            *(feats, module.weight, labels, module.threshold),
            **(values | {"scale": 9.0, "backend": target.backend}),
        )
        assert torch.equal(module(feats, labels), want)
    options = {"scale": 9.0, "t": 2.0, "margin_type": "A", "margin_gradient": "exact"}
    module = CLASS_LOSSES["sphereface2"](8, 4, **options, backend=target.backend)
    module = module.to(target.device)
    want = unitsface_kernels.fused_sphereface2_loss(
        feats, module.weight, labels, module.bias, **options, backend=target.backend
    )
    assert torch.equal(module(feats, labels), want)
    memory = torch.randn(5, 8, device=target.device)
    memory_labels = torch.tensor([0, 1, 2, -1, 3], device=target.device)
    module = PAIR_LOSSES["uss"](9.0, 0.2, 1.5, reduction="sum", backend=target.backend)
    module = module.to(target.device)
    options = {"scale": 9.0, "margin": 0.2, "reduction": "sum", "backend": target.backend}
    for given in ({}, {"memory": memory, "memory_labels": memory_labels}):
        want = unitsface_kernels.fused_uss_loss(feats, labels, 1.5, **options, **given)
        assert torch.equal(module(feats, labels, **given), want)
        both = UniTSFaceLoss(CLASS_LOSSES["cosface"](8, 4).to(target.device), module)
        total = both.class_loss(feats, labels) + want
        assert torch.equal(both(feats, labels, **given), total)
    module = PAIR_LOSSES["pair_softmax"](9.0, 0.2, reduction="sum", backend=target.backend)
    for given in ({}, {"memory": memory, "memory_labels": memory_labels}):
        want = unitsface_kernels.fused_pair_softmax_loss(feats, labels, **options, **given)
        assert torch.equal(module(feats, labels, **given), want)


# --- arguments ------------------------------------------------------------------------------------


def _arguments(cls: type[nn.Module]) -> set[str]:
    """Arguments that a module accepts, following ``**kwargs`` to the base classes' constructors."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return names | inspect.signature(cls.forward).parameters.keys()


# What a module gives a function by itself, or by another name.
OWN = {"weight", "b"}
_FILTER = {"interclass_filtering_threshold"}
RENAMED = {
    # They follow the batches.
    "curricularface": {"t"},
    "adacos": {"scale"},
    "normface": {"m1", "m2", "m3"},
    "cosface": {"m1", "m2", "m3"},
    "arcface": {"m1", "m2", "m3"},
    "sphereface": {"m1", "m2", "m3"},
    # k is the adaptive margin; all classes take part, or those that PartialFC draws.
    "epl": {"m1", "m2", "m3", "adaptive_margin", "class_index", "centers", *_FILTER},
    "unpg": {"m1", "m2", "m3", "adaptive_margin", "class_index", "centers", *_FILTER},
    "vpl": {"m1", "m2", "m3", "adaptive_margin", "class_index", "centers", *_FILTER},
    # Their functions are not those of margin softmax.
    **{
        name: {"m1", "m2", "m3", "adaptive_margin", "margin_gradient", *_FILTER}
        for name in ("adaface", "class_margin", "elasticface", "magface")
    },
}


@pytest.mark.parametrize("name", [*CLASS_LOSSES, *PAIR_LOSSES])
def test_modules_take_every_argument_of_their_functions(name: str) -> None:
    cls = (CLASS_LOSSES | PAIR_LOSSES)[name]
    registered = getattr(cls, "loss", name)
    spec = {**REGISTRY, **TOWERS}.get(registered, REGISTRY["margin_softmax"])
    of_function = inspect.signature(getattr(unitsface_kernels, spec.function)).parameters
    missing = of_function.keys() - _arguments(cls) - OWN - RENAMED.get(name, set())
    assert not missing
    if name in CLASS_LOSSES:
        assert "init_std" in _arguments(cls)


def test_presets_keep_their_margins_and_take_the_rest() -> None:
    for name in ("normface", "cosface", "arcface", "sphereface"):
        module = CLASS_LOSSES[name](8, 4, adaptive_margin=0.3, margin_gradient="detached")
        assert module.adaptive_margin == 0.3
        own = "it has no margin" if name == "normface" else "its margin is margin="
        with pytest.raises(TypeError, match=rf"Loss does not take m3 \({own}; .* got m3=0.2$"):
            CLASS_LOSSES[name](8, 4, m3=0.2)


@pytest.mark.parametrize("name", ["cosface", "arcface", "subcenter_arcface", "sphereface"])
def test_a_margin_is_changed_under_the_name_of_its_constructor(name: str) -> None:
    torch.manual_seed(0)
    feats, labels = torch.randn(6, 8), torch.arange(6) % 4
    changed, made = CLASS_LOSSES[name](8, 4, scale=9.0), CLASS_LOSSES[name](8, 4, 9.0, 1.2)
    made.load_state_dict(changed.state_dict())
    before = changed(feats, labels)
    changed.margin = 1.2
    assert changed.margin == made.margin == 1.2
    assert torch.equal(changed(feats, labels), made(feats, labels))
    assert not torch.equal(changed(feats, labels), before)


@pytest.mark.parametrize("name", ["margin_softmax", "uce", "class_bce", "sphereface2", "npt"])
def test_a_subset_of_the_classes(name: str) -> None:
    module = CLASS_LOSSES[name](8, 40, init_std=2.0)
    feats, index = torch.randn(6, 8), torch.tensor([39, 3, 7, 20])
    loss = module(feats, torch.tensor([0, 1, 2, 3, -1, 0]), class_index=index)
    (gradient,) = torch.autograd.grad(loss, module.weight)
    assert set(gradient.abs().sum(dim=1).nonzero().flatten().tolist()) <= set(index.tolist())
    assert 1.5 < float(module.weight.detach().std()) < 2.5
    with pytest.raises(ValueError, match="init_std must be > 0"):
        CLASS_LOSSES[name](8, 4, init_std=0.0)


def test_softmax_over_pairs_leaves_out_its_own_copies() -> None:
    feats, labels = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    module = PAIR_LOSSES["pair_softmax"](scale=9.0)
    columns = {"memory": feats, "memory_labels": labels}
    got = UniTSFaceLoss(CLASS_LOSSES["cosface"](8, 4), module)
    want = got.class_loss(feats, labels) + module(feats, labels)
    check_same("loss", got(feats, labels, **columns, batch_offset=0), want, SAME_LOSS)
    assert float(module(feats, labels, **columns)) < float(module(feats, labels))
