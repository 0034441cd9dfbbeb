"""The built extension and its surroundings: instruction sets, OpenMP, registries, the report."""

from __future__ import annotations

import json
import re
from itertools import filterfalse

import pytest
import torch
from support.cases import problem
from support.given_variables import streams
from support.grid import calls
from support.helpers import PACKAGE, ROOT, TARGETS, Target, run_python
from support.tolerances import SAME_GRADIENT, SAME_LOSS, SATURATED, SCALAR, check_same
from torch import Tensor

from unitsface_kernels import dispatch
from unitsface_kernels.backends.native import loader
from unitsface_kernels.losses import CUSTOM, REGISTRY, TOWERS, LossSpec

#: Whose tiles are called without variables.
each_loss = pytest.mark.parametrize(
    "spec", list(filterfalse(streams, REGISTRY.values())), ids=lambda spec: spec.name
)


# --- what has to run here -------------------------------------------------------------------------


def test_nothing_is_skipped_silently() -> None:
    """The other files iterate over what is available: that has to be everything."""
    assert set(dispatch.available("cpu")) >= {"native", "reference"}
    found = {str(target) for target in TARGETS}
    if torch.cuda.is_available():
        assert found >= {"triton-cuda", "native-cuda", "native-cpu", "reference-cuda"}
    else:
        # Interpreted, see conftest.py.
        assert found == {"triton-cpu", "native-cpu", "reference-cpu"}
    for target in TARGETS:
        assert target.runs(torch.bfloat16)
        assert target.runs(torch.float16)
        assert target.runs(torch.float64) == (target.backend == "reference")


def test_registries_agree() -> None:
    """Python, C++ and Triton have the same losses with the same reductions."""
    text = (ROOT / "csrc" / "include" / "unitsface" / "loss_list.def").read_text()
    native = dict(re.findall(r"^UF_\w+_LOSS\((\w+), (\w+)\)", text, re.MULTILINE))
    kinds = {n: k.lower() for k, n in re.findall(r"^UF_(\w+)_LOSS\((\w+),", text, re.MULTILINE)}
    # The formula of a nearest loss is eager: it has no policy.
    known = {**REGISTRY, **TOWERS}
    tiled = {name: spec for name, spec in known.items() if spec.reduction != "nearest"}
    of_pairs = ("logsumexp", "logsumexps")
    assert kinds == {
        name: ("pair_" if spec.topology == "pair" and spec.reduction in of_pairs else "")
        + spec.reduction
        for name, spec in tiled.items()
    }
    headers = (ROOT / "csrc" / "include" / "unitsface" / "generated").glob("*.h")
    # Losses that differ in their thresholds alone share a policy.
    structs = "".join(header.read_text() for header in headers)
    for name, spec in tiled.items():
        body = structs.split(f"struct {native[name]} ")[1].split("\n};")[0]
        count = re.search(r"kParameters = (\d+);", body)
        assert count is not None
        assert int(count[1]) == len(spec.kernel_params(spec.pack(spec.defaults()))), name
        flag = re.search(r"kPositives = (true|false);", body)
        assert flag is None or flag[1] == str(spec.positive is not None).lower(), name

    from unitsface_kernels.backends.triton.losses import (
        LogsumexpPairsPolicy,
        LogsumexpPolicy,
        SumPolicy,
        SumTermsPolicy,
        policy_of,
    )

    for name, spec in tiled.items():
        policy, kind = policy_of(spec), (SumPolicy, SumTermsPolicy)
        if spec.reduction in of_pairs:
            kind = LogsumexpPairsPolicy if spec.topology == "pair" else LogsumexpPolicy
        assert isinstance(policy, kind), name
        if isinstance(policy, LogsumexpPairsPolicy):
            assert (policy.positive is None) == (spec.positive is None), name
    files = {path.stem for path in (PACKAGE / "losses").glob("*.py")}
    shared = {"__init__", "custom", "from_policy", "measured_pairs", "norm_softmax", "row_formulas"}
    assert files - shared - {"spec"} - CUSTOM.keys() == known.keys()


def test_unknown_losses_are_an_error_of_the_extension() -> None:
    native = loader.extension()
    with pytest.raises(ValueError, match="no native policy for loss 'other'"):
        native.cpu.sum_tile("other", [1.0], native.CpuSumTile(), 1)
    # A loss of the other reduction is unknown as well.
    for name, spec in REGISTRY.items():
        if spec.reduction == "nearest":
            continue
        run = native.cpu.logsumexp_tile if spec.reduction == "sum" else native.cpu.sum_tile
        tile = native.LogsumexpTile() if spec.reduction == "sum" else native.CpuSumTile()
        with pytest.raises(ValueError, match=name):
            run(name, [1.0] * len(spec.parameters), tile, 1)
    for run, tile in (
        (native.cpu.pair_negatives_tile, native.CpuPairNegatives()),
        (native.cpu.pair_positives_tile, native.CpuPairPositives()),
        (native.cpu.pair_gradient_tile, native.CpuPairGradient()),
    ):
        with pytest.raises(ValueError, match="margin_softmax"):
            run("margin_softmax", [1.0] * 5, tile, 1)


