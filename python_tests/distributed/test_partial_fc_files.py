"""Files of a checkpoint of sharded classes: damaged, mixed up, hostile, and of earlier versions."""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import ROOT

from unitsface_kernels import PartialFC
from unitsface_kernels.partial_fc import (
    export,
    export_class_weights,
    load_checkpoint,
    read_extra,
    save_checkpoint,
)

FILES = ("index.json", ".metadata", "__0_0.distcp")


def _head(value: float = 0.0) -> tuple[PartialFC, torch.optim.Optimizer]:
    head = PartialFC("class_bce", 2, 5, seed=1)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(value)
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return head, optimizer


@pytest.fixture
def good(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "good", *_head(3.0), {"x": torch.arange(5)})
    return tmp_path / "good"


def _copy(good: Path) -> Path:
    bad = good.with_name("bad")
    shutil.rmtree(bad, ignore_errors=True)
    return Path(shutil.copytree(good, bad))


def _sealed(content: Any) -> bytes:
    """An index with a right checksum."""
    text = json.dumps(content).encode() + b"\n"
    return text + b"%08x\n" % zlib.crc32(text)


def _index(folder: Path) -> Any:
    return json.loads((folder / "index.json").read_bytes().split(b"\n")[0])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_or_harmless(name: str, good: Path) -> None:
    wanted, optimizer = _head()
    load_checkpoint(good, wanted, optimizer)
    data, rng, found = (good / name).read_bytes(), random.Random(0), list[str]()
    other, momenta = _head()
    for _ in range(250):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (good / name).write_bytes(flipped)
        try:
            load_checkpoint(good, other, momenta)
        except ValueError as error:
            found.append(str(error))
        else:
            assert torch.equal(other.weight, wanted.weight)
            assert torch.equal(other.loss.threshold, wanted.loss.threshold)
    # Between the records of an archive there is room that is not read.
    assert len(found) == 250 if name != "__0_0.distcp" else len(found) > 50
    assert all(text.startswith(f"cannot read checkpoint {good}: ") for text in found)


def test_a_file_of_another_save_is_refused_before_anything_changes(good: Path) -> None:
    save_checkpoint(good.with_name("other"), *_head(5.0), {"x": torch.arange(5)})
    head, optimizer = _head(1.0)
    before = head.weight.detach().clone()
    for name in FILES:
        bad = _copy(good)
        shutil.copy(good.with_name("other") / name, bad / name)
        with pytest.raises(ValueError, match=r"of another save than index\.json"):
            load_checkpoint(bad, head, optimizer)
    assert torch.equal(head.weight, before)


