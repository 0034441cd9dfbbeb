"""People and images that are both in training and in a test set."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.packs import people, write_recordio
from support.training import arguments, tiny, write_faces

from train.data import duplicates
from train.data.dataset import scan
from train.data.duplicates import check_duplicates, report_duplicates
from train.data.image_list import split_identities
from train.errors import UserError
from train.main import main


def test_names_and_images_in_both_are_counted_with_examples(tmp_path: Path) -> None:
    train = scan(str(write_faces(tmp_path / "train", identities=5, images=3)))
    other = scan(str(write_faces(tmp_path / "other", identities=2, images=2, seed=1)))
    for who in (1, 2):
        (tmp_path / "other" / f"person{who}").rename(tmp_path / "other" / f"else{who}")
    other = scan(str(tmp_path / "other"))
    assert report_duplicates(train, [other]) is None
    (tmp_path / "other" / "else1").rename(tmp_path / "other" / "person4")
    shutil.copy(tmp_path / "train" / "person2" / "3.png", tmp_path / "other" / "else2" / "9.png")
    found = report_duplicates(train, [scan(str(tmp_path / "other"))])
    assert found is not None
    assert "identities by name: 1 (person4); identical images: 1 (" in found
    assert "else2/9.png = " in found
    assert "person2/3.png" in found
    assert "\n" not in found
    found = report_duplicates(train, [train])
    assert found is not None
    assert "identities by name: 5 (person1, person2, person3, ...)" in found
    assert "identical images: 15 (" in found


def test_numbers_of_records_are_no_names(tmp_path: Path) -> None:
    train = scan(str(write_recordio(tmp_path / "a", people()[:3])))
    test = scan(str(write_recordio(tmp_path / "b", people()[2:])))
    assert set(train.identities) == set(test.identities)
    found = report_duplicates(train, [test])
    assert found is not None
    assert "identities" not in found
    assert "identical images: 4 (" in found
    first, held_out = split_identities(train, 1)
    assert not held_out.named
    assert report_duplicates(first, [held_out]) is None


def test_what_cannot_be_read_or_is_empty_is_no_duplicate(tmp_path: Path) -> None:
    train = scan(str(write_faces(tmp_path / "train", identities=2, images=2)))
    test = scan(str(write_recordio(tmp_path / "test", [[b"", b""], [b"x"]])))
    (tmp_path / "train" / "person1" / "1.png").write_bytes(b"")
    (tmp_path / "train" / "person1" / "2.png").unlink()
    assert report_duplicates(train, [test]) is None


def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = scan(str(write_recordio(tmp_path, people())))
    assert "identical images: 20 (" in str(check_duplicates("report", train, [train]))
    assert check_duplicates("ignore", train, [train]) is None
    monkeypatch.setattr(duplicates, "MOST_IMAGES", 19)
    assert check_duplicates("report", train, [train]) is None
    with pytest.raises(UserError, match=r"identical images: 20 .*data\.duplicates=report goes on"):
        check_duplicates("fail", train, [train])


def test_a_run_warns_in_one_line_or_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faces = [list(images) for images in people()]
    faces[4][0] = faces[0][0]  # of the identities held out
    write_recordio(tmp_path / "data", faces)
    config = tiny(tmp_path / "data", tmp_path / "run", data={"holdout": 2}, train={"max_steps": 1})
    assert main([*arguments(config), "data.duplicates=fail"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: both in training and in a test set: identical images: 1 (")
    assert "record 17 = " in said
    assert main(arguments(config)) == 0
    assert (
        "warning: both in training and in a test set: identical images: 1"
        in capsys.readouterr().err
    )