def test_report() -> None:
    done = run_python("-m", "unitsface_kernels")
    assert done.returncode == 0, done.stderr
    for name in dispatch.BACKENDS:
        assert re.search(rf"^ +{name} .*(available|no: )", done.stdout, re.MULTILINE), name
    assert torch.__version__ in done.stdout
    for isa in loader.extension().cpu.compiled_isas():
        assert isa in done.stdout


# --- instruction sets -----------------------------------------------------------------------------

# Run by a fresh process per instruction set; prints the set and every number.
_EVALUATE = """
import json, sys
sys.path.insert(0, "python_tests")
from support.cases import problem
from unitsface_kernels.backends.native import loader
from unitsface_kernels.losses import REGISTRY

found = {}
for name, spec in REGISTRY.items():
    for columns in (None, 130):
        p = problem(spec, rows=67, columns=columns, dim=37, labels="ignored", reduction="none")
        loss, gradients = p.evaluate("native")
        found[f"{name} {columns} loss"] = loss.tolist()
        found |= {f"{name} {columns} {k}": g.tolist() for k, g in gradients.items()}
lines = open("/proc/self/maps").read().splitlines() if sys.platform == "linux" else []
print(json.dumps([loader.extension().cpu.isa(), found, sorted({x.split()[-1] for x in lines})]))
"""