def test_a_damaged_checkpoint_is_one_line_of_the_export(
    good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((good / "__0_0.distcp").read_bytes())
    out = good.with_name("out")
    for place in range(0, len(data), 97):
        data[place] ^= 1
        (good / "__0_0.distcp").write_bytes(data)
        code = export.main([str(good), str(out)])
        said = capsys.readouterr().err
        assert code in (0, 2)
        assert (code == 0) == (said == "")
        assert said == "" or said.startswith(f"error: cannot read checkpoint {good}: ")
        data[place] ^= 1
    assert [p.name for p in good.parent.iterdir() if p.name.startswith(".")] == []


def test_a_runs_folder_stands_for_its_last_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints" / "last", *_head(3.0), {"step": 7})
    assert read_extra(tmp_path) == {"step": 7}
    export_class_weights(tmp_path, tmp_path / "a")
    export_class_weights(tmp_path / "checkpoints" / "last", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_expanded_tensor_beside_the_head_is_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", _head()[0], extra=torch.ones(1).expand(3, 2))
    assert torch.equal(read_extra(tmp_path / "c"), torch.ones(3, 2))


# -- format 1, with metadata in a pickle alone ----------------------------------------------------


@pytest.fixture
def first_format(tmp_path: Path) -> Path:
    """Two ranks; class c has (2 c, 2 c + 1) / 8, thresholds c / 8, after a step of -0.1."""
    with zipfile.ZipFile(ROOT / "python_tests" / "data" / "partial_fc_format1.zip") as archive:
        archive.extractall(tmp_path / "c")
    return tmp_path / "c"


def test_the_first_format_is_read_and_saved_anew_in_the_present_one(first_format: Path) -> None:
    head, optimizer = _head()
    for _ in range(2):
        extra = load_checkpoint(first_format, head, optimizer)
        assert extra["step"] == 3
        assert torch.equal(extra["x"], torch.arange(3))
        assert torch.equal(head.weight, torch.arange(10.0).view(5, 2) / 8 - 0.1)
        assert torch.equal(head.loss.threshold, torch.arange(5.0) / 8 - 0.1)
        assert torch.equal(optimizer.state[head.weight]["momentum_buffer"], torch.ones(5, 2))
        assert (first_format / "index.json").exists() == (_ == 1)
        save_checkpoint(first_format, head, optimizer, extra)
        head, optimizer = _head()


def test_what_newer_versions_write_is_called_that(good: Path) -> None:
    (good / "index.json").write_bytes(_sealed({**_index(good), "format": 3}))
    with pytest.raises(ValueError, match=r"format 3, of a newer version.* up to 2: update"):
        load_checkpoint(good, *_head())


def _metadata(names: str, *, tail: bytes = b"") -> bytes:
    return (
        b"\x80\x02"
        + b"".join(
            b"ctorch.distributed.checkpoint.metadata\n" + name.encode() + b"\n"
            for name in names.split()
        )
        + tail
    )


class _Code:
    def __reduce__(self) -> Any:
        return eval, ("open('executed', 'w')",)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "an index of 2 GiB": lambda: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "code": lambda: pickle.dumps(_Code()),
    "what the module imports": lambda: _metadata("dataclass", tail=b"."),
    "a class's attributes": lambda: _metadata(
        "BytesStorageMetadata", tail=b"N}(X\1\0\0\0aNu\x86b."
    ),
    "another field": lambda: _metadata("Metadata", tail=b")\x81}(X\1\0\0\0aNub."),
    "state twice": lambda: _metadata("Metadata", tail=b")\x81}b}b."),
    "an instance of a function": lambda: b"\x80\x02ctorch\nSize\n)\x81.",
    "a call of a class": lambda: _metadata("Metadata", tail=b")R."),
    "a long buffer": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "deep": lambda: b"\x80\x02" + b"\x85" * 10**5 + b".",
    "nothing": lambda: b"",
    "a number": lambda: b"I1\n.",
    "no opcode": lambda: b"\xff\xff",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_runs_no_code_and_takes_no_memory(
    name: str, first_format: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (first_format / ".metadata").write_bytes(HOSTILE[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"^cannot read checkpoint {first_format}: .*metadata"):
        read_extra(first_format)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../good/__0_0.distcp": 1}},
        {"shared": ["../good/__0_0.distcp", 0, 1]},
        {"shared": ["__0_0.distcp", 0, 2**70]},
        {"shared": ["__0_0.distcp", -1, 5]},
        {"shared": 3},
        {"tensors": {"head.loss.weight": {"dtype": "float32", "size": [2**40, 2], "blocks": []}}},
        {"tensors": {"head.loss.weight": {"dtype": "load", "size": [5, 2], "blocks": []}}},
        {
            "tensors": {
                "x": {"dtype": "int8", "size": [2], "blocks": [[0, 2, "__0_0.distcp", 0, 1]]}
            }
        },
        {
            "tensors": {
                "x": {
                    "dtype": "int8",
                    "size": [9000],
                    "blocks": [[k * 3000, 3000, "__0_0.distcp", 0, 3000] for k in range(3)],
                }
            }
        },
        {"save": "0"},
        {"metadata": 5},
    ],
)
def test_an_index_that_claims_what_is_not_there_is_refused(
    change: dict[str, Any], good: Path
) -> None:
    bad = _copy(good)
    (bad / "index.json").write_bytes(_sealed({**_index(good), **change}))
    with pytest.raises(ValueError, match=f"^cannot read checkpoint {bad}: .") as caught:
        load_checkpoint(bad, *_head())
    assert "\n" not in str(caught.value)
