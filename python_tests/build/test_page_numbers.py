"""Numbers of the pages: measured ones have a command beside them, generated ones are present."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.helpers import ROOT

from bench import custom_policies

PAGES = [ROOT / "README.md", ROOT / "bench/results/README.md", *sorted(ROOT.glob("docs/*.md"))]
#: A number with a unit of what is measured or counted; "1 s" and "2 s" are products of a formula.
MEASURED = re.compile(
    r"(?<![\w.^-])\d(?:[\d,. ]*\d)?\s?"
    r"(?:ms|µs|us|[kMGT]i?B|%|images/s|pairs/s|[GT]FLOP/s|[GT]B/s|issue cycles)(?!\w)"
)
SECONDS = re.compile(r"(?<![\w.^-])\d+\.\d+ s\b|(?<![\w.^-])\d{2,} s\b")
COMMAND = re.compile(
    r"(?:`|^ *)(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:(?:python|pytest|make) \S|bench/gpu_check\.sh)",
    re.MULTILINE,
)
RESULTS = re.compile(r"bench/results/\w+\.(?:md|json)")
SOURCE = re.compile(r"`((?:unitsface_kernels|train|bench|csrc)/[\w./-]+\.(?:py|cpp|h|cu|json))`")


def sections(text: str) -> list[tuple[str, str]]:
    """Headings with what is below each of them, up to the next of any level."""
    code = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
    comments = code.sub(lambda block: re.sub(r"^#", " #", block[0], flags=re.MULTILINE), text)
    parts = re.split(r"^(#+ .*)$", f"# (before the first heading)\n{comments}", flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def measured(text: str) -> list[str]:
    """Numbers with units in sentences and tables; not in code, formulas and addresses."""
    for pattern in (
        r"^ *```.*?^ *```$",
        r"`[^`]*`",
        r"\$\$.*?\$\$",
        r"\$[^$\n]*\$",
        r"\]\([^)]*\)",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    return [match[0] for pattern in (MEASURED, SECONDS) for match in pattern.finditer(text)]


def has_source(text: str) -> bool:
    """A command, a file of results, or the source file in which a constant stands."""
    return any(pattern.search(text) for pattern in (COMMAND, RESULTS, SOURCE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_measured_numbers_are_in_a_section_that_names_their_source(page: Path) -> None:
    without = {
        heading: found
        for heading, text in sections(page.read_text())
        if (found := measured(text)) and not has_source(text)
    }
    assert without == {}


def test_the_search_finds_a_number_without_a_source() -> None:
    text = (
        "# A\n12 ms, less (2.4 %), and 9.51 s\n## B\n```\n# 5 ms\n```\n7 GB by `python -m bench`\n"
    )
    found = {heading: (measured(t), has_source(t)) for heading, t in sections(text)}
    assert found["# A"] == (["12 ms", "2.4 %", "9.51 s"], False)
    assert found["## B"] == (["7 GB"], True)
    assert not has_source("to make it fast in python is hard; see the results")
    assert measured("`12 ms`, $64 s$, 512, [4 MB](a-4 MB.md), 1 s") == ["4 MB"]


def test_sources_that_the_pages_name_exist() -> None:
    modules: set[str] = set()
    for page in PAGES:
        text = page.read_text()
        for path in SOURCE.findall(text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
        modules |= set(
            re.findall(r"python -m ((?:bench|train|unitsface_kernels|python_tests)[\w.]*)", text)
        )
        for path in re.findall(r"python ((?:train|docs|bench)/[\w/]+\.py)", text):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"
    assert len(modules) > 15
    paths = {name: ROOT / name.rstrip(".").replace(".", "/") for name in modules}
    assert [n for n, p in paths.items() if not (p.is_dir() or p.with_suffix(".py").is_file())] == []


#: Who writes what stands between two marks, and the test that compares both.
GENERATED = {
    "README.md": {"measured", "losses", "support"},
    "bench/results/README.md": {"targets"},
    "docs/custom_losses.md": {"custom policies"},  # below
    "docs/gpu.md": {"steps"},  # bench.report, as README.md; test_bench.py
    "docs/metric_learning.md": {"losses"},  # test_adapters_page.py
    "docs/scaling.md": {"largest", "steps", "published", "simulated"},  # test_bench_cost.py
    "docs/training.md": {"training"},  # the same
}


def test_every_generated_part_has_a_test() -> None:
    found = {
        page.relative_to(ROOT).as_posix(): set(re.findall(r"<!-- ([\w ]+): begin -->", text))
        for page in PAGES
        if "begin -->" in (text := page.read_text())
    }
    assert found == GENERATED


def test_the_table_of_own_losses_is_that_of_the_results() -> None:
    text = custom_policies.PAGE.read_text()
    results = json.loads((ROOT / "bench/results/custom_policies.json").read_text())
    assert custom_policies.filled(text, results) == text
    results["machine"]["threads"] = 64
    assert custom_policies.filled(text, results) != text


def test_sentences_on_measured_heads_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "docs/scaling.md").read_text().split())
    heads = json.loads((ROOT / "bench/results/heads.json").read_text())["heads"].values()
    beyond = {"fused": [], "eager": []}
    for head in heads:
        for name, found in head["implementations"].items():
            kind = name.partition("-")[0]
            beyond.setdefault(kind, []).append(found["peak_mb"] - found["needed_mb"])
    speedups = [head["implementations"]["eager"]["speedup"] for head in heads]
    ratios = [float(r) for r in re.findall(r"\| (\d\.\d\d) \| [\d,]+ MB \| [\d,]+ MB \|", text)]
    assert len(ratios) == 12
    fused, eager = beyond["fused"], [mb / 1e3 for mb in beyond["eager"]]
    assert f"take {min(ratios):.1f} to {max(ratios):.1f} times the predicted ones" in text
    assert f"over the eager formulation is {min(speedups):.1f} to {max(speedups):.1f};" in text
    assert f"takes {min(eager):.1f} to {max(eager):.0f} GB beyond weights" in text
    assert f"the fused one takes {min(fused):.0f} to {max(fused):.0f} MB" in text
