"""``python -m bench.predict``: the tables of docs/scaling.md and docs/training.md.

They come from formulas and stored results.

``--check`` fails if the pages' tables are others.
"""

from __future__ import annotations

import sys
from pathlib import Path

from . import predict_training, report
from .cost import Machine, Step

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADS = Path(__file__).resolve().parent / "results" / "heads.json"

# Assumed: data sheets for capacity, memory and links; half of the dense bfloat16 peak for our
# GEMMs, three tenths for a backbone's convolutions.
PEAK = 989e12
GEMM_FRACTION, BACKBONE_FRACTION = 0.5, 0.3
NVLINK, NODE_NICS = 450e9, 400e9
LATENCY = 20e-6
GPUS = {"80 GB": (80e9, 3.35e12), "141 GB": (141e9, 4.8e12)}
RANKS = (1, 8, 64, 512)
IMAGES = 128
# IResNet-100: counted operations of a forward pass of one image, parameters; memory assumed.
FORWARD, PARAMETERS, BACKBONE_BYTES = 2 * 12.1e9, 65.2e6, 24e9
# insightface's table, 8 GPUs (V100), sample rate 0.1: identities, images/s, memory in MB.
PUBLISHED = ((1_000_000, 4803, 5620), (8_000_000, 3565, 12310), (29_000_000, 1855, 32324))


def gpu(name: str, ranks: int) -> Machine:
    capacity, memory = GPUS[name]
    link = NVLINK if ranks <= 8 else NODE_NICS
    return Machine(name, GEMM_FRACTION * PEAK, memory, link, LATENCY, capacity)


def millions(count: float) -> str:
    return f"{count / 1e6:,.0f} M" if count < 1e9 else f"{count / 1e9:.2f} G"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def largest() -> str:
    kinds = {
        "fused": {"mode": "fused"},
        "with a gradient": {"mode": "separate"},
        "with a gradient, rate 0.1": {"mode": "separate", "sample_rate": 0.1},
        "fused AdamW": {"mode": "fused", "states": 2},
    }
    rows = []
    for name in GPUS:
        for ranks in RANKS:
            cells = [
                millions(
                    gpu(name, ranks).largest(Step(ranks, IMAGES, 1, **options), BACKBONE_BYTES)
                )
                for options in kinds.values()
            ]
            rows.append([name, str(ranks), *cells])
    return table(["GPU", "GPUs", *kinds], rows)


def steps() -> str:
    rows = []
    backbone = 3 * FORWARD * IMAGES / (BACKBONE_FRACTION * PEAK)
    for classes in (1_000_000, 10_000_000, 100_000_000):
        for rate in (1.0, 0.1):
            for ranks in RANKS:
                step = Step(ranks, IMAGES, classes, sample_rate=rate)
                machine = gpu("141 GB", ranks)
                if classes > machine.largest(step, BACKBONE_BYTES):
                    continue
                compute, exchange = machine.compute_seconds(step), machine.exchange_seconds(step)
                averaging = 2 * (ranks - 1) / ranks * PARAMETERS * 4 / machine.link
                total = max(backbone, averaging) + compute + exchange
                rows.append(
                    [
                        millions(classes),
                        f"{rate:g}",
                        str(ranks),
                        f"{1e3 * compute:.1f}",
                        f"{1e3 * exchange:.2f}",
                        f"{1e3 * backbone:.0f}",
                        f"{step.all_rows / total:,.0f}",
                        f"{step.held() / 1e9:.1f}",
                    ]
                )
    header = ["C", "rate", "GPUs", "head ms", "exchange ms", "backbone ms", "images/s", "head GB"]
    return table(header, rows)


def published() -> str:
    rows = []
    first = PUBLISHED[0]
    for classes, speed, megabytes in PUBLISHED:
        step = Step(8, 64, classes, sample_rate=0.1)
        separate = Step(8, 64, classes, sample_rate=0.1, mode="separate")
        shards = (classes - first[0]) / 8 * 512 * 4 / 2**20
        slope = f"{(megabytes - first[2]) / shards:.1f} W" if shards else ""
        rows.append(
            [
                millions(classes),
                f"{speed} images/s",
                f"{megabytes} MB",
                slope,
                f"{step.held() / 2**20:,.0f} MB",
                f"{separate.held() / 2**20:,.0f} MB",
            ]
        )
    header = ["identities", "published speed", "published memory", "its slope"]
    return table([*header, "our head, fused", "our head, with a gradient"], rows)


def simulated() -> str:
    results = report.load(HEADS)
    if results is None:
        return "No run has been stored.\n"
    rows = []
    for name, head in results["heads"].items():
        machine = Machine("this", 1e9 * head["gemm_gflops"], 1e9 * head["copy_gb_s"])
        for implementation, row in head["implementations"].items():
            mode = implementation
            if implementation == "eager" or "failed" in row:
                continue
            if implementation == "separate" and head["rows"] > head["size"]:
                mode = "separate, N > D"
            # One rank: its rows are those of all ranks.
            step = Step(
                1, head["rows"], head["classes"], head["size"], head["sample_rate"], mode, 4
            )
            predicted, measured = machine.compute_seconds(step), row["median_s"]
            rows.append(
                [
                    f"`{name}`",
                    implementation,
                    report.seconds(predicted),
                    report.seconds(measured),
                    f"{measured / predicted:.2f}",
                    f"{step.held() / 2**20:,.0f} MB",
                    f"{row['peak_mb']:,.0f} MB",
                ]
            )
    header = ["head", "step", "predicted", "measured", "ratio", "predicted", "measured"]
    return table(header, rows)


def training() -> str:
    name = "141 GB"
    found = predict_training.rows(
        lambda ranks: gpu(name, ranks), BACKBONE_FRACTION * PEAK, GPUS[name][0]
    )
    return table(predict_training.HEADER, found)


TABLES = {
    "scaling.md": {
        "largest": largest,
        "steps": steps,
        "published": published,
        "simulated": simulated,
    },
    "training.md": {"training": training},
}


def page(name: str, text: str) -> str:
    """The page with its tables as they are now."""
    for marker, make in TABLES[name].items():
        text = report.updated(text, marker, make())
    return text


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for name in TABLES:
        path = DOCS / name
        text = path.read_text()
        if page(name, text) == text:
            continue
        if "--check" in argv:
            raise SystemExit(f"{name}: run python -m bench.predict")
        path.write_text(page(name, text))


if __name__ == "__main__":
    main()
