"""Prints the packages of an extra of pyproject.toml, which pip alone installs with the package."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())

print(*EXTRAS["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
