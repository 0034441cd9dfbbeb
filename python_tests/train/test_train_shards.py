"""Shards in the layout of WebDataset."""

from __future__ import annotations

import importlib
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from support.packs import add_member, contents, people, write_recordio, write_shards
from support.training import arguments, losses, tiny, write_faces

from train.data import records
from train.data.dataset import scan
from train.data.shards import list_shards
from train.errors import UserError
from train.main import main


def expected() -> dict[str, list[bytes]]:
    return {str(who): list(images) for who, images in enumerate(people())}


@pytest.mark.parametrize(("label", "suffix"), [("cls", "jpg"), ("json", "JPEG"), ("cls", "png")])
def test_every_image_under_its_label(tmp_path: Path, label: str, suffix: str) -> None:
    write_shards(tmp_path, people(), per_shard=6, label=label, suffix=suffix)
    images = scan(str(tmp_path))
    assert contents(images) == expected()
    assert not images.named
    assert images.name(7).endswith(f"faces-000001.tar, member 00000007.{suffix}")


def test_shards_that_the_library_itself_wrote(tmp_path: Path) -> None:
    webdataset = importlib.import_module("webdataset")
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for who, images in enumerate(people()):
            for i, image in enumerate(images):
                writer.write({"__key__": f"p.{who}/{i}", "jpg": image, "cls": who})
    assert contents(scan(str(tmp_path / "a.tar"))) == expected()


def test_many_shards_are_indexed_by_several_processes_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, people(), per_shard=1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(records, "MOST_OPEN", 3)
    images = scan(str(tmp_path))
    assert len(images.records.files.paths) == 20  # type: ignore[attr-defined]
    assert contents(images) == expected()
    assert contents(pickle.loads(pickle.dumps(images))) == expected()


def test_patterns(tmp_path: Path) -> None:
    write_shards(tmp_path, people(), per_shard=4)

    def names(pattern: str) -> list[int]:
        return [int(Path(p).stem.split("-")[1]) for p in list_shards(f"{tmp_path}/{pattern}")]

    assert names("faces-{000001..000003}.tar") == [1, 2, 3]
    assert names("faces-*{0,4}.tar") == [0, 4]
    assert names("faces-00000[12].tar") == [1, 2]
    assert names("") == [0, 1, 2, 3, 4]
    assert names("../" + tmp_path.name + "/faces-*.tar") == [0, 1, 2, 3, 4]
    for pattern, message in (
        ("faces-{000003..000007}.tar", r"no such file: .*faces-000005\.tar"),
        ("other-*.tar", r"no \.tar files"),
        ("faces-{0..9999999}.tar", "more than 1000000 shards"),
        ("faces-{0..3.tar", "no such file|braces"),
        ("{..,.}/faces-000000.tar", "leads outside"),
        ("*/../faces-000000.tar", "leads outside"),
    ):
        with pytest.raises(UserError, match=message):
            names(pattern)


@pytest.mark.parametrize(
    "address",
    ["pipe:touch {}", "http://host/faces-{{0..3}}.tar", "s3://bucket/a.tar", "file:/tmp/a.tar"],
)
def test_addresses_and_commands_are_refused(tmp_path: Path, address: str) -> None:
    mark = tmp_path / "mark.tar"
    with pytest.raises(UserError, match="shards must be local files"):
        scan(address.format(mark))
    assert not mark.exists()


def test_which_kind_a_folder_is(tmp_path: Path) -> None:
    assert len(scan("orl")) == 400
    write_faces(tmp_path)
    assert scan(str(tmp_path)).identities[0] == "person1"
    write_shards(tmp_path, people())
    with pytest.raises(UserError, match=r"holds \*\.tar and sub-folders of images; name"):
        scan(str(tmp_path))
    write_recordio(tmp_path, people())
    with pytest.raises(UserError, match=r"holds train\.rec and \*\.tar and sub-folders"):
        scan(str(tmp_path))
    assert contents(scan(str(tmp_path / "train.rec"))) == expected()
    assert contents(scan(f"{tmp_path}/*.tar")) == expected()


def test_training_from_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", people(), per_shard=7)
    config = tiny(
        tmp_path / "shards" / "faces-{000000..000002}.tar",
        tmp_path / "run",
        data={"holdout": 2, "cache": "never", "workers": 1},
        train={"batch_size": 4, "max_steps": 2},
    )
    assert main(arguments(config)) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_members_that_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("people")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add_member(tar, "README", b"no extension, so no sample")
        for i, image in enumerate(people()[0]):
            add_member(tar, f"people/{i}.jpg", image)
            add_member(tar, f"people/{i}.cls", b"7\n")
    images = scan(str(tmp_path / "a.tar"))
    assert images.identities == ["7"]
    assert len(images) == 4
