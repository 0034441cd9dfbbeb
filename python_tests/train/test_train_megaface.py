"""MegaFace: lists, feature files, and metrics on ORL faces against loops."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.evaluation_formats import orl_images, write_lines, write_megaface
from support.training import tiny, train, write_faces

from train import evaluate
from train.errors import UserError
from train.evaluation import megaface
from train.evaluation.baselines import pca
from train.evaluation.megaface import Identification
from train.evaluation.megaface_files import (
    FeatureError,
    feature_path,
    read_feature,
    read_features,
    read_list,
    read_noises,
    without_noises,
    write_feature,
)

FACES = orl_images(range(40), 10, size=16)
PEOPLE = list(FACES)


def _eigenfaces() -> dict[str, list[np.ndarray]]:
    """Features that find many faces but not all: ten coordinates of 16 x 16 pixels."""
    pixels = np.stack([np.asarray(i, float)[:, :, 0].ravel() for f in FACES.values() for i in f])
    features = pca(pixels, pixels, 10).astype(np.float32).reshape(40, 10, -1)
    return {person: list(rows) for person, rows in zip(PEOPLE, features, strict=True)}


def _by_loops(
    probes: list[tuple[str, np.ndarray]],
    distractors: list[np.ndarray],
    ranks: tuple[int, ...],
    fars: tuple[float, ...],
) -> dict[str, float]:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    found, searches = dict.fromkeys(ranks, 0), 0
    positives, negatives = [], []
    for i, (person, probe) in enumerate(probes):
        others = [cosine(probe, d) for d in distractors]
        negatives += others
        for j, (mate, image) in enumerate(probes):
            if i == j or mate != person:
                continue
            score = cosine(probe, image)
            searches += 1
            for rank in ranks:
                found[rank] += 1 + sum(other >= score for other in others) <= rank
            if i < j:
                positives.append(score)
    negatives.sort(reverse=True)
    metrics = {f"rank-{rank}": found[rank] / searches for rank in ranks}
    for far in fars:
        bar = negatives[int(far * len(negatives))]
        metrics[f"tar@far={far:g}"] = sum(p > bar for p in positives) / len(positives)
    return metrics


def test_figures_on_orl_are_those_of_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten people search among thirty others, in blocks of no particular size."""
    monkeypatch.setattr(megaface, "SCORES", 100 * 17)
    features = _eigenfaces()
    probes = [(person, row) for person in PEOPLE[30:] for row in features[person]]
    distractors = [row for person in PEOPLE[:30] for row in features[person]]
    ranks, fars = (1, 3, 10), (1e-6, 1e-4, 1e-3, 1e-2)
    expected = _by_loops(probes, distractors, ranks, fars)
    names = [person for person, _ in probes]
    found = Identification(np.stack([row for _, row in probes]), names, 300, ranks=ranks, fars=fars)
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, 300)):
        found.add(np.stack(distractors[start:stop]))
    metrics = found.metrics()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
    assert 0.2 < expected["rank-1"] < expected["rank-10"] < 1  # a case that decides something
    assert 0 < expected["tar@far=0.0001"] < expected["tar@far=0.01"] < 1
    assert (metrics["probes"], metrics["distractors"], metrics["negatives"]) == (100, 300, 30000)
    # Memory is what the largest rate allows, whatever went by.
    assert len(found._largest) == 301


def test_ties_and_lonely_probes() -> None:
    one = np.eye(3, dtype=np.float32)
    tied = Identification(one[[0, 0, 1]], ["a", "a", "b"], 2, fars=(0.5,))
    tied.add(one[[0, 2]])  # a distractor that scores exactly as the mate does
    assert tied.metrics()["rank-1"] == 0
    assert tied.metrics()["rank-10"] == 1
    with pytest.raises(UserError, match="no person has two readable probes"):
        Identification(one, ["a", "b", "c"], 2)
    with pytest.raises(UserError, match="differ in size: 3 and 4"):
        tied.add(np.eye(4, dtype=np.float32))
    with pytest.raises(UserError, match="not finite"):
        tied.add(one * np.nan)


