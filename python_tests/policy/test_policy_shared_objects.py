"""Shared objects of users' losses: kept, checked before they are loaded, and what goes wrong."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.cases import Case
from support.compiled import (
    COMPILER,
    counting,
    failure,
    forget,
    needs_compiler,
    script,
    shared_objects,
)
from support.evaluation import check_against_reference
from support.grid import extended_if
from support.helpers import ROOT, Target, run_python
from support.policies import Contrastive, custom_problem

from unitsface_kernels import policy
from unitsface_kernels.backends.native import custom as compiled
from unitsface_kernels.backends.native import loader
from unitsface_kernels.backends.native.custom import compiler, shared_object
from unitsface_kernels.losses import custom
from unitsface_kernels.policy.triton_source import triton_module

NATIVE = Target("native", "cpu")

pytestmark = needs_compiler

_USE = """
import sys, torch
sys.path.insert(0, "python_tests")
from support.cases import Case
from support.policies import Contrastive, custom_problem
from unitsface_kernels.losses import custom
p = custom_problem(Case("ad hoc", rows=40), custom.spec(Contrastive()))
print(float(p.loss("native")), float(p.loss("reference")))
"""


def _use(**environment: str) -> tuple[float, float]:
    done = run_python("-W", "error", "-c", _USE, **environment)
    assert done.returncode == 0, done.stderr
    native, reference = map(float, done.stdout.split())
    return native, reference


def test_another_process_compiles_nothing(fresh: Path, tmp_path: Path) -> None:
    command, log = counting(tmp_path)
    for _ in range(2):
        native, reference = _use(UNITSFACE_CACHE_DIR=str(fresh), CXX=command)
        assert native == pytest.approx(reference, rel=1e-5)
        assert len(log.read_text().split()) == 1
    (kept,) = shared_objects(fresh)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    # Folders and files of the compilation are gone.
    names = sorted(path.name.split(".", 1)[1] for path in kept.parent.iterdir())
    assert names == ["so", "so.lock", "so.sha256"]


@pytest.mark.extended
def test_processes_compile_together_once(fresh: Path, tmp_path: Path) -> None:
    command, log = counting(tmp_path)
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "UNITSFACE_CACHE_DIR": str(fresh), "CXX": command},
    }
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _USE],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in running:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        native, reference = map(float, output.split())
        assert native == pytest.approx(reference, rel=1e-5)
    assert len(log.read_text().split()) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        pytest.param("digest", marks=pytest.mark.extended),
        pytest.param("no digest", marks=pytest.mark.extended),
        pytest.param("empty", marks=pytest.mark.extended),
    ],
)
def test_a_damaged_file_is_made_again(fresh: Path, monkeypatch, damage: str) -> None:
    spec = custom.spec(Contrastive())
    assert failure(spec) is None
    (kept,) = shared_objects(fresh)
    good = kept.read_bytes()
    digest = kept.with_name(kept.name + ".sha256")
    # A new file: this process has the old one mapped.
    kept.unlink()
    if damage == "truncated":
        kept.write_bytes(good[: len(good) // 2])
    elif damage == "empty":
        kept.touch()
    elif damage == "digest":
        kept.write_bytes(good)
        digest.write_text("0" * 64)
    else:
        kept.write_bytes(good)
        digest.unlink()
    forget(monkeypatch)
    assert failure(spec) is None
    assert kept.stat().st_size > len(good) // 2
    assert shared_object.files.is_intact(kept)
    check_against_reference(NATIVE, custom_problem(Case("ad hoc", rows=9), spec), torch.float32)


def test_a_whole_file_that_cannot_be_loaded_is_made_again(fresh: Path, monkeypatch) -> None:
    """It is of another system that shares the home folder."""
    native = loader.extension()
    spec, mine = custom.spec(Contrastive()), compiler.find_compiler()
    name = shared_object.name_of(shared_object.source_of(spec))
    kept = shared_object.files.private_folder(*shared_object.folder_names(native, mine)) / name
    shared_object.files.put(kept, b"\x7fELF of another system")
    assert failure(spec) is None
    assert kept.stat().st_size > 1000
    check_against_reference(NATIVE, custom_problem(Case("ad hoc", rows=9), spec), torch.float32)
    # Compiled again once; if it still cannot be loaded, the reason is reported.
    (kept.parent / name).unlink()
    forget(monkeypatch)
    monkeypatch.setenv("CXX", script(fresh / "c++", _NO_LIBRARY))
    reason = failure(spec)
    assert reason is not None
    assert "cannot be loaded" in reason


#: Writes what follows -o.
_NO_LIBRARY = """
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo no library > "$2"; fi
  shift
