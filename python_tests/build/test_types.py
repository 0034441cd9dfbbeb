"""Types of the public names: public_names.py uses all of them, and runs as it is typed.

`make lint` has pyright read it in strict mode.
"""

from __future__ import annotations

import re

import public_names
import pytest
from support.helpers import PACKAGE, ROOT

import unitsface_kernels


def test_every_public_name_is_used() -> None:
    text = (ROOT / "python_tests" / "build" / "public_names.py").read_text()
    for name in unitsface_kernels.__all__:
        assert re.search(rf"\buk\.{name}\b|import .*\b{name}\b", text), name
    for name in unitsface_kernels.metrics.__all__:
        assert f"metrics.{name}" in text, name


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").read_text() == ""
    assert 'unitsface_kernels = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.filterwarnings("ignore:loss .* runs in operations of Torch")
def test_public_names_run_as_they_are_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Formulas are compiled by other tests.
    monkeypatch.setenv("UNITSFACE_POLICY_COMPILER", "off")
    public_names.main()
    assert capsys.readouterr().out.endswith(f"{unitsface_kernels.__version__}\n")
