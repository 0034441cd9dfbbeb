"""Files of face benchmarks in their original layout, made of small images."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train.data.orl import scan_orl


def orl_images(people: range, images: int, size: int = 112) -> dict[str, list[Image.Image]]:
    """The first images of each of these ORL people."""
    listed = scan_orl()
    chosen: dict[str, list[Image.Image]] = {}
    for person in people:
        rows = np.flatnonzero(listed.labels == person)[:images]
        chosen[listed.identities[person]] = [
            Image.open(io.BytesIO(listed.read(i))).convert("RGB").resize((size, size))
            for i in rows.tolist()
        ]
    return chosen


def jpeg(image: Image.Image) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG")
    return encoded.getvalue()


def orl_pairs(pairs: int = 20) -> tuple[list[bytes], list[bool]]:
    """Ten folds of a positive and a negative pair each, like lfw.bin's of 300."""
    people = list(orl_images(range(10), 3, size=16).values())
    images: list[bytes] = []
    same: list[bool] = []
    for p in range(pairs):
        first, second = people[p // 2 % 10], people[(p // 2 + 1) % 10]
        images += [jpeg(first[0]), jpeg(first[1 + p // 20 % 2] if p % 2 == 0 else second[0])]
        same.append(p % 2 == 0)
    return images, same


def python2_bin(images: list[bytes], same: list[bool]) -> bytes:
    """``pickle.dumps((images, same), 2)`` of Python 2, whose byte strings are its ``str``."""
    out = [b"\x80\x02", b"]q\x00("]
    for i, image in enumerate(images):
        header = b"T" + struct.pack("<i", len(image))
        if len(image) < 256:
            header = b"U" + bytes([len(image)])
        out += [header, image, b"r" + struct.pack("<I", i + 1)]
    flags = b"".join(b"\x88" if flag else b"\x89" for flag in same)
    return b"".join([*out, b"e]q\xfb(", flags, b"e\x86q\xfc."])


def python2_text_bin(images: list[bytes], same: list[bool]) -> bytes:
    """The same in protocol 0, its default: text, a put after every object."""
    out = [b"((lp0\n"]
    for i, image in enumerate(images):
        out.append(b"S" + repr(image)[1:].encode() + b"\np%d\na" % (i + 1))
    flags = b"".join(b"I01\na" if flag else b"I00\na" for flag in same)
    return b"".join([*out, b"(lp9998\n", flags, b"tp9999\n."])


def array_bin(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """Images as ``np.fromfile(path, np.uint8)``, flags as numpy's."""
    arrays = [np.frombuffer(image, np.uint8) for image in images]
    return pickle.dumps((arrays, [np.bool_(flag) for flag in same]), protocol)


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_ijb(
    folder: Path,
    images: dict[str, Image.Image],
    rows: list[tuple[str, int, int]],
    landmarks: np.ndarray,
    pairs: list[tuple[int, int, int]],
    tables: dict[str, list[tuple[int, int, str]]],
    scores: np.ndarray | None = None,
) -> tuple[Path, Path]:
    """Meta files and loosely cropped images of IJB-C, as insightface and NIST write them.

    ``rows`` are (image, template, medium); ``tables`` (template, subject, image) by file.
    """
    meta, crops = folder / "meta", folder / "loose_crop"
    crops.mkdir(parents=True)
    for name, image in images.items():
        image.save(crops / name)
    weights = np.ones(len(rows)) if scores is None else scores
    write_lines(meta / "ijbc_face_tid_mid.txt", [f"{n} {t} {m}" for n, t, m in rows])
    write_lines(
        meta / "ijbc_name_5pts_score.txt",
        [
            f"{name} {' '.join(f'{x:.6f}' for x in points.ravel())} {weight:.6f}"
            for (name, _, _), points, weight in zip(rows, landmarks, weights, strict=True)
        ],
    )
    write_lines(meta / "ijbc_template_pair_label.txt", [f"{a} {b} {s}" for a, b, s in pairs])
    for name, entries in tables.items():
        header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT"
        lines = [f"{t},{s},img/{file},{i},1,2,30,40" for i, (t, s, file) in enumerate(entries)]
        write_lines(meta / f"ijbc_1N_{name}.csv", [header, *lines])
    return meta, crops


def write_megaface(
    folder: Path, probes: dict[str, list[Image.Image]], distractors: dict[str, list[Image.Image]]
) -> dict[str, Path]:
    """Images, lists and noises as in insightface's test pack, lists also as the devkit's."""
    files: dict[str, list[str]] = {"facescrub": [], "megaface": []}
    for kind, people, parent in (
        ("facescrub", probes, ""),
        ("megaface", distractors, "100/"),
    ):
        for person, images in people.items():
            for i, image in enumerate(images):
                name = f"{parent}{person}/{person}_{i}.png"
                (folder / f"{kind}_images" / name).parent.mkdir(parents=True, exist_ok=True)
                image.save(folder / f"{kind}_images" / name)
                files[kind].append(name)
    devkit = folder / "facescrub_features_list.json"
    ids = [name.split("/")[0] for name in files["facescrub"]]
    devkit.write_text(json.dumps({"id": ids, "path": files["facescrub"]}))
    (folder / "megaface_features_list.json_300_1").write_text(
        json.dumps({"path": files["megaface"]})
    )
    return {
        "probes": folder / "facescrub_images",
        "gallery": folder / "megaface_images",
        "probe_list": write_lines(folder / "facescrub_lst", files["facescrub"]),
        "gallery_list": write_lines(folder / "megaface_lst", files["megaface"]),
        "probe_json": devkit,
        "gallery_json": folder / "megaface_features_list.json_300_1",
    }
