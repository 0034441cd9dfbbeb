"""Batches of uint8 images, out of memory for small sets and out of files for large ones."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from multiprocessing.queues import Queue, SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.data.decode import MAX_PIXELS, PixelError, to_pixels
from train.data.image_list import ImageList
from train.data.records import RecordError
from train.errors import EXPLAINED, UserError
from train.stopping import leave_signals

T = TypeVar("T")

CACHE_LIMIT_BYTES = 512 * 2**20

# Indices of each batch: lists, or the rows of an array.
Batches = Sequence[Sequence[int]] | NDArray[np.int64]


_Sample = tuple[np.ndarray, int, dict[str, str]]
_SKIP = "data.on_error=skip leaves such images out"


@dataclass
class ImageSource(Dataset[_Sample]):
    """Images of an :class:`ImageList` by index; ``skipped`` collects one message per bad image."""

    images: ImageList
    size: int
    skip_unreadable: bool
    workers: int = 0
    pixels: Tensor | None = None  # (len(images), 3, size, size) uint8 when cached
    skipped: dict[str, str] = field(default_factory=dict)
    max_pixels: int = MAX_PIXELS

    def batches(self, indices: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, 3, S, S) uint8 images and (n,) int64 labels for each list of indices."""
        if self.pixels is not None:
            labels = torch.from_numpy(self.images.labels)
            for rows in indices:
                chosen = torch.as_tensor(np.ascontiguousarray(rows))
                yield self.pixels[chosen], labels[chosen]
            return
        global _lost
        fork = "fork" if self.workers and sys.platform == "linux" else None
        _lost = get_context(fork).SimpleQueue() if self.workers else None
        loader: DataLoader[_Sample] = DataLoader(
            replace(self, skipped={}),
            batch_sampler=indices,  # type: ignore[arg-type]  # of an array, its rows
            num_workers=self.workers,
            # Forked workers share the arrays of the image list; others would each get a copy.
            multiprocessing_context=fork,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_start_worker, _lost),
        )
        for pixels, labels, errors in _received(loader):
            self.skipped.update(errors)
            if errors and not self.skip_unreadable:
                message = next(iter(errors.values()))
                raise UserError(f"{message} ({_SKIP})")
            if (labels < 0).any():
                raise UserError(f"none of the {len(self.images)} images can be read")
            yield pixels, labels

    def decode(self, index: int) -> NDArray[np.uint8]:
        """(3, size, size); only errors name the image, as some storages must read its name."""
        encoded = self.images.read(index)
        try:
            return to_pixels(encoded, self.size, self.max_pixels)
        except PixelError as error:
            raise RecordError(f"cannot read image {self.images.name(index)}: {error}") from error

    def __getitem__(self, index: int) -> _Sample:
        """In a decoding process. An unreadable image comes back as a message, not an exception:
        those lose their type on the way out. When skipping, the next readable image takes its
        place, so that batches keep their size on every process.
        """
        errors: dict[str, str] = {}
        for offset in range(len(self.images) if self.skip_unreadable else 1):
            i = (index + offset) % len(self.images)
            try:
                return self.decode(i), int(self.images.labels[i]), errors
            except RecordError as error:
                errors[self.images.name(i)] = str(error)
        return np.zeros((3, self.size, self.size), np.uint8), -1, errors

    def readable(self) -> NDArray[np.bool_]:
        """(len(images),): false for those skipped, in whose place ``batches`` gave another."""
        if not self.skipped or self.pixels is not None:
            return np.ones(len(self.images), dtype=bool)
        return np.array([self.images.name(i) not in self.skipped for i in range(len(self.images))])

    def stacked(self) -> Tensor:
        """All images in order, (len(images), 3, size, size) uint8: for small sets."""
        if self.pixels is not None:
            return self.pixels
        rows = range(len(self.images))
        return torch.cat([pixels for pixels, _ in self.batches([[i] for i in rows])])


def open_images(
    images: ImageList,
    size: int,
    *,
    on_error: str,
    cache: str = "auto",
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """Decode a small set at once, dropping bad files from it; a large one is decoded in batches."""
    skip = on_error == "skip"
    source = ImageSource(images, size, skip, workers, max_pixels=max_pixels)
    fits = len(images) * 3 * size * size <= CACHE_LIMIT_BYTES
    if cache == "never" or (cache == "auto" and not fits):
        return source
    arrays: dict[int, NDArray[np.uint8]] = {}
    for i in range(len(images)):
        try:
            arrays[i] = source.decode(i)
        except RecordError as error:
            if not skip:
                raise UserError(f"{error} ({_SKIP})") from error
            source.skipped[images.name(i)] = str(error)
    if not arrays:
        example = next(iter(source.skipped))
        raise UserError(f"none of the {len(images)} images can be read: {example}, ...")
    kept = images if len(arrays) == len(images) else images.keep([*arrays])
    pixels = torch.from_numpy(np.stack([*arrays.values()]))
    return replace(source, images=kept, workers=0, pixels=pixels)


_WITHOUT = "data.workers=0 decodes in the training process"
# Errors of decoding processes that could not hand over a batch; the last loader's.
_lost: SimpleQueue[str] | None = None


def _start_worker(lost: SimpleQueue[str], worker: int) -> None:
    """Runs in a decoding process. A batch that its queue cannot send (for lack of shared memory,
    for example) would be dropped with a traceback, and waited for without end.
    """
    leave_signals(worker)

    def give_up(error: Exception, item: Any) -> None:
        lost.put(" ".join(str(error).split())[:300])
        os._exit(1)

    Queue._on_queue_feeder_error = staticmethod(give_up)  # type: ignore[attr-defined]


def lost_worker(error: Exception) -> UserError:
    """The explanation of Torch's error that a decoding process is gone, wherever it is raised."""
    text = str(error)
    if _lost is not None and not _lost.empty():
        reason = f"a decoding process cannot hand over a batch ({_lost.get()})"
    elif "Bus error" in text:
        reason = "a decoding process cannot hand over a batch"
    else:
        how = re.search(r"is (killed by signal: [^.]*)|(exit code \d+)", text)
        return UserError(
            f"a decoding process has died{f' ({how[1] or how[2]})' if how else ''}, of an image or "
            f"for want of memory; {_WITHOUT}"
        )
    return UserError(
        f"{reason}: shared memory is too small for the batches under way; enlarge /dev/shm (docker "
        "run --shm-size=8g), or decode in the training process by data.workers=0"
    )


# Torch raises it wherever the main thread is when a decoding process ends.
EXPLAINED["DataLoader worker"] = lost_worker


def _received(loader: Iterable[T]) -> Iterator[T]:
    """The batches of a loader; none of its processes outlives them."""
    before = set(active_children())
    batches = iter(loader)
    workers = set(active_children()) - before
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise lost_worker(error) from error
    except (OSError, EOFError) as error:  # descriptors or a folder for sockets are short
        said = f"cannot take a batch from a decoding process: {error}; {_WITHOUT}"
        raise UserError(said) from error
    finally:
        del batches  # signals them to end
        for process in workers:  # they ignore SIGTERM, and may be waiting for a disk
            if process.is_alive():
                process.kill()


def _collate(samples: list[_Sample]) -> tuple[Tensor, Tensor, dict[str, str]]:
    errors = {path: message for s in samples for path, message in s[2].items()}
    pixels = torch.from_numpy(np.stack([s[0] for s in samples]))
    return pixels, torch.tensor([s[1] for s in samples]), errors
