"""The commands of train/evaluate.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.evaluation_formats import orl_pairs, python2_bin
from support.training import CPU, IRESNET, arguments, tiny, train, write_faces

from train import evaluate, main
from train.data.dataset import scan
from train.data.loader import open_images
from train.distributed import DistributedEnv
from train.errors import UserError
from train.evaluation.embed import embed
from train.evaluation.model import load_model
from train.evaluation.test_sets import HeldOut
from train.evaluation.verification import evaluate_features


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


def test_published_weights_are_evaluated_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    trainer = train(tiny(data, tmp_path / "run", model=IRESNET, train={"epochs": 1}))
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
    with pytest.raises(UserError, match=r"other\.pt is neither a checkpoint nor the weights"):
        evaluate.run(["pairs", str(tmp_path / "other.pt"), str(data)])


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        evaluate.run(["pairs", str(tmp_path / "nothing.pt"), "orl"])
    with pytest.raises(UserError, match="invalid choice: 'bigface'"):
        evaluate.run(["bigface", "x"])


def test_all_commands_give_the_same_figures_of_the_same_weights(tmp_path: Path) -> None:
    data, run, out = write_faces(tmp_path / "data", identities=9), tmp_path / "run", tmp_path / "o"
    lfw = tmp_path / "lfw.bin"
    lfw.write_bytes(python2_bin(*orl_pairs()))
    config = tiny(
        data,
        run,
        data={"holdout": 6},
        train={"max_steps": 2, "ema": 0.5},
        eval={"every": 1, "sets": [str(lfw)]},
    )
    assert main.main(arguments(config)) == 0
    final = json.loads((run / "evaluation.json").read_text())
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    given = [str(run), "--out", str(out), "--workers", "0"]
    assert evaluate.run(["pairs", *given, str(data), "--last", "6"]) == 0
    assert json.loads((out / "pairs.json").read_text()) == final
    assert last["eval"]["held_out"]["best_threshold"] == final["best_threshold"]
    assert evaluate.run(["thresholds", *given, "--last", "6", "--data", str(data)]) == 0
    unified = json.loads((out / "thresholds.json").read_text())["data"]["unified"]
    assert unified["best"] == final["best_threshold"]
    assert unified["accuracy_at_learned"] == final["accuracy_at_threshold"]
    assert evaluate.run(["verification", *given, str(lfw)]) == 0
    assert json.loads((out / "verification.json").read_text())["lfw"] == last["eval"]["lfw"]


def test_mistakes_are_found_at_once_and_named_by_their_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    given = ["pairs", str(tmp_path / "run"), str(data)]
    for wrong, message in (
        ("--batch-size=0", "--batch-size: expected a whole number"),
        ("--workers=-1", "data.workers: expected a number at least 0, got -1"),
        ("--workers=x", "data.workers: expected a whole number, got 'x'"),
        ("data.workers=x", "data.workers: expected a whole number, got 'x'"),
        ("data.worker=0", "unknown key 'data.worker'; did you mean 'data.workers'"),
        ("train.device=gpu", "train.device: expected one of auto, cpu, cuda; got 'gpu'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.run([*given, wrong])
    lfw = tmp_path / "lfw.bin"
    lfw.write_bytes(python2_bin(*orl_pairs()))
    with pytest.raises(UserError, match="--out: cannot make the folder"):
        evaluate.run(["verification", *given[1:2], str(lfw), "--out", str(lfw)])
    bad = data / "person2" / "3.png"
    bad.write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"3\.png: .*\(data\.on_error=skip leaves such images out\)"
    ):
        evaluate.run(given)
    for skip in (["--on-error", "skip"], ["data.on_error=skip"]):
        assert evaluate.run([*given, *skip]) == 0
        shown = capsys.readouterr().out
        assert f"{data}: 1 images skipped, such as cannot read image {bad}" in shown


def test_how_a_run_read_its_images_is_not_how_it_is_evaluated(tmp_path: Path) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    train(tiny(data, tmp_path / "run", data={"on_error": "skip", "cache": "never"}), stop_after=1)
    config = load_model(tmp_path / "run", ["data.workers=0"]).config
    assert (config.data.on_error, config.data.cache, config.data.workers) == ("fail", "auto", 0)
    (data / "person2" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png"):
        evaluate.run(["pairs", str(tmp_path / "run"), str(data)])
    assert evaluate.run(["pairs", str(tmp_path / "run"), "data.on_error=skip", str(data)]) == 0


@pytest.mark.parametrize("cache", ["always", "never"])
def test_what_cannot_be_read_is_no_pair(tmp_path: Path, cache: str) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    (data / "person1" / "4.png").write_bytes(b"no image")  # before one of another person
    backbone = train(tiny(data, tmp_path / "run", data={"on_error": "skip"}), 1).backbone
    source = open_images(scan(str(data)), 16, on_error="skip", cache=cache)
    found, labels = embed(backbone, source, CPU.device)
    (data / "person1" / "4.png").unlink()
    kept, kept_labels = embed(
        backbone, open_images(scan(str(data)), 16, on_error="fail"), CPU.device
    )
    wanted = evaluate_features(kept, kept_labels)
    figures = HeldOut(source).score(found)
    assert (figures["auc"], figures["accuracy"]) == (wanted.auc, wanted.accuracy)
    read = source.readable()
    assert labels[read].tolist() == kept_labels.tolist()


def test_every_process_gets_what_the_others_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_faces(tmp_path / "data", identities=2, images=2)
    source = open_images(scan(str(data)), 16, on_error="skip", cache="never")
    backbone = train(tiny(data, tmp_path / "run"), 1).backbone
    other = {source.images.name(3): "cannot be read"}
    other_process = other, 0, None  # what it skipped, no signal, no features
    monkeypatch.setattr(DistributedEnv, "gather_objects", lambda self, own: [own, other_process])
    embed(backbone, source, CPU.device)
    assert source.readable().tolist() == [True, True, True, False]


def test_features_that_allow_no_figures_are_one_line() -> None:
    features = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="no positive or no negative pair"):
        evaluate_features(features, np.arange(4))
    with pytest.raises(UserError, match="not finite"):
        evaluate_features(features * np.nan, np.array([0, 0, 1, 1]))


def test_options_of_earlier_versions_are_keys_and_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = evaluate.parse(["pairs", "run", "orl", "--workers", "0", "--on-error", "skip"])
    assert found.overrides == ["data.workers=0", "data.on_error=skip"]
    assert capsys.readouterr().err.splitlines() == [
        "warning: --workers is deprecated, use data.workers=0",
        "warning: --on-error is deprecated, use data.on_error=skip",
    ]
    assert evaluate.parse(["pairs", "run", "orl", "data.workers=0"]).overrides == ["data.workers=0"]
    assert capsys.readouterr().err == ""
