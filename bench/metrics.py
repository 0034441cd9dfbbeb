"""``python -m bench.metrics``: throughput and peak memory of the metrics over all pairs.

The roofline is the rate of an (1024, D) x (D, 1024) GEMM in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

import torch

from unitsface_kernels import metrics

from .machine import gemm_seconds, machine, reset_peak, status_kb

PER_IDENTITY = 10
IMPLEMENTATIONS = {
    "pair_histogram": lambda feats, labels: metrics.pair_histogram(feats, labels),
    "tar_at_far": lambda feats, labels: metrics.tar_at_far(feats, labels),
    "best_threshold": lambda feats, labels: metrics.best_threshold(feats, labels),
    "identity_thresholds": lambda feats, labels: metrics.identity_thresholds(feats, labels),
}


def features(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clusters as of a trained model: positive cosines about 0.5, negative ones about 0."""
    torch.manual_seed(0)
    labels = torch.arange(rows) // PER_IDENTITY
    feats = torch.randn(rows // PER_IDENTITY + 1, size)[labels]
    return feats.add_(torch.randn(rows, size)), labels


def measure(name: str, feats: torch.Tensor, labels: torch.Tensor, repeats: int) -> dict:
    """Seconds, throughput and roofline fraction over all unordered pairs, and peak memory."""
    run = IMPLEMENTATIONS[name]
    run(feats[:64], labels[:64])  # libraries, thread pools
    rows, size = feats.shape
    pairs = rows * (rows - 1) // 2
    gc.collect()
    reset_peak()
    before = status_kb("VmRSS")
    times, limits = [], []
    for _ in range(repeats):
        limits.append(gemm_seconds(size, 2.0 * pairs * size))
        start = time.perf_counter()
        run(feats, labels)
        times.append(time.perf_counter() - start)
    seconds, limit = statistics.median(times), statistics.median(limits)
    return {
        "seconds": seconds,
        "spread_s": [min(times), max(times)],
        "pairs_per_s": pairs / seconds,
        "tflops": 2.0 * pairs * size / seconds / 1e12,
        "gemm_gflops": 2.0 * pairs * size / limit / 1e9,
        "roofline_fraction": limit / seconds,
        "peak_mb_above_features": (status_kb("VmHWM") - before) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.metrics", description=__doc__)
    parser.add_argument(
        "implementations", nargs="*", help=f"default: all of {', '.join(IMPLEMENTATIONS)}"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="N")
    parser.add_argument("--size", type=int, default=512, help="D")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    unknown = set(arguments.implementations) - set(IMPLEMENTATIONS)
    if unknown:
        parser.error(f"unknown metric {', '.join(sorted(unknown))}")
    feats, labels = features(arguments.rows, arguments.size)
    print(json.dumps({"machine": machine(), "rows": arguments.rows, "size": arguments.size}))
    for name in arguments.implementations or IMPLEMENTATIONS:
        result = measure(name, feats, labels, arguments.repeats)
        print(json.dumps({"metric": name, **result}), flush=True)


if __name__ == "__main__":
    main()
