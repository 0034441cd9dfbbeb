"""The search for launch configurations: with a timer that is given, and Triton's interpreter."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import problem
from support.helpers import run_python
from support.tolerances import SAME_LOSS, check_same
from torch import Tensor

from unitsface_kernels.backends import triton as backend
from unitsface_kernels.backends.streaming import Call
from unitsface_kernels.losses import REGISTRY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = backend.unavailable(DEVICE, torch.float32)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

# After the check: these need Triton.
from triton.runtime.errors import OutOfResources  # noqa: E402

from unitsface_kernels.backends.triton import autotune, configs  # noqa: E402
from unitsface_kernels.backends.triton.autotune import Choice, Tuner  # noqa: E402
from unitsface_kernels.backends.triton.autotune_store import Store  # noqa: E402
from unitsface_kernels.backends.triton.workspace import shipped_config  # noqa: E402

HERE = {"unitsface_kernels": "1", "triton": "3.6", "device": "some GPU", "capability": "9.0"}
BASE = configs.select(90, torch.bfloat16, False)
KEY = "sum, any, bfloat16, 8192 x batch x 512"


class Clock:
    """A timer whose answers are given per configuration; 1 s for every other."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.ran: list[configs.Config] = []

    def run(self, config: configs.Config) -> None:
        self.ran.append(config)

    def __call__(self, run) -> float:
        run()
        config = self.ran[-1]
        times = {
            "stages": config.sum.num_stages == BASE.sum.num_stages + 1,
            "blocks": config.sum.block_n == 2 * BASE.sum.block_n,
            "tiles": config.wave.gradient_rows == 2 * BASE.wave.gradient_rows,
        }
        return min([self.seconds[name] for name, is_so in times.items() if is_so], default=1.0)


def search(tuner: Tuner, clock: Clock, key: str = KEY, search: bool = True) -> configs.Config:
    return tuner.config(key, "sum", BASE, clock.run, search)


def clock(stages: float = 1.0, blocks: float = 1.0, tiles: float = 1.0) -> Clock:
    return Clock(stages=stages, blocks=blocks, tiles=tiles)


def test_the_fastest_launch_and_then_the_fastest_tile_size_are_chosen(tmp_path: Path) -> None:
    given = clock(stages=0.9, blocks=0.7, tiles=0.5)
    found = search(Tuner(Store(tmp_path, HERE), given), given)
    assert found.sum.block_n == 2 * BASE.sum.block_n
    assert found.wave.gradient_rows == 2 * BASE.wave.gradient_rows
    # Nothing else has changed.
    assert replace(found, sum=BASE.sum, wave=BASE.wave) == BASE


def test_a_gain_within_the_noise_changes_nothing(tmp_path: Path) -> None:
    given = clock(stages=1.0 - autotune.MARGIN / 2)
    assert search(Tuner(Store(tmp_path, HERE), given), given) == BASE


def test_failing_and_spilling_candidates_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = clock(stages=0.8, blocks=0.6, tiles=1.0)
    plain = given.run

    class Spilling:
        n_spills = 4

    class Lean:
        n_spills = 0

    def run(config: configs.Config) -> None:
        plain(config)
        wide = config.sum.block_n > BASE.sum.block_n
        if config.sum.num_stages > BASE.sum.num_stages:
            raise RuntimeError("out of resource: shared memory")
        if autotune.launch._launched is not None:
            autotune.launch._launched.append(Spilling() if wide else Lean())

    monkeypatch.setattr(given, "run", run)
    assert search(Tuner(Store(tmp_path, HERE), given), given) == BASE
    assert any(config.sum.num_stages > BASE.sum.num_stages for config in given.ran)
    # A lean one that is as fast is taken: it was the spills that counted.
    monkeypatch.setattr(Spilling, "n_spills", 0)
    found = search(Tuner(Store(tmp_path / "other", HERE), given), given)
    assert found.sum.block_n > BASE.sum.block_n


def test_what_fails_in_the_call_itself_is_not_hidden(tmp_path: Path) -> None:
    def run(config: configs.Config) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        Tuner(Store(tmp_path, HERE), clock()).config(KEY, "sum", BASE, run, True)


def test_a_result_is_found_again_without_another_search(tmp_path: Path) -> None:
    first = clock(blocks=0.5)
    found = search(Tuner(Store(tmp_path, HERE), first), first)
    (path,) = tmp_path.iterdir()  # and no temporary file
    entry = json.loads(path.read_text())["entries"][KEY]
    assert entry["seconds"] == 0.5
    assert entry["shipped_seconds"] == 1.0
    again = clock(stages=0.1)
    later = Tuner(Store(tmp_path, HERE), again)
    assert search(later, again, search=False) == found
    assert search(later, again) == found
    assert again.ran == []
    # Another shape has none.
    assert search(later, again, key=KEY + " other", search=False) == BASE


