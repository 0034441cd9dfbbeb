"""``python -m bench.decode``: images/s that one core reads and decodes, and the need of a GPU.

The same JPEG files as RecordIO, as shards and as a folder; in one process, and through the loader
with worker processes as in training.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image, features

from train.data.dataset import scan
from train.data.image_list import ImageList
from train.data.loader import open_images
from train.data.orl import CREDIT, scan_orl

from . import harness, machine
from .packing import People, write_recordio, write_shards
from .predict import BACKBONE_FRACTION

RESULTS = Path(__file__).resolve().parent / "results"
SIZE, QUALITY, BATCH = 112, 95, 128
PER_SHARD = 1000
MOST_BATCHES = 20_000
ROUNDS = 5

# Assumed: multiplications and additions of IResNet-50's forward pass at 112 x 112 (insightface's
# table: 6.3 billion of both together), three times that with the backward pass, the same fraction
# of the dense bfloat16 peak as in bench.predict, and the peaks of data sheets.
FORWARD = 2 * 6.3e9
PEAKS = {"A100": 312e12, "H100": 989e12}


def make_faces(count: int) -> People:
    """Crops of ORL's photographs, no two alike, as insightface stores faces.

    They are gray: the second and third channels are moved by a pixel each, or there would be no
    color to decode.
    """
    orl = scan_orl()
    rng = np.random.default_rng(0)
    people: list[list[bytes]] = [[] for _ in orl.identities]
    for i in range(count):
        row = i % len(orl)
        with Image.open(io.BytesIO(orl.read(row))) as face:
            side = int(rng.integers(80, 91))
            left, top = rng.integers(0, [face.width - side + 1, face.height - side + 1])
            box = (int(left), int(top), int(left) + side, int(top) + side)
            gray = np.asarray(face.resize((SIZE + 2, SIZE), Image.Resampling.BICUBIC, box))
        color = np.stack([gray[:, shift : shift + SIZE] for shift in range(3)], axis=2)
        file = io.BytesIO()
        Image.fromarray(color).save(file, "JPEG", quality=QUALITY)
        people[orl.labels[row]].append(file.getvalue())
    return [images for images in people if images]


def write_folder(folder: Path, people: People) -> Path:
    for identity, images in enumerate(people):
        (folder / str(identity)).mkdir(parents=True)
        for i, image in enumerate(images):
            (folder / str(identity) / f"{i}.jpg").write_bytes(image)
    return folder


STORAGES: dict[str, Callable[[Path, People], Path]] = {
    "RecordIO": write_recordio,
    "shards": lambda folder, people: write_shards(folder, people, per_shard=PER_SHARD),
    "folder": write_folder,
}


def _batches(images: ImageList, workers: int) -> Iterator[int]:
    """The sizes of shuffled batches, of an epoch longer than any measurement."""
    source = open_images(images, SIZE, on_error="fail", cache="never", workers=workers)
    rows = np.random.default_rng(0).integers(len(images), size=(MOST_BATCHES, BATCH))
    return (len(pixels) for pixels, _ in source.batches(rows))


def rates(images: ImageList, workers: int, seconds: float) -> tuple[list[float], list[float]]:
    """Images/s of some rounds: by the clock, and by this process's own time."""
    batches = _batches(images, workers)
    for _ in range(1 + 2 * workers):  # until the workers have started and their queues are drained
        next(batches)
    clock, own = [], []
    for _ in range(ROUNDS):
        start, start_own, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            done += next(batches)
        clock.append(done / (time.perf_counter() - start))
        own.append(done / (time.process_time() - start_own))
    return clock, own


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def measure(folder: Path, people: People, workers: list[int], seconds: float) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name, write in STORAGES.items():
        harness.say(name)
        path = write(folder / name, people)
        start = time.perf_counter()
        images = scan(str(path))
        scanned = time.perf_counter() - start
        clock, own = rates(images, 0, seconds)
        found[name] = {
            "scan_images_per_s": len(images) / scanned,
            "one_process": _summary(clock),
            "per_core_second": _summary(own),
            "workers": {str(w): _summary(rates(images, w, seconds)[0]) for w in workers},
        }
    return found


def needs(per_core: float) -> list[dict[str, float | str]]:
    """Predicted, not measured: images/s of one GPU, and the cores that decode as many."""
    rows: list[dict[str, float | str]] = []
    for gpu, peak in PEAKS.items():
        images_per_s = BACKBONE_FRACTION * peak / (3 * FORWARD)
        rows.append({"gpu": gpu, "images_per_s": images_per_s, "cores": images_per_s / per_core})
    return rows


def page(results: dict) -> str:
    workers = list(next(iter(results["storages"].values()))["workers"])
    lines = [
        "# Reading and decoding",
        "",
        f"{results['images']} JPEG images of {SIZE} x {SIZE}, quality {QUALITY}, "
        f"{results['mean_bytes']:.0f} bytes on average, made from the ORL faces; the files are in",
        "the system's cache. Images/s: medians, with quartiles in brackets. `per core` is by the",
        "processor time of one process, the others by the clock.",
        "",
        f"`{results['command']}`. "
        + ", ".join(f"{key} {value}" for key, value in results["machine"].items()),
        "",
        "| storage | per core | one process | "
        + " | ".join(f"{w} worker{'s' * (w != '1')}" for w in workers)
        + " | listed at the start |",
        "|---" * (len(workers) + 4) + "|",
    ]
    for name, row in results["storages"].items():
        columns = [row["per_core_second"], row["one_process"], *row["workers"].values()]
        cells = [f"{c['median']:,.0f} ({c['low']:,.0f}-{c['high']:,.0f})" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['scan_images_per_s']:,.0f}/s |")
    lines += [
        "",
        "Predicted, not measured: the images/s of one GPU that trains IResNet-50, at "
        f"{FORWARD / 2e9:.1f} billion multiplications and additions",
        f"forward, three times that in all, and {BACKBONE_FRACTION:.0%} of the data sheet's dense "
        "bfloat16 rate; and the cores of this kind",
        "that decode as fast from RecordIO.",
        "",
        "| GPU | images/s | cores |",
        "|---|---|---|",
    ]
    lines += [
        f"| {r['gpu']} | {r['images_per_s']:,.0f} | {r['cores']:.1f} |" for r in results["needs"]
    ]
    return "\n".join([*lines, "", CREDIT]) + "\n"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    cores = os.cpu_count() or 1
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, 2, cores}))
    parser.add_argument("--out", type=Path, default=RESULTS / "decode", help="without suffix")
    arguments = parser.parse_args(argv)
    people = make_faces(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        storages = measure(Path(folder), people, arguments.workers, arguments.seconds)
    facts = machine.machine()
    facts["pillow"] = metadata.version("pillow")
    facts["libjpeg_turbo"] = features.version_feature("libjpeg_turbo")
    sizes = [len(image) for images in people for image in images]
    results = {
        "command": shlex.join(["python", "-m", "bench.decode", *argv]),
        "machine": facts,
        "images": len(sizes),
        "mean_bytes": statistics.fmean(sizes),
        "storages": storages,
        "needs": needs(storages["RecordIO"]["per_core_second"]["median"]),
    }
    path = arguments.out
    path.with_name(path.name + ".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_name(path.name + ".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
