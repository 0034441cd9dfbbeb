"""Metadata of image files: the orientation is read, the rest is kept from the decoder.

Text, profiles, thumbnails and EXIF are where small files become gigabytes or minutes, and where
versions of Pillow differ in what they refuse. None of it is needed here. All of this takes time by
the number of segments, not of pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from train.data import tiff_tags

# Bytes of compressed metadata that are unpacked at most.
_MOST_TEXT = 1 << 20
_XMP_JPEG = b"http://ns.adobe.com/xap/1.0/\0"
_PNG = b"\x89PNG\r\n\x1a\n"


class PixelError(Exception):
    """The reason why an image cannot be read."""


@dataclass(frozen=True)
class Bare:
    """An image file without metadata."""

    encoded: bytes
    orientation: int = 1  # EXIF's, 1 to 8
    # For gray pixels of more than 8 bits: the value of white, and true if 0 is white instead.
    white: int = 0xFFFF
    inverted: bool = False


def bare(encoded: bytes, max_pixels: int) -> Bare:
    """The file as it is passed to the decoder.

    Raises:
        PixelError: if its pixels have no range that is known, or its header claims what takes far
            more memory than its image.
    """
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg(encoded)
    if encoded.startswith(_PNG):
        return _png(encoded)
    if encoded.startswith((b"II", b"MM")):
        return _tiff(encoded, max_pixels)
    if encoded.startswith(b"GIF8"):
        return Bare(_gif(encoded))
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return _webp(encoded)
    if encoded[:2] in (b"P1", b"P2", b"P3"):  # numbers as text, with comments in between
        return Bare(re.sub(rb"#[^\r\n]*", b"", encoded))
    return Bare(encoded)


_OTHERS = {
    rb".{4}ftyp(avif|avis)": "AVIF",
    rb".{4}ftyp(heic|heix)": "HEIC",
    rb".{4}ftyp": "HEIF",
    rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"\0\0\0\x0cJXL |\xff\x0a": "JPEG XL",
    rb"\s*(?i:<!doctype|<html|<\?xml|<svg)": "HTML or SVG",
    rb"version https://git-lfs": "Git LFS (a pointer: git lfs pull)",
}


def kind_of(encoded: bytes) -> str | None:
    """Name of a format that is not read; None if it is unknown."""
    head = encoded[:64]
    return next((kind for start, kind in _OTHERS.items() if re.match(start, head, re.S)), None)


def _upright(exif: bytes, xmp: bytes) -> int:
    if (value := tiff_tags.orientation(exif)) is not None:
        return value
    found = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(found[1]) if found else 1


def _jpeg(encoded: bytes) -> Bare:
    """A JPEG without application segments and comments before the first scan, except for those that
    define how colors are stored (JFIF: APP0, Adobe: APP14).
    """
    dropped: list[tuple[int, int]] = []
    exif = xmp = b""
    at, size = 2, len(encoded)
    while at + 4 <= size:
        marker = encoded[at + 1]
        if encoded[at] != 0xFF or marker == 0xFF:  # filling
            at = encoded.find(b"\xff", at + 1)
            if at < 0:
                break
        elif marker == 0xDA:
            break
        elif 0xD0 <= marker <= 0xD9 or marker <= 1:  # without a length
            at += 2
        else:
            end = at + 2 + (encoded[at + 2] << 8 | encoded[at + 3])
            if marker == 0xFE or 0xE0 < marker < 0xEE or marker == 0xEF:
                content = encoded[at + 4 : end]
                if marker == 0xE1 and not exif and content.startswith(b"Exif\0\0"):
                    exif = content
                elif marker == 0xE1 and not xmp and content.startswith(_XMP_JPEG):
                    xmp = content
                dropped.append((at, end))
            at = max(end, at + 4)
    return Bare(_without(encoded, dropped), _upright(exif, xmp))


def _without(encoded: bytes, dropped: list[tuple[int, int]]) -> bytes:
    if not dropped:
        return encoded
    starts = [0, *(end for _, end in dropped)]
    stops = [*(start for start, _ in dropped), len(encoded)]
    return b"".join(encoded[a:b] for a, b in zip(starts, stops, strict=True))


def _png(encoded: bytes) -> Bare:
    """Only the chunks without which there is no image, and transparency."""
    dropped: list[tuple[int, int]] = []
    exif = profile = xmp = b""
    at = len(_PNG)
    while at + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, at)
        end = at + 12 + length
        if kind[0] & 0x20 and kind != b"tRNS":
            content = encoded[at + 8 : end - 4]
            if kind == b"eXIf":
                exif = exif or content
            elif kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):
                profile = profile or _raw_profile(kind, content)
            elif kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0"):
                xmp = xmp or _itxt(content)
            dropped.append((at, min(end, len(encoded))))
        at = end
        if kind == b"IEND":
            break
    return Bare(_without(encoded, dropped), _upright(exif or profile, xmp))


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT)
    except zlib.error:
        return b""


def _raw_profile(kind: bytes, content: bytes) -> bytes:
    """A profile as ImageMagick writes it: name, length, and hexadecimal digits in lines."""
    text = content.split(b"\0", 1)[1]
    text = _inflate(text[1:]) if kind == b"zTXt" else text[:_MOST_TEXT]
    digits = b"".join(text.split()[2:])
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        return b""


def _itxt(content: bytes) -> bytes:
    """Keyword, whether and how it is compressed, language, translated keyword, text."""
    _, _, rest = content.partition(b"\0")
    text = rest[2:].split(b"\0", 2)[-1]
    return _inflate(text) if rest[:1] == b"\1" else text[:_MOST_TEXT]


def _gif(encoded: bytes) -> bytes:
    """The first frame; without comments and application data before it."""
    dropped: list[tuple[int, int]] = []
    size = len(encoded)
    if size < 13:
        return encoded
    at = 13 + (3 << (encoded[10] & 7) + 1 if encoded[10] & 0x80 else 0)
    while at + 2 < size and encoded[at] != 0x2C:
        start, label = at, encoded[at + 1]
        if encoded[at] != 0x21:
            at += 1
            continue
        at += 2
        while at < size and encoded[at]:
            at += 1 + encoded[at]
        at += 1
        if label != 0xF9:  # graphic control
            dropped.append((start, min(at, size)))
    return _without(encoded, dropped)


def _webp(encoded: bytes) -> Bare:
    """Pillow does not parse what it holds, so it stays."""
    exif = xmp = b""
    at = 12
    while at + 8 <= len(encoded):
        kind, length = struct.unpack_from("<4sI", encoded, at)
        if kind in (b"EXIF", b"XMP "):
            content = encoded[at + 8 : at + 8 + length]
            exif, xmp = (content, xmp) if kind == b"EXIF" else (exif, content)
        at += 8 + length + length % 2
    return Bare(encoded, _upright(exif, xmp))


# Tags without which the pixels of a TIFF file cannot be found or understood.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _OFFSETS, _SAMPLES, _ROWS = (
    *(0x100, 0x101, 0x102, 0x106, 0x111, 0x115, 0x116),
)
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _SAMPLE_FORMAT = 0x142, 0x143, 0x144, 0x153
_UNSIGNED = (1, 4)  # 4: undefined
_TIFF_TAGS = (
    {_WIDTH, _HEIGHT, _BITS, 0x103, _PHOTOMETRIC, 0x10A, _OFFSETS, _SAMPLES, _ROWS, 0x117, 0x11C}
    | {0x124, 0x125, 0x13D, 0x140, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, 0x145, 0x14C, 0x152}
    | {_SAMPLE_FORMAT, 0x15B, *range(0x200, 0x20A), *range(0x211, 0x215)}
)


def _tiff(encoded: bytes, max_pixels: int) -> Bare:
    found = tiff_tags.read(encoded)
    if found is None:
        return Bare(encoded)
    kept: dict[int, tiff_tags.Tag] = {}
    upright = None
    for tag in found.tags:
        if tag.number in _TIFF_TAGS:
            kept.setdefault(tag.number, tag)
        elif tag.number == tiff_tags.ORIENTATION:
            upright = upright or tag.value

    def value(number: int, default: int) -> int:
        held = kept[number].value if number in kept else None
        return default if held is None else held

    bits, kind = value(_BITS, 1), value(_SAMPLE_FORMAT, 1)
    if bits > 16 or kind not in _UNSIGNED:
        kinds = {2: "signed", 3: "floating-point", **dict.fromkeys(_UNSIGNED, "unsigned")}
        raise PixelError(
            f"a TIFF of {bits}-bit {kinds.get(kind, 'complex')} numbers, of which white is not "
            "known; save it with 8 or 16 unsigned bits"
        )
    _check_tiff(kept, value, len(encoded), max_pixels)
    entries = b"".join(tag.entry for tag in kept.values())
    # The offset of the next image is 0: there is none.
    directory = found.count.pack(len(kept)) + entries + bytes(found.inline)
    shorter = encoded[: found.at] + directory + encoded[found.at + len(directory) :]
    upright = upright if upright in range(1, 9) else 1
    inverted = value(_PHOTOMETRIC, 1) == 0
    return Bare(shorter, upright, (1 << bits) - 1 if bits > 8 else 0xFFFF, inverted)


def _check_tiff(
    kept: dict[int, tiff_tags.Tag], value: Callable[[int, int], int], size: int, max_pixels: int
) -> None:
    """Checks that parts do not overlap and that no tile or strip is beyond the image."""
    if sum(tag.size for tag in kept.values()) > size:
        raise PixelError("its tags have more bytes than the file")
    width, height = value(_WIDTH, 0), value(_HEIGHT, 0)
    tile = value(_TILE_WIDTH, 1), value(_TILE_HEIGHT, 1)
    if _TILE_OFFSETS in kept:
        if tile[0] * tile[1] > max(max_pixels, 1 << 20):
            raise PixelError(f"its tiles have {tile[0]} x {tile[1]} pixels")
        expected = -(-width // max(tile[0], 1)) * -(-height // max(tile[1], 1))
    else:
        rows = min(max(value(_ROWS, height), 1), max(height, 1))
        expected = -(-height // rows)
    listed = kept.get(_TILE_OFFSETS, kept.get(_OFFSETS))
    if listed is not None and listed.count > expected * max(value(_SAMPLES, 1), 1):
        raise PixelError(f"it has {listed.count} strips or tiles where {expected} make the image")
