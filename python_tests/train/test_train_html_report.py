"""The page of a run: complete, self-contained, and harmless whatever a run's files contain."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import arguments, tiny, write_faces

from train import main
from train.data.loader import open_images
from train.data.orl import scan_orl
from train.errors import UserError, exit_code
from train.evaluation import plots
from train.evaluation.thresholds import unify
from train.evaluation.verification import all_pairs, evaluate_features
from train.run_folder import FEATURES, write_arrays
from train.tools import run_report

SHOWN = ["Identities held out", "Test sets", "Training"]
FOLDED = ["Metrics", "ROC", "Scores", "A threshold per identity", "Configuration"]
HOSTILE = '<script>alert("1")</script> & "$x_{$"'


def save_features(folder: Path, features: Any, labels: Any, identities: list[str]) -> None:
    arrays = {"features": features, "labels": labels, "identities": np.array(identities)}
    write_arrays(folder / FEATURES, **arrays)


class Page(HTMLParser):
    """Headings, numbers, table rows and every tag with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.numbers: list[str] = []
        self.text = ""
        self._inside = ""
        source = path.read_bytes()
        assert source.isascii()
        self.feed(source.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "h2":
            self.headings.append("")
        elif ("class", "value") in attrs:
            self._inside = "value"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._inside == "h2":
            self.headings[-1] += data
        elif self._inside == "value":
            self.numbers.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row[0] == name)


def check_self_contained(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert key not in ("src", "srcset", "data", "action"), (tag, key)
            assert not key.startswith("on"), (tag, key)
            if key == "href":  # marks of curves, clipped
                assert tag == "use"
                assert str(value).startswith("#")
            assert "url(" not in str(value) or "url(#" in str(value), value
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert "@import" not in page.text


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as a run leaves them, of the last ten ORL people's centered pixels."""
    folder = tmp_path_factory.mktemp("runs") / "my <run>"
    folder.mkdir()
    lines = [
        {
            "step": step,
            "epoch": step / 10,
            "loss": 30 / step,
            "class_loss": 20 / step,
            "pair_loss": None if step < 5 else 10 / step,  # as with a memory that fills first
            "threshold": 0.2 + step / 100,
            "lr": 0.1 / step,
            "images_per_s": 100.0 + step,
            "data_ms": 2.0 + step / 15,
            "forward_ms": 12.0 - step / 15,
        }
        for step in range(1, 31)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    evals = [
        {
            "step": step,
            "epoch": step / 10,
            "eval": {
                name: {"accuracy": 0.8 + step / 200, "auc": 0.9, "best_threshold": 0.4}
                for name in ("held_out", HOSTILE)
            },
        }
        for step in (10, 20, 30)
    ]
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in evals))
    (folder / "config.yaml").write_text(f"data:\n  path: '{HOSTILE}'\n")

    images = scan_orl()
    images = images.keep(np.flatnonzero(images.labels >= 30))
    pixels = open_images(images, 16, on_error="fail", cache="always").stacked()[:, 0].flatten(1)
    features = pixels.numpy() - pixels.numpy().mean(0)
    result = evaluate_features(features, images.labels, threshold=0.5)
    (folder / "evaluation.json").write_text(json.dumps(result.to_dict()))
    names = [HOSTILE, *list(images.identities)[1:9], "名前"]
    save_features(folder, features, images.labels, names)
    assert run_report.write(folder) == folder / "report.html"
    return folder


