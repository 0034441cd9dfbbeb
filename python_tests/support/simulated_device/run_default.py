"""``bench/gpu_check.sh`` with its default stages and ten times their limits.

The limits are for a machine with 16 cores and a device, not for one that simulates it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from bench.gpu_check import __main__ as driver
from bench.gpu_check.stages import Options, Stage

FACTOR = 10
stages = driver.stages


def slow(options: Options) -> tuple[Stage, ...]:
    return tuple(
        replace(stage, commands=tuple(replace(c, limit=FACTOR * c.limit) for c in stage.commands))
        for stage in stages(options)
    )


driver.stages = slow
sys.exit(driver.main([*sys.argv[1:], "--budget", str(FACTOR * driver.BUDGET)]))