def test_without_a_search_nothing_runs_and_nothing_is_written(tmp_path: Path) -> None:
    given = clock(stages=0.1)
    assert search(Tuner(Store(tmp_path, HERE), given), given, search=False) == BASE
    assert given.ran == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["tile"].update(block_k=48),
        lambda entry: entry["tile"].update(num_warps="8"),
        lambda entry: entry["tile"].pop("epilogue_subtiles"),
        lambda entry: entry["wave"].update(rows=7, unknown=1),
        lambda entry: entry.pop("wave"),
    ],
)
def test_an_entry_that_no_search_can_have_found_is_ignored(tmp_path: Path, damage) -> None:
    given = clock(blocks=0.5)
    search(Tuner(Store(tmp_path, HERE), given), given)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    damage(content["entries"][KEY])
    path.write_text(json.dumps(content))
    tuner = Tuner(Store(tmp_path, HERE), given)
    with pytest.warns(RuntimeWarning, match="none of the candidates"):
        assert search(tuner, given, search=False) == BASE
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once, not with every call
        assert search(tuner, given, search=False) == BASE


def test_a_result_with_the_former_names_of_its_fields_is_read(tmp_path: Path) -> None:
    given = clock(blocks=0.5)
    found = search(Tuner(Store(tmp_path, HERE), given), given)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    entry = content["entries"][KEY]
    entry["product"] = tile = entry.pop("tile")
    tile["parts"], tile["group"] = tile.pop("epilogue_subtiles"), tile.pop("group_m")
    path.write_text(json.dumps(content))
    assert found != BASE
    assert search(Tuner(Store(tmp_path, HERE), given), given, search=False) == found


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    given = clock(blocks=0.5)
    tuner = Tuner(Store(blocked / "below", HERE), given)
    with pytest.warns(RuntimeWarning, match="cannot be"):
        found = search(tuner, given)
    assert found.sum.block_n == 2 * BASE.sum.block_n
    assert search(Tuner(Store(None, HERE), given), given) == found


# What a result is for


def make_call(loss: str, rows: int = 70, columns: int | None = None, **changes: object) -> Call:
    spec = REGISTRY[loss]
    generator = torch.Generator().manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, 48, generator=generator).to(DEVICE)

    columns = 90 if spec.topology == "class" and columns is None else columns
    pair = columns is not None and spec.topology == "pair"
    call = Call(
        spec,
        spec.pack(spec.defaults()),
        "mean",
        "triton",
        torch.float32,
        rows=normal(rows),
        row_labels=torch.arange(rows, device=DEVICE) % 7,
        columns=None if columns is None else normal(columns),
        column_labels=torch.arange(columns or 0, device=DEVICE) % 7 if pair else None,
        self_offset=None if columns is not None else 0,
        threshold={
            "none": None,
            "scalar": torch.zeros(1, device=DEVICE),
            "per_column": torch.zeros(columns or rows, device=DEVICE),
        }[spec.threshold],
        need_rows=True,
        need_columns=True,
        need_threshold=True,
    )
    return replace(call, **changes)


def test_every_kind_of_call_has_its_kernel_and_every_kernel_its_call() -> None:
    kinds = set()
    for name in REGISTRY:
        of_loss = {autotune.kind_of(make_call(name), stage) for stage in ("forward", "backward")}
        if REGISTRY[name].reduction == "nearest":
            assert of_loss == {None}
        else:
            kinds |= of_loss
    assert kinds == set(autotune.SLOTS)


def test_shape_classes_are_powers_of_two() -> None:
    def of(rows: int, columns: int | None = None) -> str:
        return autotune.shape_class(make_call("uss", rows, columns))

    assert of(65) == of(128) == "128 x batch x 64"
    assert of(129) == "256 x batch x 64"
    # A batch is not a memory of the same size.
    assert of(128, 128) == "128 x 128 x 64"


def test_keys_tell_apart_what_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        make_call("uss"),
        make_call("uss", rows=200),
        make_call("uss", columns=200),
        make_call("uss", compute_dtype=torch.bfloat16),
        make_call("uss", compute_dtype=torch.float16),
        make_call("sphereface2"),
    ]
    keys = [autotune.key_of(call, "sum") for call in calls]
    keys += [autotune.key_of(calls[0], "sum_heavy")]
    monkeypatch.setattr(autotune, "uses_tf32", lambda: True)
    keys += [autotune.key_of(calls[0], "sum")]
    assert len(set(keys)) == len(keys)


ARCHITECTURES = (80, 89, 90, 100, 120)
DTYPES = {"bfloat16": False, "float32": False, "tf32": True}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", autotune.SLOTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_keep_what_kernels_rely_on(architecture: int, kind: str, dtype: str) -> None:
    torch_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    config = configs.select(architecture, torch_dtype, DTYPES[dtype])
    shipped = getattr(config, autotune.SLOTS[kind])
    found = autotune.tile_configs(shipped, kind)
    assert found[0] == shipped
    assert len(found) == len(set(found)) >= 5
    for tile in found:
        assert 64 % tile.block_k == 0
        sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
        assert all(size > 0 and size & (size - 1) == 0 for size in (*sizes, tile.epilogue_subtiles))
        assert tile.epilogue_subtiles in (1, 2, 4, 8)
        # Both passes must see the same cosines.
        assert kind in autotune.ONE_PASS or tile.block_k == shipped.block_k
    for wave in autotune.waves(config.wave):
        assert wave.gradient_bytes // (2 * 64) >= wave.gradient_rows
        assert min(wave.columns, wave.rows) % 64 == 0


