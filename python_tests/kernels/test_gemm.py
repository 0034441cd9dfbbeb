"""The extension's GEMM on the CPU, and the native backend with its bfloat16 GEMM.

Operands are small integers where a result is compared: every sum is exact in float32, so
that the result is the same in any order of summation.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from support.cases import problem
from support.evaluation import check_against_reference
from support.given_variables import streams
from support.helpers import Target, run_python
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels.backends.native import cpu_engine, loader
from unitsface_kernels.backends.native.engine import DTYPE_CODES
from unitsface_kernels.deprecated import warn_of_old_name
from unitsface_kernels.losses import REGISTRY, LossSpec


def _has_gemm(dtype: torch.dtype) -> bool:
    return loader.failure() is None and loader.extension().cpu.has_gemm(DTYPE_CODES[dtype])


needs_gemm = pytest.mark.skipif(
    not _has_gemm(torch.bfloat16), reason="no bfloat16 GEMM on this processor"
)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            dtype,
            id=str(dtype).removeprefix("torch."),
            marks=pytest.mark.skipif(
                not _has_gemm(dtype), reason=f"no GEMM of {dtype} on this processor"
            ),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ],
)
# Below, at and above the sizes of groups of rows, of tiles and of blocks, with odd depths.
SHAPES = [
    (1, 1, 1),
    (2, 3, 2),
    (7, 17, 5),
    (8, 48, 32),
    (9, 49, 33),
    (16, 16, 31),
    (31, 95, 64),
    (33, 97, 65),
    (128, 96, 256),
    (129, 47, 255),
    (130, 145, 257),
    (64, 64, 600),
    (300, 1, 513),
    (4, 0, 3),
    (0, 4, 3),
    (5, 3, 0),
    # Whole tiles of rows and depth, which AMX reads as they are, one or two at a time.
    (16, 16, 32),
    (48, 40, 64),
    (272, 33, 544),
]


def _within(shape: tuple[int, int], values: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """``values`` as a part of a larger matrix full of something else; the part and the whole."""
    whole = torch.full((shape[0] + 3, shape[1] + 5), fill, dtype=values.dtype)
    part = whole[1 : 1 + shape[0], 2 : 2 + shape[1]]
    part.copy_(values)
    return part, whole


def _operand(values: Tensor, transposed: bool) -> Tensor:
    """With NaN around it, so that nothing of it can be read."""
    if transposed:
        return _within(values.T.shape, values.T, torch.nan)[0].T
    return _within(values.shape, values, torch.nan)[0]


def _integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False, threads: int = 2):
    _multiply_all([(left, right, out, add)], threads)


def _multiply_all(products: list[tuple[Tensor, Tensor, Tensor, bool]], threads: int = 2) -> None:
    multiply = loader.extension().cpu.gemm
    multiply(DTYPE_CODES[products[0][0].dtype], products, threads)


LAYOUTS = pytest.mark.parametrize(
    "layout", list(itertools.product((False, True), repeat=2)), ids=["nn", "nt", "tn", "tt"]
)


@each_dtype
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm(shape: tuple[int, int, int], layout: tuple[bool, bool], dtype: torch.dtype) -> None:
    """Overwritten, then added to; nothing but the operands is read, nothing else is written."""
    n, m, depth = shape
    a, b = _integers(n, depth, dtype=dtype), _integers(depth, m, dtype=dtype)
    left, right = _operand(a, layout[0]), _operand(b, layout[1])
    want = (a.double() @ b.double()).float()
    out, whole = _within((n, m), torch.full((n, m), torch.nan), 7.0)
    for add, times in ((False, 1.0), (True, 2.0)):
        _multiply(left, right, out, add)
        assert torch.equal(out, times * want)
        assert torch.equal(whole, _within((n, m), times * want, 7.0)[1])


@each_dtype
@LAYOUTS
def test_sums_are_float32_whatever_the_number_of_threads(
    layout: tuple[bool, bool], dtype: torch.dtype
) -> None:
    a = torch.randn(201, 517).to(dtype)
    b = torch.randn(517, 333).to(dtype)
    left, right = _operand(a, layout[0]), _operand(b, layout[1])
    first = torch.empty(201, 333)
    _multiply(left, right, first, threads=1)
    check_same("gemm", first, a.double() @ b.double(), SAME_LOSS)
    for threads in (2, 3, 7):
        again = torch.empty(201, 333)
        _multiply(left, right, again, threads=threads)
        assert torch.equal(again, first)


@each_dtype
@LAYOUTS
def test_what_is_not_finite_stays_in_its_row_or_column(
    layout: tuple[bool, bool], dtype: torch.dtype
) -> None:
    """At the edges, where operands are padded."""
    a, b = _integers(35, 33, dtype=dtype), _integers(33, 51, dtype=dtype)
    want = a.double() @ b.double()
    a[34, 32], b[32, 50] = torch.nan, torch.nan
    out = torch.empty(35, 51)
    _multiply(_operand(a, layout[0]), _operand(b, layout[1]), out)
    assert bool(out[34].isnan().all())
    assert bool(out[:, 50].isnan().all())
    assert torch.equal(out[:34, :50], want[:34, :50].float())


@each_dtype
def test_operands_of_no_unit_stride_are_refused(dtype: torch.dtype) -> None:
    a, b = _integers(4, 8, dtype=dtype), _integers(4, 4, dtype=dtype)
    with pytest.raises(ValueError, match="stride"):
        _multiply(a[:, ::2], b, torch.empty(4, 4))
    with pytest.raises(ValueError, match="stride"):
        _multiply(b, a[:, ::2], torch.empty(4, 4))


@each_dtype
def test_two_products_at_once_are_those_of_one_each(dtype: torch.dtype) -> None:
    """Both directions of a gradient tile, one added and one not, of any number of threads."""
    tile, a, b = (torch.randn(*s).to(dtype) for s in ((130, 301), (130, 75), (301, 75)))
    first, second = torch.randn(130, 75), torch.full((301, 75), torch.nan)
    want = first.clone(), second.clone()
    _multiply(tile, b, want[0], add=True)
    _multiply(tile.T, a, want[1])
    for threads in (1, 2, 7):
        found = first.clone(), second.clone()
        _multiply_all([(tile, b, found[0], True), (tile.T, a, found[1], False)], threads)
        assert all(map(torch.equal, found, want))


@each_dtype
def test_matrices_that_do_not_fit_are_refused(dtype: torch.dtype) -> None:
    """Shapes, strides and types say what is read and written."""
    a, b, out = _integers(4, 8, dtype=dtype), _integers(8, 5, dtype=dtype), torch.empty(4, 5)
    for message, *operands in (
        ("shapes", a[:, 1:], b, out),
        ("shapes", a, b, out[1:]),
        ("shapes", a, b, out[:, 1:]),
        ("type", a, b.double(), out),
        ("type", a, b, out.double()),
        ("stride", a, b, torch.empty(5, 4).T),
        ("matrix", a, b[0], out),
    ):
        with pytest.raises(ValueError, match=message):
            _multiply(*operands)
    with pytest.raises(ValueError, match="too many"):
        _multiply_all([(a, b, out, False)] * 3)
    with pytest.raises(TypeError, match="tuple of 4"):
        _multiply_all([(a, b, out)])


# --- before and after a GEMM ----------------------------------------------------------------------


def _gradient_tile(spec: LossSpec, cosines: Tensor, dtype: torch.dtype) -> Tensor:
    """d loss / d cosine of a tile with ignored labels, in both directions where there are two."""
    native = loader.extension()
    n, m = cosines.shape
    gradient = torch.empty(n, m, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    classes = (spec.reduction, spec.topology) == ("logsumexp", "class")
    held = {"cosines": cosines, "gradient": gradient}
    if classes:
        held["targets"] = torch.arange(n) % (2 * m) - 1
        held |= {"log_negatives": torch.full((n,), 20.0), "target_gradient": torch.ones(n) / 3}
        held["negative_weight"] = torch.rand(n, generator=generator)
    else:
        held["a_labels"] = torch.arange(n, dtype=torch.int32) % 5 - 1
        held["b_labels"] = torch.arange(m, dtype=torch.int32) % 7 - 1
    sides = {"a": n, "b": m}
    if spec.reduction == "sum":
        for side, size in sides.items() if spec.topology == "pair" else [("a", n)]:
            held[f"{side}_weights"] = torch.rand(size, generator=generator)
            held[f"{side}_loss"] = torch.zeros(size, dtype=torch.float64)
        for side, size in sides.items():
            held[f"{side}_threshold"] = torch.full((size,), 3.0)
    elif not classes:
        for side, size in sides.items():
            held[f"{side}_log_negatives"] = torch.full((size,), 20.0)
            if spec.reduction == "logsumexps":
                held[f"{side}_log_positives"] = torch.full((size,), 18.0)
            for kind in ("negative", "positive"):
                held[f"{side}_{kind}_weight"] = torch.rand(size, generator=generator)
    options = {"n": n, "m": m, "stride": m, "gradient_dtype": DTYPE_CODES[dtype]}
    if not classes:
        options["diagonal"] = 2
    if spec.reduction == "sum":
        options |= {
            "mirrored": spec.topology == "pair",
            "per_column": spec.threshold == "per_column",
        }
    kernel, arguments = {
        ("sum", "pair"): ("sum_tile", "CpuSumTile"),
        ("sum", "class"): ("sum_tile", "CpuSumTile"),
        ("logsumexp", "class"): ("logsumexp_gradient_tile", "LogsumexpGradientTile"),
        ("logsumexp", "pair"): ("pair_gradient_tile", "CpuPairGradient"),
        ("logsumexps", "pair"): ("pair_gradient_tile", "CpuPairGradient"),
    }[spec.reduction, spec.topology]
    tile = getattr(native, arguments)(**options, **held)
    # At the scale of its default Circle has infinite exponentials beside zeros.
    values = spec.defaults() | ({"scale": 8.0} if spec.name == "circle" else {})
    # No distance is beyond both margins.
    values |= {"negative_margin": 2.5} if spec.name == "contrastive" else {}
    params = list(spec.kernel_params(spec.pack(values)))
    getattr(native.cpu, kernel)(spec.name, params, tile, 2)
    return gradient


@pytest.mark.parametrize(
    "spec",
    [s for s in REGISTRY.values() if s.reduction != "nearest" and not streams(s)],
    ids=lambda spec: spec.name,
)
def test_gradient_tiles_are_rounded_once(spec: LossSpec) -> None:
    """Finished in float32, then to the nearest bfloat16."""
    cosines = 2 * torch.rand(67, 133) - 1
    exact = _gradient_tile(spec, cosines, torch.float32)
    rounded = _gradient_tile(spec, cosines, torch.bfloat16)
    assert bool((exact != exact.to(torch.bfloat16)).sum() > exact.numel() // 3)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_normalize_rows_are_rounded_once() -> None:
    native = loader.extension()
    rows = 20 * torch.randn(33, 77)
    rows[3] = 0.0
    # All bits set: rounding must not carry into the sign and leave a zero.
    rows[4] = torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        unit, norms = torch.empty(33, 77, dtype=dtype), torch.empty(33)
        arguments = native.NormalizeRows(
            source=rows,
            n=33,
            rows=33,
            d=77,
            unit=unit,
            unit_dtype=DTYPE_CODES[dtype],
            inverse_norms=norms,
        )
        native.cpu.normalize_rows(arguments, 2)
        found.append((unit.to(torch.bfloat16), norms))
    for exact, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def variables_read_again():
    """The environment variables of the GEMM are read once per process."""
    cpu_engine._wanted_gemm.cache_clear()
    yield
    cpu_engine._wanted_gemm.cache_clear()


@pytest.mark.usefixtures("variables_read_again")
@pytest.mark.parametrize("gemm", ["own", "library"])
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_float32_losses_by_either_gemm(spec: LossSpec, gemm: str, monkeypatch) -> None:
    """Independent of the processor's default."""
    monkeypatch.setenv("UNITSFACE_CPU_GEMM", gemm)
    used = []
    multiply = loader.extension().cpu.gemm

    def spied(*arguments):
        used.append(arguments)
        return multiply(*arguments)

    monkeypatch.setattr(loader.extension().cpu, "gemm", spied)
    p = problem(spec, rows=77, columns=130, dim=51)
    check_against_reference(Target("native", "cpu"), p, torch.float32)
    assert bool(used) == (gemm == "own" and _has_gemm(torch.float32))


