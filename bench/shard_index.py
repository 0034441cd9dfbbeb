"""Throughput of indexing tar shards: ``python -m bench.shard_index``.

Images per second of one core, by processor time, which other load on the machine changes little:
the median over shards of small images with a label each, as WebDataset writes them.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

from train.data.shards import _index

from .machine import machine

IMAGES = 10_000
REPEATS = 7
IMAGE = bytes(5_000)  # contents are not read


def write_shard(path: Path, images: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(images):
            for ending, content in (("jpg", IMAGE), ("cls", b"7")):
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def measure(images: int, repeats: int) -> list[float]:
    """Images per second of each repeat."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        write_shard(path, images)
        for _ in range(repeats):
            start = time.process_time()
            _index(str(path))
            found.append(images / (time.process_time() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    speeds = measure(given.images, given.repeats)
    print(
        f"{statistics.median(speeds):,.0f} images/s of one core "
        f"({min(speeds):,.0f} to {max(speeds):,.0f}; {machine()['processor']}, "
        f"Python {platform.python_version()})"
    )


if __name__ == "__main__":
    main()
