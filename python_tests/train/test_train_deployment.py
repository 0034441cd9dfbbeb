"""``python -m train embed``, ``compare``, ``enroll`` and ``search``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packs import people, write_recordio
from support.training import tiny, train, write_faces

from train.__main__ import COMMANDS, main
from train.data.dataset import open_source, scan
from train.data.records import Files
from train.deployment import command, vectors
from train.errors import UserError
from train.evaluation.model import load_model
from train.tools import export


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run; its images are in ``data`` beside it."""
    folder = tmp_path_factory.mktemp("deployment")
    data = write_faces(folder / "data", identities=3, images=4)
    trainer = train(tiny(data, folder / "run", model={"name": "conv4"}, train={"epochs": 1}))
    assert trainer.threshold() is not None
    return folder / "run"


def call(run: Path, name: str, *arguments: object) -> int:
    given = [name, *map(str, arguments), "--checkpoint", str(run), "data.workers=0"]
    return command.run([*given, "train.device=cpu"])


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_the_command_line_has_all_commands() -> None:
    assert tuple(command.COMMANDS) == COMMANDS
    assert main(["embed", "nothing"]) == 2


def test_features_are_those_of_the_evaluation(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.deployment.images.BLOCK", 5)  # several, the last one shorter
    data = run.parent / "data"
    model = load_model(run, ["data.workers=0"])
    wanted, labels = model.embed(open_source(model.config, scan(str(data))))
    assert call(run, "embed", data, "--out", tmp_path / "new" / "a.npy") == 0
    found = vectors.read(tmp_path / "new" / "a.npy")
    np.testing.assert_allclose(found.features, unit(wanted), atol=1e-5)
    np.testing.assert_allclose(found.norms, np.linalg.norm(wanted, axis=1), rtol=1e-5)
    assert found.identities == [f"person{label + 1}" for label in labels]
    assert found.names[1] == str(data / "person1" / "2.png")
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["a.csv", "a.npy"]
    with open(tmp_path / "new" / "a.csv", newline="") as file:
        assert next(csv.reader(file)) == ["name", "identity", "norm"]

    # A list, with identities of its own; without the mirror images.
    (data.parent / "list.txt").write_text("data/person2/1.png\tB\ndata/person1/1.png\tA\n")
    assert (
        call(run, "embed", data.parent / "list.txt", "--no-flip", "--out", tmp_path / "b.npy") == 0
    )
    alone = vectors.read(tmp_path / "b.npy")
    assert alone.identities == ["B", "A"]
    cosines = (alone.features * found.features[[4, 0]]).sum(1)
    assert (cosines > 0.5).all()
    assert (cosines < 1 - 1e-5).all()

    # Records, with the identities' numbers.
    record = write_recordio(tmp_path, people(2, 3)) / "train.rec"
    assert call(run, "embed", record, "--no-flip", "--out", tmp_path / "r.npy") == 0
    packed = vectors.read(tmp_path / "r.npy")
    assert (packed.names[0], packed.identities) == (f"{record}, record 1", ["0"] * 3 + ["1"] * 3)

    # A folder of images without identities.
    assert call(run, "embed", data / "person1", "--out", tmp_path / "c.npy") == 0
    flat = vectors.read(tmp_path / "c.npy")
    np.testing.assert_allclose(flat.features, found.features[:4], atol=1e-5)
    assert flat.identities == [""] * 4


def test_an_exported_model_has_the_same_features_and_threshold(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = tmp_path / "model.onnx"
    export.run([str(run), "--onnx", str(model)])
    image = run.parent / "data" / "person1" / "1.png"
    found = []
    for path in (run, model):
        assert call(path, "embed", image, "--out", tmp_path / "x.npy") == 0
        found.append(vectors.read(tmp_path / "x.npy").features)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    model.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"onnxruntime cannot load .*model\.onnx"):
        call(model, "embed", image, "--out", tmp_path / "x.npy")


def test_what_cannot_be_read_is_left_out_on_request(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=1, images=3)
    (data / "person1" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"2\.png: .*\(data\.on_error=skip"):
        call(run, "embed", data, "--out", tmp_path / "x.npy")
    assert not list(tmp_path.glob("*x.*"))  # nothing half written
    assert call(run, "embed", data, "--out", tmp_path / "x.npy", "data.on_error=skip") == 0
    assert [Path(n).name for n in vectors.read(tmp_path / "x.npy").names] == ["1.png", "3.png"]
    assert "1 images skipped, such as cannot read image" in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("name,identity,norm\na,,1\n")
    with pytest.raises(UserError, match=r"expected 1 rows of float32, got \(2, 512\)"):
        vectors.read(tmp_path / "x.npy")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no features with a table beside them"):
        vectors.read(tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"expected a file \.npy or \.parquet, got x\.txt"):
        call(run, "embed", data, "--out", "x.txt")
    (tmp_path / "list.csv").write_text("of another program")
    with pytest.raises(UserError, match=r"its names belong in .*list\.csv, which is there without"):
        call(run, "embed", data, "--out", tmp_path / "list.npy")


def test_parquet_holds_the_same_or_asks_for_pyarrow(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        import pyarrow.parquet
    except ImportError:
        with pytest.raises(UserError, match=r"x\.parquet needs pyarrow: pip install pyarrow"):
            call(run, "embed", run.parent / "data", "--out", tmp_path / "x.parquet")
        return
    monkeypatch.setattr("train.deployment.images.BLOCK", 5)
    for name in ("x.parquet", "x.npy"):
        assert call(run, "embed", run.parent / "data", "--out", tmp_path / name) == 0
    table, wanted = (
        pyarrow.parquet.read_table(tmp_path / "x.parquet"),
        vectors.read(tmp_path / "x.npy"),
    )
    assert table.column_names == ["name", "identity", "norm", "features"]
    assert table["features"].to_pylist() == wanted.features.tolist()
    assert table["name"].to_pylist() == wanted.names
    assert table["norm"].to_pylist() == wanted.norms


def test_two_images_and_the_threshold_that_decides(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = run.parent / "data"
    pair = data / "person1" / "1.png", data / "person2" / "1.png"

    def lines(path: Path, *more: object) -> list[str]:
        capsys.readouterr()
        assert call(path, "compare", *pair, *more) == 0
        return capsys.readouterr().out.splitlines()

    model = load_model(run, ["data.workers=0"])
    features = unit(model.embed_records(Files([*map(str, pair)]))[0])
    cosine = float(features[0] @ features[1])
    learned = model.threshold
    assert learned is not None
    verdict = "the same person" if cosine >= learned else "different people"
    assert lines(run) == [
        f"cosine {cosine:.4f}",
        f"{verdict}: threshold {learned:.4f}, the unified threshold that the model has learned",
    ]
    for given, verdict in ((cosine - 0.01, "the same person"), (cosine + 0.01, "different people")):
        assert lines(run, f"--threshold={given}")[1].startswith(f"{verdict}: threshold {given:.4f}")

    # Without a learned threshold: that of the run's evaluation, or none.
    values = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    values["trainer"]["threshold"] = None
    other = tmp_path / "other" / "checkpoints" / "last.pt"
    other.parent.mkdir(parents=True)
    torch.save(values, other)
    assert lines(other)[1].startswith("no verdict")
    (other.parents[1] / "evaluation.json").write_text('{"best_threshold": 0.25}')
    for path in (other, other.parents[1]):
        assert lines(path)[1].endswith("threshold 0.2500, the best one of the held-out identities")
    broken = tmp_path / "x.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read .*x\.png"):
        call(run, "compare", broken, pair[1], "data.on_error=skip")


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines(), delimiter="\t"))


