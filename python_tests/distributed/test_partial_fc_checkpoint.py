"""Checkpoints of sharded classes: any number of ranks, whole or not at all."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ranks import RankError, run_ranks
from torch import Tensor

from unitsface_kernels import PartialFC, SampledAdamW, SampledSGD
from unitsface_kernels.distributed.collectives import own_rank, world_size
from unitsface_kernels.partial_fc import (
    checkpoint,
    export,
    export_class_weights,
    load_checkpoint,
    save_checkpoint,
    storage,
)

D = 4
# Every kind of state: rows alone, a threshold per class, a shared one, prototypes, stamps.
LOSSES: dict[str, dict[str, Any]] = {
    "cosface": {},
    "class_bce": {},
    "epl": {"base": "uce", "start_epoch": 0},
    "vpl": {"start_iteration": 0, "max_age": 2},
}
EXTRA: dict[str, Any] = {
    "backbone": {"w": torch.arange(6.0).view(2, 3)[:, 1:]},
    "list": [1, (np.float64(2.5), None), "x"],
}


def _head(
    loss: str, classes: int, seed: int = 1, kind: str = "sgd"
) -> tuple[PartialFC, torch.optim.Optimizer]:
    rate = 0.5 if kind in ("sampled", "fused") else 1.0
    head = PartialFC(loss, D, classes, rate, seed=seed, **LOSSES[loss])
    # What ranks share beside the head is the optimizer's business, too.
    backbone = torch.nn.Parameter(torch.zeros(3))
    parameters = [{"params": [backbone]}, {"params": list(head.parameters())}]
    if kind == "adamw":
        return head, torch.optim.AdamW(parameters, lr=0.1)
    if kind == "sgd":
        return head, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if kind == "sampled":
        return head, SampledAdamW(parameters, lr=0.1)
    optimizer = SampledSGD(parameters, lr=0.1, momentum=0.9)
    head.fuse(optimizer, "step")
    return head, optimizer


def _train(head: PartialFC, optimizer: torch.optim.Optimizer, steps: int) -> None:
    backbone = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        generator = torch.Generator().manual_seed(head.step)
        feats = torch.randn(8, D, generator=generator)
        labels = torch.randint(0, head.num_classes, (8,), generator=generator)
        own = slice(own_rank(), None, world_size())
        optimizer.zero_grad()
        (head(feats[own], labels[own]) + backbone.sum()).backward()
        optimizer.step()


def _state(head: PartialFC, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Per-class tensors of this rank, and what all ranks must have alike."""
    state = {name: v for name, v in head.state_dict().items() if isinstance(v, Tensor)}
    shared: dict[str, Any] = {"step": head.step}
    parts = {}
    for name, value in state.items():
        (parts if name in head.per_class else shared)[name] = value.clone()
    names = ["backbone", *(name for name, _ in head.named_parameters())]
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            per_class = names[index] in head.per_class and value.dim() > 0
            (parts if per_class else shared)[f"{names[index]} {key}"] = value.clone()
    return {"parts": parts, "shared": shared}


def _whole(states: list[dict[str, Any]]) -> dict[str, Any]:
    first = states[0]
    for state in states:
        assert state["shared"].keys() == first["shared"].keys()
        for name, value in state["shared"].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(first["shared"][name]))
    joined = {name: torch.cat([s["parts"][name] for s in states]) for name in first["parts"]}
    return {**joined, **first["shared"]}


def _assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[name])), name


def _cases() -> list[tuple[str, int, str]]:
    return [
        *((loss, 7, "sgd") for loss in LOSSES),
        ("class_bce", 2, "adamw"),
        ("class_bce", 27, "sampled"),
        ("cosface", 27, "fused"),
        ("vpl", 27, "fused"),
        ("cosface", 3, "fused"),
    ]


def _save_all(rank: int, folder: str) -> list[dict[str, Any]]:
    """Saves every case; the run then goes on as one that was loaded."""
    storage.BLOCK_BYTES = 32  # two rows
    states = []
    for loss, classes, kind in _cases():
        path = Path(folder) / f"{loss}{classes}"
        head, optimizer = _head(loss, classes, kind=kind)
        _train(head, optimizer, 3)
        save_checkpoint(path, head, optimizer, EXTRA if rank == 0 else None)
        states.append(_state(head, optimizer))
        again, other = _head(loss, classes, kind=kind)
        load_checkpoint(path, again, other)
        for run in ((head, optimizer), (again, other)):
            _train(*run, 2)
        _assert_equal(
            *(
                {**s["parts"], **s["shared"]}
                for s in (_state(head, optimizer), _state(again, other))
            )
        )
    return states


def _load_all(rank: int, folder: str) -> list[dict[str, Any]]:
    states = []
    for loss, classes, kind in _cases():
        head, optimizer = _head(loss, classes, kind=kind)
        _train(head, optimizer, 1)  # state that is to be replaced
        memory = head.weight.data_ptr()
        extra = load_checkpoint(Path(folder) / f"{loss}{classes}", head, optimizer)
        assert head.weight.data_ptr() == memory
        assert torch.equal(extra["backbone"]["w"], EXTRA["backbone"]["w"])
        assert extra["list"] == EXTRA["list"]
        states.append(_state(head, optimizer))
    return states


