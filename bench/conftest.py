"""Options of ``pytest bench/``, and its second table: what pytest-benchmark has no column for."""

from __future__ import annotations

import pytest
import torch

HEADER = ("implementation", "peak MB", "pairs/s", "TFLOP/s", "roofline", "error")


def pytest_addoption(parser: pytest.Parser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}"
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows: dict[str, list[tuple[str, ...]]] = {}
    for benchmark in session.benchmarks if session is not None else []:
        info = benchmark.extra_info
        if "pairs_per_s" in info:
            row = (
                info["implementation"],
                f"{info['peak_mb']:,.0f}",
                f"{info['pairs_per_s']:.3g}",
                f"{info['tflops']:.3g}",
                f"{info['roofline_fraction']:.0%}",
                f"{info['error']:.1e}",
            )
            rows.setdefault(benchmark.group, []).append(row)
    for group, lines in rows.items():
        terminalreporter.section(f"{group}: memory, throughput and accuracy")
        widths = [max(map(len, column)) for column in zip(HEADER, *lines, strict=True)]
        for line in (HEADER, *lines):
            name, *cells = (
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            terminalreporter.write_line("  ".join((name, *cells)))