@pytest.mark.usefixtures("variables_read_again")
@pytest.mark.parametrize(
    ("gemm", "former", "library"),
    [("library", None, True), (None, "library", True), ("own", "library", False)],
)
def test_the_earlier_name_of_the_variable_is_read(
    gemm: str | None, former: str | None, library: bool, monkeypatch
) -> None:
    """UNITSFACE_CPU_PRODUCTS, unless UNITSFACE_CPU_GEMM is set."""
    for name, value in (("UNITSFACE_CPU_GEMM", gemm), ("UNITSFACE_CPU_PRODUCTS", former)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader.extension().cpu, "has_gemm", lambda dtype: True)
    warn_of_old_name.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engines = [cpu_engine.CpuEngine(None, torch.device("cpu")) for _ in range(2)]
    assert [engine.library_gemm for engine in engines] == [library] * 2
    assert ["use UNITSFACE_CPU_GEMM" in str(w.message) for w in told] == [True] * bool(former)


# --- when it is used ------------------------------------------------------------------------------

# Prints for each loss whether it differs from that of the same numbers in float32; float32 features
# are under autocast.
_DIFFERENT = """
import sys
sys.path.insert(0, "python_tests")
import torch
from support.cases import problem
from support.grid import representatives
from unitsface_kernels.backends.native import loader
from unitsface_kernels.losses import REGISTRY

print(loader.extension().cpu.isa(), loader.extension().cpu.has_gemm(1))
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for spec in representatives(REGISTRY.values()):
        name = spec.name
        for columns in (None, 130):
            if columns is None and spec.topology == "class":
                continue
            p = problem(spec, rows=67, columns=columns, dim=37).converted(dtype)
            want = p.converted(torch.float32).loss("native")
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                print(dtype, name, columns, not torch.equal(p.loss("native"), want))
"""


