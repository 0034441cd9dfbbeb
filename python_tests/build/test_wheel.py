"""Wheels and source distributions, and the extension's interface to Python."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from support.helpers import ROOT

from unitsface_kernels.backends.native import loader

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


# --- the extension --------------------------------------------------------------------------------


def test_one_extension_serves_every_python() -> None:
    if os.name == "nt" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("setup.py says why there is no stable ABI")
    assert Path(str(loader.extension().__file__)).name == "_native.abi3.so"


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"n": "3"}, TypeError, "integer"),
        ({"n": 1.5}, TypeError, "integer"),
        ({"n": 2**70}, OverflowError, "too big"),
        ({"gradient_dtype": 2**40}, OverflowError, "too large"),
        ({"gradient_scale": "1"}, TypeError, "real number"),
        ({"cosines": 7}, TypeError, "address and a size in bytes, got int"),
        ({"cosines": (1, 2, 3)}, TypeError, "address and a size in bytes"),
        ({"cosines": (-1, 2)}, OverflowError, "negative"),
        ({"cosine": (1, 2)}, TypeError, "no field cosine"),
    ],
)
def test_a_field_refuses_what_it_cannot_hold(given, error, text) -> None:
    with pytest.raises(error, match=text):
        loader.extension().CpuSumTile(**given)


def test_names_of_fields_need_not_be_interned() -> None:
    name = "".join(["no", "t_a_field"])
    known = "".join(["cos", "ines"])
    sizes = {"n": 1, "m": 1, "stride": 1}
    with pytest.raises(ValueError, match="cosines has 2 bytes of 4"):
        loader.extension().LogsumexpTile(**sizes, **{known: (1, 2)})
    with pytest.raises(TypeError, match=name):
        loader.extension().LogsumexpTile(**{name: 1})


def test_functions_refuse_other_arguments() -> None:
    native = loader.extension()
    tile = native.CpuSumTile()
    run = native.cpu.sum_tile
    for arguments, error, text in (
        (("uss", [1.0], native.NormalizeRows(), 1), TypeError, "got NormalizeRows"),
        (("uss", [1.0], None, 1), TypeError, "expected CpuSumTile, got NoneType"),
        (("uss", [1.0], tile), TypeError, "expected 4 positional arguments, got 3"),
        (("uss", ["a"], tile, 1), TypeError, "real number"),
        ((1, [1.0], tile, 1), TypeError, "expected a string, got int"),
        (("uss", 1.0, tile, 1), TypeError, "iterable"),
        (("uss", [1.0], tile, 2**40), OverflowError, "too large"),
    ):
        with pytest.raises(error, match=text):
            run(*arguments)
    with pytest.raises(TypeError, match="keywords"):
        run("uss", [1.0], tile, threads=1)
    with pytest.raises(TypeError, match="by keyword"):
        native.CpuSumTile(1)
    with pytest.raises(TypeError, match="cannot create"):
        type(tile)()


def test_calls_and_errors_leave_no_references() -> None:
    native = loader.extension()
    rows, params, span = torch.zeros(2, 3), [1.0, 2.0], (12345678901, 98765432101)

    def calls() -> None:
        native.NormalizeRows(source=rows, n=0, d=3, rows=2)
        native.cpu.sum_tile("uss", params, native.CpuSumTile(), 1)
        native.CpuSumTile(cosines=span)
        native.cpu.usable_isas()
        for wrong in ({"n": 1.5}, {"no_field": 1}, {"n": 3, "m": 3, "stride": 3}):
            with pytest.raises((TypeError, ValueError)):
                native.CpuSumTile(**wrong)

    held = [type(native.CpuSumTile()), params, span, span[0], "uss", native.cpu, None]

    def counts() -> list[int]:
        gc.collect()
        return [sys.getrefcount(thing) for thing in held]

    calls()
    before = counts()
    for _ in range(200):
        calls()
    # None and strings are shared with all else that runs.
    assert all(now - then < 100 for now, then in zip(counts(), before, strict=True))


# --- public CI ------------------------------------------------------------------------------------


def test_the_workflow_runs_what_can_be_run_here() -> None:
    """Targets and scripts exist; the matrix has every declared Python, and the oldest Torch."""
    content = pytest.importorskip("yaml").safe_load(WORKFLOW.read_text())
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step
    ]
    targets = {target for line in commands for target in re.findall(r"make ([\w-]+)", line)}
    assert targets >= {"lint", "docs", "test", "wheel", "sanitize"}
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert targets <= set(phony[1].split())
    scripts = {path for line in commands for path in re.findall(r"[\w/]+\.(?:sh|py)", line)}
    assert "packaging/try_wheel.sh" in scripts
    assert all((ROOT / path).is_file() for path in scripts)
    metadata = (ROOT / "pyproject.toml").read_text()
    pythons = re.findall(r"Python :: (3\.\d+)", metadata)
    install = content["jobs"]["install"]["strategy"]["matrix"]
    assert install["python"] == pythons
    tested = content["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert [entry["python"] for entry in tested] == pythons
    oldest = [re.search(rf'"{name}>=([\d.]+)', metadata) for name in ("torch", "triton")]
    for versions in (install["versions"][0], tested[0]["versions"]):
        found = re.findall(r"==(\d+\.\d+)", versions)
        assert found == [entry[1] for entry in oldest if entry is not None]


# --- distributions --------------------------------------------------------------------------------

# In place of CMake: configures as it does, then takes the extension that is built already.
CMAKE = """#!/bin/sh
case "$1" in
  -S) exec {cmake} "$@" ;;
  --build) ;;
  --install) prefix=$(sed -n 's/^CMAKE_INSTALL_PREFIX:[A-Z]*=//p' "$2/CMakeCache.txt")
    mkdir -p "$prefix" && cp {extension} "$prefix/" ;;
