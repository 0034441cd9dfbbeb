"""Damaged and hostile data: an error in one line that names file and record, or skipped."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.mutation import outcome
from PIL import Image
from support.packs import (
    contents,
    pack,
    people,
    write_recordio,
    write_records,
    write_shards,
)
from support.training import arguments, tiny

from train.data import recordio_format, shards
from train.data import records as records_module
from train.data.dataset import open_dataset, scan
from train.data.decode import PixelError, to_pixels
from train.data.image_list import whole
from train.data.loader import open_images
from train.data.records import Files, RecordError
from train.errors import UserError
from train.main import main


def offsets(folder: Path) -> dict[int, int]:
    lines = (folder / "train.idx").read_text().splitlines()
    return {int(key): int(byte) for key, byte in (line.split("\t") for line in lines)}


def reindex(folder: Path, change: dict[int, int | None]) -> None:
    """Other offsets for some records; None leaves a record out of the index."""
    table = {**offsets(folder), **change}
    lines = [f"{key}\t{byte}\n" for key, byte in table.items() if byte is not None]
    (folder / "train.idx").write_text("".join(lines))


def patch(folder: Path, key: int, at: int, fmt: str, *values: float) -> None:
    rec = bytearray((folder / "train.rec").read_bytes())
    struct.pack_into(fmt, rec, offsets(folder)[key] + at, *values)
    (folder / "train.rec").write_bytes(rec)


def cut(folder: Path, key: int, at: int) -> None:
    rec = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(rec[: offsets(folder)[key] + at])


def read_all(path: Path, on_error: str) -> tuple[int, dict[str, str]]:
    """Images read through the workers' code, and what was skipped."""
    config = tiny(path, path, data={"on_error": on_error, "cache": "always"})
    source = open_dataset(config).train
    for pixels, labels in source.batches([range(len(source.images))]):
        assert len(pixels) == len(labels) == len(source.images)
    return len(source.images), source.skipped


# -- RecordIO -----------------------------------------------------------------------------------

