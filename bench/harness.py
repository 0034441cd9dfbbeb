"""Interleaved rounds of every implementation of a workload, and their summary."""

from __future__ import annotations

import statistics
import sys
import time

import torch

from . import accuracy
from .implementations import OURS, PRIMARY, implementations
from .machine import available_bytes, copy_rate, gemm_rate, has_bfloat16_gemm
from .session import ImplementationFailedError, start
from .workloads import Workload

LEAST_ROUNDS = 3
# Fractions of the free memory beyond which an implementation is not run; fused ones are
# predicted better.
MEMORY_LIMIT, OUR_MEMORY_LIMIT = 0.6, 0.9
RATES_EVERY_S = 1.0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def misfit(workload: Workload, name: str, device: str, beside: int = 0) -> str | None:
    """Reason not to run an implementation: the bytes that it would need; None if they are free.

    Args:
        beside: number of other implementations whose inputs are in memory at the same time.
    """
    implementation = implementations(workload, device)[name]
    width = torch.finfo(workload.dtype(device)).bits // 8
    rows = workload.rows * workload.size * width
    columns = workload.columns * workload.size * width
    held = rows + columns
    gradients = rows + (columns if workload.topology in ("class", "towers") else 0)
    # Random numbers are drawn in float32 for every dtype.
    needed = held * (1 + beside) + max(gradients + implementation.bytes, (4 / width - 1) * held)
    fraction = OUR_MEMORY_LIMIT if name in OURS else MEMORY_LIMIT
    limit = fraction * available_bytes(device)
    if needed <= limit:
        return None
    return (
        f"does not fit: {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB ({fraction:.0%} of the free)"
    )


def run(
    workload: Workload, device: str, seconds: float, names: list[str], memory: bool = True
) -> dict[str, object]:
    """Times implementations in interleaved rounds, for ``seconds`` or at least a few rounds.

    An implementation that fails or does not fit is recorded with the reason. After ``seconds`` of
    its own steps an implementation pauses, so that slow ones leave time for the others.
    """
    if workload.autocast and device == "cpu" and not has_bfloat16_gemm():
        return {"skipped": "this processor has no bfloat16 matmul"}
    known = implementations(workload, device)
    names = [name for name in known if name in names]
    rows: dict[str, dict[str, object]] = {name: {} for name in names}
    samples: dict[str, dict[int, float]] = {name: {} for name in names}
    result: dict[str, object] = {
        "loss": workload.loss,
        "rows": workload.rows,
        "columns": workload.columns,
        "size": workload.size,
        "dtype": str(workload.dtype(device)).removeprefix("torch."),
        "gemms": workload.gemms_on(device),
        "primary": PRIMARY[device],
        "implementations": rows,
    }
    sessions = {}
    for name in names:
        reason = misfit(workload, name, device, beside=len(names) - 1)
        if reason is None:
            sessions[name] = start(workload, name, device)
        else:
            rows[name]["skipped"] = reason
    rates = Rates(workload, device)
    loss_limit = accuracy.limits(workload, device)[0]

    def failed(name: str, error: Exception) -> None:
        say(f"{workload.name}: {name} failed: {error}")
        rows[name]["failed"] = str(error)
        samples[name].clear()
        sessions.pop(name).close()

    try:
        for name in list(sessions):
            say(f"{workload.name}: {name}: check and first step")
            try:
                # Workspaces that the check allocates would be missing from the peak. Compiled code
                # is checked first all the same, or the compiler's memory would be in the peak.
                if known[name].compiled:
                    rows[name]["errors"] = sessions[name].call("check")
                else:
                    sessions[name].call("warm_up")
                first = sessions[name].call("first")
                if not known[name].compiled:
                    rows[name]["errors"] = sessions[name].call("check")
                if known[name].same_formula:
                    # The check was on a small shape; this compares the loss on the full shape.
                    value = result.setdefault("value", first["loss"])
                    difference = abs(first["loss"] - value)
                    rows[name]["loss_against_first"] = difference / abs(value)
                    if not difference < 2 * loss_limit * max(abs(value), 1.0):
                        raise ArithmeticError(
                            f"its loss on the full shape is {first['loss']}, another's {value}"
                        )
                if "facts" not in result:
                    result["facts"] = sessions[name].call("facts")
            except (ImplementationFailedError, ArithmeticError) as error:
                failed(name, error)
                continue
            if memory:
                for key in ("peak_mb", "above_gradients_mb"):
                    rows[name][key] = first[key]
            # In a step this long a cold start is negligible.
            if first["seconds"] > seconds:
                samples[name][0] = first["seconds"]
        deadline, number = time.perf_counter() + seconds, 0
        while time.perf_counter() < deadline or number < LEAST_ROUNDS:
            number += 1
            rates.measure()
            going = [name for name in sessions if sum(samples[name].values()) <= seconds]
            if not going:
                break
            for name in going:
                try:
                    samples[name][number] = sessions[name].call("step")
                except ImplementationFailedError as error:
                    failed(name, error)
    finally:
        for session in sessions.values():
            session.close()
    _summarize(result, samples, rates)
    return result


class Rates:
    """GEMM and copy rates of the machine, measured between the rounds."""

    def __init__(self, workload: Workload, device: str) -> None:
        self.workload, self.device = workload, device
        self.dtype = torch.bfloat16 if workload.autocast else workload.dtype(device)
        self.gemm: list[float] = []
        self.copy: list[float] = []
        self._last = 0.0

    def measure(self) -> None:
        if time.perf_counter() - self._last < RATES_EVERY_S:
            return
        self.gemm.append(gemm_rate(self.workload.size, self.device, self.dtype))
        self.copy.append(copy_rate(self.device))
        self._last = time.perf_counter()

    def roofline(self) -> float:
        """Seconds of the fused algorithm's GEMMs, or of reading inputs and writing gradients."""
        work = self.workload
        width = torch.finfo(work.dtype(self.device)).bits // 8
        passes = 1 if work.topology == "memory" else 2
        traffic = width * work.size * (2 * work.rows + passes * work.columns)
        # The best rates: other load on the machine does not lower the roofline.
        gemms = work.flops_on(self.device) / max(self.gemm)
        return max(gemms, traffic / max(self.copy))


def _summarize(result: dict, samples: dict[str, dict[int, float]], rates: Rates) -> None:
    result["gemm_gflops"] = max(rates.gemm) / 1e9
    result["copy_gb_s"] = max(rates.copy) / 1e9
    result["roofline_s"] = rates.roofline()
    rows = result["implementations"]
    # The primary implementation may have failed, too.
    primary = samples.get(result["primary"]) or {}
    for name, own in samples.items():
        if not own:
            continue
        times = list(own.values())
        rows[name] |= {
            "samples": len(times),
            "median_s": statistics.median(times),
            "spread_s": [min(times), max(times)],
        }
        if name in OURS:
            rows[name]["roofline_fraction"] = result["roofline_s"] / rows[name]["median_s"]
        if primary and name != result["primary"]:
            ratios = [time / primary[number] for number, time in own.items() if number in primary]
            if not ratios:
                ratios = [rows[name]["median_s"] / statistics.median(primary.values())]
            rows[name]["speedup"] = statistics.median(ratios)
            if len(ratios) > 1:
                low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
                rows[name]["speedup_quartiles"] = [low, high]
