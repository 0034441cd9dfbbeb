"""``python -m bench.gpu_check.build``: the extension, for the architecture of the device alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .files import write_json

_CAPABILITY = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
_PIP = ("-m", "pip", "--disable-pip-version-check")
_INSTALL = (*_PIP, "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", ".")
_IN_PLACE = ("setup.py", "--quiet", "build_ext", "--inplace")
#: What is tried until one succeeds, and whether CUDA kernels are required. The later stages run in
#: the checkout, where an extension compiled in place suffices; Triton needs no compiled kernels.
ATTEMPTS = (("install", _INSTALL, "ON"), ("in place", _IN_PLACE, "ON"), ("CPU", _IN_PLACE, "OFF"))


def architecture() -> str | None:
    """Compute capability of the first device, such as "90"; None: Torch finds none."""
    done = subprocess.run([sys.executable, "-c", _CAPABILITY], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, end="", flush=True)
        return None
    return done.stdout.strip()


def install(wheels: Path) -> list[str]:
    """Installs wheels one by one, so that one that is incompatible does not block the others."""
    refused = []
    for wheel in sorted(wheels.glob("*.whl")):
        command = [sys.executable, *_PIP, "install", "--quiet", "--no-index", "--no-deps"]
        if subprocess.run([*command, str(wheel)]).returncode:
            print(f"not installed: {wheel.name}", flush=True)
            refused.append(wheel.name)
    return refused


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.build")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args(arguments)
    report: dict[str, Any] = {"attempts": []}
    if given.wheels is not None:
        report["refused_wheels"] = install(given.wheels)
    report["architecture"] = architecture()
    found = {"UNITSFACE_CUDA_ARCHS": report["architecture"]} if report["architecture"] else {}
    for name, attempt, cuda in ATTEMPTS:
        environment = {**os.environ, **found, "UNITSFACE_CUDA": cuda}
        print(f"$ UNITSFACE_CUDA={cuda} {found or ''} {' '.join(attempt)}", flush=True)
        start = time.monotonic()
        status = subprocess.run([sys.executable, *attempt], env=environment).returncode
        seconds = time.monotonic() - start
        report["attempts"].append({"name": name, "status": status, "seconds": seconds})
        write_json(given.out, report)
        if status == 0:
            break
    # The package's own report: backends, and why one is missing.
    says = subprocess.run([sys.executable, "-m", "unitsface_kernels"])
    succeeded = report["attempts"][-1]["status"] == 0 and says.returncode == 0
    # Without the CUDA kernels the build has failed, even if the others are there.
    return 0 if succeeded and cuda == "ON" else 1


if __name__ == "__main__":
    sys.exit(main())
