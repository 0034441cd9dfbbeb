"""The comparison of losses: which ones, on which people, and the content of its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reports import write_comparison
from support.training import ROOT, write_faces

import unitsface_kernels as uk
from train.config import make_config, parse_overrides, read_yaml
from train.errors import DivergedError, UserError, exit_code
from train.evaluation.verification import Verification
from train.losses import build_loss
from train.run_folder import read_metrics
from train.tools import comparison

RESULT = Verification(
    pairs=104,
    positives=4,
    accuracy=0.8,
    accuracy_std=0.01,
    auc=0.9,
    tar_at_far={"0.01": 0.5, "0.1": 0.75},
    threshold=None,
    accuracy_at_threshold=None,
    best_threshold=0.3,
)
ABOUT = {
    "model": "iresnet18 at 16 x 16",
    "epochs": 3,
    "data": "orl",
    "train_identities": 30,
    "train_images": 300,
    "test_identities": 10,
    "test_images": 100,
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_entries_name_registered_losses_and_are_many() -> None:
    found = {entry: comparison.find_losses(entry) for entry in comparison.ENTRIES}
    assert len(found) >= 25
    assert None not in found.values()
    assert found["uss"] == ("none", "uss")
    assert found["cosface+pair_bce"] == ("cosface", "pair_bce")
    for name in uk.CLASS_LOSSES:
        assert comparison.find_losses(name) == (name, "none")
    for wrong in ("", "bigface", "uss+cosface", "cosface+", "cosface+arcface", "cosface+none"):
        assert comparison.find_losses(wrong) is None


@pytest.mark.parametrize("entry", comparison.ENTRIES)
def test_losses_have_the_options_of_their_recipes(entry: str) -> None:
    arguments = comparison.loss_arguments(entry, epochs=30, steps=270)
    loss = make_config(("test", parse_overrides(arguments))).loss
    for kind, options in (("class", loss.class_options), ("pair", loss.pair_options)):
        recipe = comparison.RECIPES / f"{getattr(loss, f'{kind}_name')}.yaml"
        published = read_yaml(recipe)["loss"] if recipe.is_file() else {}
        changed = ("kind", "margin", "std", "start_epoch", "start_iteration")
        for option, value in published.get(f"{kind}_options", {}).items():
            assert options[option] == value or option in changed
    assert build_loss(loss, 30, 8, counts=torch.full((30,), 10)) is not None
    if entry == "vpl":
        assert loss.class_options["start_iteration"] == 27
    if entry == "epl":
        assert loss.class_options["start_epoch"] == 3
    if entry == "elasticface_cos":
        assert loss.class_options["kind"] == "cos"


def test_losses_are_trained_alike_and_scored_on_the_same_unseen_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "losses"
    names = ["class_bce", "sphereface2+uss"]
    assert comparison.run(["--quick", "--out", str(out), "--only", *names]) == 0
    stored = json.loads((out / "report.json").read_text())
    assert stored["smoke"] is True
    values = stored["sets"]["orl"]
    assert list(values["results"]) == ["raw pixels", *names]
    assert (values["train_identities"], values["test_identities"]) == (30, 10)
    for (figures,) in values["results"].values():
        assert (figures["pairs"], figures["positives"]) == (4950, 450)
    assert values["results"]["raw pixels"][0]["auc"] == pytest.approx(0.92, abs=0.02)
    assert values["results"]["class_bce"][0]["threshold"] is None
    (both,) = values["results"]["sphereface2+uss"]
    # USS's own, though SphereFace2 has one too.
    assert both["threshold"] == read_metrics(out / "orl" / "sphereface2+uss-0")[-1]["threshold"]
    assert both["accuracy_at_threshold"] is not None
    printed = capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert "Smoke run" in text
    assert "seed 0." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [cells(row)[0] for row in rows[2:]] == ["raw pixels", *names]
    assert all(row in printed for row in rows)
    assert all(speed > 0 for name in names for speed in values["images_per_s"][name])
    page = (out / "report.html").read_text()
    assert page.count('class="value"') == 3
    assert page.count("<svg ") == 1
    assert not list(out.glob("*/*/checkpoints"))


def test_sets_of_images_are_compared_on_and_a_cut_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "losses"
    sets = [write_faces(tmp_path / name, identities=6, images=4) for name in ("my faces", "b")]
    given = ["--data", *map(str, sets), "--holdout", "2", "--quick", "--only", "uss"]
    assert comparison.run([*given, "--out", str(out)]) == 0
    stored = json.loads((out / "report.json").read_text())["sets"]
    assert list(stored) == list(map(str, sets))
    for values in stored.values():
        assert (values["train_identities"], values["test_images"]) == (4, 8)
    text = (out / "report.md").read_text()
    assert "AT&T" not in text
    tables = [cells(line) for line in text.splitlines() if line.startswith("| uss")]
    assert [len(row) for row in tables] == [7, 7, 7]  # of both sets, and of each
    both, first, second = tables
    assert both == ["uss", *first[1:3], first[4], *second[1:3], second[4]]

    def again(entry: str, arguments: list[str], folder: Path) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison, "run_one", again)
    assert comparison.run([*given, "--resume", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["sets"] == stored
    with pytest.raises(AssertionError, match="trained again"):
        comparison.run([*given, "--resume", "--epochs", "2", "--out", str(out)])


def test_table_has_mean_and_spread_over_seeds_and_keeps_what_did_not_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[str, str]] = []

    def made_up(entry: str, arguments: list[str], folder: Path) -> Any:
        runs.append((entry, folder.name))
        seed = int("run.seed=1" in arguments)
        if entry == "uss" and seed == 1:
            raise DivergedError("the loss is nan at step 7")
        learned = 0.3 if entry == "uce" else None
        return replace(
            RESULT, auc=0.9 + 0.02 * seed, threshold=learned, accuracy_at_threshold=learned
        ), ABOUT

    monkeypatch.setattr(comparison, "run_one", made_up)
    given = ["--out", str(tmp_path), "--seeds", "2", "--only", "uss", "uce", "uss"]
    assert comparison.run(given) == 0
    assert runs == [("uss", "uss-0"), ("uce", "uce-0"), ("uss", "uss-1"), ("uce", "uce-1")]
    text = (tmp_path / "report.md").read_text()
    assert "Smoke run" not in text
    assert "seeds 0 to 1" in text
    assert "- orl, uss, seed 1: the loss is nan at step 7\n" in text
    uss, uce = [line for line in text.splitlines() if line.startswith("| u")]
    assert cells(uss) == ["uss (1 diverged)", "0.800", "0.900", "0.500", "0.750", "-", "-"]
    # Deviation of 0.90 and 0.92 about their mean, with one degree of freedom lost.
    assert cells(uce)[2] == "0.910 ± 0.014"
    assert cells(uce)[5:] == ["0.300 ± 0.000"] * 2
    # The best, and its margin where both have a result.
    assert "- **uce** AUC 0.910 ± 0.014: the highest of 2" in text
    assert "- **+0.000** AUC above the next, uss: " in text


def test_comparison_in_which_everything_diverged_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object) -> Any:
        raise DivergedError("the loss is nan at step 1")

    monkeypatch.setattr(comparison, "run_one", diverge)
    with pytest.raises(UserError, match="every run diverged"):
        comparison.run(["--out", str(tmp_path), "--only", "uss"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "bigface"], "--only: expected a class loss .*cosface.*uss.*got 'bigface'"),
        (["--only", "uss+uce"], "got 'uss\\+uce'"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--data", "faces"], "--data needs --holdout"),
        (
            ["--data", "a/faces", "b/faces"],
            "--data: expected folders of different names, got a/fac",
        ),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--out", str(tmp_path / "out"), *arguments]
    with pytest.raises(UserError, match=message):
        comparison.run(given)
    assert exit_code(lambda: comparison.run(given)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.extended
def test_the_committed_page_is_that_of_the_results(tmp_path: Path) -> None:
    page = write_comparison(tmp_path / "losses")
    text = (ROOT / "bench/results/losses.md").read_text()
    assert page.with_suffix(".md").read_text() == text


def test_committed_results_have_every_loss_and_the_readme_quotes_them() -> None:
    stored = json.loads((ROOT / "bench/results/losses.json").read_text())
    assert list(stored["sets"]) == ["orl", "fashion_mnist"]
    assert stored["seeds"] == 3
    for values in stored["sets"].values():
        runs = {entry: len(results) for entry, results in values["results"].items()}
        for entry, errors in values["diverged"].items():
            runs[entry] += len(errors)
        assert runs == {"raw pixels": 1, **dict.fromkeys(comparison.ENTRIES, 3)}
    table = (ROOT / "bench/results/losses.md").read_text().splitlines()
    _, _, rest = (ROOT / "README.md").read_text().partition("<!-- losses: begin -->")
    quoted = rest.partition("<!-- losses: end -->")[0].strip().splitlines()
    assert 3 <= len(quoted) <= 10
    assert set(quoted) <= set(table)