def _with_isa(isa: str) -> dict[str, Tensor]:
    done = run_python("-c", _EVALUATE, UNITSFACE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    used, found, mapped = json.loads(done.stdout)
    assert used == isa
    # Torch's: the extension has threads of its own (csrc/cpu/pool.h).
    runtimes = [path for path in mapped if re.search(r"lib(gomp|omp|iomp)", path)]
    assert len(runtimes) == (1 if mapped else 0), runtimes
    return {name: torch.tensor(values) for name, values in found.items()}


def test_instruction_sets_agree() -> None:
    """Each maps one OpenMP runtime into the process."""
    native = loader.extension()
    usable, compiled = native.cpu.usable_isas(), native.cpu.compiled_isas()
    assert "baseline" in usable
    assert set(usable) <= set(compiled)
    assert native.cpu.isa() == usable[0]
    results = {isa: _with_isa(isa) for isa in usable}
    want = results.pop("baseline")
    for isa, found in results.items():
        assert found.keys() == want.keys()
        for name, values in found.items():
            allowed = SAME_LOSS if name.endswith("loss") else SAME_GRADIENT
            check_same(f"{isa}: {name}", values, want[name], allowed)


def test_unknown_instruction_set() -> None:
    """The failure is reported, and everything else works."""
    code = """
import torch, unitsface_kernels as uk
from unitsface_kernels import dispatch
print(dispatch.unavailable("native", "cpu", torch.float32))
print(dispatch.available("cpu")[0])
"""
    done = run_python("-c", code, UNITSFACE_CPU_ISA="mmx")
    assert done.returncode == 0, done.stderr
    reason, first = done.stdout.strip().splitlines()
    for part in ("UNITSFACE_CPU_ISA", "baseline", "mmx"):
        assert part in reason
    assert first == "reference"


# --- determinism ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "spec"), calls(TARGETS, of_operator=True))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("columns", [None, 40], ids=["few", "columns"])
def test_results_are_bitwise_repeatable(
    target: Target, spec: LossSpec, reduction: str, columns: int | None
) -> None:
    rows = 700 if target.backend == "native" else 40
    p = problem(spec, target.device, rows=rows, columns=columns, reduction=reduction, dim=33)
    loss, gradients = p.evaluate(target.backend)
    for _ in range(1 if target.interpreted else 3):
        again, of_again = p.evaluate(target.backend)
        assert torch.equal(again, loss)
        for name, gradient in of_again.items():
            assert torch.equal(gradient, gradients[name]), name


def _sum_tile(loss: str, params: list[float], cosines: Tensor, threads: int, **given) -> dict:
    """One tile of a ``sum`` loss in place; everything that it accumulates."""
    native = loader.extension()
    n, m = cosines.shape
    cosine = cosines.clone()
    found = {
        "a_loss": torch.zeros(n, dtype=torch.float64),
        "b_loss": torch.zeros(m, dtype=torch.float64),
        "b_dthreshold": torch.zeros(1, dtype=torch.float64),
    }
    held = {
        "a_labels": torch.arange(n, dtype=torch.int32) % 5 - 1,
        "b_labels": torch.arange(m, dtype=torch.int32) % 7 - 1,
        "a_threshold": torch.zeros(1),
        "b_threshold": torch.zeros(1),
        **given,
    }
    tile = native.CpuSumTile(
        cosines=cosine,
        gradient=cosine,
        n=n,
        m=m,
        stride=m,
        diagonal=native.NO_DIAGONAL,
        mirrored=True,
        **held,
        **found,
    )
    native.cpu.sum_tile(loss, params, tile, threads)
    return {**found, "gradient": cosine}


def _logsumexp_tile(loss: str, params: list[float], cosines: Tensor, threads: int) -> dict:
    native = loader.extension()
    n, m = cosines.shape
    cosine = cosines.clone()
    targets = torch.arange(n) % (2 * m) - 1
    found = {
        "maximum": torch.full((n,), -torch.inf),
        "total": torch.zeros(n),
        "target_cosine": torch.zeros(n),
    }
    shared = {"n": n, "m": m, "stride": m, "targets": targets, "start": 0}
    tile = native.LogsumexpTile(cosines=cosine, **shared, **found)
    native.cpu.logsumexp_tile(loss, params, tile, threads)
    gradient = cosines.clone()
    rows = {
        "log_negatives": found["maximum"] + torch.log(found["total"]),
        "negative_weight": torch.rand(n, generator=torch.Generator().manual_seed(3)),
        "target_gradient": torch.ones(n),
    }
    native.cpu.logsumexp_gradient_tile(
        loss,
        params,
        native.LogsumexpGradientTile(
            cosines=gradient,
            gradient=gradient,
            **shared,
            **rows,
        ),
        threads,
    )
    return {**found, "gradient": gradient}


def _pair_tiles(loss: str, params: list[float], cosines: Tensor, threads: int) -> dict:
    """Every tile of a log-sum-exp over samples, in both directions."""
    native = loader.extension()
    n, m = cosines.shape
    found = {}
    for side, size in (("a", n), ("b", m)):
        found |= {
            f"{side}_maximum": torch.full((size,), -torch.inf),
            f"{side}_total": torch.zeros(size),
            f"{side}_positive_maximum": torch.full((size,), -torch.inf),
            f"{side}_positive_total": torch.zeros(size),
            f"{side}_loss": torch.zeros(size),
            f"{side}_negative_prob": torch.zeros(size),
        }
    labels = [torch.arange(size, dtype=torch.int32) % 7 - 1 for size in (n, m)]
    shared = {"n": n, "m": m, "stride": m, "diagonal": native.NO_DIAGONAL}
    shared |= {"a_labels": labels[0], "b_labels": labels[1]}

    def run(kernel: str, arguments: str, tensors: dict[str, Tensor]) -> Tensor:
        tile = cosines.clone()
        tile_arguments = getattr(native, arguments)(cosines=tile, **shared, **tensors)
        getattr(native.cpu, kernel)(loss, params, tile_arguments, threads)
        return tile

    def some(*names: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in found.items() if key[2:] in names}

    two = REGISTRY[loss].reduction == "logsumexps"
    sums = ["maximum", "total"] + two * ["positive_maximum", "positive_total"]
    run("pair_negatives_tile", "CpuPairNegatives", some(*sums))
    log_sums = {
        f"{side}_log_{kind}": found[f"{side}_{at}maximum"] + torch.log(found[f"{side}_{at}total"])
        for side in "ab"
        for kind, at in (("negatives", ""), ("positives", "positive_"))[: 1 + two]
    }
    if not two:
        run("pair_positives_tile", "CpuPairPositives", some("loss", "negative_prob") | log_sums)
        sums += ["loss", "negative_prob"] if REGISTRY[loss].positive is not None else []
    gradient = cosines.clone()
    generator = torch.Generator().manual_seed(3)
    weights = {
        f"{side}_{kind}_weight": torch.rand(size, generator=generator)
        for side, size in (("a", n), ("b", m))
        for kind in ("negative", "positive")
    }
    run("pair_gradient_tile", "CpuPairGradient", log_sums | weights | {"gradient": gradient})
    return {**some(*sums), "gradient": gradient}


def _nearest_tile(loss: str, params: list[float], cosines: Tensor, threads: int) -> dict:
    native = loader.extension()
    n, m = cosines.shape
    cosine, targets, k = cosines.clone(), torch.arange(n) % (2 * m) - 1, 5
    found = {
        "best": torch.full((n, k), -torch.inf),
        "position": torch.full((n, k), -1, dtype=torch.int32),
        "target_cosine": torch.zeros(n),
    }
    shared = {"n": n, "m": m, "stride": m, "targets": targets, "start": 0, "k": k}
    tile = native.NearestTile(cosines=cosine, **shared, **found)
    native.cpu.nearest_tile(tile, threads)
    return found


@each_loss
def test_tiles_do_not_depend_on_the_number_of_threads(spec: LossSpec) -> None:
    """The extension's results are the same for any number of threads, unlike the library's."""
    cosines = 2 * torch.rand(201, 333) - 1
    run = {"sum": _sum_tile, "nearest": _nearest_tile}.get(spec.reduction, _pair_tiles)
    if (spec.reduction, spec.topology) == ("logsumexp", "class"):
        run = _logsumexp_tile
    params = list(spec.kernel_params(spec.pack(spec.defaults())))
    want = run(spec.name, params, cosines, 1)
    for name, tensor in want.items():
        assert bool(tensor.any()) or (spec.threshold == "none" and "threshold" in name), name
    for threads in (2, 3, 7):
        for name, tensor in run(spec.name, params, cosines, threads).items():
            assert torch.equal(tensor, want[name]), f"{name} with {threads} threads"


# --- scalar functions -----------------------------------------------------------------------------


def _range() -> Tensor:
    """Arguments of both signs, from tiny to where the exponent saturates."""
    magnitudes = torch.logspace(-30, 2, 3000).clamp(max=SATURATED)
    dense = torch.linspace(-SATURATED, SATURATED, 20_000)
    return torch.cat([-magnitudes, magnitudes, dense, torch.zeros(1)])


def _worst(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want) / want).abs().max())


