"""Image files by their bytes: what is beside the pixels, and small files of large images."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from fuzz.mutation import outcome
from PIL import Image, ImageOps

from train.data.decode import MAX_PIXELS, MOST_SCANS, PixelError, to_image, to_pixels

RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(0, 255, (5, 4, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
PICTURE = Image.fromarray(PIXELS)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def directory(*entries: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF header and directory: tag, type, count, value or offset."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def with_exif(exif: bytes, *, jfif: bool = True) -> bytes:
    """A JPEG with this after its start, in as many segments as it takes."""
    encoded = encode(PICTURE, "JPEG")
    parts = [exif[i : i + 65_000] for i in range(0, len(exif), 65_000)]
    segments = b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)
    return encoded[:2] + segments + encoded[2 if jfif else 20 :]


def png_with(*chunks: bytes, before: bool = True) -> bytes:
    encoded = encode(PICTURE, "PNG")
    at = 33 if before else len(encoded) - 12
    return encoded[:at] + b"".join(chunks) + encoded[at:]


# -- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "icc_profile": bytes(70_000), "comment": b"text"}),
        ("PNG", {"icc_profile": bytes(70_000)}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_photographs_are_upright_whatever_they_are_stored_in(
    kind: str, options: dict[str, Any], orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    encoded = encode(PICTURE, kind, exif=exif, **options)
    with Image.open(io.BytesIO(encoded)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(to_image(encoded)), expected)


def turned(*, resolution: bytes = b"", **other: int) -> bytes:
    """EXIF of orientation 6 with a damaged entry."""
    exif = directory((0x112, 3, 1, 6), (0x11A, 5, 1, 38), (0x8769, 4, 1, other.get("sub", 0)))
    return exif + resolution


@pytest.mark.parametrize(
    "exif",
    [
        turned(resolution=bytes(8)),  # 0/0, which Pillow 11.0 refuses
        turned(),  # beyond the end
        turned(sub=2**32 - 1),
        turned(sub=8),  # itself
        directory((0x112, 4, 1, 6)),
        directory((0x112, 3, 1, 6), (0x9999, 99, 2**32 - 1, 2**32 - 1)),
    ],
)
def test_damaged_exif_costs_no_photograph(exif: bytes) -> None:
    for encoded in (with_exif(exif), with_exif(exif, jfif=False), png_with(chunk(b"eXIf", exif))):
        assert to_image(encoded).size == PICTURE.size[::-1]


SILENT = [b"x", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*" * 9, directory((0x112, 3, 1, 9))]
SILENT.append(directory((0x112, 3, 1, 6))[:-8])


@pytest.mark.parametrize("exif", SILENT)
def test_exif_without_an_orientation_turns_nothing(exif: bytes) -> None:
    for encoded in (with_exif(exif), png_with(chunk(b"eXIf", exif))):
        assert to_image(encoded).size == PICTURE.size


@pytest.mark.parametrize("text", ['tiff:Orientation="6"', "<tiff:Orientation>6</tiff:Orientation>"])
def test_orientation_in_xmp_and_in_a_raw_profile(text: str) -> None:
    xmp = text.encode()
    jpeg = encode(PICTURE, "JPEG")
    profile = b"\nexif\n%8d\n%s\n" % (
        20,
        (b"Exif\0\0" + directory((0x112, 3, 1, 6))).hex().encode(),
    )
    for encoded in (
        jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp) + jpeg[2:],
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))),
        png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))),
        png_with(chunk(b"tEXt", b"Raw profile type exif\0" + profile)),
        encode(PICTURE, "WEBP", xmp=xmp),
    ):
        assert to_image(encoded).size == PICTURE.size[::-1]


# -- small files that would need much memory ----------------------------------------------------

MANY = [(300 + i, 1, 700_000, 0) for i in range(60_000)]  # every tag has the same 700 kB
DEFLATED = zlib.compress(bytes(1 << 28))


def gif_with(extension: bytes) -> bytes:
    encoded = encode(PICTURE.quantize(8), "GIF")
    at = 13 + (3 << (encoded[10] & 7) + 1)
    return encoded[:at] + extension + encoded[at:]


def tiff_with(*entries: tuple[int, int, int, int]) -> bytes:
    """40 x 32 gray pixels, uncompressed, and other entries in the place of those of their tags."""
    usual = [(0x100, 4, 1, 40), (0x101, 4, 1, 32), (0x102, 3, 1, 8), (0x103, 3, 1, 1)]
    usual += [(0x106, 3, 1, 1), (0x111, 4, 1, 0), (0x115, 3, 1, 1), (0x117, 4, 1, 1280)]
    tags = {entry[0]: entry for entry in (*usual, *entries)}
    at = 14 + 12 * len(tags)
    if 0x111 not in {entry[0] for entry in entries}:
        tags[0x111] = (0x111, 4, 1, at)
    return directory(*sorted(tags.values())) + bytes(range(256)) * 5


MUCH: dict[str, bytes] = {
    "JPEG, EXIF that overlaps": with_exif(directory(*MANY)),
    "JPEG, EXIF that overlaps, no JFIF": with_exif(directory(*MANY), jfif=False),
    "PNG, EXIF that overlaps": png_with(chunk(b"eXIf", directory(*MANY))),
    "PNG, text of 5 MB": png_with(chunk(b"tEXt", b"a\0" + b"x" * (5 << 20))),
    "PNG, text of 5 MB at the end": png_with(
        chunk(b"tEXt", b"a\0" + b"x" * (5 << 20)), before=False
    ),
    "PNG, compressed text": png_with(chunk(b"zTXt", b"a\0\0" + DEFLATED)),
    "PNG, compressed profile": png_with(chunk(b"iCCP", b"a\0\0" + DEFLATED)),
    "PNG, compressed XMP": png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + DEFLATED)),
    "PNG, compressed EXIF": png_with(chunk(b"zTXt", b"Raw profile type exif\0\0" + DEFLATED)),
    "PNG, many chunks": png_with(chunk(b"teXt", b"") * 50_000),
    "GIF, a comment of single bytes": gif_with(b"\x21\xfe" + b"\1x" * 300_000 + b"\0"),
    "GIF, many comments": gif_with(b"\x21\xfe\1x\0" * 50_000),
    "PPM, many comments": b"P3\n32 40\n255\n" + b"#\n" * 300_000 + b"1 " * 3840,
}


@pytest.mark.parametrize("name", MUCH)
def test_metadata_takes_neither_time_nor_memory(name: str) -> None:
    """Each of these images can be decoded."""
    assert outcome(lambda: to_pixels(MUCH[name], 16), (), memory=128 << 20) is None


def test_tags_that_overlap_are_refused() -> None:
    offsets = tiff_with((0x111, 4, 1_000_000, 8))
    strips = tiff_with((0x111, 4, 40, 8), (0x117, 4, 40, 8), (0x116, 4, 1, 32))
    tiles = tiff_with(
        (0x142, 4, 1, 2**31 - 1), (0x143, 4, 1, 2**31 - 1), (0x144, 4, 1, 8), (0x145, 4, 1, 8)
    )
    for encoded, reason in (
        (offsets, "more bytes than the file"),
        (strips, "40 strips or tiles where 1 make"),
        (tiles, "2147483647 x 2147483647"),
    ):
        with pytest.raises(PixelError, match=reason):
            to_pixels(encoded, 16)
    private = [(0x8000 + i, 1, 700_000, 0) for i in range(100)]
    assert to_image(tiff_with(*private)).size == (40, 32)  # those are not even looked at


def progressive(side: int, scans: int) -> bytes:
    """A gray picture whose last scan, of a few bytes, is repeated."""
    encoded = encode(Image.new("L", (side, side), 99), "JPEG", progressive=True)
    last = encoded[encoded.rindex(b"\xff\xda") : -2]
    return encoded[:-2] + last * (scans - encoded.count(b"\xff\xda")) + encoded[-2:]


def test_scans_are_bounded_by_those_of_the_largest_image() -> None:
    side = int(MAX_PIXELS**0.5)
    assert to_pixels(progressive(side // 4, 20), 16).shape == (3, 16, 16)
    assert to_pixels(progressive(112, 1000), 16).shape == (3, 16, 16)
    reason = rf"{MOST_SCANS + 1} scans of {side} x {side} pixels, more than {MOST_SCANS} of"
    with pytest.raises(PixelError, match=reason):
        to_pixels(progressive(side, MOST_SCANS + 1), 16)
    with pytest.raises(PixelError, match=r"data\.max_pixels=256"):
        to_pixels(progressive(16, MOST_SCANS + 1), 16, 256)


# -- numbers of more than 8 bits, and formats that are not read ---------------------------------


def test_16_bit_gray_is_scaled_from_all_of_its_range() -> None:
    ramp = np.arange(256, dtype=np.uint16)[None].repeat(4, 0) * 257
    for kind, options in (("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PNG", {})):
        pixels = np.asarray(to_image(encode(Image.fromarray(ramp), kind, **options)))
        assert np.array_equal(pixels, np.dstack([ramp // 257] * 3))
    words = ramp[0, :40].tobytes() * 32
    for photometric, white in ((1, 1), (0, 254)):  # 0 is white
        head = tiff_with((0x102, 3, 1, 16), (0x106, 3, 1, photometric), (0x117, 4, 1, len(words)))
        encoded = head[: -5 * 256] + words
        assert np.asarray(to_image(encoded))[0, 1, 0] == white


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.ones((4, 4), np.float32), "TIFF of 32-bit floating-point numbers.*8 or 16 unsigned"),
        (np.ones((4, 4), np.int32), "TIFF of 32-bit signed numbers.*save it with"),
    ],
)
def test_gray_whose_white_is_not_known_is_refused(array: np.ndarray, reason: str) -> None:
    for compression in (None, "tiff_lzw"):
        encoded = encode(Image.fromarray(array), "TIFF", compression=compression)
        with pytest.raises(PixelError, match=reason):
            to_pixels(encoded, 16)
    for bits, kind in ((16, 2), (32, 1), (64, 3), (16, 3)):
        with pytest.raises(PixelError, match=f"TIFF of {bits}-bit"):
            to_pixels(tiff_with((0x102, 3, 1, bits), (0x153, 3, 1, kind)), 16)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x1cftypheic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
        (b"\xff\x0a\xff", "JPEG XL"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_formats_that_are_not_read_are_named(head: bytes, name: str) -> None:
    with pytest.raises(PixelError, match=f"{name}.*convert it to JPEG or PNG"):
        to_pixels(head + bytes(100), 16)
