"""The rules of the layers that a search of the sources can check."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from support.helpers import PACKAGE, ROOT

import unitsface_kernels
from unitsface_kernels import dispatch, modules, validate
from unitsface_kernels.losses import REGISTRY

CSRC = ROOT / "csrc"


# They measure a backend from inside, or stand in for what is below it.
TUNES_INTERNALS = (
    *(
        "bench/tile_sizes.py",
        "bench/breakdown.py",
        "bench/cpu_model.py",
        "bench/fake_device/",
        "bench/gpu_model/",
    ),
    *("bench/gpu_check/alternatives.py", "bench/gpu_check/compile_kernels.py"),
    *("bench/generated_policies.py", "bench/custom_policies.py"),
)


def _sources(folder: Path, *suffixes: str) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.suffix in suffixes]
    assert found, f"nothing to search in {folder}"
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_torch_header_in_csrc() -> None:
    for path in _sources(CSRC, ".h", ".cpp", ".cu", ".cuh"):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert not re.search(r"torch|ATen|c10", line), f"{_name(path)}: {line}"


def test_policies_need_neither_framework_nor_runtime() -> None:
    for path in _sources(CSRC / "include", ".h"):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith("#include"):
                assert not re.search(r"binding\.h|cuda|Python\.h", line), f"{_name(path)}: {line}"


def test_only_one_header_includes_python() -> None:
    binding = [
        _name(path)
        for path in _sources(CSRC, ".h", ".cpp", ".cu")
        if "include <Python.h>" in path.read_text()
    ]
    assert binding == ["csrc/binding.h"]


def _raised(path: Path) -> list[ast.Call]:
    """Every ``raise ValueError(...)`` and ``raise TypeError(...)`` of a source."""
    raised = [n.exc for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise)]
    return [
        exc
        for exc in raised
        if isinstance(exc, ast.Call) and ast.unparse(exc.func) in ("ValueError", "TypeError")
    ]


def test_arguments_are_checked_before_a_backend_runs() -> None:
    """Drivers and engines raise no errors of arguments; the dispatcher raises the backend's."""
    for path in _sources(PACKAGE / "backends", ".py"):
        assert not _raised(path), _name(path)
    assert len(_raised(PACKAGE / "dispatch.py")) == 1


def test_messages_hold_what_was_given() -> None:
    """A value or a name is part of every message, but where nothing can be shown."""
    fixed = {
        "parameter must be one of the optimizer's parameters, got another",
        "far must have at least one rate, got none",
        "batch_offset must be given together with memory, got memory=None",
    }
    found = set()
    for path in _sources(PACKAGE, ".py"):
        for exc in _raised(path):
            assert len(exc.args) == 1, f"{_name(path)}:{exc.lineno}"
            if isinstance(exc.args[0], ast.Constant):
                found.add(exc.args[0].value)
    assert found == fixed


