"""``python -m bench.gpu_model.scopes``: compiles what the tests look at, and records it.

Kernels that the record has are not compiled again, except with ``--all``.
"""

from __future__ import annotations

import sys

from . import record
from .chips import CHIPS
from .steps import KERNELS
from .tritons import Triton, tritons, unpacked
from .worker import EVERY, MODEL, RECORDED, VARIANTS, Results, run_each

#: What the tests compile: the named workloads for Hopper by the Triton of most servers; by it also
#: every variant for all architectures, of every loss for Hopper, and by the others those in
#: bfloat16 for Hopper; everything by all.
SCOPES = ("workloads", "servers", "all")
#: The step whose time is predicted as well.
STEP = "class-100k"


def tasks(scope: str) -> dict[tuple[Triton, int], list[str]]:
    """Tasks of the workers, by Triton and architecture."""
    workloads = [MODEL + name if name == STEP else name for name in KERNELS]
    # That of most servers is the last.
    *others, servers = tritons(unpacked())
    if scope == "workloads":
        return {(servers, 90): workloads}
    everything = [*workloads, f"{VARIANTS}:{EVERY}"]
    if scope == "all":
        return {(one, chip): everything for one in (servers, *others) for chip in CHIPS}
    found = {(servers, chip): [*workloads, VARIANTS] for chip in CHIPS}
    found[servers, 90] = everything
    return found | {(other, 90): [*workloads, f"{VARIANTS}:bfloat16"] for other in others}


def run(scope: str, *options: str) -> Results:
    return run_each([(work, *place) for place, work in tasks(scope).items()], *options)


if __name__ == "__main__":
    record.save(run("servers", *([] if "--all" in sys.argv else [RECORDED])).kernels)
