"""The writer of reports: text, tables and plots as one HTML page, or as Markdown with its images.

An HTML page is self-contained, and text in it is never markup, wherever it comes from.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from train.evaluation import plots
from train.run_folder import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #eee; text-align: left; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img { max-width: 100%; } pre { background: #f6f6f6; padding: 1rem;
  overflow-x: auto; } .missing, figcaption { color: #666; }
"""
# Nothing is run and nothing fetched, should text ever come through as markup.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Plot:
    drawing: Figure
    caption: str
    file: str = ""  # name of the image beside a Markdown report


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Missing:
    """The reason why a part of the report is absent."""

    text: str


Block = str | Table | Plot | Code | Missing  # a string is a paragraph
Sections = Mapping[str, Sequence[Block]]  # by heading; that of the first part may be empty


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean of the known values, and their standard deviation where there are several."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"


def layout(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def write_markdown(path: Path, title: str, sections: Sections) -> None:
    """The report, and the images of its plots beside it; paragraphs are Markdown."""
    parts = [f"# {title}"]
    for heading, blocks in sections.items():
        parts += [f"## {heading}"] if heading else []
        for block in blocks:
            if isinstance(block, Plot):
                plots.save(block.drawing, path.parent / block.file)
            parts.append(_markdown(block))
    write_text(path, "\n\n".join(parts) + "\n")


def _markdown(block: Block) -> str:
    match block:
        case Table():
            return layout(block.header, [[cell(value) for value in row] for row in block.rows])
        case Plot():
            return f"![{block.caption}]({block.file})"
        case Code():
            return "\n".join(f"    {line}" for line in block.text.splitlines())
        case Missing():
            return block.text
    return block


def write_html(path: Path, title: str, sections: Sections) -> None:
    """One file in ASCII, whatever the encoding it is written in; plots are embedded."""
    body = "\n".join(
        f"<h2>{escape(heading)}</h2>\n" + "\n".join(map(_html, blocks))
        for heading, blocks in sections.items()
    )
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""
    write_text(path, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))


def _html(block: Block) -> str:
    match block:
        case Table():
            lines = [_line(block.header, "th"), *(_line(row, "td") for row in block.rows)]
            return "\n".join(["<table>", *lines, "</table>"])
        case Plot():
            data = base64.b64encode(plots.png(block.drawing)).decode("ascii")
            caption = escape(block.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        case Code():
            return f"<pre>{escape(block.text)}</pre>"
        case Missing():
            return f'<p class="missing">{escape(block.text)}</p>'
    return f"<p>{escape(block)}</p>"


def _line(values: Sequence[Any], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell(v))}</{tag}>" for v in values) + "</tr>"
