"""README and docs/: commands exist, links lead somewhere, numbers are those of the results."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.helpers import ROOT

from train.config import make_config, parse_overrides

# --- commands -------------------------------------------------------------------------------------

PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "bench/results/*.md") for path in ROOT.glob(pattern)
)

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    """Lines of the pages' blocks without a language, joined where they are continued."""
    lines = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for language, block in BLOCK.findall(page.read_text()):
            if not language:
                lines += re.sub(r"\\\n\s*", "", block).splitlines()
    return [re.sub(r"\s#.*", "", line).strip() for line in lines]


def test_make_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(page.read_text() for page in PAGES if page.parent.name != "results")
    named = set(re.findall(r"(?:`|^)make (\w[\w-]*)", text, flags=re.MULTILINE))
    assert {"demo", "docs", "test", "bench", "losses"} <= named
    for target in named:
        assert re.search(rf"^(?:\S+ )*{target}(?: \S+)*:", makefile, flags=re.MULTILINE), target


def test_programs_and_options_of_the_commands_exist() -> None:
    folders = ("train", "bench", "unitsface_kernels", "python_tests")
    sources = [path.read_text() for name in folders for path in (ROOT / name).rglob("*.py")]
    programs = Counter()
    for line in _commands():
        found = re.match(r"(?:\S+=\S+ )*(?:\S*python|torchrun .*?)(?: (-m \S+|\S+\.py))(.*)", line)
        if found is None:
            continue
        program, rest = found[1], found[2]
        programs[program] += 1
        if program.startswith("-m "):
            if program.split()[1] in ("pip", "pytest", "venv"):
                continue
            assert importlib.util.find_spec(program.split()[1]), line
        elif program != "my_training.py":
            assert (ROOT / program).is_file(), line
        for option in re.findall(r" (--[a-z][\w-]*)", rest):
            assert any(f'"{option}"' in text for text in sources), f"{line}: {option}"
    assert programs["train/main.py"] > 5


def test_keys_of_the_commands_are_known() -> None:
    """Keys of a training, with values that have their type."""
    sections = ("model", "data", "loss", "partial_fc", "train", "run", "eval")
    found = 0
    for line in _commands():
        keys = re.findall(rf"(?<!\S)((?:{'|'.join(sections)})\.\w[\w.]*=\S+)", line)
        if keys:
            make_config((line, parse_overrides([key.replace("'", "") for key in keys])))
            found += len(keys)
    assert found > 15


# --- links ----------------------------------------------------------------------------------------


def _text(page: Path) -> str:
    """Without code; of a notebook the cells that are text."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = (cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them: those that repeat are numbered."""
    anchors: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", _text(page), flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{anchors[anchor]}" if anchors[anchor] else anchor)
        anchors[anchor] += 1
    return found


def _external_mistake(link: str) -> str | None:
    """A mistake in the form of an address: tests need no network."""
    parts = urlsplit(link)
    if parts.scheme != "https":
        return "no https"
    if not re.fullmatch(r"(?:[a-z0-9-]+\.)+[a-z]{2,}", parts.netloc):
        return "no host"
    if not re.fullmatch(r"[\w./~%+#?=&:@-]*", parts.path + parts.query + parts.fragment, re.ASCII):
        return "characters that an address has not"
    return "an empty part" if "//" in parts.path else None


LINKING = sorted([*PAGES, *ROOT.glob("docs/*.ipynb")])


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = _text(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            assert _external_mistake(link) is None, link
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link
    # Forms that the search above would miss.
    assert not re.search(r"\]\([^)\s]*\s", text)
    assert not re.search(r"^\[[^\]]+\]: |<a |<img ", text, flags=re.MULTILINE)


def test_the_check_of_addresses_finds_mistakes() -> None:
    assert _external_mistake("https://arxiv.org/abs/2311.02523") is None
    for wrong in ("http://arxiv.org", "https://arxiv", "https://x.org//a", "https://x.org/a,b"):
        assert _external_mistake(wrong), wrong


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "text", "result", "row"),
    [
        ("docs/training.md", "4094 images/s of a core", "decode", r"RecordIO \| 4,094 "),
        ("docs/training.md", "5617 with two worker", "decode", r"RecordIO .*\| 5,617 [^|]*\| \d"),
        ("docs/usage.md", "takes 16 MB beyond", "heads", r"`head-400k`: .*\| fused \|.* \+16 MB"),
        ("docs/usage.md", "takes 6.3 GB beyond", "heads", r"\| eager \|.*\+6(2[5-9]|3[0-4])\d MB"),
        ("docs/usage.md", "is 2.29", "heads", r"\| eager \| [^|]*\| 2\.29 "),
        ("docs/custom_losses.md", "at most 1.4 % more", "generated_policies", r"\| \+1\.4% \|"),
        ("docs/custom_losses.md", "up to 13.7 % more", "generated_policies", r"uce .*\| \+13\.7% "),
    ],
)
def test_numbers_in_sentences_are_those_of_the_results(
    page: str, text: str, result: str, row: str
) -> None:
    assert re.search(re.escape(text).replace(r"\ ", r"\s"), (ROOT / page).read_text())
    assert re.search(row, (ROOT / "bench" / "results" / f"{result}.md").read_text())


def test_matrices_that_eager_code_stores_are_as_many_as_the_page_says() -> None:
    text = " ".join((ROOT / "docs" / "memory_and_speed.md").read_text().split())
    assert re.search("four matrices of N . M float32 numbers, .* published code fourteen", text)
    stored = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["workloads"]
    workload = stored["pair-8k"]
    matrix = 4 * workload["rows"] ** 2 / 2**20
    peaks = {name: row["peak_mb"] for name, row in workload["implementations"].items()}
    assert round(peaks["eager"] / matrix) == 4
    assert round(peaks["published"] / matrix) == 14