def test_asserts_only_narrow_types() -> None:
    """``python -O`` drops an ``assert``, so none checks what a user passes."""
    for folder in ("functional", "modules", "metrics", "adapters", "validate", "distributed"):
        for path in _sources(PACKAGE / folder, ".py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Assert):
                    condition = ast.unparse(node.test)
                    narrows = re.fullmatch(r"[\w.]+ is not None|isinstance\(.*\)", condition)
                    assert narrows, f"{_name(path)}:{node.lineno}"


def test_checks_in_validate_are_shared() -> None:
    """A check with one caller stands in its caller.

    Excepted are what operators check for backends, and what belongs to the calls of all functions
    of a topology.
    """
    alone = {"class_index", "memory_pair", "operands", "packed", "report_later"}
    text = "\n".join(path.read_text() for path in _sources(PACKAGE, ".py"))
    for name in validate.__all__:
        if name.islower():
            uses = len(re.findall(rf"(?<!def )\b{name}\(", text))
            assert uses > 1 or name in alone, name


def _strided_ranges(path: Path) -> list[int]:
    """Lines of loops over ``range`` with a step: an order of blocks."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "range"
        and len(node.args) == 3
    ]


def test_one_file_orders_tiles() -> None:
    """Drivers and metrics take their tiles from ``tiles.py`` and its blocks from nowhere else."""
    scheduler = PACKAGE / "backends" / "streaming" / "tiles.py"
    assert len(_strided_ranges(scheduler)) == 1
    for folder in (scheduler.parent, PACKAGE / "metrics"):
        for path in _sources(folder, ".py"):
            if path != scheduler:
                assert _strided_ranges(path) == [], _name(path)


def test_kernels_are_reached_through_the_dispatcher() -> None:
    """Only it, and ``python -m unitsface_kernels``, which reports on it, import the extension's."""
    found = set()
    for path in _sources(PACKAGE, ".py"):
        if (PACKAGE / "backends") in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
                if any(re.search(r"backends\.native\b", name) for name in names):
                    found.add(_name(path))
    assert found == {"unitsface_kernels/dispatch.py", "unitsface_kernels/__main__.py"}


def test_tile_work_takes_few_arguments() -> None:
    """At most 10 in engines and drivers; kernels of Triton take every tensor on its own."""
    for path in _sources(PACKAGE / "backends", ".py"):
        if path.name == "call.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            jitted = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            assert jitted or count <= 10, f"{_name(path)}:{node.lineno} {node.name}: {count}"


@pytest.mark.parametrize("folder", ["train", "bench"])
def test_applications_import_only_the_public_api(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if _name(path).startswith(TUNES_INTERNALS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    assert not alias.name.startswith("unitsface_kernels."), where
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                assert not node.module.startswith("unitsface_kernels."), where
                if node.module == "unitsface_kernels":
                    for alias in node.names:
                        assert alias.name in unitsface_kernels.__all__, f"{where}: {alias.name}"


def _mentions(path: Path) -> list[str]:
    """Names of losses and of their policies in a source, comments left out."""
    text = path.read_text()
    if path.suffix == ".py":
        # Names and strings of the code; docstrings and comments may explain.
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                body[0] = ast.Pass()
        text = ast.unparse(tree)
    else:
        text = re.sub(r"//.*|/\*.*?\*/", "", text)
    words = set(re.findall(r"[A-Za-z0-9]+", re.sub(r"_", "", text).lower()))
    return [name for name in REGISTRY if name.replace("_", "") in words]


def _is_kernel(path: Path) -> bool:
    """Tests of kernels name the policies that they run."""
    return not path.stem.startswith("test_")


# Everything that must not depend on a loss: the registry and loss_list.def are its only sources.
LOSS_FREE = [
    *(path for path in _sources(PACKAGE / "backends" / "streaming", ".py")),
    *(path for path in _sources(PACKAGE / "backends" / "native", ".py")),
    *(path for path in (PACKAGE / "backends" / "triton").glob("*.py")),
    *(path for path in (PACKAGE / "backends" / "triton" / "kernels").glob("*.py")),
    *(path for path in _sources(CSRC / "cpu", ".h", ".cpp")),
    *(path for path in _sources(CSRC / "cuda", ".h", ".cpp", ".cu", ".cuh") if _is_kernel(path)),
    CSRC / "module.cpp",
    *(path for path in (CSRC / "include" / "unitsface").glob("*.h") if path.stem != "losses"),
    PACKAGE / "backends" / "reference.py",
    PACKAGE / "losses" / "spec.py",
    PACKAGE / "modules" / "class_loss.py",
    PACKAGE / "modules" / "registered.py",
    PACKAGE / "ops.py",
    PACKAGE / "dispatch.py",
    *(path for path in _sources(PACKAGE / "validate", ".py")),
]


@pytest.mark.parametrize("path", LOSS_FREE, ids=_name)
def test_no_loss_outside_its_own_files(path: Path) -> None:
    assert _mentions(path) == []


def test_the_search_for_losses_finds_them() -> None:
    for name in REGISTRY:
        assert name in _mentions(PACKAGE / "losses" / f"{name}.py")
        if REGISTRY[name].triplet is None:
            assert name in _mentions(CSRC / "include" / "unitsface" / "loss_list.def")
        assert name in _mentions(PACKAGE / "losses" / "__init__.py")


def test_files_are_readable_in_one_sitting() -> None:
    """Files stay near 400 lines."""
    for folder in (PACKAGE, CSRC, ROOT / "python_tests"):
        for path in _sources(folder, ".py", ".h", ".cpp", ".cu", ".cuh", ".def"):
            lines = len(path.read_text().splitlines())
            assert lines <= 450, f"{_name(path)} has {lines} lines"


def test_public_names_exist_and_are_documented() -> None:
    for name in unitsface_kernels.__all__:
        value = getattr(unitsface_kernels, name)
        if callable(value):
            assert value.__doc__, name
    for spec in REGISTRY.values():
        assert spec.function in unitsface_kernels.__all__
        assert spec.source
    classes = {**modules.CLASS_LOSSES, **modules.PAIR_LOSSES}
    for cls in classes.values():
        assert cls.__name__ in unitsface_kernels.__all__


def _literal_defaults(function: object) -> set[str]:
    """Parameters whose default stands in the signature, not in the spec."""
    arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    named = [*zip(arguments.args[::-1], arguments.defaults[::-1], strict=False)]
    named += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {argument.arg for argument, default in named if isinstance(default, ast.Constant)}


def test_defaults_of_a_loss_are_written_once() -> None:
    """In its spec: signatures of functions and modules refer to it."""
    classes = {**modules.CLASS_LOSSES, **modules.PAIR_LOSSES}
    for cls in classes.values():
        if "loss" in vars(cls) and cls.loss in REGISTRY:
            assert not _literal_defaults(cls.__init__) & REGISTRY[cls.loss].defaults().keys()
    for spec in REGISTRY.values():
        function = getattr(unitsface_kernels, spec.function)
        assert not _literal_defaults(function) & spec.defaults().keys()
        signature = inspect.signature(function)
        for name, value in spec.defaults().items():
            assert signature.parameters[name].default == value, f"{spec.function}: {name}"
        assert signature.parameters["backend"].default == "auto"
        assert signature.parameters["reduction"].default == "mean"
    assert set(dispatch.BACKENDS) == {"reference", "native", "triton"}