def test_people_are_enrolled_replaced_and_found(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.deployment.images.BLOCK", 5)  # people lie across blocks
    monkeypatch.setattr("train.deployment.gallery.BLOCK", 2)
    data, gallery = run.parent / "data", tmp_path / "gallery.npy"
    assert call(run, "enroll", data, "--gallery", gallery) == 0
    known = vectors.read(gallery)
    assert known.identities == ["person1", "person2", "person3"]
    assert call(run, "embed", data, "--out", tmp_path / "all.npy") == 0
    each = vectors.read(tmp_path / "all.npy")
    mean = each.features.reshape(3, 4, -1).mean(1)
    np.testing.assert_allclose(known.features, unit(mean), atol=1e-5)
    np.testing.assert_allclose(known.norms, np.reshape(each.norms, (3, 4)).mean(1), rtol=1e-5)

    # One image of a new person, then another image in its place.
    for image, message in ((1, "1 person enrolled, 0 replaced, 4"), (2, "1 replaced, 4 in all")):
        photo = data / "person2" / f"{image}.png"
        assert call(run, "enroll", photo, "--name", "Ada", "--gallery", gallery) == 0
        assert message in capsys.readouterr().out
    changed = vectors.read(gallery)
    assert changed.names == [*known.names, "Ada"]
    np.testing.assert_allclose(changed.features[:3], known.features)
    np.testing.assert_allclose(changed.features[3], each.features[5], atol=1e-5)
    with pytest.raises(UserError, match="expected a folder of images per person"):
        call(run, "enroll", data / "person1", "--gallery", gallery)

    # By images and by their features; the threshold is the run's, or the one that is given.
    table = tmp_path / "found.tsv"
    top = "--gallery", gallery, "--top", 2
    assert call(run, "search", data, *top, "--out", table) == 0
    found = rows_of(table.read_text())
    cosines = each.features @ changed.features.T
    assert found[0] == ["query", "rank", "name", "identity", "cosine", "same"]
    assert len(found) == 1 + 2 * len(each)
    threshold = load_model(run, ["data.workers=0"]).threshold
    assert threshold is not None
    for i, first in enumerate(found[1::2]):
        best = int(cosines[i].argmax())
        same = "yes" if cosines[i, best] >= threshold else "no"
        assert first[:4] == [each.names[i], "1", changed.names[best], changed.names[best]]
        assert (float(first[4]), first[5]) == (pytest.approx(cosines[i, best], abs=1e-4), same)
    capsys.readouterr()
    given = "search", tmp_path / "all.npy", *top
    assert call(run, *given) == 0
    assert [row[:5] for row in rows_of(capsys.readouterr().out)] == [row[:5] for row in found]
    assert call(run, *given, "--threshold", 2) == 0
    assert {row[5] for row in rows_of(capsys.readouterr().out)[1:]} == {"no"}
    try:
        import faiss  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="--faiss needs FAISS: pip install faiss-cpu"):
            call(run, *given, "--faiss", "Flat")
    else:
        assert call(run, *given, "--faiss", "Flat") == 0
        assert [r[:5] for r in rows_of(capsys.readouterr().out)] == [row[:5] for row in found]
        with pytest.raises(UserError, match="--faiss Flatt: "):
            call(run, *given, "--faiss", "Flatt")
    narrow = vectors.Vectors(np.eye(3, dtype=np.float32), *[["a", "b", "c"]] * 2, [1.0] * 3)
    with vectors.writing(gallery) as add:
        add(narrow)
    for wrong in ("search", "enroll"):
        with pytest.raises(UserError, match="features of 3 numbers, the model of 512"):
            call(run, wrong, data, "--gallery", gallery)