done
"""


def test_nothing_is_loaded_from_a_folder_of_others(fresh: Path) -> None:
    fresh.mkdir(mode=0o700)
    fresh.chmod(0o777)
    reason = failure(custom.spec(Contrastive()))
    assert reason is not None
    assert "can be written by others" in reason
    assert "UNITSFACE_CACHE_DIR" in reason
    assert shared_objects(fresh) == []


def test_without_a_cache_each_process_compiles(fresh: Path, monkeypatch) -> None:
    """A home folder that cannot be written costs a warning, not the kernels."""
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", "/proc/none")
    spec = custom.spec(Contrastive())
    with pytest.warns(RuntimeWarning, match="not kept.*/proc/none"):
        assert failure(spec) is None
    check_against_reference(NATIVE, custom_problem(Case("ad hoc", rows=9), spec), torch.float32)


def test_versions_do_not_share_files(monkeypatch) -> None:
    native = loader.extension()
    mine = compiler.find_compiler()

    def name(**changes) -> str:
        cpu = {"isa": native.cpu.isa, "flags": native.cpu.flags, "loss_abi": native.cpu.loss_abi}
        fake = SimpleNamespace(cpu=SimpleNamespace(**{**cpu, **changes}))
        return "/".join(shared_object.folder_names(fake, mine))

    other = compiler.Compiler(mine.command, "another version")
    found = {
        name(),
        name(isa=lambda: "baseline"),
        name(flags=lambda: "-O0"),
        name(loss_abi=1),
        "/".join(shared_object.folder_names(native, other)),
    }
    monkeypatch.setattr(shared_object, "__version__", "another")
    found.add(name())
    monkeypatch.setattr(shared_object, "_digest_of_headers", lambda: "another")
    found.add(name())
    assert len(found) == 7


def test_headers_of_another_extension_are_refused(fresh: Path) -> None:
    native = loader.extension()
    cpu = {n: getattr(native.cpu, n) for n in ("isa", "flags", "pool")}
    registered: list = []
    other = SimpleNamespace(
        cpu=SimpleNamespace(**cpu, loss_abi=7, register_loss=lambda *a: registered.append(a))
    )
    reason = compiled.failure(custom.spec(Contrastive()), other)
    assert reason is not None
    assert "are not those of the extension" in reason
    assert registered == []


@pytest.mark.extended
@pytest.mark.parametrize("isa", loader.extension().cpu.usable_isas())
def test_instruction_sets(fresh: Path, isa: str) -> None:
    """A loss is compiled for the set of the extension."""
    native, reference = _use(UNITSFACE_CACHE_DIR=str(fresh), UNITSFACE_CPU_ISA=isa)
    assert native == pytest.approx(reference, rel=1e-5)
    (kept,) = shared_objects(fresh)
    kernels = "avx512" if isa in ("avx512bf16", "amx") else isa
    assert kept.parent.name.startswith(f"cpu-{kernels}-")


# --- the compiler ---------------------------------------------------------------------------------


def test_no_compiler(fresh: Path, monkeypatch, tmp_path: Path) -> None:
    spec = custom.spec(Contrastive())
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = failure(spec)
    assert reason is not None
    assert "install g++ or clang++, or set CXX" in reason
    # The result is kept: a compiler is not looked for at every step.
    monkeypatch.setenv("CXX", str(COMPILER))
    assert failure(spec) == reason


@pytest.mark.parametrize("variable", ["CXX", "UNITSFACE_POLICY_COMPILER"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/nowhere/g++", "there is no /nowhere/g\\+\\+"),
        ("g++; touch {folder}/made", "there is no g\\+\\+;"),
        ("'g++", "is no command"),
    ],
)
def test_a_compiler_that_is_none(
    fresh: Path, monkeypatch, tmp_path: Path, variable: str, value: str, message: str
) -> None:
    """No shell reads it."""
    monkeypatch.setenv(variable, value.format(folder=tmp_path))
    with pytest.raises(compiler.CompilerError, match=message):
        compiler.find_compiler()
    assert not (tmp_path / "made").exists()


def test_the_named_compiler_is_used(fresh: Path, monkeypatch, tmp_path: Path) -> None:
    command, log = counting(tmp_path)
    monkeypatch.setenv("CXX", "/nowhere")
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", f"env WORD=1 {shlex.quote(command)}")
    assert failure(custom.spec(Contrastive())) is None
    assert len(log.read_text().split()) == 1


def test_the_report_has_the_compiler_of_losses(fresh: Path, monkeypatch) -> None:
    def said() -> str:
        return compiled.description(loader.extension())

    assert said().startswith(f"compiled by {COMPILER}, kept in {fresh}/policies/cpu-")
    monkeypatch.setenv("UNITSFACE_CACHE_DIR", "/proc/none")
    assert "by each process" in said()
    monkeypatch.setenv("CXX", "/nowhere")
    assert said() == "not compiled: CXX=/nowhere: there is no /nowhere"


def test_turned_off(fresh: Path, monkeypatch) -> None:
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    assert failure(custom.spec(Contrastive())) == "UNITSFACE_POLICY_COMPILER=off"
    assert shared_objects(fresh.parent) == []


def test_a_failing_compiler_is_quoted_in_one_line(fresh: Path, monkeypatch, tmp_path: Path) -> None:
    text = 'case "$*" in *--version*) exit 0;; esac\necho in file: >&2\n'
    text += f"echo 'x.h: error: {'a' * 500}' >&2\nexit 4"
    monkeypatch.setenv("CXX", script(tmp_path / "failing", text))
    reason = failure(custom.spec(Contrastive()))
    assert reason is not None
    assert "exit code 4: x.h: error: aaa" in reason
    assert "\n" not in reason
    assert len(reason) < 400
    # Neither what it left nor a folder of it stays.
    left = [path.name for path in fresh.rglob("*") if path.is_file()]
    assert all(name.endswith(".lock") for name in left)


def test_a_hanging_compiler_is_ended(fresh: Path, monkeypatch, tmp_path: Path) -> None:
    """With the processes that it started."""
    monkeypatch.setattr(compiler, "TIMEOUT_S", 1.0)
    text = 'case "$*" in *--version*) exit 0;; esac\n'
    text += f"sleep 300 &\necho $! > {tmp_path}/child\nwait"
    monkeypatch.setenv("CXX", script(tmp_path / "hanging", text))
    reason = failure(custom.spec(Contrastive()))
    assert reason is not None
    assert "did not end within 1 s" in reason
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        try:
            os.kill(child, 0)
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("its child runs on")


# --- what reaches the compiler --------------------------------------------------------------------

HOSTILE = (
    'A"); system("touch /tmp/x"); //',
    "A\n#include </etc/passwd>\n",
    "A */ int x = sizeof(\\\n) /*",
    "int",
    "Größe",
    "../../../etc/x",
    "%s$(touch x)`touch y`",
    "{policy}",
    '"""; import os; """',
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=extended_if(i > 2)) for i, n in enumerate(HOSTILE)]
)
def test_names_do_not_become_code(fresh: Path, name: str) -> None:
    """Names of classes, fields and choices: type() accepts any string for them."""
    members = {
        "__annotations__": dict.fromkeys((name, "field", "word"), policy.Number),
        name: 0.25,
        "field": 0.5,
        "word": policy.number(name, choices=(name, "other")),
        "positive": lambda self, c: 1 - c * getattr(self, name),
        "negative": lambda self, c: policy.where(self.word == name, c * self.field, 0),
    }
    spec = custom.spec(type(name, (policy.Pair,), members)())
    text = shared_object.source_of(spec)
    code = "\n".join(line.split("//")[0] for line in text.splitlines())
    assert set(text) <= set(map(chr, range(32, 127))) | {"\n"}
    assert "\\" not in text
    for word in ("system", "passwd", "touch", "etc", "sizeof"):
        assert word not in code
    directives = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert all(line.split()[1].startswith('"') for line in directives)
    assert len(directives) == 3
    tree = ast.parse(triton_module(spec.formula))
    kinds = [type(node).__name__ for node in tree.body]
    assert set(kinds) == {"Expr", "Import", "ImportFrom", "FunctionDef", "Assign"}
    assert kinds.count("Expr") == kinds.count("Assign") == 1
    assert failure(spec) is None
    problem = custom_problem(Case("ad hoc", rows=9), spec)
    check_against_reference(NATIVE, problem, torch.float32)
    assert all(path.is_relative_to(fresh) for path in shared_objects(fresh.parent))


# --- installations --------------------------------------------------------------------------------


def test_an_installation_has_the_headers(fresh: Path, monkeypatch, tmp_path: Path) -> None:
    """As setup.py packs them, they are all that a loss is compiled with."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    script = ModuleType("setup_script")
    script.__file__ = str(ROOT / "setup.py")
    exec(compile((ROOT / "setup.py").read_text(), script.__file__, "exec"), script.__dict__)
    command = script.PackHeaders(setuptools.Distribution({"packages": []}))
    command.ensure_finalized()
    command.build_lib = str(tmp_path / "installed")
    command.run()
    package = tmp_path / "installed" / "unitsface_kernels"
    monkeypatch.setattr(shared_object, "PACKAGE", package)
    for cached in (shared_object.headers, shared_object._digest_of_headers):
        cached.cache_clear()
        monkeypatch.setattr(shared_object, cached.__name__, cached.__wrapped__)
    assert shared_object.headers() == package / "csrc"
    assert {*command.get_outputs()} >= {str(path) for path in package.rglob("*.h")}
    assert failure(custom.spec(Contrastive())) is None
    # Without them, the reason is reported.
    shutil.rmtree(package)
    forget(monkeypatch)
    assert "headers are missing" in str(failure(custom.spec(Contrastive())))
