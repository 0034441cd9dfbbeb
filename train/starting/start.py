"""The start of a run, by the one of ``model.weights``, ``train.init`` and ``train.finetune`` given.

``model.weights`` loads a backbone alone, ``train.init`` the class weights of another program, too,
and ``train.finetune`` all that another run has learned, for identities that may be others. After
any of them the run begins at step 0, with its own learning rate.
"""

from __future__ import annotations

from pathlib import Path

from train import checkpoint
from train.errors import UserError, reported
from train.starting.finetuning import finetune
from train.starting.foreign import start_from
from train.trainer import Trainer


def load_start(trainer: Trainer, *, backbone_only: bool = False) -> str:
    """Load what the configuration names; every process calls. A line on what was found, or none.

    With ``backbone_only`` the classes of the file need not be those of the trainer.

    Raises:
        UserError: with the key, the file and what does not fit.
    """
    config = trainer.config
    for key, file, load in (
        ("model.weights", config.model.weights, _backbone),
        ("train.init", config.train.init, start_from),
        ("train.finetune", config.train.finetune, finetune),
    ):
        if file:
            with reported(key, UserError):
                return (_backbone if backbone_only else load)(trainer, Path(file))
    return ""


def _backbone(trainer: Trainer, file: Path) -> str:
    path, values = checkpoint.read_any(file)
    trainer.load_backbone(values, path)
    return f"starting from {path}: its backbone"