@pytest.mark.parametrize(
    ("savers", "loaders"),
    [(3, 2), *(pytest.param(*n, marks=pytest.mark.extended) for n in ((1, 3), (3, 1), (2, 4)))],
)
def test_loads_bitwise_on_any_number_of_ranks(savers: int, loaders: int, tmp_path: Path) -> None:
    saved = run_ranks(savers, _save_all, str(tmp_path))
    loaded = run_ranks(loaders, _load_all, str(tmp_path))
    for number, (_, classes, _) in enumerate(_cases()):
        ranks_then = [states[number] for states in saved]
        ranks_now = [states[number] for states in loaded]
        before, now = _whole(ranks_then), _whole(ranks_now)
        assert (
            len(before["loss.weight" if "loss.weight" in before else "loss.head.weight"]) == classes
        )
        _assert_equal(before, now)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []
    # The format is readable by torch.distributed.checkpoint.
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "vpl7", tmp_path / "vpl.pt")
    values = torch.load(tmp_path / "vpl.pt", weights_only=True)
    vpl = _whole([states[3] for states in saved])
    assert torch.equal(values["head.loss.stamps"], vpl["loss.stamps"])
    assert torch.equal(
        values["optimizer.loss.head.weight.momentum_buffer"],
        vpl["loss.head.weight momentum_buffer"],
    )


# -- mistakes -------------------------------------------------------------------------------------


def _said(work: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        work()
    return type(caught.value).__name__, str(caught.value)


def _mistakes(rank: int, folder: str) -> dict[str, tuple[str, str]]:
    path = Path(folder)
    head, optimizer = _head("class_bce", 7)
    _train(head, optimizer, 1)
    save_checkpoint(path / "good", head, optimizer)
    save_checkpoint(path / "bare", head)
    said = {
        "loss": _said(lambda: load_checkpoint(path / "good", *_head("cosface", 7))),
        "classes": _said(lambda: load_checkpoint(path / "good", *_head("class_bce", 8))),
        "seed": _said(lambda: load_checkpoint(path / "good", *_head("class_bce", 7, seed=2))),
        "width": _said(lambda: load_checkpoint(path / "good", PartialFC("class_bce", 5, 7))),
        "absent": _said(lambda: load_checkpoint(path / "none", head)),
        "state": _said(lambda: load_checkpoint(path / "bare", head, optimizer)),
    }
    alone = torch.optim.SGD(head.parameters(), lr=0.1)
    said["groups"] = _said(lambda: load_checkpoint(path / "good", head, alone))
    extra = {"a": object()} if rank == 0 else None
    said["extra"] = _said(lambda: save_checkpoint(path / "good", head, optimizer, extra))
    if rank == 0:
        (path / "folder").mkdir()
        (path / "folder" / "precious").touch()
    said["folder"] = _said(lambda: save_checkpoint(path / "folder", head))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "save", _full_disk)
        said["disk"] = _said(lambda: save_checkpoint(path / "good", head, optimizer))
    # As on two nodes without a common file system.
    said["elsewhere"] = _said(lambda: save_checkpoint(path / f"node{rank}" / "good", head))
    before = _state(head, optimizer)
    load_checkpoint(path / "good", head, optimizer)  # the one of before the mistakes
    _assert_equal(before["parts"], _state(head, optimizer)["parts"])
    return said


def _full_disk(*arguments: object) -> None:
    raise OSError("No space left on device")


def test_mistakes_are_errors_on_every_rank(tmp_path: Path) -> None:
    ranks = run_ranks(2, _mistakes, str(tmp_path))
    for said in ranks:
        assert "has loss = class_bce, this PartialFC has cosface" in said["loss"][1]
        assert "has num_classes = 7, this PartialFC has 8" in said["classes"][1]
        assert "has embedding_size = 4, this PartialFC has 5" in said["width"][1]
        assert "has seed = 1, this PartialFC has 2" in said["seed"][1]
        assert f"no such checkpoint: {tmp_path / 'none'}" in said["absent"][1]
        assert "has no optimizer state" in said["state"][1]
        assert "groups of [1, 2] parameters, this one has groups of [2]" in said["groups"][1]
        assert said["disk"][0] == "OSError"
        assert "on rank 1: No space left" in said["disk"][1]
    assert ranks[0]["extra"] == (
        "TypeError",
        "extra must consist of dicts, lists, tuples, tensors, numbers and strings, got object",
    )
    assert "will not be replaced" in ranks[0]["folder"][1]
    assert f"{tmp_path / 'node0' / 'good'} must be a folder that all" in ranks[0]["elsewhere"][1]
    assert not (tmp_path / "node0" / "good").exists()
    for mistake in ("extra", "folder", "elsewhere"):
        assert ranks[1][mistake][0] == "ValueError"
        assert ranks[1][mistake][1].endswith(f"rank 0: {ranks[0][mistake][1]}")
    assert (tmp_path / "folder" / "precious").exists()
    left = {p.name for p in tmp_path.iterdir()} - {"node0", "node1"}
    assert left == {"bare", "folder", "good"}


