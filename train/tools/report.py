"""The writer of reports: three numbers, figures and tables as one HTML page, or as Markdown.

An HTML page is self-contained and runs no script; text in it is never markup, wherever it comes
from, but for *emphasis*, `code` and lines that begin with "- " in paragraphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.evaluation import plots
from train.run_folder import write_text

STYLE = Path(__file__).with_suffix(".css")
# Nothing is run and nothing fetched, should text ever come through as markup.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


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
    numbers = "".join(
        f'<div><dt>{escape(what)}</dt><dd class="value">{escape(value)}</dd>'
        f"<dd>{escape(why)}</dd></div>\n"
        for value, what, why in report.numbers
    )
    parts = [f'<dl class="numbers">\n{numbers}</dl>']
    for heading, blocks in report.shown.items():
        parts += [f"<h2>{escape(heading)}</h2>", _blocks(blocks)]
    for heading, blocks in report.folded.items():
        summary = f"<summary><h2>{escape(heading)}</h2></summary>"
        parts.append(f"<details>{summary}\n{_blocks(blocks)}\n</details>")
    title = escape(report.title)
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="note">{escape(report.about)}</p>
{chr(10).join(parts)}
</main>
</body>
</html>
"""
    write_text(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))


def _blocks(blocks: Sequence[Block]) -> str:
    """Figures that follow one another are side by side, where there is room."""
    parts = []
    for figures, group in groupby(blocks, lambda block: isinstance(block, Plot)):
        text = "\n".join(map(_html, group))
        parts.append(f'<div class="figures">\n{text}\n</div>' if figures else text)
    return "\n".join(parts)


def _html(block: Block) -> str:
    match block:
        case Table():
            caption, rows = escape(block.caption), "\n".join(map(_row, block.rows))
            header = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.header)
            return (
                f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table>'
                f"<caption><span>{caption}</span></caption>\n<thead><tr>{header}</tr></thead>\n"
                f"<tbody>\n{rows}\n</tbody></table></div>"
            )
        case Plot():
            drawing = plots.svg(block.drawing, block.caption)
            return f"<figure><figcaption>{escape(block.caption)}</figcaption>{drawing}</figure>"
        case Code():
            return f'<pre tabindex="0">{escape(block.text)}</pre>'
        case Note():
            return f'<p class="note">{_inline(block.text)}</p>'
    if block.startswith("- "):
        items = "".join(f"<li>{_inline(line[2:])}</li>\n" for line in block.strip().splitlines())
        return f"<ul>\n{items}</ul>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"(?<!\w)\*+([^*]+)\*+(?!\w)", r"<em>\1</em>", text)


def _row(values: Sequence[Any]) -> str:
    name, *cells = (escape(cell(value)) for value in values)
    return f'<tr><th scope="row">{name}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