@pytest.mark.parametrize(
    "loss",
    [
        *("margin_softmax", "pair_softmax"),
        *(pytest.param(loss, marks=pytest.mark.extended) for loss in ("uss", "pair_bce", "uce")),
    ],
)
def test_candidates_compute_the_same(loss: str) -> None:
    """Every third candidate, of both kinds and with every third size of a tile."""
    call = make_call(loss)
    state = torch.zeros(0)
    for stage in ("forward", "backward"):
        kind = autotune.kind_of(call, stage)
        assert kind is not None
        base = shipped_config(call)
        shipped = getattr(base, autotune.SLOTS[kind])
        choices = [Choice(p, base.wave) for p in autotune.tile_configs(shipped, kind)[::3]]
        choices += [Choice(shipped, wave) for wave in autotune.waves(base.wave)[1::3]]
        results = []
        for choice in choices:
            # On a device the largest may not fit; the shipped one, the first, has to.
            with suppress(*(() if choice is choices[0] else (OutOfResources,))):
                results.append(run_stage(call, stage, choice.applied(base, kind), state))
        assert len(results) >= 4
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                check_same(f"{kind}", got, want, SAME_LOSS)
        if stage == "forward" and call.spec.reduction != "sum":
            state = results[0][-1]


def run_stage(call: Call, stage: str, config: configs.Config, state: Tensor) -> list[Tensor]:
    from unitsface_kernels.backends.streaming import driver
    from unitsface_kernels.backends.triton.engine import TritonEngine

    if stage == "forward":
        sums = call.spec.reduction == "sum"
        found = driver(call.spec).forward(call, TritonEngine(call, sums, config=config), sums)
        tensors = [found.loss, *found.gradients, found.state]
    else:
        weights = torch.linspace(0.2, 1.0, call.rows.shape[0], device=DEVICE)
        tensors = list(
            driver(call.spec).backward(call, TritonEngine(call, config=config), state, weights)
        )
    return [tensor for tensor in tensors if tensor is not None]


@pytest.mark.skipif(DEVICE == "cuda", reason="no interpreter beside a CUDA device")
def test_the_interpreter_is_never_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its times mean nothing, and neither do results of a GPU."""
    monkeypatch.setenv("UNITSFACE_AUTOTUNE", "1")
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", str(tmp_path))
    problem(REGISTRY["uss"]).evaluate("triton")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "capturing", "needs", "expected"),
    [
        ("1", False, True, True),
        ("1", True, True, False),
        ("1", False, False, False),
        ("", False, True, False),
    ],
)
def test_when_a_search_is_made(
    monkeypatch: pytest.MonkeyPatch, mode: str, capturing: bool, needs: bool, expected: bool
) -> None:
    asked: list[bool] = []

    class Fake:
        is_empty = False

        def config(self, key: str, kind: str, base: configs.Config, run, search: bool):
            asked.append(search)
            return base

    monkeypatch.setenv("UNITSFACE_AUTOTUNE", mode)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(autotune, "_tuner", lambda device: Fake())
    call = on_cuda(make_call("uss", need_rows=needs, need_columns=False, need_threshold=False))
    assert autotune.config(call, "forward", lambda config: None) == shipped_config(call)
    assert asked == [expected]
    monkeypatch.setenv("UNITSFACE_AUTOTUNE", "0")
    autotune.config(call, "forward", lambda config: None)
    assert len(asked) == 1


def on_cuda(call: Call) -> Call:
    """As far as the choice of a configuration looks."""

    class Rows:
        is_cuda, device, shape = True, torch.device("cuda", 0), call.rows.shape

        def numel(self) -> int:
            return call.rows.numel()

    return replace(call, rows=Rows())


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITSFACE_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="UNITSFACE_AUTOTUNE must be one of"):
        problem(REGISTRY["uss"], DEVICE).evaluate("triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_on_a_device(tmp_path: Path) -> None:
    """A process of its own: results are read once."""
    code = """
import torch
from unitsface_kernels import fused_uss_loss
torch.manual_seed(0)
x = torch.randn(512, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
y = torch.arange(512, device="cuda") // 4
loss = fused_uss_loss(x, y, 20.0, backend="triton")
loss.backward()
print(float(loss), float(x.grad.float().norm()))
"""
    outputs = []
    for mode in ("1", "", "0"):
        done = run_python(
            "-c", code, timeout=300, UNITSFACE_AUTOTUNE=mode, UNITSFACE_CACHE_DIR=str(tmp_path)
        )
        assert done.returncode == 0, done.stderr
        outputs.append([float(part) for part in done.stdout.split()])
    (path,) = tmp_path.iterdir()
    entries = json.loads(path.read_text())["entries"]
    assert list(entries) == ["sum, uss, bfloat16, 512 x batch x 128"]
    assert outputs[0] == outputs[1], "a stored result is another configuration"
    assert outputs[0] == pytest.approx(outputs[2], rel=1e-2)
    assert os.path.getsize(path) < 10_000