def test_softplus_and_sigmoid() -> None:
    """Through a column of one-element rows: s = 1, m = 0, b = 0 makes the loss softplus(c)."""
    z = _range()
    labels = {"a_labels": torch.zeros(len(z)).int(), "b_labels": torch.ones(1).int()}
    found = _sum_tile("uss", [1.0, 0.0], z[:, None].contiguous(), 1, **labels)
    exact = z.double()
    softplus = torch.where(exact > 0, exact, 0.0) + torch.log1p(torch.exp(-exact.abs()))
    sigmoid = torch.where(exact > 0, 1.0, torch.exp(exact)) / (1 + torch.exp(-exact.abs()))
    # The logarithm works on half of e^z; denormals are zeros.
    normal = softplus >= 2 * torch.finfo(torch.float32).tiny
    assert _worst(found["a_loss"][normal], softplus[normal]) < SCALAR
    # Both directions of a pair.
    assert _worst(found["gradient"][:, 0], 2 * sigmoid) < SCALAR


def test_softplus_of_saturated_arguments() -> None:
    z = torch.tensor([100.0, 1e4, 1e30, torch.inf, -100.0, -1e4, -1e30, -torch.inf, torch.nan])
    labels = {"a_labels": torch.zeros(9).int(), "b_labels": torch.ones(1).int()}
    found = _sum_tile("uss", [1.0, 0.0], z[:, None].contiguous(), 1, **labels)
    loss, slope = found["a_loss"], found["gradient"][:, 0] / 2
    assert torch.equal(loss[:4], z[:4].double())
    assert torch.equal(slope[:4], torch.ones(4))
    assert bool((loss[4:8].abs() < 1e-37).all())
    assert bool((slope[4:8].abs() < 1e-37).all())
    assert bool(loss[8].isnan())
    assert bool(slope[8].isnan())


def test_exp() -> None:
    """Through the sum over one negative, whose maximum so far is 0."""
    native = loader.extension()
    z = -_range().abs()
    total, maximum = torch.zeros_like(z), torch.zeros_like(z)
    cosine, target_cosine = z.clone(), torch.zeros_like(z)
    targets = torch.full((len(z),), -2)
    native.cpu.logsumexp_tile(
        "margin_softmax",
        # Scale and m1 are 1.
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
        native.LogsumexpTile(
            cosines=cosine,
            n=len(z),
            m=1,
            stride=1,
            targets=targets,
            start=0,
            maximum=maximum,
            total=total,
            target_cosine=target_cosine,
        ),
        1,
    )
    assert torch.equal(maximum, torch.zeros_like(z))
    assert _worst(total, torch.exp(z.double())) < SCALAR


def test_large_offsets_of_a_tile() -> None:
    """Targets and positions are 64-bit: a shard's first column may lie beyond 2^31."""
    native = loader.extension()
    far = 2**33
    cosines = torch.tensor([[0.5, -0.25, 0.75]])
    found = [torch.tensor([-torch.inf]), torch.zeros(1), torch.zeros(1)]
    targets = torch.tensor([far + 2])
    native.cpu.logsumexp_tile(
        "margin_softmax",
        # Scale and m1 are 1.
        [1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
        native.LogsumexpTile(
            cosines=cosines,
            n=1,
            m=3,
            stride=3,
            targets=targets,
            start=far,
            maximum=found[0],
            total=found[1],
            target_cosine=found[2],
        ),
        1,
    )
    assert found[2].item() == 0.75
    assert found[0].item() == 0.5
