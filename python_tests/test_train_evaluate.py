"""The commands of train/evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_support import tiny, train, write_faces

from train import evaluate
from train.errors import UserError


def test_all_pairs_of_a_folder_by_a_run_or_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    trainer = train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    threshold = trainer.threshold()
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.pt"):
        given = ["pairs", str(path), str(data), "--workers", "0", "--out", str(tmp_path / "out")]
        assert evaluate.run(given) == 0
        figures = json.loads((tmp_path / "out" / "pairs.json").read_text())
        assert (figures["pairs"], figures["positives"]) == (66, 18)
        assert figures["threshold"] == threshold
    assert "3 identities, 66 pairs" in capsys.readouterr().out


def test_published_weights_are_judged_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    trainer = train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    wrapped = {f"module.{k}": v for k, v in trainer.backbone.state_dict().items()}
    torch.save({"state_dict_backbone": wrapped, "epoch": 1}, tmp_path / "published.pt")
    figures = []
    for path in ("run", "published.pt"):
        given = ["pairs", str(tmp_path / path), str(data), "--workers", "0"]
        assert evaluate.run([*given, "--out", str(tmp_path / "out")]) == 0
        figures.append(json.loads((tmp_path / "out" / "pairs.json").read_text()))
    assert figures[0]["auc"] == figures[1]["auc"]
    assert figures[1]["threshold"] is None
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no checkpoint, and no weights"):
        evaluate.run(["pairs", str(tmp_path / "other.pt"), str(data)])


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate.run(["pairs", str(tmp_path / "nothing.pt"), "orl"])
    with pytest.raises(UserError, match="invalid choice: 'bigface'"):
        evaluate.run(["bigface", "x"])
