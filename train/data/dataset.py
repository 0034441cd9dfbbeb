"""From ``data.*`` of a configuration to training and test images."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import Config
from train.data.folder import scan_folder
from train.data.image_list import ImageList, split_identities
from train.data.loader import ImageSource, open_images
from train.data.orl import HOLDOUT, scan_orl
from train.errors import UserError


@dataclass
class Dataset:
    train: ImageSource
    test: ImageList  # people never trained on; decoded when they are needed


def open_dataset(config: Config, world_size: int = 1) -> Dataset:
    data = config.data
    is_orl = data.path == "orl"
    holdout = data.holdout if data.holdout is not None else (HOLDOUT if is_orl else 0)
    train, test = split_identities(scan(data.path), holdout)
    source = open_source(config, train)
    left = len(source.images.identities)
    if left < 2:
        raise UserError(f"data.path: {left} identity left after skipping unreadable images, need 2")
    batch = min(config.train.batch_size, len(source.images))
    if batch // world_size < 2:
        raise UserError(
            f"a batch of {batch} images over {world_size} processes: BatchNorm needs 2 in each"
        )
    return Dataset(source, test)


def scan(path: str) -> ImageList:
    """The images under ``data.path``; nothing is decoded."""
    return scan_orl() if path == "orl" else scan_folder(path)


def open_source(config: Config, images: ImageList) -> ImageSource:
    """These images at the model's size, under the configuration's caching and error rules."""
    return open_images(
        images,
        config.model.input_size,
        on_error=config.data.on_error,
        cache=config.data.cache,
        workers=config.data.workers,
    )
