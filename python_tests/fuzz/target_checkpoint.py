"""Damaged checkpoints: folders of sharded classes of both formats, runs, and weights.

A damaged file is read as what was saved, or refused; where there are no checksums (weights before
Torch 1.6), anything may come out of it, within the limits of time and memory.
"""

from __future__ import annotations

import io
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.helpers import ROOT
from torch import Tensor

from train import checkpoint
from train.errors import UserError
from train.evaluation.model import load_model
from train.main import load_config
from unitsface_kernels import PartialFC, partial_fc

from .mutation import mutate, outcome

_TOKENS = (
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ctorch\nSize\n"),
    *(b"ccollections\nOrderedDict\n)R", b"cos\nsystem\n", b"cbuiltins\neval\n", b"}", b"]", b")"),
    *(b"h\x00", b"q\x00", b"r\xff\xff\xff\x7f", b"\x96" + b"\xff" * 7 + b"\0", b"R", b"b", b"\x81"),
    *(b"PK\x01\x02", b"PK\x05\x06", b"e", b"u", b"s", b"t", b"(", b"2", b"\x85", b"Q", b"."),
    *(b'"format": 3', b'"size": [9]', b"../", b"[0, 1, ", b"null", b"{}", b"-1"),
)


def _head() -> tuple[PartialFC, torch.optim.Optimizer]:
    head = PartialFC("class_bce", 2, 5, seed=1)
    return head, torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)


def _folders(root: Path) -> dict[str, dict[str, bytes]]:
    head, optimizer = _head()
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    partial_fc.save_checkpoint(root / "c", head, optimizer, {"step": 3, "x": torch.arange(3)})
    with zipfile.ZipFile(ROOT / "python_tests" / "data" / "partial_fc_format1.zip") as archive:
        first = {name: archive.read(name) for name in archive.namelist()}
    return {"folder": {p.name: p.read_bytes() for p in (root / "c").iterdir()}, "format 1": first}


def _run(backbone: Any) -> dict[str, Any]:
    trainer = {"step": 3, "threshold": 0.5, "best": None}
    config = {"model": {"name": "iresnet18", "input_size": 16}, "run": {"dir": "x"}}
    parts: dict[str, Any] = {"loss": {}, "scaler": {}, "optimizer": {"state": {0: torch.ones(2)}}}
    values = {"format": 1, "trainer": trainer, "config": config, "backbone": backbone, **parts}
    return {**values, "identities": "a\0b"}


def _written(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, **options)
    return file.getvalue()


def _pickled(data: bytes) -> bytes:
    """The program within an archive, to be damaged alone: its checksum hides most of it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


def _with_program(data: bytes, program: bytes) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            target.writestr(name, program if name.endswith("data.pkl") else source.read(name))
    return result.getvalue()


with tempfile.TemporaryDirectory() as _folder:
    FOLDERS = _folders(Path(_folder))
_STATE = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).state_dict()
FILES = {
    "run": _written(_run(_STATE)),
    "weights": _written(_STATE),
    "weights before 1.6": _written(_STATE, _use_new_zipfile_serialization=False),
}
KINDS = (*FOLDERS, *FILES, "program of a run", "program of weights")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def _read_folder(folder: Path) -> Any:
    head, optimizer = _head()
    extra = partial_fc.load_checkpoint(folder, head, optimizer)
    momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in head.named_parameters()}
    partial_fc.export_class_weights(folder, folder.with_name("out"))
    partial_fc.read_classes(folder, torch.tensor([0]))
    return {"extra": extra, "momenta": momenta, "head": dict(head.named_parameters())}


def _read_file(path: Path) -> Any:
    """As convert, resuming and evaluation do, in this order."""
    values = checkpoint.read(path)
    for use in (
        lambda: checkpoint.read_any(path),
        lambda: load_config(["--resume", str(path)]),
        lambda: load_model(path, ["train.device=cpu"]),
    ):
        try:
            use()
        except UserError as error:
            if "\n" in str(error):
                raise AssertionError("an error of several lines") from error
    return values


with tempfile.TemporaryDirectory() as _folder:
    EXPECTED: dict[str, Any] = {}
    for _kind, _files in FOLDERS.items():
        (Path(_folder) / _kind).mkdir()
        for _name, _data in _files.items():
            (Path(_folder) / _kind / _name).write_bytes(_data)
        EXPECTED[_kind] = _read_folder(Path(_folder) / _kind)
    for _kind, _data in FILES.items():
        (Path(_folder) / "x.pt").write_bytes(_data)
        EXPECTED[_kind] = checkpoint.read(Path(_folder) / "x.pt")


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    kind = rng.choice(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        # Objects of other types are passed over in a file of Lightning's.
        path = Path(folder) / ("x" if kind in FOLDERS or seed % 2 else "x.ckpt")
        read: Callable[[Path], Any] = _read_file
        if kind in FOLDERS:
            read = _read_folder
            path.mkdir()
            files = FOLDERS[kind]
            chosen = rng.choice(sorted(files))
            others = [*files.values(), *FOLDERS["folder"].values()]
            for name, data in files.items():
                damaged = mutate(data, rng, others=others, tokens=_TOKENS)
                (path / name).write_bytes(damaged if name == chosen else data)
            if rng.random() < 0.05:
                (path / chosen).unlink()
        elif kind in FILES:
            path.write_bytes(mutate(FILES[kind], rng, others=[*FILES.values()], tokens=_TOKENS))
        else:
            data = FILES["run" if kind.endswith("run") else "weights"]
            program = mutate(_pickled(data), rng, tokens=_TOKENS)
            path.write_bytes(_with_program(data, program))
        found: list[Any] = []
        wrong = outcome(lambda: found.append(read(path)), (UserError, ValueError))
        # The metadata of format 1 have no checksum.
        checked = kind == "folder" or kind in ("run", "weights")
        # Half of one file and half of another may be a whole one.
        if (
            wrong is None
            and found
            and checked
            and not any(_same(found[0], other) for other in EXPECTED.values())
        ):
            wrong = "read as other values"
    return None if wrong is None else f"{kind}: {wrong}"
