"""Damaged and hostile shards: an error in one line that names file and member, or skipped."""

from __future__ import annotations

import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz.mutation import outcome
from support.packs import add_member, contents, people, write_shards

from train.data.dataset import scan
from train.data.loader import open_images
from train.errors import UserError


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


BAD_MEMBERS: dict[str, tuple[list[tuple[str, bytes] | tarfile.TarInfo], str]] = {
    "absolute name": (
        [("/etc/x.jpg", b"x"), ("/etc/x.cls", b"0")],
        "member /etc/x.jpg: refused: its name",
    ),
    "climbing name": (
        [("a/../../x.jpg", b"x")],
        r"member a/\.\./\.\./x\.jpg: refused: its name leads",
    ),
    "link": (
        [link("x.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("x.cls", b"0")],
        "x.jpg: refused: links",
    ),
    "hard link": ([link("x.jpg", tarfile.LNKTYPE, "00000000.jpg")], "x.jpg: refused: links"),
    "device": ([link("x.jpg", tarfile.CHRTYPE, "")], "x.jpg: refused: links, devices"),
    "no label": ([("x.jpg", b"x")], r"sample x: no label: expected a \.cls or \.json"),
    "no image": ([("x.cls", b"0")], r"sample x: expected one image"),
    "two images": ([("x.jpg", b"x"), ("x.png", b"x"), ("x.cls", b"0")], "sample x: .*; found 2"),
    "the same twice": ([("x.jpg", b"x"), ("x.jpg", b"x"), ("x.cls", b"0")], "x.jpg: duplicate"),
    "label is text": ([("x.jpg", b"x"), ("x.cls", b"zero")], r"its \.cls is not a number: b'zero'"),
    "label below 0": ([("x.jpg", b"x"), ("x.cls", b"-1")], "its label is -1, expected a whole"),
    "huge label": ([("x.jpg", b"x"), ("x.cls", b"9" * 60)], "its label is 9+, expected a whole"),
    "long label": ([("x.jpg", b"x"), ("x.cls", b"9" * 600)], r"its \.cls has 600 bytes"),
    "label is a fraction": ([("x.jpg", b"x"), ("x.json", b'{"label": 0.5}')], "its label is 0.5"),
    "label is true": ([("x.jpg", b"x"), ("x.json", b'{"label": true}')], "its label is True"),
    "json without label": ([("x.jpg", b"x"), ("x.json", b"{}")], r'is not JSON with "label"'),
    "json is a list": ([("x.jpg", b"x"), ("x.json", b"[1]")], r'is not JSON with "label"'),
    "deep json": ([("x.jpg", b"x"), ("x.json", b"[" * 60000)], r'is not JSON with "label"'),
    "terminal codes": ([("\x1b[2J.jpg", b"x")], r"sample \\x1b\[2J: no label"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_named_or_skipped_and_counted(tmp_path: Path, case: str) -> None:
    members, message = BAD_MEMBERS[case]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(people()[0]):
            add_member(tar, f"{i:08d}.jpg", image)
            add_member(tar, f"{i:08d}.cls", b"0")
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                add_member(tar, *member)
    with pytest.raises(UserError, match=rf"a\.tar.*{message}"):
        scan(str(path))
    images = scan(str(path), skip=True)
    assert re.search(message, "\n".join(images.left_out.values()))
    assert contents(images)["0"][:4] == list(people()[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # nothing is extracted


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (5700, "cut short"),
        (5120, "cut short after byte"),
        (5400, "cut short after"),
        (300, "not an"),
    ],
)
def test_truncated_shards(tmp_path: Path, keep: int, message: str) -> None:
    """Cut within an image, between members, within a header, and within the first one."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            add_member(tar, f"{i}.jpg", bytes([1]) * 600)  # a header and two blocks
            add_member(tar, f"{i}.cls", b"0")  # a header and a block
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"a\.tar.*{message}"):
        scan(str(path))
    if keep > 512:
        assert len(scan(str(path), skip=True)) == 2
    else:
        with pytest.raises(UserError, match="no images in the 1 shard"):
            scan(str(path), skip=True)


def test_what_tarfile_would_take_for_the_end_is_damage(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(tmp_path / name, people()[:1])
    one, other = (next((tmp_path / name).glob("*.tar")).read_bytes() for name in "ab")
    damaged = bytearray(one)
    damaged[damaged.index(b"00000002.jpg") + 3] ^= 1  # its check sum no longer fits
    for content in (one + other, bytes(damaged)):
        (tmp_path / "c.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"c\.tar: damaged or cut short after byte"):
            scan(str(tmp_path / "c.tar"))
    (tmp_path / "c.tar").write_bytes(zlib.compress(one))
    with pytest.raises(UserError, match=r"c\.tar: not an uncompressed tar file"):
        scan(str(tmp_path / "c.tar"))


def test_a_name_for_a_name_for_a_name_is_damage(tmp_path: Path) -> None:
    """Headers of long names, each of the next header: tarfile calls itself for every one."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2
    path = tmp_path / "a.tar"
    path.write_bytes((name.tobuf() + b"x".ljust(512, b"\0")) * 3000 + bytes(1024))
    with pytest.raises(UserError, match=r"a\.tar: not an uncompressed tar file, or damaged"):
        scan(str(path))


@pytest.mark.parametrize("prefix", ["", "./", "faces/", "./faces/"])
def test_hidden_members_count_for_nothing(tmp_path: Path, prefix: str) -> None:
    """macOS's tar writes attributes of x.jpg before it, into ._x.jpg."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i, image in enumerate(people()[0]):
            for ending, content in (("jpg", image), ("cls", b"0")):
                add_member(tar, f"{prefix}._{i}.{ending}", b"\0\5\x16\7")
                add_member(tar, f"__MACOSX/{prefix}._{i}.{ending}", b"\0\5\x16\7")
                add_member(tar, f"{prefix}{i}.{ending}", content)
        add_member(tar, f"{prefix}.git/x.jpg", b"x")
        add_member(tar, f"{prefix}.DS_Store", b"x")
    for skip in (False, True):
        images = scan(str(path), skip=skip)
        assert contents(images)["0"] == list(people()[0])
        assert not images.left_out


def test_endings_of_images_and_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.tar"
    faces = people()[0]
    with tarfile.open(path, "w") as tar:
        for i, ending in enumerate(("jfif", "JPE", "webp")):
            add_member(tar, f"{i}.{ending}", faces[i])
            add_member(tar, f"{i}.cls", b"0")
        for name, content in (("3.jpg", faces[3]), ("3.webp", b"mask"), ("3.cls", b"0")):
            add_member(tar, name, content)
        add_member(tar, "README", b"text")
    assert contents(scan(str(path)))["0"] == list(faces)
    said = capsys.readouterr().err
    assert re.search(r"left out: 1 member\(s\) whose names have no ending.*member README", said)


def pax(content: bytes) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content",
    [
        b"1" * 100_000,
        b"1" * 100_000 + b" hdrcharset=BINARY\n",
        b"1 " * 50_000,
        b"0 path=x\n",
        b"9 size=x\n",
        b"%d size=%s\n" % (5011, b"9" * 5000),
        b"999999999 path=x\n",
        b"9" * 19 + b" path=x\n",
    ],
)
def test_extended_headers_take_no_time(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(pax(content) * 3 + bytes(1024))
    assert outcome(lambda: scan(str(tmp_path / "a.tar")), (UserError,)) is None
    with pytest.raises(UserError, match=r"a\.tar: not an uncompressed tar file, or damaged: "):
        scan(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_and_the_longest_refused(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "a.tar"
    name = "folder/" * 100 + "ü0"
    with tarfile.open(path, "w", format=kind) as tar:
        for prefix in (name, "x" * 5000):
            add_member(tar, f"{prefix}.jpg", people()[0][0])
            add_member(tar, f"{prefix}.cls", b"7")
    with pytest.raises(UserError, match="its name has 5004 characters"):
        scan(str(path))
    assert contents(scan(str(path), skip=True)) == {"7": [people()[0][0]]}


def test_any_damage_to_a_shard_is_a_message_or_an_image(tmp_path: Path) -> None:
    write_shards(tmp_path, people()[:1])
    path = tmp_path / "faces-000000.tar"
    original = path.read_bytes()
    headers = [i for i in range(0, len(original), 512) if original[i + 257 : i + 262] == b"ustar"]
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for _ in range(150):
        damaged = bytearray(original)
        start = int(rng.choice(headers))
        for _ in range(3):
            damaged[start + rng.integers(512)] = rng.integers(256)
        checksum = sum(damaged[start : start + 512]) - sum(damaged[start + 148 : start + 156])
        damaged[start + 148 : start + 156] = b"%06o\0 " % (checksum + 8 * 32)
        path.write_bytes(damaged)
        try:
            images = scan(str(path), skip=True)
            open_images(images, 16, on_error="skip")
        except UserError as error:
            messages.append(str(error))
    assert messages
    assert all("shard(s)" in m or "can be read" in m for m in messages)
