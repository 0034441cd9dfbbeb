"""Types of the public names: public_names.py uses all of them, and runs as it is typed.

`make lint` has pyright read it in strict mode.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from pathlib import Path

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


def test_the_package_is_marked_as_typed() -> None:
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


def test_the_site_has_the_defaults_of_the_formulas() -> None:
    """It reads them from the sources; here they are those of the functions and modules."""
    path = ROOT / "docs" / "site" / "defaults.py"
    found = importlib.util.spec_from_file_location("site_defaults", path)
    assert found is not None
    assert found.loader is not None
    defaults = importlib.util.module_from_spec(found)
    found.loader.exec_module(defaults)
    compared = 0
    for name in unitsface_kernels.__all__:
        value = getattr(unitsface_kernels, name)
        if not callable(value) or not value.__module__.startswith("unitsface_kernels."):
            continue
        function = inspect.unwrap(value.__init__ if inspect.isclass(value) else value)
        source = inspect.getsourcefile(function)
        if source is None or PACKAGE not in Path(source).parents:
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        assert isinstance(node, ast.FunctionDef)
        given = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        plain = node.args.args[len(node.args.args) - len(node.args.defaults) :]
        for argument, default in [*given, *zip(plain, node.args.defaults, strict=True)]:
            written = "" if default is None else ast.unparse(default)
            if re.fullmatch(r"_[A-Z_]+\.\w+", written):
                shown = defaults.default_of(Path(source), written)
                parameter = inspect.signature(value).parameters[argument.arg]
                assert ast.literal_eval(shown) == parameter.default, f"{name}: {argument.arg}"
                compared += 1
    assert compared > 100
