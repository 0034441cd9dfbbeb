"""Builds, installations, and messages where they lack something: nothing is compiled here."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.helpers import PACKAGE, ROOT

from unitsface_kernels import PartialFC, __version__, dispatch, fused_uss_loss, resolve_backend
from unitsface_kernels.backends.native import images, loader

# --- setup.py -------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    """setup.py as a module, on a machine that has every tool."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    module = ModuleType("setup_script")
    module.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), module.__file__, "exec"), module.__dict__)
    monkeypatch.setattr(module, "_require_tools", lambda: None)
    return module


def _build(script: ModuleType, build: Path) -> list[str]:
    """The command that configures."""
    commands: list[list[str]] = []
    command = SimpleNamespace(
        get_ext_fullpath=lambda name: str(build / "_native.so"),
        build_temp=str(build),
        _run=lambda command, stage: commands.append(command),
    )
    script.CMakeBuild.build_extension(command, SimpleNamespace(name="unitsface_kernels._native"))
    return commands[0]


def test_options_of_an_earlier_build_do_not_stick(script, tmp_path, monkeypatch) -> None:
    for name in script.OPTIONS:
        monkeypatch.delenv(name, raising=False)
    assert {f"-U{name}" for name in script.OPTIONS} <= set(_build(script, tmp_path))
    monkeypatch.setenv("UNITSFACE_CUDA", "OFF")
    assert "-DUNITSFACE_CUDA=OFF" in _build(script, tmp_path)
    text = (ROOT / "CMakeLists.txt").read_text()
    for name in script.OPTIONS:
        assert f"set({name} " in text


@pytest.mark.parametrize("change", ["nothing", "place", "compiler", "nvcc", "no record"])
def test_a_build_folder_of_other_inputs_is_removed(script, tmp_path, monkeypatch, change) -> None:
    _build(script, tmp_path)
    cache = tmp_path / "cmake" / "CMakeCache.txt"
    cache.write_text("kept")
    if change == "place":
        monkeypatch.setattr(script, "ROOT", tmp_path / "elsewhere")
    elif change == "compiler":
        monkeypatch.setenv("CXX", "another")
    elif change == "nvcc":
        which = shutil.which
        monkeypatch.setattr(
            script.shutil, "which", lambda n, *a, **k: f"/new/{n}" if n == "nvcc" else which(n)
        )
    elif change == "no record":
        (tmp_path / "cmake" / "inputs.json").unlink()
    _build(script, tmp_path)
    assert cache.exists() == (change == "nothing")


def test_missing_build_tools_are_one_line(script, monkeypatch) -> None:
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), script.__dict__)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        script._require_tools()
    text = str(stopped.value)
    assert "pip install cmake ninja" in text
    assert "--no-build-isolation" in text
    assert "\n" not in text


def test_a_source_distribution_has_every_source() -> None:
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    (patterns,) = (line.split()[2:] for line in lines if line.startswith("recursive-include csrc"))
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.is_file():
            assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path
    assert "include CMakeLists.txt" in lines


