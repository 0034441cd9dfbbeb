"""Makes the site of the files that GitHub shows: hooks of MkDocs.

Files beside docs/ become pages, notebooks too; the API pages list the names of ``__all__``, so that
none is left out. Links are written for GitHub and led to pages here. Formulas become MathML while
the site is built: a browser needs no script and no network for them.
"""

from __future__ import annotations

import ast
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "unitsface_kernels"
#: Place on the site of files outside docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "RELEASING.md": "releasing.md",
    **{
        f"bench/results/{path.name}": f"results/{path.name}"
        for path in sorted((ROOT / "bench" / "results").glob("*.md"))
    },
}
#: The file of a page that is not in docs/ under its own name.
ORIGINS = {page: name for name, page in PAGES.items()}
#: Other files that pages link to.
SOURCES = "source/"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
#: Where Markdown of GitHub begins a list or a table, and that of the site needs an empty line.
BEGIN = re.compile(r"^((?![-|]| |<!--.*--> ).+\n)(?=- )|^(<!--.*-->\n)(?=\|)", re.MULTILINE)
#: A bar in code of a table, which only GitHub needs escaped.
ESCAPED = re.compile(r"^\|.*$", re.MULTILINE), re.compile(r"`[^`\n]*`")
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', flags=re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        page = path.with_suffix(".md").name
        ORIGINS[page] = f"docs/{path.name}"
        files.append(File.generated(config, page, content=notebook(path)))
    for page, content in api_pages().items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    place = page.file.src_uri
    origin = ORIGINS.get(place, f"docs/{place}")

    def led(match: re.Match[str]) -> str:
        name, anchor, fragment = match[2].partition("#")
        if not name or "://" in match[2] or name.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), name))
        target = _page_of(path, origin)
        if target.startswith(SOURCES) and files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
        link = posixpath.relpath(target, posixpath.dirname(place) or ".")
        return f"{match[1]}{link}{anchor}{fragment}{match[3]}"

    parts = FENCED.split(markdown)
    for number in range(0, len(parts), 2):
        text = ESCAPED[0].sub(_plain_bars, BEGIN.sub(r"\g<0>\n", parts[number]))
        parts[number] = LINK.sub(led, text)
    return "".join(parts)


def _plain_bars(row: re.Match[str]) -> str:
    return ESCAPED[1].sub(lambda code: code[0].replace("\\|", "|"), row[0])


def _page_of(path: str, origin: str) -> str:
    """Place on the site of a file of the repository."""
    if not (ROOT / path).is_file():
        raise PluginError(f"{origin} links to {path}, which is not a file")
    if path in PAGES:
        return PAGES[path]
    if path.endswith(".md") and not path.startswith("docs/"):
        raise PluginError(f"{origin} links to {path}, which is missing in PAGES and in nav")
    if not path.startswith("docs/") or path.endswith(".py"):
        return SOURCES + path
    inside = path.removeprefix("docs/")
    # A notebook's own page leads to the file.
    return inside.replace(".ipynb", ".md") if path != origin else inside


def on_page_content(html_text: str, page: Page, **_: Any) -> str:
    def typeset(match: re.Match[str]) -> str:
        tex = html.unescape(match[2]).strip()
        try:
            mathml = convert(tex, display="block" if match[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: formula {tex!r}: {error}") from error
        # The bars of a norm, which would grow with what stands beside them.
        mathml = mathml.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
        return f"<{match[1]}>{mathml}</{match[1]}>"

    return FORMULA.sub(typeset, html_text)


def notebook(path: Path) -> str:
    """The cells of a notebook as a page."""
    texts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        texts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join([*texts, f"This page is the notebook [{path.name}]({path.name}).", ""])


# --- API ------------------------------------------------------------------------------------------

#: Names of the root that have a page with others of their kind.
HEADS = ("PartialFC", "SampledAdamW", "SampledSGD", "clip_grad_norm_")
#: Names that are no function and no class, or a package of their own.
OTHERS = ("CLASS_LOSSES", "PAIR_LOSSES", "__version__", "adapters", "metrics", "policy")


def api_pages() -> dict[str, str]:
    root = exported("")
    functions = [name for name in root if name.islower() and name not in (*HEADS, *OTHERS)]
    modules = [name for name in root if not name.islower() and name not in (*HEADS, *OTHERS)]
    heads = [f"partial_fc.{name}" for name in exported("distributed.partial_fc")]
    heads = [name for name in heads if name.rpartition(".")[2] not in HEADS]
    adapters = [
        f"adapters.{library}.{name}"
        for library in exported("adapters")
        for name in classes(f"adapters.{library}")
    ]
    lists = {
        "functions": ("Functions", functions),
        "modules": ("Modules", modules),
        "partial_fc": ("Partial FC and optimizers", [*HEADS, *heads]),
        "policy": ("Losses of your own", [f"policy.{name}" for name in exported("policy")]),
        "metrics": ("Metrics", [f"metrics.{name}" for name in exported("metrics")]),
        "adapters": ("Adapters", [*adapters, "grad_cache.cached_backward"]),
    }
    return {
        f"api/{page}.md": f"# {title}\n\n" + "".join(f"::: {_defined(n)}\n\n" for n in names)
        for page, (title, names) in lists.items()
    }


def exported(module: str) -> list[str]:
    """``__all__`` of a module of the package, as it is written."""
    for node in ast.parse(_source(module).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    raise PluginError(f"unitsface_kernels.{module} has no __all__")


def classes(module: str) -> list[str]:
    """Public classes of a module: those of ``__all__``, or all that it defines."""
    path = _source(module)
    if path.name == "__init__.py":
        return exported(module)
    nodes = ast.parse(path.read_text()).body
    return [n.name for n in nodes if isinstance(n, ast.ClassDef) and n.name[0] != "_"]


def _source(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


#: Names that their module imports when they are first used, and where they are defined.
_LATE = {
    "policy.check": "policy.checking.check",
    "partial_fc.dominant_centers": "distributed.partial_fc.class_weights.dominant_centers",
    "partial_fc.export_class_weights": "distributed.partial_fc.class_weights.export_class_weights",
    "partial_fc.read_classes": "distributed.partial_fc.class_weights.read_classes",
}


def _defined(name: str) -> str:
    name = _LATE.get(name, name)
    # That package passes on what another one defines.
    if name.startswith("partial_fc."):
        name = f"distributed.{name}"
    return f"unitsface_kernels.{name}"
