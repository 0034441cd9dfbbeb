"""Runs the first snippet of README.md with the installed package, on its compiled kernels.

usage: first_snippet.py README.md
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

import unitsface_kernels
from unitsface_kernels.backends.native import loader


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    if not snippets:
        sys.exit("no snippet found")
    torch.manual_seed(0)
    found = []
    # The kernels that the wheel brings, and the same formula in Torch operations.
    for backend in ("native", "reference"):
        names = {
            "feats": torch.randn(64, 32, generator=torch.Generator().manual_seed(0)),
            "labels": torch.arange(64) % 8,
            "b": torch.zeros((), requires_grad=True),
        }
        names["feats"].requires_grad_()
        os.environ["UNITSFACE_BACKEND"] = backend
        exec(snippets[0], names)
        found.append((names["loss"].detach(), names["feats"].grad, names["b"].grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    print(
        f"unitsface_kernels {unitsface_kernels.__version__}, Python {sys.version.split()[0]}, "
        f"Torch {torch.__version__}, {loader.extension().cpu.isa()}: loss {found[0][0].item():.6f}"
    )


if __name__ == "__main__":
    main()