def test_page_is_complete_self_contained_and_shows_the_files(run_folder: Path) -> None:
    page = Page(run_folder / "report.html")
    check_self_contained(page)
    assert page.headings == SHOWN + FOLDED
    assert [tag for tag, _ in page.tags].count("details") == len(FOLDED)
    figures = [str(a["aria-label"]).partition(":")[0] for tag, a in page.tags if tag == "svg"]
    assert figures == [
        *("ROC of all 4950 pairs", "Cosines of pairs, each kind to its own area"),
        *("The best threshold of each identity", "Loss", "Learned threshold b / s"),
        *("Learning rate", "Images/s", "Milliseconds of the parts of a step", "Accuracy"),
    ]
    assert "Constant: AUC 0.9000." in page.text  # the same for all sets, at all times

    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    for key in ("accuracy", "auc", "best_threshold", "accuracy_at_threshold"):
        assert page.row(key.replace("_", " "))[1] == f"{evaluation[key]:.4f}"
    assert page.row("tar@far=0.01")[1] == f"{evaluation['tar_at_far']['0.01']:.4f}"
    assert page.row("pairs")[1] == "4950"
    # The ROC's exact points are the evaluation's.
    assert page.row("0.01")[1] == f"{evaluation['tar_at_far']['0.01']:.4f}"
    assert "Too few negative pairs for FAR 1e-06, 1e-05, 0.0001." in page.text
    assert len(page.numbers) == 3
    assert page.numbers[0] == f"{100 * evaluation['tar_at_far']['0.01']:.1f} %"
    assert page.numbers[2] == "116"  # the median of 101 to 130
    assert "22 % of a step is waiting for data" in page.text
    assert page.row("held_out") == ["held_out", "30", "0.9500", "0.9000", "0.4000"]
    with np.load(run_folder / "features.npz") as arrays:
        unified = unify(arrays["features"], arrays["labels"], 0.5)
    assert page.row("learned b / s")[1:] == ["0.5000", f"{unified.accuracy_at_learned:.4f}"]
    assert page.row("learned - best")[1] == f"{unified.gap:.4f}"
    assert page.row("identities")[1] == "10"
    assert page.row("1:N probes")[1] == "90"


def test_text_from_files_is_never_markup(run_folder: Path) -> None:
    path = run_folder / "report.html"
    source = path.read_text()
    assert "<script" not in source
    assert "<run>" not in source
    page = Page(path)
    assert page.row(HOSTILE)[1] == "30"  # the test set
    # The identity, of ten that are listed; another one whose name is not ASCII.
    listed = {row[0] for row in page.rows[-15:]}
    assert {HOSTILE, "名前"} <= listed
    assert f"path: '{HOSTILE}'" in page.text
    assert "my <run>" in page.text


def test_what_a_run_has_not_written_is_reported_missing(run_folder: Path, tmp_path: Path) -> None:
    shutil.copy(run_folder / "metrics.jsonl", tmp_path)
    page = Page(run_report.write(tmp_path))
    check_self_contained(page)
    assert page.headings == ["Training", *FOLDED]
    assert page.numbers == ["1.0000", "0.5000", "116"]  # loss, threshold, images/s
    assert "This run has not been evaluated." in page.text
    assert page.text.count("This run has no features.npz.") == 3
    assert "This run has no config.yaml." in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5

    save_features(tmp_path, np.eye(3), np.zeros(3, np.int64), ["only one"])
    (tmp_path / "metrics.jsonl").write_text("")
    page = Page(run_report.write(tmp_path))
    assert "This run has not logged a step." in page.text
    assert page.numbers == ["-", "-", "-"]
    assert "form no positive or no negative pair" in page.text


def test_the_equal_error_rate_is_where_both_errors_are_equal(run_folder: Path) -> None:
    with np.load(run_folder / "features.npz") as arrays:
        scores, same = all_pairs(arrays["features"], arrays["labels"])
    errors = [((scores[~same] >= t).mean(), (scores[same] < t).mean()) for t in np.unique(scores)]
    false_accepts, false_rejects = min(errors, key=lambda both: abs(both[0] - both[1]))
    shown = float(Page(run_folder / "report.html").numbers[1].removesuffix(" %"))
    assert shown == pytest.approx(50 * (false_accepts + false_rejects), abs=0.1)