@pytest.mark.extended
@pytest.mark.skipif(
    loader.failure() is not None or loader.extension().cpu.isa() != "amx",
    reason="the default has no other bfloat16 GEMM below it",
)
def test_the_next_bfloat16_gemm() -> None:
    """Without AMX a processor takes AVX512-BF16."""
    chosen = ("-q", "-p", "no:cacheprovider", __file__, "-k", "test_gemm or sums_are_float32")
    done = run_python("-m", "pytest", *chosen, UNITSFACE_CPU_ISA="avx512bf16")
    assert done.returncode == 0, done.stdout


def _different(isa: str) -> tuple[bool, dict[str, bool]]:
    done = run_python("-c", _DIFFERENT, UNITSFACE_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    head, *lines = (line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert head[0] == isa
    return head[1] == "True", {name: answer == "True" for name, answer in lines}


@pytest.mark.parametrize("isa", loader.extension().cpu.usable_isas())
def test_the_bfloat16_gemm_is_used_where_available(isa: str) -> None:
    """Elsewhere, and for other dtypes, the same numbers are multiplied in float32."""
    has_gemm, different = _different(isa)
    assert has_gemm == (isa in ("avx512bf16", "amx"))
    assert len({name.split()[0] for name in different}) == 3
    for name, differs in different.items():
        assert differs == (has_gemm and not name.startswith("torch.float16")), name


@needs_gemm
@pytest.mark.parametrize("spec", REGISTRY.values(), ids=lambda spec: spec.name)
def test_results_are_bitwise_repeatable_in_bfloat16(spec: LossSpec) -> None:
    p = problem(spec, rows=300, columns=40, dim=33, reduction="none").converted(torch.bfloat16)
    loss, gradients = p.evaluate("native")
    for _ in range(2):
        again, of_again = p.evaluate("native")
        assert torch.equal(again, loss)
        for name, gradient in of_again.items():
            assert torch.equal(gradient, gradients[name]), name
