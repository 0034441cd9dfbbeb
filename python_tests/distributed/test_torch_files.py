"""Files of torch.save: read as Torch reads them, within their size, damaged ones refused."""

from __future__ import annotations

import io
import pickle
import random
import resource
import struct
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unitsface_kernels.distributed.partial_fc.plain_pickle import DamagedError
from unitsface_kernels.partial_fc import read_saved, torch_files


def _saved(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, **options)
    return file.getvalue()


def _read(data: bytes) -> Any:
    return torch_files.read(io.BytesIO(data), len(data))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(
            a.double(), b.double()
        )
    if isinstance(a, dict):
        versions = [getattr(values, "_metadata", None) for values in (a, b)]
        same = type(a) is type(b) and list(a) == list(b) and versions[0] == versions[1]
        return same and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _values() -> dict[str, Any]:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    whole = torch.randn(6, 6)
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    return {
        "state": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "milestones": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3]).state_dict(),
        "views": [whole[1:3, ::2], whole.T, whole[0], whole],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": [torch.empty(0, 3), torch.tensor(3)],
        "types": [torch.ones(3).to(t) for t in (*integers, torch.float16, torch.bfloat16)],
        "plain": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), {1, 2}, 3 + 4j, None],
        "numbers": {1: 10**40, -5: 1.5, "ü": (1, (2,), [True])},
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_reads(legacy: bool) -> None:
    data = _saved(_values(), _use_new_zipfile_serialization=not legacy)
    assert _same(_read(data), torch.load(io.BytesIO(data), weights_only=True))
    for protocol in (3, 4, 5):
        other = _saved(
            _values(), _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol
        )
        assert _read(other).keys() == _values().keys()
    assert torch.equal(_read(_saved({"p": nn.Parameter(torch.ones(2))}))["p"], torch.ones(2))


def test_types_without_a_storage_of_their_own_and_files_without_checksums() -> None:
    values = {"a": torch.ones(3, dtype=torch.uint16), "b": torch.ones(2).to(torch.float8_e4m3fn)}
    assert _same(_read(_saved(values)), values)
    torch.serialization.set_crc32_options(False)
    try:
        data = _saved(values)
    finally:
        torch.serialization.set_crc32_options(True)
    assert _same(_read(data), values)


def test_a_flipped_bit_is_found_or_harmless() -> None:
    values = {"step": 12345, "lr": 0.1, "w": torch.arange(64.0), "s": nn.Linear(3, 3).state_dict()}
    data, rng, found = _saved(values), random.Random(0), list[str]()
    for _ in range(600):
        bad = bytearray(data)
        bad[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert _same(_read(bytes(bad)), values)
        except DamagedError as error:
            found.append(str(error))
    assert len(found) > 300
    assert all(text and "\n" not in text for text in found)


# -- hostile files --------------------------------------------------------------------------------


def _packed(values: Any) -> bytes:
    """The same archive, compressed: a thousand times what is on the disk."""
    source, target = zipfile.ZipFile(io.BytesIO(_saved(values))), io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    return target.getvalue()


def _archive(pickled: bytes, storage: bytes = bytes(64)) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)
    return file.getvalue()


def _tensor(size: str, stride: str, count: int = 16, kind: bytes = b"FloatStorage") -> bytes:
    """A call of _rebuild_tensor_v2; size and stride are the opcodes of tuples."""
    storage = b"((X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\x000X\x03\0\0\0cpuI%d\ntQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage % count
    return call + b"I0\n" + size.encode() + stride.encode() + b"I00\n}tR"


def _lists(levels: int) -> bytes:
    """Lists of twice the list before: 2 to the power of ``levels`` values in a few bytes each."""
    return b"]" + b"".join(b"q%c0](h%ch%ce" % (n, n, n) for n in range(levels)) + b"."


_TENSOR = _tensor("(I4\nI4\nt", "(I4\nI1\nt")
HOSTILE: dict[str, Callable[[], bytes]] = {
    "expanded": lambda: _saved({"w": torch.zeros(1).expand(10**6, 10**5)}),
    "larger than its storage": lambda: _archive(_tensor("(I4\nI5\nt", "(I5\nI1\nt") + b"."),
    "behind its storage": lambda: _archive(_tensor("(I2\nI2\nt", "(I9\nI9\nt") + b"."),
    "negative size": lambda: _archive(_tensor("(I-4\nI-4\nt", "(I4\nI1\nt") + b"."),
    "storage larger than its record": lambda: _archive(_tensor("(t", "(t", 10**12) + b"."),
    "no dtype": lambda: _archive(_tensor("(t", "(t", kind=b"float32") + b"."),
    "packed": lambda: _packed({"w": torch.zeros(10**7)}),
    "one tensor a thousand times": lambda: _archive(
        b"]" + _TENSOR + b"q\x00a(" + b"h\x00" * 1000 + b"e."
    ),
    "lists of lists": lambda: _archive(_lists(40)),
    "deep": lambda: _archive(b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
    "a deep key": lambda: _archive(b"})" + b"\x85" * 2 * 10**5 + b"Ns."),
    "items of a tensor": lambda: _archive(_TENSOR + b"I0\nI1\ns."),
    "memory of an index": lambda: _archive(b"Nr\xff\xff\xff\x7fcos\nsystem\n."),
    "a long buffer": lambda: _archive(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"."),
    "long bytes": lambda: _archive(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"."),
    "bytearray": lambda: _archive(b"cbuiltins\nbytearray\n(I99999999999\ntR."),
    "os.system": lambda: _archive(b"cposix\nsystem\n(X\x04\0\0\0truetR."),
    "torch.load": lambda: _archive(b"ctorch\nload\n(X\x04\0\0\0filetR."),
    "state of a tensor": lambda: _archive(_TENSOR + b"}b."),
    "legacy, large storages": lambda: _legacy(10**12),
    "not a file of Torch": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "empty": lambda: b"",
}


def _legacy(count: int) -> bytes:
    parts = [pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    values = b"\x80\x02" + _tensor("(t", "(t", count).replace(b"tQ", b"NtQ") + b"."
    return b"".join(parts) + values + pickle.dumps(["0"], 2) + struct.pack("<q", count)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_within_their_size(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(HOSTILE[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^cannot read checkpoint .*x\.pt: .") as caught:
        read_saved(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_executed_where_unknown_objects_are_passed_over(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(HOSTILE[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = {"os.system": {}, "torch.load": {}, "bytearray": {}, "memory of an index": "os.system"}
    refused = pytest.raises(ValueError, match="cannot read checkpoint")
    with nullcontext() if name in names else refused:
        assert read_saved(path, unknown=True) == names[name]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


class _Holder(dict[str, Any]):
    """A type that no other program has."""


def test_unknown_objects_become_dicts_of_their_items(tmp_path: Path) -> None:
    held = _Holder(a=1, t=torch.ones(2))
    held.state = "left out"  # type: ignore[attr-defined]
    torch.save({"held": held, "kind": _Holder, _Holder: 3, "path": tmp_path}, tmp_path / "x.ckpt")
    found = read_saved(tmp_path / "x.ckpt", unknown=True)
    assert type(found["held"]) is dict
    assert _same(found["held"], {"a": 1, "t": torch.ones(2)})
    name = f"{__name__}._Holder"
    assert found["kind"] == name
    assert found[name] == 3
    assert found["path"] == {}
    with pytest.raises(ValueError, match=r"it refers to .*_Holder"):
        read_saved(tmp_path / "x.ckpt")
