"""``python -m unitsface_kernels.partial_fc.export CHECKPOINT FILE``."""

from __future__ import annotations

import argparse
import sys

from .class_weights import export_class_weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m unitsface_kernels.partial_fc.export",
        description="Write the class matrix of a sharded checkpoint as a safetensors file.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder of save_checkpoint, or of a run"
    )
    parser.add_argument("file", metavar="FILE", help="safetensors file to write")
    arguments = parser.parse_args(argv)
    try:
        export_class_weights(arguments.checkpoint, arguments.file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
