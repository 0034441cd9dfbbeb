"""Training and test images, from ``data.*`` of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.config import Config
from train.data.balanced import check_balanced
from train.data.folder import has_images, scan_folder
from train.data.image_list import ImageList, split_identities
from train.data.loader import ImageSource, open_images
from train.data.named import NAMED, holdout_of
from train.data.recordio import scan_recordio
from train.data.shards import is_pattern, is_remote, scan_shards
from train.errors import UserError


@dataclass
class Dataset:
    train: ImageSource
    test: ImageList  # identities never trained on; decoded when they are needed


def open_dataset(config: Config, world_size: int = 1) -> Dataset:
    data = config.data
    everything = scan(data.path, skip=data.on_error == "skip")
    train, test = split_identities(everything, holdout_of(data.path, data.holdout))
    source = open_source(config, train)
    source.skipped.update(everything.left_out)
    left = len(source.images.identities)
    if left < 2:
        raise UserError(f"data.path: {left} identity left after skipping unreadable images, need 2")
    check_batch(config, len(source.images), world_size)
    if data.sampler == "balanced":
        check_balanced(
            left,
            batch_size=config.train.batch_size,
            images_per_identity=data.images_per_identity,
            world_size=world_size,
        )
    return Dataset(source, test)


def check_batch(config: Config, images: int, processes: int) -> None:
    batch = min(config.train.batch_size, images)
    if batch // processes < 2:
        raise UserError(
            f"a batch of {batch} images over {processes} processes: BatchNorm needs 2 in each"
        )


def scan(path: str, *, skip: bool = False) -> ImageList:
    """The images of ``data.path`` in any format that is read; nothing is decoded.

    ``skip`` leaves out invalid records, with the reason, where a format has any to check.
    """
    if path in NAMED:
        return NAMED[path].scan()
    if path.endswith(".rec"):
        return scan_recordio(path, skip=skip)
    if path.endswith(".tar") or is_pattern(path) or is_remote(path):
        return scan_shards(path, skip=skip)
    kinds = _kinds(Path(path))
    if len(kinds) > 1:
        raise UserError(
            f"data.path: {path} holds {' and '.join(kinds)}; name the .rec file, a pattern of "
            ".tar files or a folder of its own for the images"
        )
    if "train.rec" in kinds:
        return scan_recordio(path, skip=skip)
    if "*.tar" in kinds:
        return scan_shards(path, skip=skip)
    return scan_folder(path, skip=skip)


def _kinds(folder: Path) -> list[str]:
    """Kinds of data in a folder that ``data.path`` may refer to; none if it is not a folder."""
    if not folder.is_dir():
        return []
    found = ["train.rec"] if (folder / "train.rec").exists() else []
    if any(folder.glob("*.tar")):
        found.append("*.tar")
    # Sub-folders matter only beside the others: there may be millions.
    if found and has_images(folder):
        found.append("sub-folders of images")
    return found


def open_source(config: Config, images: ImageList) -> ImageSource:
    """A source of these images at the model's size, with the configuration's caching and errors."""
    return open_images(
        images,
        config.model.input_size,
        on_error=config.data.on_error,
        cache=config.data.cache,
        workers=config.data.workers,
        max_pixels=config.data.max_pixels,
    )
