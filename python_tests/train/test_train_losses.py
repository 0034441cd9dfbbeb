"""Losses by name, their thresholds, what changes with the epoch, and the feature memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import assert_same_state, losses, tiny, train, trainer_of, write_faces
from torch import Tensor, nn

import unitsface_kernels as uk
from train import checkpoint
from train.backbones import build_backbone
from train.config import Config
from train.config.sections import LossConfig
from train.errors import UserError
from train.losses import FaceLoss, build_loss, cosine_threshold, try_loss
from train.main import main
from train.optimizer import build_optimizer
from train.run_folder import read_metrics
from train.trainer import Trainer


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


EVERY_LOSS = [
    *((name, "none") for name in uk.CLASS_LOSSES),
    *(("none", name) for name in uk.PAIR_LOSSES),
]


@pytest.mark.parametrize(("class_name", "pair_name"), EVERY_LOSS)
def test_every_loss_trains_by_name(
    faces: Path, tmp_path: Path, class_name: str, pair_name: str
) -> None:
    config = tiny(
        faces, tmp_path, loss={"class": class_name, "pair": pair_name}, train={"max_steps": 1}
    )
    trainer = trainer_of(config)
    before = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    trainer.fit(tmp_path)
    line = read_metrics(tmp_path)[0]
    assert math.isfinite(line["loss"])
    assert (line["class_loss"] is None) == (class_name == "none")
    assert (line["pair_loss"] is None) == (pair_name == "none")
    thresholds = [p for p in trainer.loss.parameters() if p.dim() == 0]
    # That of SimPLE is not one of cosines.
    simple = class_name == "simple_proxy" or pair_name == "simple"
    assert (line["threshold"] is None) == (not thresholds or simple)
    moved = {n for n, p in trainer.module.named_parameters() if not torch.equal(p, before[n])}
    assert "backbone.fc.weight" in moved
    assert {n for n in before if n.startswith("loss.")} <= moved


# -- thresholds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_name", "pair_name", "shapes"),
    [
        ("sphereface2", "pair_bce", {"class_loss.bias": (), "pair_loss.threshold": (5,)}),
        ("class_bce", "uss", {"class_loss.threshold": (5,), "pair_loss.threshold": ()}),
        ("cosface", "pair_softmax", {}),
    ],
)
def test_no_threshold_decays_whatever_its_name_and_shape(
    class_name: str, pair_name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    loss = build_loss(LossConfig(class_name=class_name, pair_name=pair_name), 5, 8)
    optimizer = build_optimizer(Config(), build_backbone("iresnet18", input_size=16), loss)
    still = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    found = {name: tuple(p.shape) for name, p in loss.named_parameters() if id(p) in still}
    assert found == shapes


@pytest.mark.parametrize("bias", [-30.0, -3.0, 0.0, 12.5, 39.0])
def test_sphereface2_separates_at_the_threshold_that_its_bias_comes_to(bias: float) -> None:
    loss = uk.SphereFace2Loss(2, 1, margin=0.0)
    with torch.no_grad():
        loss.bias.fill_(bias)
        loss.weight.copy_(torch.tensor([[3.0, 0.0]]))
    cosine = cosine_threshold(loss)
    assert cosine is not None
    feature = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
    # A lone class, no margin, logit 0: w / r times alpha log 2.
    expected = 50 / 40 * 0.7 * math.log(2)
    assert float(loss(feature, torch.tensor([0])).detach()) == pytest.approx(expected, rel=1e-3)


def test_sphereface2_that_accepts_everything_has_the_lowest_threshold() -> None:
    loss = uk.SphereFace2Loss(2, 3)
    nn.init.constant_(loss.bias, 41.0)
    assert cosine_threshold(loss) == -1.0


def test_the_unified_threshold_is_the_pair_loss_s_first_and_may_lie_deep() -> None:
    uce, uss = uk.UCELoss(4, 3, scale=32.0), uk.USSLoss(scale=16.0)
    nn.init.constant_(uce.threshold, 8.0)
    nn.init.constant_(uss.threshold, 12.0)
    assert FaceLoss(uce, uss).threshold() == 0.75
    assert FaceLoss(uce, uk.PairSoftmaxLoss()).threshold() == 0.25
    assert FaceLoss(nn.ModuleDict({"inner": uce}), None).threshold() == 0.25
    assert FaceLoss(uk.ClassBCELoss(4, 3), uk.PairBCELoss(3)).threshold() is None


# -- losses with a state ------------------------------------------------------------------------


class Stateful(nn.Module):
    """A class loss that notes its epochs and how often it was called."""

    epochs: tuple[int, ...] = ()

    def __init__(self, embedding_size: int, num_classes: int) -> None:
        super().__init__()
        self.inner = uk.CosFaceLoss(embedding_size, num_classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def set_epoch(self, epoch: int) -> None:
        self.epochs += (epoch,)

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(feats, labels)


def test_trying_a_loss_leaves_its_state_alone() -> None:
    loss = FaceLoss(Stateful(8, 2), None)
    try_loss(loss, 8, torch.device("cpu"))
    assert loss.class_loss is not None
    assert int(loss.class_loss.calls) == 0


def test_losses_get_every_epoch_also_after_resuming(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(uk.CLASS_LOSSES, "stateful", Stateful)
    config = tiny(faces, tmp_path, loss={"class": "stateful"}, train={"epochs": 3})
    first = train(config, stop_after=3).loss.class_loss
    assert first is not None
    assert first.epochs == (0, 1)
    resumed = trainer_of(config)
    path = tmp_path / checkpoint.LAST
    resumed.load_state(checkpoint.read_run(path), path)
    resumed.fit(tmp_path)
    assert resumed.loss.class_loss is not None
    assert resumed.loss.class_loss.epochs == (1, 2)
    assert int(resumed.loss.class_loss.calls) == 6


# -- the feature memory -------------------------------------------------------------------------


MEMORY = {"memory": True}


def test_pair_loss_uses_the_newest_feature_of_each_identity_from_the_second_epoch_on(
    faces: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny(faces, tmp_path, loss=MEMORY, train={"epochs": 3}))
    assert trainer.memory is not None
    assert trainer.loss.pair_loss is not None
    newest: dict[int, Tensor] = {}
    seen: list[int] = []

    def compare(module: nn.Module, args: tuple[Any, ...], columns: dict[str, Tensor]) -> None:
        rows = columns["memory_labels"] >= 0
        labels = columns["memory_labels"][rows].tolist()
        assert sorted(labels) == sorted(newest)
        expected = torch.stack([newest[label] for label in labels])
        assert torch.equal(columns["memory"][rows], expected)
        seen.append(trainer.step)

    trainer.loss.pair_loss.register_forward_pre_hook(compare, with_kwargs=True)
    update = trainer.memory.update

    def note(feats: Tensor, labels: Tensor) -> None:
        assert not feats.requires_grad
        newest.update(zip(labels.tolist(), feats.clone(), strict=True))
        update(feats, labels)

    trainer.memory.update = note
    trainer.fit(tmp_path)
    assert seen == [2, 3, 4, 5]
    lines = read_metrics(tmp_path)
    assert [line["pair_loss"] is None for line in lines] == [True] * 2 + [False] * 4
    assert lines[0]["loss"] == lines[0]["class_loss"]
    assert lines[2]["loss"] == pytest.approx(lines[2]["class_loss"] + lines[2]["pair_loss"])


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run with a memory that was not interrupted."""
    run = tmp_path_factory.mktemp("whole")
    return train(tiny(faces, run, loss=MEMORY, train={"epochs": 3}))


