"""Small folders of made-up faces and small configurations for the tests of ``train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from train.config import Config, make_config  # noqa: E402
from train.data.dataset import open_dataset  # noqa: E402
from train.distributed import DistributedEnv  # noqa: E402
from train.run_folder import prepare, read_metrics  # noqa: E402
from train.starting.start import load_start  # noqa: E402
from train.trainer import Trainer  # noqa: E402

CPU = DistributedEnv(0, 1, torch.device("cpu"))
# Known by its tensors, as Conv-4 is not.
IRESNET = {"name": "iresnet18"}


def write_faces(
    folder: Path, identities: int = 4, images: int = 4, size: int = 16, seed: int = 0
) -> Path:
    """Per identity one smooth random picture; its images add a little noise."""
    rng = np.random.default_rng(seed)
    for i in range(identities):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        face = np.asarray(Image.fromarray(coarse).resize((size, size)), dtype=np.float64)
        (folder / f"person{i + 1}").mkdir(parents=True)
        for k in range(images):
            noisy = face + rng.normal(0, 8, face.shape)
            pixels = noisy.clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"person{i + 1}" / f"{k + 1}.png")
    return folder


def tiny(data: Path, run: Path, /, **sections: dict[str, Any]) -> Config:
    """Conv-4 at 16 x 16, batches of 8, no progress bar; sections override single keys."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "conv4", "input_size": 16},
        "data": {"path": str(data), "workers": 0},
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.05, "device": "cpu"},
        "run": {
            "dir": str(run),
            "log_every": 1,
            "progress": False,
            "tensorboard": False,
            "report": False,
        },
    }
    for section, entries in sections.items():
        values.setdefault(section, {}).update(entries)
    return make_config(("test", values))


def arguments(config: Config) -> list[str]:
    """The command line that gives this configuration."""
    import json

    from train.config import to_dict

    return [
        f"{section}.{name}={json.dumps(value)}"
        for section, entries in to_dict(config).items()
        for name, value in entries.items()
    ]


def trainer_of(config: Config) -> Trainer:
    trainer = Trainer(config, CPU, open_dataset(config).train)
    load_start(trainer)
    return trainer


def train(config: Config, stop_after: int | None = None) -> Trainer:
    """A run from its beginning, possibly cut off."""
    trainer = trainer_of(config)
    prepare(Path(config.run.dir), config, resume_step=None)
    finished = trainer.fit(Path(config.run.dir), stop=lambda step: step == stop_after)
    assert finished == (stop_after is None)
    return trainer


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder)]


def assert_same_state(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b
