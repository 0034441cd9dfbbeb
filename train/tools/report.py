"""The writer of reports: three numbers, figures and tables as one HTML page, or as Markdown.

An HTML page is self-contained and runs no script; text in it is never markup, wherever it comes
from, but for *emphasis*, `code` and lines that begin with "- " in paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from train.evaluation import plots
from train.run_folder import write_text


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass(frozen=True)
class Plot:
    drawing: Figure
    caption: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Note:
    """A remark, such as the reason why a part of the report is absent."""

    text: str


Number = tuple[str, str, str]  # one of the three at the top: what it is, and why this one
Block = str | Table | Plot | Code | Note  # a string is a paragraph
Sections = Mapping[str, Sequence[Block]]  # by heading


@dataclass(frozen=True)
class Report:
    title: str
    about: str  # a line below it: what was done, on what
    numbers: Sequence[Number]
    shown: Sections
    folded: Sections = field(default_factory=dict)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def mean_and_spread(values: Sequence[float | None], sign: str = "") -> str:
    """Mean of the known values, and their standard deviation where there are several."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):{sign}.3f}{spread}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def speed_of(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Median of the images/s of a training log."""
    known = [speed for line in lines if is_number(speed := line.get("images_per_s"))]
    return float(np.median(known)) if known else None


def best_of(
    scores: Mapping[str, Mapping[int, float]], metric: str, speeds: Mapping[str, float | None]
) -> list[Number]:
    """The three numbers of a comparison: scores by seed, larger is better, and images/s."""
    ranked = sorted(scores, key=lambda name: -float(np.mean([*scores[name].values()])))
    best, following = scores[ranked[0]], ranked[1] if len(ranked) > 1 else "none"
    others = scores.get(following, {})
    several = len(best) > 1
    seeds = f"mean ± standard deviation over {len(best)} seeds" if several else "one seed"
    why = f"the highest of {len(ranked)}; {metric} depends on no threshold; {seeds}"
    first = (ranked[0], f"{metric} {mean_and_spread([*best.values()])}", why)
    margin = [value - others[seed] for seed, value in best.items() if seed in others]
    tie = "seed by seed: a spread as large as the margin is a tie"
    why = tie if several else "one seed: another may turn it"
    second = (mean_and_spread(margin, "+"), f"{metric} above the next, {following}", why)
    known = sorted(speed for speed in speeds.values() if speed)
    why = "median over the log: data, loss and update included" if known else "not in the log"
    why += f"; {known[0]:.0f} to {known[-1]:.0f} of all" if len(known) > 1 else ""
    return [first, second, (whole(speeds.get(ranked[0])), f"images/s with {ranked[0]}", why)]


# -- Markdown -------------------------------------------------------------------------------


def layout(table: Table) -> str:
    """A Markdown table with aligned columns, readable in a terminal too."""
    lines = [[*table.header], *([cell(value) for value in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def write(folder: Path, report: Report) -> None:
    """``report.html``, and its text as ``report.md``."""
    write_html(folder / "report.html", report)
    write_markdown(folder / "report.md", report)


def write_markdown(path: Path, report: Report) -> None:
    """The text of a report; paragraphs are Markdown, figures are left to the page."""
    opening = (f"- **{value}** {what}: {why}" for value, what, why in report.numbers)
    parts = [f"# {report.title}", report.about, "\n".join(opening)]
    for heading, blocks in {**report.shown, **report.folded}.items():
        texts = [*filter(None, map(_markdown, blocks))]
        parts += [f"## {heading}", *texts] if texts else []
    write_text(path, "\n\n".join(parts) + "\n")


def _markdown(block: Block) -> str:
    match block:
        case Table():
            return "\n\n".join(filter(None, [block.caption, layout(block)]))
        case Plot():
            return ""
        case Code():
            return "\n".join(f"    {line}" for line in block.text.splitlines())
        case Note():
            return f"> {block.text}"
    return block


# -- HTML -----------------------------------------------------------------------------------


def write_html(path: Path, report: Report) -> None:
    """One file in ASCII, whatever the encoding it is written in."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(autoescape=True, loader=folder, trim_blocks=True, undefined=StrictUndefined)
    pages.filters |= {
        "cell": cell,
        "inline": _inline,
        "kind": lambda block: type(block).__name__,
        "runs": lambda blocks: groupby(blocks, lambda block: isinstance(block, Plot)),
        "svg": lambda block: Markup(plots.svg(block.drawing, block.caption)),
    }
    text = pages.get_template("report.html.jinja").render(report=report)
    write_text(path, text.lstrip().encode("ascii", "xmlcharrefreplace").decode("ascii"))


def _inline(text: str) -> Markup:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"(?<!\w)\*+([^*]+)\*+(?!\w)", r"<em>\1</em>", text))