# Damage to 20 images (records 1 to 20) and 5 identities (21 to 25); record 0 comes last but those.
# Each: the damage, the record that the error names, the reason, images left when skipping.
DAMAGE: dict[str, tuple[Callable[[Path], None], int, str, int]] = {
    "offset beyond the end": (
        lambda f: reindex(f, {7: 10**12}),
        7,
        "byte 1000000000000 .* beyond the file's end",
        19,
    ),
    "negative offset": (lambda f: reindex(f, {7: -8}), 7, "byte -8", 19),
    "offset between records": (
        lambda f: reindex(f, {7: offsets(f)[7] + 4}),
        7,
        "no record begins at byte",
        19,
    ),
    "offset of another record": (
        lambda f: reindex(f, {7: offsets(f)[12]}),
        7,
        "the .idx file puts it where record 12 is",
        19,
    ),
    "offset of another identity's, which is missing": (
        lambda f: reindex(f, {7: offsets(f)[14], 14: None}),
        14,
        "not in the .idx file",
        18,
    ),
    "record not in the index": (lambda f: reindex(f, {7: None}), 7, "not in the .idx file", 19),
    "another magic number": (lambda f: patch(f, 7, 0, "<I", 1), 7, "no record begins", 19),
    "length beyond the end": (
        lambda f: patch(f, 20, 4, "<I", (1 << 29) - 1),
        20,
        "more than|cut short",
        19,
    ),
    "a part that continues nothing": (
        lambda f: patch(f, 7, 4, "<I", 3 << 29 | 8),
        7,
        "no record begins",
        19,
    ),
    "an unknown kind of part": (lambda f: patch(f, 7, 4, "<I", 5 << 29), 7, "no record begins", 19),
    "no room for the header": (lambda f: patch(f, 7, 4, "<I", 8), 7, "header is cut short", 19),
    "more labels than bytes": (
        lambda f: patch(f, 7, 8, "<I", 2**32 - 1),
        7,
        "should have 4294967295 labels",
        19,
    ),
    "another label": (lambda f: patch(f, 7, 32, "<f", 3), 7, "label is 3, 1 according", 19),
    "label that is no number": (
        lambda f: patch(f, 5, 32, "<f", float("nan")),
        5,
        "not a number|identity have labels",
        19,
    ),
    "label beyond the classes": (
        lambda f: patch(f, 5, 32, "<f", 9),
        22,
        "records 5 and 8 .* labels 9 and 1",
        19,
    ),
    "range beyond the images": (
        lambda f: patch(f, 22, 32, "<ff", 5, 99),
        22,
        "range of an identity's records",
        20,
    ),
    "range that is no number": (
        lambda f: patch(f, 22, 32, "<ff", float("nan"), 9),
        22,
        "range of an identity",
        20,
    ),
    "identity not in the index": (lambda f: reindex(f, {22: None}), 22, "not in the .idx", 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_records_are_named_or_skipped_and_counted(tmp_path: Path, damage: str) -> None:
    change, key, reason, left = DAMAGE[damage]
    write_recordio(tmp_path, people())
    change(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"train\.rec, record {key}: .*({reason})|"
        rf"train\.rec, record {key}.*{reason}",
    ) as caught:
        read_all(tmp_path, "fail")
    assert "data.on_error=skip" in str(caught.value)
    count, skipped = read_all(tmp_path, "skip")
    assert count == left
    assert any(name.endswith(f"record {key}") for name in skipped)


@pytest.mark.parametrize("at", [0, 6, 20, 300])
def test_a_truncated_file_loses_what_is_cut_off_and_no_more(tmp_path: Path, at: int) -> None:
    write_recordio(tmp_path, people(), layout="plain", label_count=1)
    cut(tmp_path, 15, at)
    with pytest.raises(UserError, match=r"record 1[56].*(cut short|beyond the file's end)"):
        scan(str(tmp_path))
    images = scan(str(tmp_path), skip=True)
    assert len(images) == 15
    assert len(images.left_out) == 5
    assert contents(images)["2"] == list(people()[2])


@pytest.mark.parametrize("kept", ["the images", "everything else"])
def test_without_record_0_what_else_can_be_read_is_kept(tmp_path: Path, kept: str) -> None:
    write_recordio(tmp_path, people())
    if kept == "the images":
        cut(tmp_path, 15, 4)  # with record 0 and the identities, which lie behind
    else:
        patch(tmp_path, 0, 0, "<I", 0)
    with pytest.raises(UserError, match=r"train\.rec, record (0|16): .*(beyond|no record begins)"):
        scan(str(tmp_path))
    images = scan(str(tmp_path), skip=True)
    assert len(images) == (14 if kept == "the images" else 20)
    assert len(images.left_out) == (12 if kept == "the images" else 6)
    assert contents(images)["2"] == list(people()[2])


@pytest.mark.parametrize(
    ("layout", "message", "left"),
    [
        ((21, 1e6), "record 26 to 999999: not in the", 20),
        ((1e6, 1e6 + 5), "record 26 to 999999: not in the", 20),
        ((1e30, 2e30), "record 26 to 10.*: not in the", 20),
        ((float("inf"), 1), r"record 0: expected two ascending numbers, got \[inf", None),
        ((float("nan"), 1), r"record 0: expected two ascending numbers, got \[nan", None),
        ((9, 3), r"record 0: expected two ascending numbers, got \[9", None),
        ((0.5, 3), r"record 0: expected two ascending numbers, got \[0\.5", None),
    ],
)
def test_record_0_counts_records_that_do_not_exist(
    tmp_path: Path, layout: tuple[float, float], message: str, left: int | None
) -> None:
    """Nothing is allocated by its numbers. Records of identities have no image, and are none."""
    write_recordio(tmp_path, people())
    patch(tmp_path, 0, 32, "<ff", *layout)
    (tmp_path / "property").unlink()
    with pytest.raises(UserError, match=message):
        scan(str(tmp_path))
    if left is None:
        with pytest.raises(UserError, match=message):
            scan(str(tmp_path), skip=True)
    else:
        assert len(scan(str(tmp_path), skip=True)) == left


def test_keys_far_apart_take_no_memory(tmp_path: Path) -> None:
    write_recordio(tmp_path, people())
    reindex(tmp_path, {10**15: 0, 1: None})
    patch(tmp_path, 0, 32, "<ff", 1e15, 1e15)
    for skip in (False, True):
        with pytest.raises(UserError, match=r"record 0: it holds .* lists 26"):
            scan(str(tmp_path), skip=skip)


def test_records_within_one_another_take_no_time(tmp_path: Path) -> None:
    """Thousands of first parts, which all go on into the same thousands of others."""
    count, magic = 10_000, struct.pack("<I", 0xCED7230A)
    firsts = [magic + struct.pack("<I", 1 << 29 | 8 * (count - i - 1)) for i in range(count)]
    others = [magic + struct.pack("<I", kind << 29) for kind in (*[2] * count, 3)]
    (tmp_path / "train.rec").write_bytes(b"".join(firsts + others))
    (tmp_path / "train.idx").write_text("".join(f"{i}\t{8 * i}\n" for i in range(count)))
    assert outcome(lambda: scan(str(tmp_path), skip=True), (UserError,)) is None
    with pytest.raises(UserError, match="record"):
        scan(str(tmp_path))


def test_labels_beyond_the_classes_of_property(tmp_path: Path) -> None:
    write_recordio(tmp_path, people())
    (tmp_path / "property").write_text("4,112,112\n")
    reason = r"record 17: its label is 4, expected a whole number from 0 to 3 \(property: 4 classes"
    with pytest.raises(UserError, match=reason):
        scan(str(tmp_path))
    images = scan(str(tmp_path), skip=True)
    assert images.identities == ["0", "1", "2", "3"]
    assert len(images.left_out) == 4
    for label in (-1.0, 0.5, float("inf"), float("nan")):
        write_records(tmp_path, [(0, pack([0], b"a", 0)), (1, pack([label], b"b", 1))])
        with pytest.raises(UserError, match=r"record 1: its label is"):
            scan(str(tmp_path))
        assert len(scan(str(tmp_path), skip=True)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.idx", "", r"train\.idx: expected lines"),
        ("train.idx", "0\t0\n1\n", r"train\.idx: expected lines"),
        ("train.idx", "0\tzero\n", r"train\.idx: expected lines of a number.*zero"),
        ("train.idx", f"0\t{10**30}\n", r"train\.idx: expected lines"),
        ("train.idx", "0\t0\n1\t8\n0\t16\n", r"train\.idx: record 0 is listed twice"),
        ("train.idx", None, r"no such file: .*train\.idx"),
        ("property", "many,112,112", r"property: expected 'classes,height,width', got 'many"),
        ("property", "\0\xff", "property: expected 'classes"),
        ("train.rec", "", r"train\.rec, record 0.*beyond the file's end, 0 bytes"),
    ],
)
def test_unusable_files_are_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    write_recordio(tmp_path, people())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content, encoding="latin-1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=message):
            scan(str(tmp_path))


def test_any_damage_to_the_bytes_is_a_message_or_an_image(tmp_path: Path) -> None:
    write_recordio(tmp_path, people())
    original = (tmp_path / "train.rec").read_bytes()
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for _ in range(150):
        damaged = bytearray(original)
        starts = rng.choice(list(offsets(tmp_path).values()), 3)
        for start in starts:
            damaged[start + rng.integers(40)] ^= 1 << rng.integers(8)
        (tmp_path / "train.rec").write_bytes(damaged[: rng.integers(1, 2 * len(damaged))])
        try:
            images = scan(str(tmp_path), skip=True)
            open_images(images, 16, on_error="skip")
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all("train.rec" in m or "can be read" in m for m in messages)


def test_one_record_never_takes_more_memory_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse files claim gigabytes; nothing of that size is read."""
    for module in (records_module, recordio_format, shards):
        monkeypatch.setattr(module, "MAX_BYTES", 4000)
    write_records(tmp_path / "rec", [(i, pack([i], bytes(5000), i)) for i in range(2)])
    write_shards(tmp_path / "tar", [[b"a"], [bytes(5000)]])
    for who in ("a", "b"):
        (tmp_path / "folder" / who).mkdir(parents=True)
        (tmp_path / "folder" / who / "1.png").write_bytes(bytes(5000))
    for kind, message in (
        ("rec", "record 0.* more than 4000"),
        ("tar", "sample 00000001: it has 5000 bytes, more than 4000"),
        ("folder", r"a.1\.png: it has 5000 bytes, more than 4000"),
    ):
        with pytest.raises(UserError, match=message):
            open_images(scan(str(tmp_path / kind)), 16, on_error="fail")


# -- images -------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels, which compresses a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as train.data.decode
def test_bombs_are_refused_by_their_header() -> None:
    jpeg = bytearray(people()[0][0])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for encoded in (bomb(5000), bomb(10_000), bomb(60_000), bytes(jpeg)):
        with pytest.raises(PixelError, match=r"more than data\.max_pixels=16000000|exceeds limit"):
            to_pixels(encoded, 16)
    with pytest.raises(PixelError, match=r"it has 24 x 24 pixels, more than data\.max_pixels=575"):
        to_pixels(people()[0][0], 16, 575)
    assert to_pixels(people()[0][0], 16, 576).shape == (3, 16, 16)


def test_formats_that_start_programs_are_none_here() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(PixelError, match="no known image format"):
        to_pixels(postscript, 16)


def test_any_damage_to_a_jpeg_is_a_reason_or_pixels() -> None:
    original = people()[0][0]
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(300):
        damaged = bytearray(original)
        for at in rng.integers(0, len(damaged), 4):
            damaged[at] = rng.integers(256)
        try:
            pixels = to_pixels(bytes(damaged[: rng.integers(2, 2 * len(damaged))]), 16)
            assert pixels.shape == (3, 16, 16)
        except PixelError as error:
            reasons.add(str(error))
    assert len(reasons) > 1
    assert "" not in reasons


def test_a_run_skips_and_reports_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = [list(images) for images in people()]
    faces[0][1] = b""
    faces[1][2] = faces[1][2][:100]
    faces[2][3] = bomb(8000)
    write_recordio(tmp_path / "data", faces)
    reindex(tmp_path / "data", {18: None})
    config = tiny(
        tmp_path / "data",
        tmp_path / "run",
        data={"on_error": "skip", "cache": "never"},
        train={"epochs": 1, "batch_size": 19},
    )
    assert main(arguments(config)) == 0
    said = capsys.readouterr().err
    assert "skipped 4 unreadable image(s)" in said
    for key, reason in ((2, "it is empty"), (7, ""), (12, "8000 x 8000 pixels"), (18, "not in")):
        assert re.search(rf"record {key}: .*{reason}", said)
    assert main([*arguments(config), "data.on_error=fail", "run.overwrite=true"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "record 18: it is not in the .idx file (data.on_error=skip" in said


class Deadly:
    """Records of which one kills the process that reads it."""

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> bytes:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return people()[0][index]

    def name(self, index: int) -> str:
        return str(index)


def test_a_decoding_process_that_dies_is_an_error_in_one_line() -> None:
    images = whole(Deadly(), [0, 0, 1, 1], ["a", "b"])
    source = open_images(images, 16, on_error="skip", cache="never", workers=1)
    with pytest.raises(UserError, match=r"a decoding process has died.*data\.workers=0"):
        list(source.batches([[0, 1], [2, 3]]))


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are files on POSIX")
def test_only_regular_files_are_images(tmp_path: Path) -> None:
    """A pipe without a writer, and a file without an end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(RecordError, match=f"{name}: it is not a regular file"):
            Files([str(tmp_path / name)]).read(0)