esac
"""
# In place of what only releases need.
AUDITWHEEL = """#!/bin/sh
[ "$1 $2" = "repair --wheel-dir" ] && mkdir -p "$3" && cp "$4" "$3/"
"""
ABI3AUDIT = """#!/bin/sh
[ -f "$3" ]
"""


@pytest.mark.extended
@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")
def test_a_wheel_from_the_source_distribution(tmp_path) -> None:
    """Without a network and beside the sources; its first snippet runs without a compiler."""
    pytest.importorskip("setuptools")
    beside = str(Path(sys.executable).parent)
    path = f"{beside}:{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    if cmake is None or shutil.which("ninja", path=path) is None:
        pytest.skip("needs cmake and ninja")
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.so")
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    fakes = {
        "cmake": CMAKE.format(cmake=cmake, extension=loader.extension().__file__),
        "auditwheel": AUDITWHEEL,
        "abi3audit": ABI3AUDIT,
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }
    for name, text in fakes.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{tools}:{path}", **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    build = str(tree / "packaging" / "wheel.sh")
    run("bash", build, str(tools / "python"), UNITSFACE_LOCAL_VERSION="label")
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    assert "label" not in sdist.name
    (wheel,) = (tree / "dist").glob("*.whl")
    assert re.search(r"\+label-cp310-abi3-linux_\w+\.whl$", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = ROOT / "unitsface_kernels"
    wanted = {f"unitsface_kernels/{path.relative_to(package)}" for path in package.rglob("*.py")}
    headers = {
        f"unitsface_kernels/csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.h")
    }
    assert names >= wanted | headers | {"unitsface_kernels/py.typed"}
    assert "unitsface_kernels/_native.abi3.so" in names
    assert not any(name.startswith(("train", "bench", "python_tests")) for name in names)
    script = str(tree / "packaging" / "try_wheel.sh")
    told = run("bash", script, str(wheel), "python", TRY_ENV=str(tmp_path))
    assert re.search(r"unitsface_kernels [\d.]+, Python .*: loss \d", told)
