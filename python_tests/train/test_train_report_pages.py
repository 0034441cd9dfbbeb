"""Pages of reports as Chromium shows them: on a phone and a screen, in both color schemes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import PROGRAM, Browser, browser
from support.reports import write_comparison

from train.run_folder import FEATURES, write_arrays
from train.tools import run_report

pytestmark = pytest.mark.skipif(not PROGRAM, reason="no Chromium: apt-get install chromium")

LONG = "a_set_of_a_name_that_is_longer_than_the_width_of_a_phone/" * 2
#: Texts and colors of curves against the background of the page, smallest of each; WCAG's formula.
CONTRAST = """(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const least = (elements, key) => Math.min(...[...elements]
    .map(e => light(getComputedStyle(e)[key])).map(c => Math.max(c, paper) / Math.min(c, paper)));
  const curves = [0, 1, 2, 3, 4, 5].map(i => {
    const e = document.body.appendChild(document.createElement("i"));
    e.style.color = `var(--c${i})`;
    return e;
  });
  return [least(document.querySelectorAll("h1, h2, p, li, dt, dd, th, td, figcaption, caption"),
                "color"), least(document.querySelectorAll("svg text"), "fill"),
          least(curves, "color")];
})()"""
SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("svg text")]
  .map(e => e.getBoundingClientRect()).map(box => Math.max(box.height, 0)))"""
LOWEST_NUMBER = """Math.max(...[...document.querySelectorAll(".numbers .value")]
  .map(e => e.getBoundingClientRect().bottom))"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
OPEN = "document.querySelectorAll('details').forEach(e => { e.open = true })"


def write_run(folder: Path) -> Path:
    """A run of 1000 lines in the log, with identities held out and two test sets."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    values = {"loss": 30.0, "class_loss": 20.0, "pair_loss": 10.0, "threshold": 0.3, "lr": 0.1}
    lines = [
        {key: value * rng.uniform(0.8, 1.2) for key, value in values.items()}
        | {"step": step, "epoch": step / 50, "images_per_s": 900.0 + step % 7}
        for step in range(1, 1001)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    of_sets = {"lfw": {"accuracy": 0.9, "auc": 0.95}, LONG: {"accuracy": 0.8, "auc": 0.9}}
    evaluated = {"step": 1000, "epoch": 20.0, "eval": of_sets}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluated) + "\n")
    labels = np.arange(120) % 12
    features = rng.standard_normal((12, 8))[labels] + 0.5 * rng.standard_normal((120, 8))
    found = {"accuracy": 0.9, "pairs": 7140, "positives": 540, "tar_at_far": {"0.1": 0.8}}
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text(f"data:\n  path: {LONG}\n")
    names = np.array([f"{LONG}{i}" for i in range(12)])
    write_arrays(folder / FEATURES, features=features, labels=labels, identities=names)
    return run_report.write(folder)


PAGES = {"run": write_run, "losses": write_comparison}


@pytest.fixture(scope="module", params=["run", pytest.param("losses", marks=pytest.mark.extended)])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PAGES[request.param](tmp_path_factory.mktemp("pages") / LONG[:50])


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_fits_reads_well_and_needs_nothing(
    page: Path, width: int, scheme: str, chromium: Browser
) -> None:
    chromium.open(page, width=width, scheme=scheme)
    assert chromium.evaluate("innerWidth") == width
    # The three numbers are on the first screen.
    assert chromium.evaluate("document.querySelectorAll('.numbers .value').length") == 3
    assert 0 < chromium.evaluate(LOWEST_NUMBER) < 900
    assert chromium.evaluate(OVERFLOW) == 0
    assert chromium.evaluate(SMALLEST_TEXT) > 9
    chromium.evaluate(OPEN)
    assert chromium.evaluate(OVERFLOW) == 0
    text, in_figures, curves = chromium.evaluate(CONTRAST)
    assert min(text, in_figures) >= 4.5
    assert curves >= 3
    dark = chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 28)"
    assert dark == (scheme == "dark")
    assert chromium.problems == []
    assert chromium.requests == [page.as_uri()]


def test_figures_and_tables_have_names_for_a_screen_reader(page: Path, chromium: Browser) -> None:
    chromium.open(page, width=1400)
    chromium.evaluate(OPEN)
    names: dict[str, list[Any]] = {"image": [], "table": []}
    for node in chromium("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if role in names:
            names[role].append(node["name"]["value"])
    assert len(names["image"]) == chromium.evaluate("document.querySelectorAll('svg').length")
    assert len(names["table"]) == chromium.evaluate("document.querySelectorAll('table').length")
    assert all(names["image"])
    assert all(names["table"])


def test_the_checks_find_what_is_wrong(tmp_path: Path, chromium: Browser) -> None:
    page = tmp_path / "wrong.html"
    page.write_text(
        '<body style="background: rgb(255, 255, 255)">'
        '<p style="width: 3000px; color: #bbb">text</p>'
        '<img src="https://example.com/a.png"><script>console.error("wrong")</script>'
    )
    chromium.open(page, width=1400)
    assert chromium.evaluate(OVERFLOW) > 0
    assert chromium.evaluate(CONTRAST)[0] < 2
    assert chromium.requests == [page.as_uri(), "https://example.com/a.png"]
    assert any("wrong" in problem for problem in chromium.problems)
    assert any("ERR_INTERNET_DISCONNECTED" in problem for problem in chromium.problems)