@pytest.mark.parametrize(
    "stop_after",
    [1, pytest.param(3, marks=pytest.mark.extended)],
    ids=["while it fills", "when it is full"],
)
def test_run_with_a_memory_resumes_bitwise(
    faces: Path, whole: Trainer, tmp_path: Path, stop_after: int
) -> None:
    train(tiny(faces, tmp_path / "cut", loss=MEMORY, train={"epochs": 3}), stop_after=stop_after)
    assert main(["--resume", f"run.dir={tmp_path / 'cut'}"]) == 0
    resumed = checkpoint.read_run(tmp_path / "cut" / checkpoint.LAST)
    for part in ("backbone", "loss", "memory"):
        assert_same_state(dict(resumed[part]), dict(whole.state()[part]))
    assert losses(tmp_path / "cut") == losses(Path(whole.config.run.dir))


def test_memory_needs_a_checkpoint_that_has_one_and_both_losses(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(faces, tmp_path, train={"max_steps": 1}))
    assert main(["--resume", f"run.dir={tmp_path}", "loss.memory=true"]) == 2
    assert "was trained without loss.memory" in capsys.readouterr().err
    for missing in ("class", "pair"):
        with pytest.raises(UserError, match=r"loss\.memory=true needs loss\.pair, and loss\.class"):
            tiny(faces, tmp_path, loss={**MEMORY, missing: "none"})
