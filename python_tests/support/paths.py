"""Errors over limits on every way this processor can compute: ``make test-paths``.

Libraries choose instructions, and so orders of adding, by processor and vendor. Environment
variables choose others: each row of the table is a process that evaluates all parity problems in
float32. Limits are computed once, in float64. The exit status is 1 if a limit is passed.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import conftest  # noqa: F401  (what has to precede Torch)
import torch
from support.cases import Problem, build
from support.evaluation import expected
from support.grid import parity_cases
from support.helpers import FUSED, Target
from support.tolerances import FACTOR, TINY

INTEL = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"
PATHS = [
    {},
    *({"ATEN_CPU_CAPABILITY": name} for name in ("default", "avx2", "avx512")),
    *({"MKL_ENABLE_INSTRUCTIONS": name} for name in ("SSE4_2", "AVX2", "AVX512")),
    *({"MKL_CBWR": name} for name in ("COMPATIBLE", "AVX2", "AVX512")),
    *({"ONEDNN_MAX_CPU_ISA": name} for name in ("SSE41", "AVX2")),
    *({"UNITSFACE_CPU_ISA": name} for name in ("baseline", "avx2", "avx512")),
    *({"UNITSFACE_CPU_GEMM": name} for name in ("own", "library")),
    *({"LD_PRELOAD": "intel", "MKL_ENABLE_INSTRUCTIONS": n} for n in ("SSE4_2", "AVX2", "AVX512")),
    *({"OMP_NUM_THREADS": n} for n in "12"),
]


def problems() -> list[tuple[str, Problem]]:
    found = [(n, build(c, s, v)) for n, s, v, c in parity_cases() if not c.heavy]
    return [(name, p) for name, p in found if p.rows.numel()]


def worst(limits: Path) -> tuple[float, str]:
    """The largest error over its limit, and where."""
    found = (0.0, "")
    stored = pickle.loads(limits.read_bytes())
    backends = ["reference", *(t.backend for t in FUSED if not t.interpreted)]
    for (name, p), spreads in zip(problems(), stored, strict=True):
        for backend in backends:
            loss, gradients = p.evaluate(backend)
            for key, got in {"loss": loss, **gradients}.items():
                want, norm, element = spreads[key]
                if want.numel():
                    off = got.double() - want
                    pairs = ((off.norm(), norm), (off.abs().max(), element))
                    ratio = max(float(a) / (FACTOR * b + TINY) for a, b in pairs)
                    found = max(found, (ratio, f"{backend} {name} {key}"))
    return found


def main() -> int:
    if len(sys.argv) > 1:
        ratio, where = worst(Path(sys.argv[1]))
        print(f"{ratio:.2f} {where}")
        return 0
    torch.set_num_threads(1)  # for the limits; the processes choose
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        limits, library = Path(folder) / "limits", Path(folder) / "intel.so"
        of_all = [expected(Target("reference", "cpu"), p, torch.float32) for _, p in problems()]
        plain = [{n: (s.want, s.norm, s.element) for n, s in of.items()} for of in of_all]
        limits.write_bytes(pickle.dumps(plain))
        compiler = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(library)]
        subprocess.run(compiler, input=INTEL, text=True, check=True)
        for path in PATHS:
            more = {**path, "LD_PRELOAD": str(library)} if "LD_PRELOAD" in path else path
            done = subprocess.run(
                [sys.executable, __file__, str(limits)],
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **more},
                capture_output=True,
                text=True,
                check=False,
            )
            line = done.stdout.strip() or done.stderr.strip()[-200:]
            failed |= done.returncode != 0 or not float(line.split()[0]) <= 1
            name = " ".join("=".join(item) for item in path.items()) or "default"
            print(f"{name:50} {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
