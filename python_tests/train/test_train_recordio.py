"""RecordIO as insightface packs it."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from support.packs import contents, frame, pack, people, write_recordio, write_records
from support.training import arguments, losses, tiny

from train.data import recordio
from train.data.dataset import scan
from train.data.image_list import ImageList
from train.data.recordio_format import read_heads, read_record, split_record
from train.data.records import OpenFiles
from train.errors import UserError
from train.main import main

MAGIC = struct.pack("<I", 0xCED7230A)


def expected(count: int = 5) -> dict[str, list[bytes]]:
    return {str(who): list(images) for who, images in enumerate(people()[:count])}


# -- the format ---------------------------------------------------------------------------------


def test_a_record_written_by_hand(tmp_path: Path) -> None:
    # Label 3.0 = 0x40400000, id 7, image "abcde": 24 + 5 = 29 = 0x1d bytes and 3 of padding.
    record = bytes.fromhex(
        "0a23d7ce 1d000000 00000000 00004040 0700000000000000 0000000000000000 6162636465 000000"
    )
    assert record == frame(pack([3], b"abcde", 7))
    (tmp_path / "train.rec").write_bytes(record)
    (tmp_path / "train.idx").write_text("0\t0\n")
    images = scan(str(tmp_path))
    assert images.identities == ["3"]
    assert images.read(0) == b"abcde"


def test_two_labels_written_by_hand(tmp_path: Path) -> None:
    # Flag 2, the header's label 0, then 1.0 = 0x3f800000 and 0.5 = 0x3f000000.
    record = bytes.fromhex(
        "0a23d7ce 22000000 02000000 00000000 0100000000000000 0000000000000000"
        "0000803f 0000003f 7879 0000"
    )
    assert record == frame(pack([1, 0.5], b"xy", 1))
    labels, image = split_record(record[8:-2])
    assert labels.tolist() == [1, 0.5]
    assert image == b"xy"


@pytest.mark.parametrize(
    "image",
    [MAGIC, b"abcd" + MAGIC, MAGIC + MAGIC + b"a", b"abcd" + MAGIC + b"efg" + MAGIC, b"a" + MAGIC],
    ids=["all", "end", "twice", "unaligned later", "unaligned"],
)
def test_the_magic_number_within_an_image_is_put_back(tmp_path: Path, image: bytes) -> None:
    records = [(0, pack([1], image, 0)), (1, pack([0, 1], image, 1)), (2, pack([0], b"z", 2))]
    write_records(tmp_path, records)
    files = OpenFiles([str(tmp_path / "train.rec")])
    framed = [frame(r) for _, r in records]
    offsets = np.cumsum([0, *(len(f) for f in framed[:-1])])
    for (_, record), offset in zip(records, offsets, strict=True):
        assert read_record(files, int(offset)) == record
    heads, errors = read_heads(files, offsets)
    assert not errors
    assert heads.tolist() == [(1, 0, len(image)), (0, 1, len(image)), (0, 0, 1)]


# -- sets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["header 0", "plain"])
@pytest.mark.parametrize("label_count", [1, 2])
def test_every_image_under_its_label(tmp_path: Path, layout: str, label_count: int) -> None:
    write_recordio(tmp_path, people(), layout=layout, label_count=label_count)
    images = scan(str(tmp_path))
    assert contents(images) == expected()
    assert not images.named
    assert images.name(0).endswith(f"train.rec, record {1 if layout == 'header 0' else 0}")
    assert contents(scan(str(tmp_path / "train.rec"))) == expected()


@pytest.mark.parametrize("first", [0, 1])
def test_record_0_that_has_an_image_is_one(tmp_path: Path, first: int) -> None:
    """Whatever its labels look like: (identity, whether it is aligned), some converters write."""
    faces = people()
    order = sorted(range(5), key=lambda who: who != first)
    records = [pack([who, 1], face, 0) for who in order for face in faces[who]]
    write_records(tmp_path, list(enumerate(records)))
    assert contents(scan(str(tmp_path))) == expected()


def test_records_of_identities_are_no_images_where_record_0_is_missing(tmp_path: Path) -> None:
    write_recordio(tmp_path, people())
    lines = (tmp_path / "train.idx").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("0\t")]
    (tmp_path / "train.idx").write_text("\n".join(kept))
    with pytest.raises(UserError, match="record 21: it holds no image"):
        scan(str(tmp_path))
    images = scan(str(tmp_path), skip=True)
    assert contents(images) == expected()
    assert len(images.left_out) == 5


def test_gaps_in_the_labels_and_identities_without_images(tmp_path: Path) -> None:
    faces = people()
    write_recordio(tmp_path, [faces[0], [], faces[1], [], faces[2]])
    images = scan(str(tmp_path))
    assert images.identities == ["0", "2", "4"]
    assert sorted(set(images.labels.tolist())) == [0, 1, 2]
    assert contents(images)["4"] == list(faces[2])


def test_records_in_any_order_of_keys_and_without_property(tmp_path: Path) -> None:
    write_recordio(tmp_path, people())
    lines = (tmp_path / "train.idx").read_text().splitlines()
    (tmp_path / "train.idx").write_text("\n".join(reversed(lines)))
    (tmp_path / "property").unlink()
    assert contents(scan(str(tmp_path))) == expected()


def test_more_records_than_float32_can_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels then come from the images themselves, and record 0 may be off by its rounding."""
    write_recordio(tmp_path, people())
    monkeypatch.setattr(recordio, "EXACT", 20)
    rec = bytearray((tmp_path / "train.rec").read_bytes())
    lines = (line.split("\t") for line in (tmp_path / "train.idx").read_text().splitlines())
    offset = {int(key): int(byte) for key, byte in lines}
    for stored in (19.0, 21.0, 23.0):
        struct.pack_into("<ff", rec, offset[0] + 32, stored, stored + 5)
        for key in range(21, 26):  # ranges that must be rejected
            struct.pack_into("<ff", rec, offset[key] + 32, 1, 21)
        (tmp_path / "train.rec").write_bytes(rec)
        assert contents(scan(str(tmp_path))) == expected()


def test_what_is_read_in_a_worker_or_a_copy_is_the_same(tmp_path: Path) -> None:
    images = scan(str(write_recordio(tmp_path, people())))
    first = images.read(0)
    copy: ImageList = pickle.loads(pickle.dumps(images))
    assert copy.read(0) == first
    assert [copy.read(i) for i in range(len(copy))] == [images.read(i) for i in range(len(images))]


def test_a_run_from_records_is_that_from_a_folder_of_the_same_images(tmp_path: Path) -> None:
    write_recordio(tmp_path / "rec", people())
    for who, faces in enumerate(people()):
        (tmp_path / "folder" / str(who)).mkdir(parents=True)
        for i, face in enumerate(faces):
            (tmp_path / "folder" / str(who) / f"{i}.jpg").write_bytes(face)
    for kind in ("rec", "folder"):
        config = tiny(
            tmp_path / kind,
            tmp_path / f"run-{kind}",
            data={"holdout": 2, "cache": "never"},
            train={"batch_size": 6, "max_steps": 3},
        )
        assert main(arguments(config)) == 0
        assert (tmp_path / f"run-{kind}" / "evaluation.json").exists()
    assert losses(tmp_path / "run-rec") == losses(tmp_path / "run-folder")
    assert len(losses(tmp_path / "run-rec")) == 3
