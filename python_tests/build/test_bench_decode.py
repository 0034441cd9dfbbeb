"""The benchmark of reading and decoding, on a handful of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.training import ROOT  # noqa: F401  # makes bench importable

from bench import decode
from train.data.decode import to_pixels


def test_every_storage_is_measured_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "ROUNDS", 2)
    decode.main(
        ["--images", "30", "--seconds", "0.01", "--workers", "1", "--out", str(tmp_path / "d")]
    )
    results = json.loads((tmp_path / "d.json").read_text())
    assert results["images"] == 30
    assert list(results["storages"]) == ["RecordIO", "shards", "folder"]
    for row in results["storages"].values():
        assert row["one_process"]["median"] > 0
        assert row["workers"]["1"]["median"] > 0
    per_core = results["storages"]["RecordIO"]["per_core_second"]["median"]
    for need in results["needs"]:
        assert need["cores"] * per_core == pytest.approx(need["images_per_s"])
    # 0.3 x 989 Tflop/s over 3 x 2 x 6.3 Gflop.
    assert results["needs"][1]["images_per_s"] == pytest.approx(7849, abs=1)
    page = (tmp_path / "d.md").read_text()
    assert page == capsys.readouterr().out[:-1]
    assert "Predicted, not measured" in page


def test_faces_differ_and_have_color() -> None:
    people = decode.make_faces(405)
    images = [image for images in people for image in images]
    assert len(set(images)) == 405
    pixels = to_pixels(images[0], decode.SIZE)
    assert (pixels[0] != pixels[2]).mean() > 0.5