@pytest.mark.slow
def test_the_reason_of_an_nvcc_failure_is_reported(tmp_path) -> None:
    """As configured by CMake with a compiler that refuses its host compiler."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'x.h: #error -- unsupported GNU version!' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    done = subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        env={**os.environ, "CUDACXX": str(nvcc)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "unsupported GNU version" in done.stdout.split("CUDA kernels: no (")[1]


# --- dependencies ---------------------------------------------------------------------------------

#: Names of packages where they differ from those of their modules.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
#: Compared with where they are installed; see CONTRIBUTING.md.
PEERS = {"cut-cross-entropy", "inf-cl", "liger-kernel", "quack", "siglip-kernel"}
OWN = {"unitsface_kernels", "train", "bench"}


def _declared(*groups: str) -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    lists = dict(re.findall(r"^([\w-]+) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL))
    entries = (entry for group in groups for entry in re.findall(r'"([\w.-]+)', lists[group]))
    return {entry.lower().replace("_", "-") for entry in entries}


@pytest.mark.parametrize(
    ("folder", "groups"),
    [
        ("unitsface_kernels", ["dependencies", "metric-learning"]),
        ("train", ["dependencies", "train", "timm", "export", "deployment", "wandb"]),
        ("bench", ["dependencies", "bench", "train"]),
    ],
)
def test_every_import_is_declared(folder: str, groups: list[str]) -> None:
    declared = _declared(*groups) | (PEERS if folder == "bench" else set())
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names}:
                beside = (path.parent / f"{name}.py").exists()  # of a file that runs as a script
                if name not in sys.stdlib_module_names and name not in OWN and not beside:
                    needed = DISTRIBUTIONS.get(name, name).replace("_", "-")
                    assert needed in declared, f"{path.relative_to(ROOT)} imports {name}"


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiled", "runs", "refused"),
    [
        ("80,90", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (7, 5)]),
        ("80-real,90-real", [(8, 0), (8, 9), (9, 0)], [(7, 5), (10, 0), (12, 1)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90-virtual", [(9, 0), (10, 3)], [(8, 9)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("120-real;80-real,80-virtual", [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
    ],
)
def test_which_devices_a_build_runs_on(compiled, runs, refused) -> None:
    assert all(images.fits(compiled, capability) for capability in runs)
    assert not any(images.fits(compiled, capability) for capability in refused)


def test_architectures_in_words() -> None:
    text = images.described("80-real,90-real,90-virtual")
    assert text == "machine code for 8.0 and 9.0, PTX for 9.0"


@pytest.fixture
def fresh():
    """Results of the loader are cached; not across these tests."""
    cached = (loader.cuda_failure, loader.warn_of_fallback, loader._image_failure)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def gpus(monkeypatch, fresh) -> list[tuple[int, int]]:
    """Capabilities of devices that are played, 9.0 and 7.5; the current one is the first."""
    capabilities = [(9, 0), (7, 5)]

    def index(device) -> int:
        return torch.device("cuda" if device is None else device).index or 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[index(device)]
    )
    cuda = SimpleNamespace(device_count=lambda: (2, ""), compiled_archs=lambda: "80,90")
    extension = SimpleNamespace(cpu=loader.extension().cpu, cuda=cuda)
    monkeypatch.setattr(loader, "_load", lambda: (extension, None))
    return capabilities


def test_auto_takes_no_kernels_that_the_device_cannot_run(gpus) -> None:
    """The device is that of the tensors, whichever is current."""
    old = torch.device("cuda", 1)
    with pytest.warns(RuntimeWarning, match=r"7\.5.*UNITSFACE_CUDA_ARCHS=75"):
        assert dispatch.resolve("auto", old, torch.float32) == "reference"
    with pytest.raises(ValueError, match=r"machine code for 8\.0 and 9\.0.*7\.5"):
        dispatch.resolve("native", old, torch.bfloat16)
    assert dispatch.row_kernels(old) is None
    for device in ("cuda", torch.device("cuda", 0)):
        assert dispatch.resolve("native", device, torch.float32) == "native"
    gpus[0] = (8, 9)
    assert dispatch.unavailable("native", "cuda", torch.float32) is None
    gpus[0] = (7, 0)
    assert "7.0" in str(dispatch.unavailable("native", "cuda", torch.float32))


def test_an_image_that_the_driver_refuses(gpus, monkeypatch) -> None:
    cuda = loader.extension().cuda
    cuda.image_failure = lambda: "the provided PTX was compiled with an unsupported toolchain"
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    assert "unsupported toolchain" in str(dispatch.unavailable("native", "cuda:0", torch.float32))


# --- falling back ---------------------------------------------------------------------------------


def test_fallback_without_the_extension_warns_once(monkeypatch, fresh, recwarn) -> None:
    monkeypatch.setattr(loader, "_load", lambda: (None, "the compiled extension is played away"))
    feats, labels = torch.randn(4, 8, requires_grad=True), torch.arange(4)
    for _ in range(3):
        fused_uss_loss(feats, labels, 0.0).backward()
    told = [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning]
    assert len(told) == 1
    assert "played away" in told[0]
    assert resolve_backend("auto", "cpu", torch.float64) == "reference"
    with pytest.raises(ValueError, match="played away"):
        PartialFC("cosface", embedding_size=8, num_classes=4)(feats, labels)
    assert dispatch.row_kernels(torch.device("cpu")) is None


def test_no_warning_for_tensors_without_kernels(recwarn, fresh) -> None:
    assert resolve_backend("auto", "cpu", torch.float64) == "reference"
    assert resolve_backend("auto", "meta", torch.float32) == "reference"
    assert not recwarn.list


def test_sources_that_hide_an_installed_extension_are_named(tmp_path, monkeypatch) -> None:
    clone, site = (tmp_path / name / PACKAGE.name for name in ("clone", "site"))
    for folder in (clone, site):
        folder.mkdir(parents=True)
    monkeypatch.setattr(loader, "PACKAGE", clone)
    monkeypatch.setattr(sys, "path", [str(clone.parent), str(site.parent)])
    assert str(clone) not in loader._remedy()
    suffix = loader.importlib.machinery.EXTENSION_SUFFIXES[0]
    (site / f"_native{suffix}").touch()
    assert str(clone) in loader._remedy()
    assert str(site) in loader._remedy()


# --- metadata -------------------------------------------------------------------------------------


def test_versions_and_licenses_agree(script, monkeypatch) -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in citation
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "\nlicense: MIT\n" in citation
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    # In the form that the installed setuptools takes.
    taken = {}
    monkeypatch.setattr(script.setuptools, "setup", lambda **options: taken.update(options))
    for version, form in (("64.0.0", "license"), ("84.2.1", "license_expression")):
        monkeypatch.setattr(script.setuptools, "__version__", version)
        taken.clear()
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), script.__dict__)
        assert taken.pop(form) == "MIT"
        assert {"license", "license_expression"}.isdisjoint(taken)


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"), ROOT / ".pre-commit-config.yaml"],
    ids=lambda path: path.name,
)
def test_templates_and_hooks_can_be_read(path: Path) -> None:
    content = pytest.importorskip("yaml").safe_load(path.read_text())
    if "repos" in content:
        (local,) = content["repos"]
        for hook in local["hooks"]:
            program, *rest = hook["entry"].split()
            assert program.startswith(".venv/bin/")
            assert all((ROOT / name).is_file() for name in rest if name.endswith(".py"))
        return
    assert {*content} >= {"name", "description", "body"}
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