def test_numbers_of_a_run_with_test_sets_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "images_per_s": 7}\n')
    (tmp_path / "config.yaml").write_text("[no mapping")
    path, sets = tmp_path / "evaluations.jsonl", {"lfw": {"accuracy": 0.99, "auc": 0.9995}}
    path.write_text(json.dumps({"step": 1, "epoch": 0.1, "eval": sets}) + "\n")
    page = Page(run_report.write(tmp_path))
    assert page.numbers == ["99.00 %", "0.9995", "7"]
    assert page.headings == ["Test sets", "Training", "Scores of identities", "Configuration"]
    sets["agedb"] = {"accuracy": 0.95, "auc": 0.98}
    path.write_text(json.dumps({"step": 1, "epoch": 0.1, "eval": sets}) + "\n")
    page = Page(run_report.write(tmp_path))
    assert page.numbers == ["97.00 %", "95.00 %", "7"]
    assert "agedb" in page.text


def test_damaged_files_are_one_line(run_folder: Path, tmp_path: Path) -> None:
    assert exit_code(lambda: run_report.run([str(tmp_path)])) == 2
    with pytest.raises(UserError, match=r"is no run folder: it has no metrics\.jsonl"):
        run_report.write(tmp_path)
    folder = tmp_path / "copy"
    for name, content, message in (
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo\n', "line 2: not JSON"),
        ("metrics.jsonl", b"[1]\n", "line 1: expected an object with an epoch"),
        ("evaluation.json", b"{", "not JSON"),
        ("evaluation.json", b"[]", "expected the figures"),
        *(
            ("evaluation.json", json.dumps({"accuracy": 0.5, **more}).encode(), "expected the fig")
            for more in (
                {"accuracy": "high"},
                {"pairs": "many"},
                {"threshold": [1]},
                {"tar_at_far": 3},
                {"tar_at_far": {"low": 0.5}},
                {"tar_at_far": {"0.1": None}},
            )
        ),
        ("metrics.jsonl", b'{"epoch": "one"}\n', "line 1: expected an object with an epoch"),
        ("features.npz", b"PK", "cannot read features"),
    ):
        shutil.copytree(run_folder, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            run_report.write(folder)
        shutil.rmtree(folder)
    shutil.copytree(run_folder, folder)
    save_features(folder, np.ones((3, 2)), np.array([0, 1, 2]), ["a", "b"])
    with pytest.raises(UserError, match="labels beyond its 2 identities"):
        run_report.write(folder)
    (folder / "features.npz").unlink()
    # What is no evaluation of sets is left out.
    lines = [{"epoch": 1, "eval": sets} for sets in (3, {"x": 4}, {"lfw": {"accuracy": 0.9}})]
    (folder / "evaluations.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    assert "lfw" in run_report.write(folder).read_text()


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9, "epoch": 0.5}\n{"step": 10, "epo')
    assert run_report._lines(path) == [{"step": 9, "epoch": 0.5}]


def test_a_finished_run_leaves_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_faces(tmp_path / "data", identities=5, images=4)
    config = tiny(data, tmp_path / "run", data={"holdout": 2}, train={"epochs": 1})
    config.run.report = True
    assert main.run(arguments(config)) == 0
    printed = capsys.readouterr().out
    assert f"report: {tmp_path / 'run' / 'report.html'}" in printed
    assert re.match(r"device cpu, loss backend \w+, losses \w+", printed.splitlines()[0])
    page = Page(tmp_path / "run" / "report.html")
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert page.row("auc")[1] == f"{figures['auc']:.4f}"
    assert "name: conv4" in page.text


def test_counts_are_those_of_the_list_of_pairs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 150)
    features = rng.standard_normal((12, 6))[labels] + rng.standard_normal((150, 6))
    features[1], labels[1] = features[0], labels[0]  # a cosine of 1, or a little more
    counts = plots.count_all(features, labels)
    scores, same = all_pairs(features, labels)
    assert counts.positives.sum() == same.sum()
    assert counts.negatives.sum() == (~same).sum()
    listed = np.histogram(scores[~same], counts.edges)[0]
    assert np.abs(counts.negatives - listed).sum() <= 4  # rounding at an edge
    assert counts.positives[0] + counts.negatives[0] > 0
    assert counts.positives[-1] > 0
