"""IJB-C: alignment, meta files, templates, verification and search, against loops."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.evaluation_formats import orl_images, write_ijb, write_lines
from support.training import tiny, train, write_faces

from train import evaluate
from train.errors import UserError
from train.evaluation import ijb, ijb_meta, rates
from train.evaluation.align import PLACES, AlignedFaces, align, similarity
from train.evaluation.model import Model

FACE = next(iter(orl_images(range(1), 1).values()))[0]  # 112 x 112


def test_similarity_of_known_points() -> None:
    angle, scale, shift = 0.7, 1.9, np.array([11.0, -5.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity(PLACES, PLACES @ (scale * turn).T + shift)
    np.testing.assert_allclose(found[:, :2], scale * turn, atol=1e-12)
    np.testing.assert_allclose(found[:, 2], shift, atol=1e-10)
    mirrored = similarity(PLACES, PLACES * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0  # the best that is no mirror image


def test_landmarks_at_their_places_change_nothing_and_whole_shifts_crop() -> None:
    np.testing.assert_array_equal(np.asarray(align(FACE, PLACES)), np.asarray(FACE))
    wide = Image.new("RGB", (140, 130))
    wide.paste(FACE, (17, 9))
    np.testing.assert_array_equal(
        np.asarray(align(wide, PLACES + np.array([17, 9]))), np.asarray(FACE)
    )


def test_alignment_undoes_turns_and_zooms() -> None:
    turned = FACE.transpose(Image.Transpose.ROTATE_90)  # pixel (x, y) goes to (y, 111 - x)
    points = np.stack([PLACES[:, 1], 111 - PLACES[:, 0]], axis=1)
    assert _difference(align(turned, points)) < 0.1
    double = FACE.resize((224, 224), Image.Resampling.BICUBIC)  # center x goes to 2 x + 0.5
    assert _difference(align(double, 2 * PLACES + 0.5)) < 2
    # Half a pixel off is seen: the convention of pixel centers matters.
    assert _difference(align(double, 2 * PLACES + 1.5)) > 2
    assert np.asarray(align(FACE, PLACES - 60))[:50, :50].max() == 0  # black beyond the image


def _difference(image: Image.Image) -> float:
    a, b = np.asarray(image, float), np.asarray(FACE, float)
    return float(np.abs(a - b)[4:-4, 4:-4].mean())


def _random_templates(rng: np.random.Generator, count: int = 30) -> Any:
    """Images of templates of one to four media of one to three images."""
    rows = [
        (t, 100 * t + m)
        for t in range(count)
        for m in range(rng.integers(1, 5))
        for _ in range(rng.integers(1, 4))
    ]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    people = rng.normal(size=(count // 3, 8))
    features = np.stack([people[t % len(people)] + rng.normal(0, 0.9, 8) for t, _ in rows])
    numbers = np.array(rows)
    return features.astype(np.float32), numbers[:, 0] * 7 + 3, numbers[:, 1]


def _pooled_by_loops(features: Any, ids: Any, media: Any, scores: Any, norms: bool) -> dict:
    pooled = {}
    for template in sorted(set(ids.tolist())):
        total = np.zeros(features.shape[1])
        for medium in sorted(set(media[ids == template].tolist())):
            frames = []
            for i in np.flatnonzero((ids == template) & (media == medium)):
                feature = features[i].astype(np.float64)
                if not norms:
                    feature = feature / np.linalg.norm(feature)
                frames.append(feature * (1 if scores is None else scores[i]))
            total += np.mean(frames, axis=0)
        pooled[template] = total / np.linalg.norm(total)
    return pooled


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_templates_are_sums_over_media_of_means_over_images(
    norms: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ijb, "ROWS", 7)
    rng = np.random.default_rng(0)
    features, ids, media = _random_templates(rng)
    scores = rng.uniform(0.2, 1, len(ids)) if weighted else None
    pooled = ijb.pool(features, ids, media, scores=scores, norms=norms)
    expected = _pooled_by_loops(features, ids, media, scores, norms)
    assert pooled.ids.tolist() == list(expected)
    np.testing.assert_allclose(pooled.features, list(expected.values()), atol=1e-6)
    with pytest.raises(UserError, match="not finite"):
        ijb.pool(features * np.nan, ids, media, scores=None, norms=True)


def test_rates_accept_no_more_than_allowed() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=5000).round(1)  # with ties
    same = rng.random(5000) < 0.3
    scores[same] += 1
    fars = (1e-6, 1e-3, 1e-2, 0.1, 0.5, 1.0)
    given = rates.tar_at_fars(scores, same, fars)
    for far in fars:
        best = 0.0
        for threshold in [*np.unique(scores), np.inf]:
            if (scores[~same] >= threshold).mean() <= far:
                best = max(best, float((scores[same] >= threshold).mean()))
        assert given[f"tar@far={far:g}"] == best
    assert rates.allowed(0.29, 100) == 29  # 28.999999999999996
    assert 0 < given["tar@far=0.001"] < given["tar@far=0.1"] < 1 == given["tar@far=1"]


def test_rates_that_the_negatives_do_not_resolve_are_none() -> None:
    figures = {"tar@far=1e-06": 0.9, "tar@far=0.01": 0.8, "pairs": 405}
    assert rates.without_unresolved(figures, 405) == {**figures, "tar@far=1e-06": None}
    assert rates.resolved(1e-6, 10**6)
    assert [rates.shown(v) for v in (None, 0.8, 405)] == ["not resolved", "0.8000", "405"]


def test_verification_of_listed_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ijb, "ROWS", 50)
    rng = np.random.default_rng(2)
    features, ids, media = _random_templates(rng)
    pooled = ijb.pool(features, ids, media, scores=None, norms=True)
    by_id = dict(zip(pooled.ids.tolist(), pooled.features, strict=True))
    first, second = rng.choice(pooled.ids, (2, 400))
    same = (first - second) // 7 % 10 == 0
    figures = ijb.verify(pooled, first, second, same, (0.01, 0.1))
    scores = np.array([by_id[a] @ by_id[b] for a, b in zip(first, second, strict=True)])
    for far in (0.01, 0.1):
        negatives = sorted(scores[~same], reverse=True)
        threshold = negatives[int(far * len(negatives))]
        assert figures[f"tar@far={far}"] == (scores[same] > threshold).mean()
    assert figures["pairs"] == 400
    # A template of which no image was read: its pairs are left out.
    first[:5] = 1
    left = ijb.verify(pooled, first, second, same, (0.1,))
    assert (left["pairs"], left["skipped_pairs"]) == (395, 5)
    with pytest.raises(UserError, match="no pairs of both kinds are left, 0 of 5"):
        ijb.verify(pooled, first[:5], second[:5], same[:5])


def _search_by_loops(by_id: dict, gallery: Any, probes: Any) -> dict[str, float]:
    ranks, mates, alarms = [], [], []
    for template, subject in probes:
        best: dict[int, float] = {}
        for enrolled, name in gallery:
            score = float(by_id[template] @ by_id[enrolled])
            best[name] = max(best.get(name, -9.0), score)
        if subject in best:
            ranks.append(1 + sum(s >= best[subject] for n, s in best.items() if n != subject))
            mates.append(best[subject])
        else:
            alarms.append(max(best.values()))
    alarms.sort(reverse=True)
    figures = {f"rank-{r}": sum(rank <= r for rank in ranks) / len(ranks) for r in (1, 5, 10)}
    for fpir in (1e-2, 1e-1):
        bar = alarms[int(fpir * len(alarms))]
        hits = sum(r == 1 and m > bar for r, m in zip(ranks, mates, strict=True))
        figures[f"tpir@fpir={fpir:g}"] = hits / len(ranks)
    return figures


def test_search_in_galleries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ijb, "PROBES", 13)
    rng = np.random.default_rng(3)
    count, size = 240, 16
    people = rng.normal(size=(40, size))
    subjects = rng.permutation(np.arange(count) % 40) + 1000
    features = people[subjects - 1000] + rng.normal(0, 1.6, (count, size))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ids = np.sort(rng.choice(10_000, count, replace=False))
    pooled = ijb.Templates(ids, features.astype(np.float32))
    # Subjects up to 1014 in the first gallery, from 1025 on in the second, some twice; some in none
    lists: list[list[tuple[int, int]]] = [[], [], []]
    for template, subject in zip(ids.tolist(), subjects.tolist(), strict=True):
        side = 0 if subject < 1015 else 1 if subject >= 1025 else 2
        taken = sum(s == subject for _, s in lists[side])
        lists[side if taken < 1 + subject % 2 else 2].append((template, subject))
    tables = [ijb_meta.Subjects(*np.array(sorted(entries), dtype=np.int64).T) for entries in lists]
    figures = ijb.both_galleries(pooled, *tables)
    by_id = dict(zip(ids.tolist(), pooled.features, strict=True))
    each = [_search_by_loops(by_id, lists[g], lists[2]) for g in (0, 1)]
    merged = _search_by_loops(by_id, lists[0] + lists[1], lists[2])
    for name, value in merged.items():
        assert figures["gallery 1"][name] == pytest.approx(each[0][name], abs=1e-12)
        assert figures["gallery 2"][name] == pytest.approx(each[1][name], abs=1e-12)
        assert figures["mean"][name] == pytest.approx((each[0][name] + each[1][name]) / 2)
        assert figures["merged"][name] == pytest.approx(value, abs=1e-12)
    assert 0 < merged["tpir@fpir=0.1"] < merged["rank-1"] < merged["rank-10"] < 1


def _small_ijb(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Six ORL people as three templates each, in crops with a border; three in each gallery."""
    images, rows, points = {}, [], []
    tables: dict[str, list[tuple[int, int, str]]] = {
        "gallery_G1": [],
        "gallery_G2": [],
        "probe_mixed": [],
    }
    rng = np.random.default_rng(4)
    for subject, faces in enumerate(orl_images(range(6), 6).values()):
        for i, face in enumerate(faces):
            name = f"{len(images) + 1}.jpg"
            left, top = rng.integers(5, 30, 2).tolist()
            images[name] = Image.new("RGB", (150, 150), (90, 90, 90))
            images[name].paste(face, (left, top))
            points.append(PLACES + np.array([left, top]))
            template = 10 * subject + i // 2 + 1
            rows.append((name, template, 1000 + 2 * template + (i % 2 if subject % 2 else 0)))
            gallery = "gallery_G1" if subject < 3 else "gallery_G2"
            tables[gallery if i // 2 == 0 else "probe_mixed"].append((template, subject, name))
    ids = sorted({t for _, t, _ in rows})
    pairs = [(a, b, int(a // 10 == b // 10)) for a in ids for b in ids if a < b]
    scores = rng.uniform(0.5, 1, len(rows))
    meta_folder, crops = write_ijb(
        folder, images, rows, np.stack(points), pairs, tables, scores=scores
    )
    return meta_folder, crops, {"rows": rows, "pairs": pairs, "scores": scores.round(6)}


def test_the_command_from_meta_files_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meta_folder, crops, given = _small_ijb(tmp_path / "IJBC")
    train(tiny(write_faces(tmp_path / "data"), tmp_path / "run"), stop_after=1)
    seen = []

    def keep(*arguments: Any) -> Any:
        seen.append(embed_records(*arguments))
        return seen[-1]

    embed_records = Model.embed_records
    monkeypatch.setattr(Model, "embed_records", keep)
    line = ["ijbc", str(tmp_path / "run"), "--meta", str(meta_folder), "--images", str(crops)]
    line += ["--workers", "0", "--out", str(tmp_path / "out")]
    assert evaluate.run(line) == 0
    figures = json.loads((tmp_path / "out" / "ijbc.json").read_text())
    features, read = seen[-1]
    assert read.all()
    ids, media = np.array([row[1:] for row in given["rows"]]).T
    by_id = _pooled_by_loops(features, ids, media, given["scores"], norms=True)
    scores = np.array([by_id[a] @ by_id[b] for a, b, _ in given["pairs"]])
    same = np.array([s == 1 for *_, s in given["pairs"]])
    for far in (1e-6, 1e-2, 1e-1):
        negatives = sorted(scores[~same], reverse=True)
        expected = (scores[same] > negatives[int(far * len(negatives))]).mean()
        if far * len(negatives) < 1:
            assert figures["1:1"][f"tar@far={far:g}"] is None
            continue
        assert figures["1:1"][f"tar@far={far:g}"] == pytest.approx(expected)
    assert figures["1:N"]["gallery 1"]["mated"] == figures["1:N"]["gallery 1"]["non_mated"] == 6
    shown = capsys.readouterr().out
    assert "36 images (0 skipped), 18 templates" in shown
    assert "tar@far=1e-06 not resolved" in shown

    # Two images of template 1 are missing, one of template 3's: an error, or left out and counted.
    (crops / "1.jpg").unlink()
    (crops / "2.jpg").write_bytes(b"no image")
    (crops / "5.jpg").unlink()
    with pytest.raises(UserError, match=r"cannot read image .*1\.jpg: No such file"):
        evaluate.run(line)
    kept = tmp_path / "features.npy"
    assert evaluate.run([*line, "--on-error", "skip", "--write-features", str(kept)]) == 0
    figures = json.loads((tmp_path / "out" / "ijbc.json").read_text())
    assert figures["skipped_images"] == 3
    assert (figures["1:1"]["pairs"], figures["1:1"]["skipped_pairs"]) == (136, 17)
    # Probes of the person whose gallery template has gone are left out of all figures.
    assert figures["1:N"]["merged"]["skipped_probes"] == 2
    assert figures["1:N"]["merged"]["non_mated"] == 0
    # The same out of the features that were kept, without a model or images.
    given_features = ["ijbc", "none", "--meta", str(meta_folder), "--out", str(tmp_path / "again")]
    assert evaluate.run([*given_features, "--read-features", str(kept)]) == 0
    assert json.loads((tmp_path / "again" / "ijbc.json").read_text()) == figures
    for wrong, message in (
        (np.zeros((3, 4), np.float32), r"expected 36 rows of floats, got \(3, 4\)"),
        (np.array([[None] * 4] * 36), "npy: expected numbers, got .* of object"),
    ):
        np.save(kept, wrong, allow_pickle=True)
        with pytest.raises(UserError, match=message):
            evaluate.run([*given_features, "--read-features", str(kept)])
    # Aligned, a face is what it was before it was put into its crop.
    source = AlignedFaces(
        [str(crops / "7.jpg")], ijb_meta.read_faces(meta_folder, "ijbc").landmarks[6:]
    )
    face = list(orl_images(range(2), 6).values())[1][0]
    aligned = np.asarray(Image.open(io.BytesIO(source.read(0))), float)
    shifted, face = np.roll(aligned, 1, axis=1), np.asarray(face, float)
    assert np.abs(aligned - face).mean() < 0.5 * np.abs(shifted - face).mean()  # JPEG changes some


@pytest.mark.parametrize(
    ("file", "number", "line", "message"),
    [
        ("face_tid_mid.txt", 3, "3.jpg 2", r"txt, line 3: expected integers template medium"),
        ("face_tid_mid.txt", 3, "3.jpg 2 x", r"line 3: expected integers template medium, got"),
        ("face_tid_mid.txt", 2, "../2.jpg 1 1", r"line 2: expected a path within the folder"),
        ("face_tid_mid.txt", 2, "/etc/x 1 1", r"line 2: expected a path within the folder"),
        ("name_5pts_score.txt", 4, "9.jpg 1 2", r"line 4: expected 4\.jpg as in ijbc_face_tid"),
        ("name_5pts_score.txt", 4, "4.jpg 1 2 3", r"line 4: expected 5 landmarks x y and a score"),
        ("name_5pts_score.txt", 4, "4.jpg" + " nan" * 11, r"line 4: expected 5 landmarks"),
        ("name_5pts_score.txt", 4, "4.jpg" + " 7" * 11, r"line 4: the five landmarks are one"),
        ("name_5pts_score.txt", 36, "", r"expected 36 images, at least 1; got 35"),
        ("template_pair_label.txt", 5, "1 2", r"line 5: expected integers template template label"),
        ("template_pair_label.txt", 5, "1 2 3 4", r"line 5: expected integers template"),
        ("template_pair_label.txt", 5, f"1 {2**64} 1", r"line 5: expected integers template"),
        ("template_pair_label.txt", 5, "1 2 7", r"pair 5: expected label 0 or 1, got 7"),
        ("template_pair_label.txt", 5, "1 999 0", r"label\.txt: template 999 has no images"),
        ("1N_probe_mixed.csv", 2, "999,1,f", r"mixed\.csv: template 999 has no images"),
        ("1N_gallery_G1.csv", 1, "A,B", r"expected a header with TEMPLATE_ID and SUBJECT_ID"),
        ("1N_gallery_G1.csv", 3, "7", r"csv, line 3: expected 8 columns, got 1"),
        ("1N_gallery_G1.csv", 3, "7,x,f", r"line 3: expected integers TEMPLATE_ID SUBJECT_ID"),
        ("1N_gallery_G1.csv", 3, "1,99,f", r"line 3: template 1 shows subject 99 here, 0 before"),
        ("1N_probe_mixed.csv", 0, None, r"cannot read .*mixed\.csv: No such file"),
    ],
)
def test_malformed_files_are_named_with_their_line(
    file: str, number: int, line: str | None, message: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "meta"
    folder.mkdir()
    for path in small[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / f"ijbc_{file}"
    if line is None:
        path.unlink()
    else:
        kept = path.read_text().splitlines()
        write_lines(path, [*kept[: number - 1], line, *kept[number:]])
    # Found before any model is loaded.
    given = ["ijbc", "no_checkpoint", "--meta", str(folder), "--images", str(small[1])]
    with pytest.raises(UserError, match=message):
        evaluate.run(given)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _small_ijb(tmp_path_factory.mktemp("ijb") / "IJBC")[:2]