def test_options_of_the_loss_that_change_its_state_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", PartialFC("epl", D, 7, base="uce"))
    with pytest.raises(ValueError, match=r"loss.head.threshold = \(\), this PartialFC has None"):
        load_checkpoint(tmp_path / "c", PartialFC("epl", D, 7, base="cosface"))


def test_damage_is_an_error(tmp_path: Path) -> None:
    head, optimizer = _head("cosface", 7)
    _train(head, optimizer, 1)
    save_checkpoint(tmp_path / "good", head, optimizer)
    weights = head.weight.detach().numpy().tobytes()

    def flip(data: bytes) -> bytes:
        place = data.index(weights) + 1
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    for file, change, message in (
        ("__0_0.distcp", flip, "wrong checksum"),
        ("__0_0.distcp", lambda data: data[:-100], "cut off"),
        ("__0_0.distcp", None, "No such file"),
        (".metadata", lambda data: data[: len(data) // 2], "damaged, or of another save"),
        ("index.json", lambda data: data.replace(b"7", b"8", 1), "wrong checksum"),
        ("index.json", None, "index.json is missing"),
    ):
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad)
        if change is None:
            (bad / file).unlink()
        else:
            (bad / file).write_bytes(change((bad / file).read_bytes()))
        with pytest.raises(ValueError, match=f"cannot read checkpoint {bad}: .*{message}"):
            load_checkpoint(bad, head, optimizer)
        shutil.rmtree(bad)


# -- crashes --------------------------------------------------------------------------------------


class _Crash(BaseException):
    """An exit that bypasses all clean-up."""


@pytest.mark.parametrize("function", ["rename", "fsync", "rmtree"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_crash_between_any_two_phases_leaves_a_whole_checkpoint(
    function: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    head, _ = _head("cosface", 7)
    save_checkpoint(path, head, extra="old")
    calls = 0
    module = shutil if function == "rmtree" else os
    original = getattr(module, function)

    def crash(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise _Crash
        original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, crash)
        try:
            save_checkpoint(path, head, extra="new")
            complete = True
        except (_Crash, OSError):
            complete = False
    assert calls <= count
    found = load_checkpoint(path, head)
    assert found == "new" if complete else found in ("old", "new")
    save_checkpoint(path, head, extra="newer")
    assert load_checkpoint(path, head) == "newer"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def _die_while_saving(rank: int, folder: str, function: str, count: int) -> None:
    calls = 0
    original = getattr(os, function)

    def die(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    head, _ = _head("cosface", 7)
    save_checkpoint(folder, head, extra="old")
    with torch.no_grad():
        head.weight.zero_()
    if rank == (1 if function == "fsync" else 0):
        setattr(os, function, die)
    save_checkpoint(folder, head, extra="new")


@pytest.mark.parametrize(("function", "count"), [("fsync", 1), ("rename", 2), ("rename", 3)])
def test_a_killed_rank_leaves_the_previous_checkpoint(
    function: str, count: int, tmp_path: Path
) -> None:
    """Killed writing its shard; with the old folder renamed; with the new one yet to be."""
    with pytest.raises(RankError):
        run_ranks(2, _die_while_saving, str(tmp_path / "c"), function, count)
    head, _ = _head("cosface", 7)
    first = head.weight.detach().clone()
    assert load_checkpoint(tmp_path / "c", head) == "old"
    assert torch.equal(head.weight, first)


# -- export ---------------------------------------------------------------------------------------


def test_export_is_the_class_matrix_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    head, optimizer = _head("epl", 700)
    _train(head, optimizer, 2)
    save_checkpoint(tmp_path / "c", head, optimizer)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1000)
    read = storage.Stored.read

    def small(self: storage.Stored, wanted: dict[str, storage.Rows]) -> None:
        assert sum(rows.tensor.nbytes for rows in wanted.values()) <= 1000
        read(self, wanted)

    monkeypatch.setattr(storage.Stored, "read", small)
    export_class_weights(tmp_path / "c", tmp_path / "weights.safetensors")
    found = safetensors.load_file(tmp_path / "weights.safetensors")
    assert found.keys() == {"weight", "prototypes", "threshold"}
    assert torch.equal(found["weight"], head.weight)
    assert torch.equal(found["prototypes"], head.loss.prototypes)
    assert torch.equal(found["threshold"], head.loss.head.threshold)
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        about = file.metadata()
    assert about == {"loss": "epl", "num_classes": "700", "embedding_size": "4", "seed": "1"}

    assert export.main([str(tmp_path / "c"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "weights.safetensors").read_bytes()
    assert export.main([str(tmp_path / "none"), str(tmp_path / "again")]) == 2
    assert capsys.readouterr().err == f"error: no such checkpoint: {tmp_path / 'none'}\n"
    assert checkpoint.find_checkpoint(tmp_path / "none") is None
