"""Generated kernels in the sources are those of the present formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.helpers import PACKAGE, ROOT, run_python

from unitsface_kernels.losses import REGISTRY, TOWERS
from unitsface_kernels.policy import generate

FILES = generate.generated_files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_those_of_the_formulas(path: Path) -> None:
    assert path.read_bytes() == FILES[path].encode()


def test_every_formula_has_its_files() -> None:
    """No other file is beside them."""
    own = {
        name
        for name, spec in {**REGISTRY, **TOWERS}.items()
        if spec.formula is not None and spec.policy is None and spec.triplet is None
    }
    folders = {
        ROOT / "csrc/include/unitsface/generated": (".h", own),
        PACKAGE / "backends/triton/generated": (".py", own),
    }
    for folder, (suffix, wanted) in folders.items():
        found = {path.stem for path in folder.iterdir() if path.suffix == suffix} - {"__init__"}
        assert found == wanted, folder


def test_a_changed_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpp, triton = tmp_path / "cpp", tmp_path / "triton"
    monkeypatch.setattr(generate, "_CPP", cpp)
    monkeypatch.setattr(generate, "_TRITON", triton)
    assert len(generate.generate()) == len(FILES)
    assert generate.generate(check=True) == []
    changed = cpp / "uss.h"
    text = changed.read_text()
    changed.write_text(text + "\n")
    (triton / "other.py").write_text("")
    assert generate.generate(check=True) == [
        f"{changed} is out of date",
        f"{triton / 'other.py'} has no formula",
    ]
    assert changed.read_text() != text
    generate.generate()
    assert changed.read_text() == text


def test_the_command_checks() -> None:
    done = run_python("-m", "unitsface_kernels.policy", "generate", "--check")
    assert done.returncode == 0, done.stderr
