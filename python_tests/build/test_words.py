"""The words of code and pages: American spelling, impersonal verbs, and docstrings that state their
subject.
"""

from __future__ import annotations

import ast
import re
import subprocess

import pytest
from support.helpers import ROOT

BRITISH = re.compile(
    r"neighbour|colour|behaviour|favour|labour|honour|artefact|licence|catalogue|whilst|grey\b"
    r"|\bcentre|(?:label|model|cancel|travel|signal)l(?:ed|ing)\b"
    r"|(?:normal|optim|serial|recogn|initial|organ|minim|maxim|general|synchron|summar|util)is"
    r"(?:e|es|ed|ing|ation)\b|analys(?:e|es|ed|ing)\b",
    re.IGNORECASE,
)
#: Programs do not know, ask, want, notice, forget or believe, and are not told.
PERSONAL = re.compile(
    r"\b(?:asks|asked (?:for|of)|(?:is|are|was|be|been|if) told|told apart|forgets|notices"
    r"|unnoticed|knows|wants|remembers|believes|thinks|pretends|speaks|hopes|blames|owes"
    r"|somebody|someone|nobody|everybody|anybody|whoever|in none's way)\b",
    re.IGNORECASE,
)
#: Words of a sentence whose subject is elsewhere.
FRAGMENT = re.compile(r"(?:Of|And|Also|Likewise|Those|That of)\b")
FOLDERS = ("unitsface_kernels", "train", "bench", "python_tests")


def _tracked(*suffixes: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    files = listed or [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*")]
    found = [name for name in files if name.endswith(suffixes) and name != _HERE]
    assert found, f"nothing to search with the endings {suffixes}"
    return found


_HERE = "python_tests/build/test_words.py"


TEXTS = (".py", ".h", ".cpp", ".cu", ".cuh", ".def", ".md", ".ipynb", ".yaml", ".toml", ".sh")


@pytest.mark.parametrize("words", [BRITISH, PERSONAL], ids=["american", "impersonal"])
def test_words_of_all_texts(words: re.Pattern[str]) -> None:
    for name in (*_tracked(*TEXTS), "Makefile", "CMakeLists.txt"):
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            word = words.search(line)
            assert word is None, f"{name}:{number}: {word[0] if word else ''}"


def test_docstrings_state_their_subject() -> None:
    for name in _tracked(".py"):
        if not name.startswith(FOLDERS):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                where = f"{name}:{getattr(node, 'lineno', 1)}"
                assert not FRAGMENT.match(text), f"{where}: {text.splitlines()[0]}"


def test_the_search_finds_words() -> None:
    for word in ("neighbours", "Modelled", "normalised", "centre", "grey"):
        assert BRITISH.search(f"some {word} here"), word
    for word in ("neighbors", "modeled", "parallel", "noise", "promise", "optimistic", "disguised"):
        assert BRITISH.search(f"some {word} here") is None, word
    for text in ("the driver knows", "it asks for more", "Nobody reads it", "cannot be told apart"):
        assert PERSONAL.search(text), text
    for text in ("known sizes", "the number asked", "tolerances", "tasks", "a wanted gradient"):
        assert PERSONAL.search(text) is None, text
    assert FRAGMENT.match("Of the rows.")
    assert FRAGMENT.match("Offsets of rows.") is None
