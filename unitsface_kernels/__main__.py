"""``python -m unitsface_kernels``: versions, what was built, what is usable here and why not."""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__, dispatch
from .backends.native import custom, images, loader
from .losses import REGISTRY


def _module_version(name: str) -> str:
    try:
        return str(__import__(name).__version__)
    except ImportError as error:
        return f"not importable ({error})"


def _extension_lines() -> list[str]:
    reason = loader.failure()
    if reason is not None:
        return [f"extension   not usable: {reason}"]
    native = loader.extension()
    lines = [
        f"CPU kernels built for {', '.join(native.cpu.compiled_isas())}; "
        f"this processor runs {native.cpu.isa()}"
    ]
    if loader.has_cuda():
        lines.append(f"CUDA kernels built: {images.described(native.cuda.compiled_archs())}")
    else:
        lines.append(f"CUDA kernels not built: {loader.cuda_failure()}")
    return [*lines, f"CPU kernels of users' losses: {custom.description(native)}"]


def report() -> str:
    """The text that ``python -m unitsface_kernels`` prints."""
    lines = [
        f"unitsface_kernels {__version__}",
        f"Python {platform.python_version()}, Torch {torch.__version__}, "
        f"CUDA of Torch {torch.version.cuda}, Triton {_module_version('triton')}",
        *_extension_lines(),
        f"losses: {', '.join(REGISTRY)}",
        "",
    ]
    for device in ("cpu", "cuda"):
        preferred = dispatch.available(device)[0] if _usable(device) else "no device"
        lines.append(f"{device} tensors (auto: {preferred})")
        for name in dispatch.BACKENDS:
            reason = dispatch.unavailable(name, device, torch.float32)
            if not _usable(device):
                reason = "; ".join(filter(None, ("Torch finds no CUDA device", reason)))
            lines.append(f"  {name:<10} {'available' if reason is None else 'no: ' + reason}")
    return "\n".join(lines)


def _usable(device: str) -> bool:
    return device == "cpu" or torch.cuda.is_available()


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
