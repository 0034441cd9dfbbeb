"""Small files around images: lists of IJB and MegaFace, features, a run's figures, caches."""

from __future__ import annotations

import io
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from train.errors import UserError
from train.evaluation.ijb_meta import GALLERIES, Faces, read_faces, read_pairs, read_search
from train.evaluation.lists import read_matrix
from train.evaluation.megaface_files import (
    FeatureError,
    read_feature,
    read_list,
    read_noises,
    without_noises,
    write_feature,
)
from train.tools import run_report
from unitsface_kernels.backends.triton.autotune_store import Store

from .mutation import mutate, outcome

_ENVIRONMENT = {"device": "any"}
_TOKENS = (
    *(b"\n", b"\t", b",", b" ", b"\r", b"\0", b"\xff", b'"', b"../", b"/", b"\\u0000", b"\\ud800"),
    *(b'"path":', b'"id":', b"null", b"NaN", b"[[", b"{}", b"TEMPLATE_ID", b"\xef\xbb\xbf", b"#"),
    *(b"'<f4'", b"'O'", b"'<f8'", b"(3, ", b"True", b"'descr'", b"PK\3\4", b"\x80\4"),
)


@cache
def _samples() -> dict[str, bytes]:
    faces = [(f"{i}.jpg", i // 2, i) for i in range(6)]
    points = " ".join(str(float(i)) for i in range(10))
    table = "TEMPLATE_ID,SUBJECT_ID,FILENAME\n" + "".join(f"{t},{t},x.jpg\n" for t in range(3))
    matrix = io.BytesIO()
    np.save(matrix, np.ones((3, 4), np.float32))
    names = [f"person{i}/{i}.jpg" for i in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        write_feature(path, np.ones(8, np.float32))
        feature = path.read_bytes()
        store = Store(Path(folder), _ENVIRONMENT)
        store.add("key", {"product": {"a": 1}, "seconds": 0.1})
        assert store.path is not None
        cache_file = store.path.read_bytes()
    text = {
        "ijbc_face_tid_mid.txt": "".join(f"{n} {t} {m}\n" for n, t, m in faces),
        "ijbc_name_5pts_score.txt": "".join(f"{n} {points} 0.9\n" for n, _, _ in faces),
        "ijbc_template_pair_label.txt": "0 1 0\n0 0 1\n1 2 0\n",
        **{f"ijbc_1N_gallery_{name}.csv": table for name in GALLERIES["ijbc"]},
        "ijbc_1N_probe_mixed.csv": table,
        "facescrub_lst": "".join(f"{name}\n" for name in names),
        "list.json": json.dumps({"path": names, "id": ["a", "b", 3]}),
        "noises.txt": "# text\nfile\t0/0/1.jpg\n2.jpg\n",
    }
    files = {name: content.encode() for name, content in text.items()}
    arrays = io.BytesIO()
    people = {"labels": np.arange(3), "identities": np.array(["a", "b", "c"])}
    np.savez(arrays, features=np.eye(3, dtype=np.float32), **people)
    files["features.npz"] = arrays.getvalue()
    files["metrics.jsonl"] = b'{"step": 1, "epoch": 0.5, "loss": 3.0}\n' * 3
    return {**files, "m.npy": matrix.getvalue(), "x.bin": feature, "cache.json": cache_file}


def _read(folder: Path, name: str) -> None:
    if name.startswith("ijbc"):
        faces: Faces = read_faces(folder, "ijbc")
        read_pairs(folder, "ijbc", faces)
        read_search(folder, "ijbc", faces)
        return
    readers: dict[str, Callable[[Path], object]] = {
        "facescrub_lst": lambda path: read_list(path, folder, people=True),
        "list.json": lambda path: read_list(path, folder, people=True),
        "noises.txt": lambda path: without_noises(
            read_list(folder / "facescrub_lst", folder, people=True), read_noises(path), 1
        ),
        "m.npy": lambda path: read_matrix(path, rows=3),
        "x.bin": read_feature,
        "features.npz": run_report._features,
        "metrics.jsonl": run_report._lines,
        "cache.json": _read_store,
    }
    readers[name](folder / name)


def _read_store(path: Path) -> None:
    """Whatever is in the file, the cache works, and costs a warning at most."""
    store = Store(path.parent, _ENVIRONMENT)
    assert store.path is not None
    path.rename(store.path)
    assert isinstance(store.entries, dict)
    store.add("key", {"seconds": 1.0})
    assert Store(path.parent, _ENVIRONMENT).entries["key"] == {"seconds": 1.0}


def run_one(seed: int) -> str | None:
    rng = random.Random(seed)
    files = dict(_samples())
    name = rng.choice(sorted(files))
    files[name] = mutate(files[name], rng, others=list(files.values()), tokens=_TOKENS)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for other, content in files.items():
            Path(folder, other).write_bytes(content)
        return outcome(lambda: _read(Path(folder), name), (UserError, FeatureError))
