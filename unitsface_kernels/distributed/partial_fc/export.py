"""``python -m unitsface_kernels.partial_fc.export CHECKPOINT FILE``."""

from __future__ import annotations

import argparse
import sys
import zipfile

import numpy as np
import torch

from ...subcenters import Dominant
from .class_weights import dominant_centers, export_class_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unitsface_kernels.partial_fc.export",
        description="Write the class matrix of a sharded checkpoint as a safetensors file.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of save_checkpoint, or of a run"
    )
    parser.add_argument("file", metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--dominant",
        metavar="SAMPLES",
        help="keep of several centers per class the one that is nearest to most of its samples; "
        ".npz file of the training set's features by the trained network, feats (N, D), and "
        "labels (N,). FILE then has the kept centers, which samples are near theirs, and cosines",
    )
    parser.add_argument(
        "--angle",
        type=float,
        default=75.0,
        help="degrees from which a sample is too far from its class's center (75)",
    )
    arguments = parser.parse_args(argv)
    try:
        dominant = None
        if arguments.dominant is not None:
            dominant = _dominant(arguments.checkpoint, arguments.dominant, arguments.angle)
        export_class_weights(arguments.checkpoint, arguments.file, dominant)
    except (OSError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _dominant(checkpoint: str, samples: str, angle: float) -> Dominant:
    try:
        with np.load(samples, allow_pickle=False) as arrays:
            feats, labels = (torch.from_numpy(arrays[name]) for name in ("feats", "labels"))
    except (KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{samples} is no .npz file of feats and labels: {error}") from error
    found = dominant_centers(checkpoint, feats, labels, angle)
    print(f"{int(found.kept.sum())} of {len(found.kept)} samples are within {angle:g} degrees")
    return found


if __name__ == "__main__":
    sys.exit(main())