def _run(tmp_path: Path, files: dict[str, Path], *more: Any) -> dict[str, float]:
    line = ["megaface", str(tmp_path / "run"), "--probes", str(files["probes"])]
    line += ["--gallery", str(files["gallery"]), "--workers", "0", "--out", str(tmp_path / "out")]
    assert evaluate.run([*line, *map(str, more)]) == 0
    metrics: dict[str, float] = json.loads((tmp_path / "out" / "megaface.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A short run's checkpoint, and a test pack of ten people among thirty."""
    folder = tmp_path_factory.mktemp("megaface")
    train(tiny(write_faces(folder / "data"), folder / "run"), stop_after=1)
    probes = {person: FACES[person] for person in PEOPLE[30:]}
    distractors = {person: FACES[person] for person in PEOPLE[:30]}
    return folder, write_megaface(folder, probes, distractors)


def test_from_feature_files_with_noises_left_out(pack: tuple[Path, dict[str, Path]]) -> None:
    folder, files = pack
    features = _eigenfaces()
    store = folder / "features"
    for kind, list_name in (("facescrub", "probe_list"), ("megaface", "gallery_list")):
        for name in files[list_name].read_text().split():
            person, number = name.split("/")[-1].removesuffix(".png").rsplit("_", 1)
            path = feature_path(store, name, "pca", kind=kind)
            write_feature(path, features[person][int(number)])
    person, other = PEOPLE[33], PEOPLE[4]
    probe_noises = write_lines(folder / "facescrub_noises.txt", ["# no face", f"{person}_3.png"])
    gallery_noises = write_lines(
        folder / "megaface_noises.txt",
        ["# rank, path", f"12\t100/{other}/{other}_0.png", f"100/{other}/{other}_7.png"],
    )
    metrics = _run(
        folder,
        files,
        *("--probe-list", files["probe_list"], "--gallery-list", files["gallery_list"]),
        *("--probe-noises", probe_noises, "--gallery-noises", gallery_noises),
        *("--read-features", store, "--algorithm", "pca"),
    )
    probes = [
        (p, row) for p in PEOPLE[30:] for i, row in enumerate(features[p]) if (p, i) != (person, 3)
    ]
    distractors = [
        row
        for p in PEOPLE[:30]
        for i, row in enumerate(features[p])
        if p != other or i not in (0, 7)
    ]
    for name, value in _by_loops(probes, distractors, (1, 10), (1e-4,)).items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
    assert metrics["tar@far=1e-06"] is None  # 29502 negatives do not resolve it
    assert (metrics["noise_probes"], metrics["noise_distractors"]) == (1, 2)
    assert (metrics["probes"], metrics["distractors"]) == (99, 298)


def test_from_images_and_the_feature_files_written_for_the_devkit(
    pack: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, files = pack
    monkeypatch.setattr(megaface, "BLOCK", 128)
    lists = ("--probe-list", files["probe_json"], "--gallery-list", files["gallery_json"])
    written = folder / "written"
    by_images = _run(folder, files, *lists, "--write-features", written)
    person = PEOPLE[30]
    first = written / "facescrub" / person / f"{person}_0.png_unitsface.bin"
    assert struct.unpack("<4i", first.read_bytes()[:16]) == (512, 1, 4, 5)
    assert np.linalg.norm(read_feature(first)) == pytest.approx(1)
    assert len(list((written / "megaface").rglob("*.bin"))) == 300
    by_files = _run(folder, files, *lists, "--read-features", written)
    for name, value in by_images.items():
        assert by_files[name] == pytest.approx(value, abs=1e-3), name
    # Two distractors without a file.
    gone = sorted((written / "megaface").rglob("*.bin"))[:2]
    gone[0].unlink()
    gone[1].write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read .*\.bin: No such file.*data\.on_error=skip"):
        _run(folder, files, *lists, "--read-features", written)
    left = _run(folder, files, *lists, "--read-features", written, "--on-error", "skip")
    assert (left["skipped_distractors"], left["distractors"]) == (2, 298)


def test_feature_files_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_feature(path, np.arange(4, dtype=np.float32))
    good = path.read_bytes()
    assert good == struct.pack("<4i4f", 4, 1, 4, 5, 0, 1, 2, 3)
    for written, message in (
        (good[:10], "cut off in its header"),
        (good[:-1], "expected 16 bytes of numbers, it has 15"),
        (good + b"x", "expected 16 bytes of numbers, it has more"),
        (struct.pack("<4i", 4, 1, 4, 6) + good[16:], "expected a float32 matrix .* type 6"),
        (struct.pack("<4i", -4, 1, 4, 5) + good[16:], "expected a float32 matrix"),
        (struct.pack("<4i", 4, 1, 16, 5) + good[16:], "expected a float32 matrix without gaps"),
        (struct.pack("<4i", 2**30, 1, 4, 5) + good[16:], "at most 1048576 numbers"),
        (struct.pack("<4i", 2**20, 2**9, 2**11, 5) + good[16:], "at most 1048576 numbers"),
        (good[:16] + struct.pack("<4f", 0, 1, 2, np.nan), "not finite"),
    ):
        path.write_bytes(written)
        with pytest.raises(FeatureError, match=rf"x\.bin: .*{message}"):
            read_feature(path)
    path.write_bytes(struct.pack("<4i4f", 1, 4, 16, 5, 0, 1, 2, 3))  # one row: the same numbers
    assert read_feature(path).tolist() == [0, 1, 2, 3]
    write_feature(tmp_path / "y.bin", np.arange(5, dtype=np.float32))
    with pytest.raises(
        UserError, match=r"features of different sizes: 4 in .*x\.bin, 5 in .*y\.bin"
    ):
        read_features([path, tmp_path / "y.bin"], skip=True)
    with pytest.raises(UserError, match="none of 1 feature files can be read"):
        read_features([tmp_path / "z.bin"], skip=True)


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list"
    write_lines(path, ["a/b/a_1.png", "", "a/c/c_1.png"])
    listed = read_list(path, tmp_path, people=True)
    assert (listed.names, listed.people) == (["a/b/a_1.png", "a/c/c_1.png"], ["b", "c"])
    path.write_text(json.dumps({"id": ["p", 7], "path": ["x/1.png", "x/2.png"]}))
    assert read_list(path, tmp_path, people=True).people == ["p", "7"]
    noises = write_lines(tmp_path / "noises", ["# comment", "9\tx/2.png"])
    assert without_noises(listed, read_noises(noises), 2) == listed
    kept = without_noises(read_list(path, tmp_path, people=True), read_noises(noises), 2)
    assert (kept.names, kept.people) == (["x/1.png"], ["p"])
    for text, message in (
        ("../x.png\n", r"list, line 1: expected a path within the folder, got '\.\./x\.png'"),
        ("a/b.png\na/../../x.png\n", "list, line 2: expected a path within"),
        ("/etc/passwd\n", "line 1: expected a path within"),
        ("a\\..\\b.png\n", "line 1: expected a path within"),
        ("a/\n", "line 1: expected a path within"),
        ("file.png\n", "expected person/file, got 'file.png'"),
        ("\n", "no images"),
        ("[1]", "expected an object with 'path'"),
        ('{"path": ["a/b", 1]}', "expected an object with 'path'"),
        ('{"path": ["a/b", "../c"]}', "list, path 1: expected a path within"),
        ('{"path": ["a/b"], "id": []}', "expected 'id' to be a list as long as 'path'"),
        ('{"path": ', "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_list(path, tmp_path, people=True)
    path.write_bytes(b"a/\xff\xfe.png\n")
    with pytest.raises(UserError, match="not a text file"):
        read_list(path, tmp_path, people=True)
    with pytest.raises(UserError, match="no such folder"):
        read_list(None, tmp_path / "missing", people=False)
