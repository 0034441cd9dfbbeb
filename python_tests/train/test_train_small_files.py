"""Lists, matrices and caches beside the images: damaged ones are errors in one line."""

from __future__ import annotations

import json
import struct
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fuzz.mutation import outcome
from support.training import ROOT  # noqa: F401  # makes train importable

from train.errors import UserError
from train.evaluation.ijb_meta import read_subjects
from train.evaluation.lists import inside, integers, read_matrix
from train.evaluation.megaface_files import read_list
from train.small_files import load_npz
from unitsface_kernels.backends.triton.autotune_store import Store


def npy(header: str, content: bytes = b"\0" * 48) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + content


def shaped(shape: str, kind: str = "<f4") -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': ("), r"not a \.npy file, or damaged"),
        (npy("(" * 100), r"not a \.npy file, or damaged"),
        (npy(shaped("(3, 1099511627776)")), "expected 13194139533312 bytes of numbers, it has 48"),
        (npy(shaped("(3, 99999999999999999999)")), "bytes of numbers, it has 48"),
        (npy(shaped("(3, -4)")), r"expected numbers, got \(3, -4\)"),
        (npy(shaped("(3, 4)", "|O")), r"expected numbers, got \(3, 4\) of object"),
        (npy(shaped("(3, 4)", "<i4")), "expected 3 rows of floats, got .* of int32"),
        (npy(shaped("(3, 4)"), b"\0" * 47), "expected 48 bytes of numbers, it has 47"),
        (b"\x93NUMPY\1\0\xff\xff", r"not a \.npy file, or damaged"),
        (b"PK\3\4" + bytes(40), r"not a \.npy file, or damaged"),
        (b"\x80\4N.", r"not a \.npy file, or damaged"),
        (b"", r"not a \.npy file, or damaged"),
    ],
)
def test_matrices_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.npy"
    path.write_bytes(content)
    assert outcome(lambda: read_matrix(path, rows=3), (UserError,)) is None
    with pytest.raises(UserError, match=rf"m\.npy: .*({message})"):
        read_matrix(path, rows=3)


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
def test_matrices_as_numpy_writes_them(tmp_path: Path, kind: str) -> None:
    matrix = np.arange(12, dtype=kind).reshape(3, 4)
    for order in "CF":
        np.save(tmp_path / "m.npy", np.asarray(matrix, order=order))
        read = read_matrix(tmp_path / "m.npy", rows=3)
        assert read.dtype == np.float32
        assert np.array_equal(read, matrix)


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_archives_of_arrays_take_no_more_than_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    labels = np.arange(3)
    np.savez(path, features=np.eye(3, dtype=np.float32), labels=labels, names=np.array(["a", "b"]))
    features, found, names = load_npz(path, "features", "labels", "names")
    assert np.array_equal(features, np.eye(3))
    assert np.array_equal(found, labels)
    assert names.tolist() == ["a", "b"]
    whole = path.read_bytes()
    huge = npy(shaped("(3, 1099511627776)"))
    zeros = npy(shaped("(16, 1048576)"), bytes(64 << 20))
    for content, message in (
        (whole[:-30], "not a zip file"),
        (whole.replace(b"labels", b"lapels"), "no item|cannot read"),
        (archive(path, {"features": huge}).read_bytes(), "expected 13194139533312 bytes"),
        (archive(path, {"features": zeros}, 8).read_bytes(), "bytes when unpacked"),
        (archive(path, {"features": npy(shaped("(3,)", "|O"))}).read_bytes(), "of object"),
        (b"", "not a zip file"),
    ):
        path.write_bytes(content)
        read = partial(load_npz, path, "features", "labels")
        assert outcome(read, (UserError,), memory=64 << 20) is None
        with pytest.raises(
            UserError, match=rf"f\.npz: cannot read features, labels: .*({message})"
        ):
            read()


def test_lines_of_tables_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    head = "TEMPLATE_ID,SUBJECT_ID\n"
    for text, message in (
        (f"{head}1,{'2' * 200_000}\n", "line 2"),
        (f'{head}1,"{"x" * 200_000}\n', "line 2: not a line of a CSV file"),
        (f"{'A' * 200_000}\n", "x.csv"),
        (f"{head}1\n", "line 2: expected 2 columns, got 1"),
    ):
        path.write_text(text)
        assert outcome(lambda: read_subjects(path), (UserError,)) is None
        with pytest.raises(UserError, match=message):
            read_subjects(path)
    for text in ("1 2\n" + "9" * 100_000, "1 " * 100_000, "1 2 3\n"):
        path.write_text(text)
        assert outcome(lambda: integers(path, "a b"), (UserError,)) is None
        with pytest.raises(UserError, match=r"x\.csv, line \d: expected integers a b"):
            integers(path, "a b")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../x", "a\\x", "a\0x", "a\nx", "\ud800.jpg", "a/", "x" * 5000]
)
def test_names_that_no_file_below_a_folder_has(name: str) -> None:
    with pytest.raises(UserError, match="expected a path within the folder"):
        inside(name, "here")
    assert inside("a b/ü.jpg", "here") == "a b/ü.jpg"


def test_lists_of_megaface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "list.json"
    for values, message in (
        ("[" * 100_000, "list.json: not JSON: it is nested too deeply"),
        ('{"path": ["a/1.jpg"], "id": [[1]]}', "'id' to be a list of names or numbers"),
        (json.dumps({"path": ["\ud800/1.jpg"]}), "path 0: expected a path within"),
        ('{"path": ["a/1.jpg"], "id": [1' + "0" * 5000 + "]}", "not JSON"),
    ):
        path.write_text(values)
        assert outcome(lambda: read_list(path, tmp_path, people=True), (UserError,)) is None
        with pytest.raises(UserError, match=message):
            read_list(path, tmp_path, people=True)
    for name in ("a/1.jpg", "a/._1.jpg", ".b/2.jpg", "a/2.jfif", "a/3.txt"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    assert read_list(None, tmp_path / "images", people=True).names == ["a/1.jpg", "a/2.jfif"]
    assert "1 file(s) without the ending of an image that is read (such as a/3.txt)" in (
        capsys.readouterr().err
    )


def test_a_cache_of_nested_brackets_is_ignored(tmp_path: Path) -> None:
    store = Store(tmp_path, {"device": "x"})
    assert store.path is not None
    for text in ("[" * 100_000, '{"entries": ' * 100_000, "9" * 10_000):
        store.path.write_text(text)
        with pytest.warns(RuntimeWarning, match="ignored"):
            assert Store(tmp_path, {"device": "x"}).entries == {}


def test_messages_are_one_line_that_a_terminal_shows() -> None:
    assert str(UserError("a\nb  \x1b[2J \ud800")) == r"a b \x1b[2J \ud800"
    assert len(str(UserError("x" * 10**6))) <= 2000
    assert len(str(UserError("\ud800" * 10**6))) <= 2000
