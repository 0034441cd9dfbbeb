"""Structure that a search of the sources can measure: import cycles, repetition, parameters."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

import pytest
from support.helpers import ROOT

PRODUCT = ("unitsface_kernels", "train", "bench")
#: A run of lines of the same logic in two files is a function that is missing.
LONGEST_RUN = 12
MOST_PARAMETERS = 10
#: Public signatures, whose keywords are the options of a loss, and the flat schema of an operator.
MANY_PARAMETERS = (
    "unitsface_kernels/functional/",
    "unitsface_kernels/modules/",
    "unitsface_kernels/ops.py",
)
#: Kernels take pointers, strides and sizes one by one.
KERNELS = (
    "unitsface_kernels/backends/triton/kernels/",
    "unitsface_kernels/backends/triton/losses/",
)


def _sources(*folders: str) -> dict[str, ast.Module]:
    """Parsed sources by their path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(path: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules that a file imports at its top level, for type checking included."""
    package = _module(path) if path.endswith("__init__.py") else _module(path).rpartition(".")[0]
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in inside_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in modules else base)
    return (found & modules) - {_module(path)}


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a cycle, or none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            found = visit(other, [*way, module])
            if found:
                return found
        done.add(module)
        return []

    for module in sorted(graph):
        found = visit(module, [])
        if found:
            return found
    return []


@pytest.mark.parametrize("folder", PRODUCT)
def test_no_import_cycles(folder: str) -> None:
    sources = _sources(folder)
    modules = {_module(path) for path in sources}
    graph = {_module(path): _imports(path, tree, modules) for path, tree in sources.items()}
    assert _cycle(graph) == []


def test_the_search_for_cycles_finds_one() -> None:
    modules = {"p", "p.a", "p.b", "p.c"}
    sources = {
        "p/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
        "p/b.py": "from . import c",
        "p/c.py": "import p.a",
    }
    graph = {_module(p): _imports(p, ast.parse(text), modules) for p, text in sources.items()}
    assert _cycle(graph) == ["p.a", "p.b", "p.c", "p.a"]
    graph["p.c"].clear()
    assert _cycle(graph) == []


def _lines(tree: ast.Module) -> list[str]:
    """Lines of code: without comments, docstrings and imports, in one formatting."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        kept = [n for n in body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        if kept and isinstance(kept[0], ast.Expr) and isinstance(kept[0].value, ast.Constant):
            kept = kept[1:]
        node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    lines = [line.strip() for line in ast.unparse(tree).splitlines()]
    return [line for line in lines if line]


def _repetitions(sources: dict[str, list[str]]) -> list[str]:
    seen: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for path, lines in sources.items():
        for start in range(len(lines) - LONGEST_RUN + 1):
            seen[tuple(lines[start : start + LONGEST_RUN])].setdefault(path, start)
    return sorted(
        {
            " and ".join(sorted(where)) + f": {run[0]}"
            for run, where in seen.items()
            if len(where) > 1
        }
    )


def _native_lines(text: str) -> list[str]:
    """Lines of C++ or CUDA: without comments, inclusions and lone braces."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line.strip("{};") and not line.startswith("#include")]


def test_no_two_files_share_a_run_of_lines() -> None:
    sources = {path: _lines(tree) for path, tree in _sources(*PRODUCT).items()}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".def"):
            sources[path.relative_to(ROOT).as_posix()] = _native_lines(path.read_text())
    assert any(path.endswith(".cuh") for path in sources)
    # Generated files may share lines where their formulas do.
    written = {path: lines for path, lines in sources.items() if "/generated/" not in path}
    assert _repetitions(written) == []


def test_the_search_for_repetition_finds_one() -> None:
    run = "\n".join(f"a{i} = f({i})" for i in range(LONGEST_RUN))
    sources = {name: _lines(ast.parse(f'"""{name}."""\n# {name}\n{run}')) for name in "xy"}
    assert _repetitions(sources) == ["x and y: a0 = f(0)"]
    sources["y"] = _lines(ast.parse(run.replace("f(5)", "g(5)")))
    assert _repetitions(sources) == []
    run = run.replace("\n", ";\n")
    sources = {name: _native_lines(f'#include "{name}.h"\n{{\n// {name}\n{run}') for name in "xy"}
    assert _repetitions(sources) == ["x and y: a0 = f(0);"]


def test_functions_have_few_parameters() -> None:
    """A function with many parameters lacks a dataclass."""
    for path, tree in _sources(*PRODUCT).items():
        if path.startswith((*MANY_PARAMETERS, *KERNELS)):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            assert count <= MOST_PARAMETERS, f"{path}:{node.lineno} {node.name}: {count} parameters"
