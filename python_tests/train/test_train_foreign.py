"""Checkpoints of arcface_torch, AdaFace and CVLFace: their layouts in, their outputs out.

The networks and heads below have the published names: mk-minchul/AdaFace (net.py, head.py,
train_val.py), mk-minchul/CVLface (models/base, classifiers/base, pipelines/base.py) and
deepinsight/insightface (recognition/arcface_torch/train_v2.py, partial_fc_v2.py).
"""

from __future__ import annotations

import os
import pathlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import IRESNET, arguments, tiny, trainer_of, write_faces
from torch import Tensor, nn

from train import checkpoint
from train.__main__ import main
from train.backbones import build_backbone
from train.config import make_config
from train.errors import UserError
from train.evaluation.model import load_model
from train.starting.foreign import start_from
from train.starting.foreign_classes import read_class_weights
from train.tools.convert import read_classes

C = 7  # classes


class PublishedBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(shortcut, nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class PublishedNet(nn.Module):
    """AdaFace's Backbone(num_layers=18, mode="ir") for images of 112 x 112."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.input_layer = nn.Sequential(first, nn.BatchNorm2d(64), nn.PReLU(64))
        channels = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        blocks = [PublishedBlock(channels[i], channels[i + 1], 2 - i % 2) for i in range(8)]
        self.body = nn.Sequential(*blocks)
        last = nn.BatchNorm1d(512, affine=False)
        flat = nn.Dropout(0.4), nn.Flatten(), nn.Linear(512 * 49, 512)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), *flat, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


@pytest.fixture(scope="module")
def net() -> PublishedNet:
    torch.manual_seed(0)
    net = PublishedNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    return net.eval()


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faces(tmp_path_factory.mktemp("faces"), identities=C, images=2)


IMAGES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Executed:
    """What a hostile file would have called."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def lightning(net: nn.Module, kernel: Tensor, **more: Any) -> dict[str, Any]:
    """As Lightning writes the module of train_val.py."""
    state = {f"model.{k}": v for k, v in net.state_dict().items()}
    state |= {"head.kernel": kernel, "head.t": torch.zeros(1), "head.batch_mean": torch.ones(1)}
    return {"epoch": 3, "global_step": 9, "state_dict": state, "lr_schedulers": [], **more}


@torch.no_grad()
def outputs(file: Path) -> Tensor:
    return load_model(file, ["train.device=cpu", "model.channels_last=false"]).backbone(IMAGES)


def test_adaface_in_bgr_is_the_same_network_in_rgb(
    net: PublishedNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    kernel = torch.randn(512, C)
    # Callbacks under their classes, paths, settings of a type of Lightning's, and what is not read.
    module = types.ModuleType("pytorch_lightning")
    for name, base in (("ModelCheckpoint", object), ("AttributeDict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    settings = module.AttributeDict(use_mxrecord=True, head="adaface")  # type: ignore[attr-defined]
    callback = {"best": np.float64(0.5), "dirpath": pathlib.PurePosixPath("a"), "x": Executed()}
    more = {
        "callbacks": {module.ModelCheckpoint: callback},  # type: ignore[attr-defined]
        "hyper_parameters": settings,
        "pytorch-lightning_version": "1.8.6",
    }
    torch.save(lightning(net, kernel, **more), tmp_path / "adaface.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    out, classes = tmp_path / "out.pt", tmp_path / "classes.pt"
    assert main(["convert", str(tmp_path / "adaface.ckpt"), str(out), f"--classes={classes}"]) == 0
    assert not (tmp_path / "executed").exists()
    said = capsys.readouterr().out
    assert "ir18 at 112 x 112, 512 features" in said
    assert f"weights of {C} classes, 512 numbers" in said
    assert torch.equal(torch.load(classes)["weight"], kernel.T)
    with torch.no_grad():
        expected = net(IMAGES.flip(1))
    torch.testing.assert_close(outputs(out), expected, rtol=1e-4, atol=1e-5)
    values = checkpoint.read(tmp_path / "adaface.ckpt")
    assert values["hyper_parameters"] == {"use_mxrecord": True, "head": "adaface"}
    assert values["callbacks"]["pytorch_lightning.ModelCheckpoint"]["x"] == {}
    # By another name such objects are refused, as ever.
    os.rename(tmp_path / "adaface.ckpt", tmp_path / "adaface.pt")
    with pytest.raises(UserError, match="it refers to"):
        checkpoint.read(tmp_path / "adaface.pt")


@pytest.mark.extended
@pytest.mark.parametrize("color", ["RGB", "'BGR'"])
def test_cvlface_says_its_colors_beside_the_weights(
    net: PublishedNet, tmp_path: Path, color: str
) -> None:
    torch.save({f"net.{k}": v for k, v in net.state_dict().items()}, tmp_path / "model.pt")
    (tmp_path / "model.yaml").write_text(f"name: ir18\ncolor_space: {color}\noutput_dim: 512\n")
    with torch.no_grad():
        expected = net(IMAGES.flip(1) if "BGR" in color else IMAGES)
    torch.testing.assert_close(outputs(tmp_path / "model.pt"), expected, rtol=1e-4, atol=1e-5)
    path, values = checkpoint.read_any(tmp_path / "model.pt")
    assert read_class_weights(values, path) is None
    weight = torch.randn(C, 512)
    for rank, part in enumerate(weight.split([4, 3])):
        torch.save({"partial_fc.weight": part}, tmp_path / f"classifier_rank{rank}.pt")
    found = read_class_weights(values, path)
    assert found is not None
    assert torch.equal(found, weight)


@pytest.mark.extended
def test_an_ir_network_trains_as_the_published_one_does(net: PublishedNet) -> None:
    state = {f"model.{k}": v for k, v in net.state_dict().items()}
    own = build_backbone("ir18")
    checkpoint.load_backbone(
        own,
        {"state_dict": state},
        path=Path("x.ckpt"),
        config=make_config(("test", {"model": {"name": "ir18"}})),
    )
    published = PublishedNet()
    published.load_state_dict(net.state_dict())
    published.output_layer[1].p = 0.0  # type: ignore[assignment]
    images = IMAGES.repeat(2, 1, 1, 1) + torch.arange(4)[:, None, None, None] * 0.1
    for model, given in ((own, images), (published, images.flip(1))):
        model.train()(given).square().mean().backward()
    ours, theirs = own.fc.weight.grad, published.output_layer[3].weight.grad
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def arcface(folder: Path, weight: Tensor, ranks: int, size: int = 16) -> Path:
    """As train_v2.py writes its states; the backbone's names are those here."""
    torch.manual_seed(3)
    backbone = build_backbone("iresnet18", size).state_dict()
    for rank, part in enumerate(weight.tensor_split(ranks)):
        state = {
            "epoch": 4,
            "global_step": 40,
            "state_dict_backbone": backbone,
            "state_dict_softmax_fc": {"weight": part.clone()},
            "state_optimizer": {"state": {}, "param_groups": []},
            "state_lr_scheduler": {"last_epoch": 40, "base_lrs": [0.1]},
        }
        torch.save(state, folder / f"checkpoint_gpu_{rank}.pt")
    return folder / "checkpoint_gpu_0.pt"


@pytest.mark.parametrize("enabled", ["never", "always"])
def test_shards_of_arcface_torch_are_put_together(
    faces: Path, tmp_path: Path, enabled: str
) -> None:
    weight = torch.randn(C, 512)
    file = arcface(tmp_path, weight, ranks=3)
    sections: dict[str, dict[str, Any]] = {
        "model": IRESNET,
        "train": {"init": str(file), "ema": 0.9},
        "partial_fc": {"enabled": enabled},
    }
    trainer = trainer_of(tiny(faces, tmp_path / "run", **sections))
    said = start_from(trainer, file)
    assert f"iresnet18 and {C} classes in the order of data.path" in said
    own = trainer.head.loss.weight if trainer.head else trainer.loss.class_loss.weight
    assert torch.equal(own, weight)
    expected = torch.load(file)["state_dict_backbone"]
    for model in (trainer.backbone, trainer.evaluated):
        assert torch.equal(model.state_dict()["fc.weight"], expected["fc.weight"])


@pytest.mark.extended
def test_a_run_begins_with_a_checkpoint_of_arcface_torch_and_goes_on_without_it(
    faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = arcface(tmp_path, torch.randn(C, 512), ranks=3)
    config = tiny(faces, tmp_path / "run", model=IRESNET, train={"epochs": 1, "init": str(file)})
    assert main(arguments(config)) == 0
    assert f"starting from {file}: iresnet18 and {C} classes" in capsys.readouterr().out
    # The run itself is gone on with, not the file.
    file.unlink()
    more = ["--resume", f"run.dir={tmp_path / 'run'}", "train.epochs=2"]
    assert main(more) == 0


@pytest.mark.extended
def test_mistakes_name_the_file_and_the_remedy(faces: Path, tmp_path: Path) -> None:
    weight = torch.randn(C, 512)
    file = arcface(tmp_path, weight, ranks=3)
    trainer = trainer_of(tiny(faces, tmp_path / "run", model=IRESNET))

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            start_from(trainer, file)

    (tmp_path / "checkpoint_gpu_2.pt").unlink()
    refused(rf"{5} classes of 512 numbers; data.path has {C} identities")
    (tmp_path / "checkpoint_gpu_1.pt").rename(tmp_path / "checkpoint_gpu_2.pt")
    refused("checkpoint_gpu_1.pt is missing")
    arcface(tmp_path, weight, ranks=3)
    values = torch.load(tmp_path / "checkpoint_gpu_1.pt")
    torch.save({**values, "global_step": 30}, tmp_path / "checkpoint_gpu_1.pt")
    refused("are of different steps")
    torch.save({**values, "state_dict_softmax_fc": {}}, tmp_path / "checkpoint_gpu_1.pt")
    refused(r"checkpoint_gpu_1.pt: its class weights are no matrix")
    torch.save({**values, "state_dict_softmax_fc": {"weight": weight}}, file)
    refused("are no shards of a head: \\[7, 2, 2\\]|no matrix")
    torch.save(values["state_dict_backbone"], file)
    refused(r"no class weights of another program; model.weights=.* starts from its backbone")
    for loss, given in (
        ({"class": "none"}, "none has no weights of classes"),
        ({"class_options": {"centers": 2}}, rf"cosface has class weights \({C}, 2, 512\)"),
    ):
        arcface(tmp_path, weight, ranks=3)
        trainer = trainer_of(tiny(faces, tmp_path / "run", loss=loss, model=IRESNET))
        refused(rf"loss.class: expected .* one weight vector per class, \(C, D\); {given}")
    with pytest.raises(UserError, match="can start from one only"):
        tiny(faces, tmp_path, model={"weights": "a"}, train={"init": "b"})


def test_files_that_only_look_like_these_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("color_space: BGR")
    first, flat = "net.input_layer.0.weight", torch.ones(3)
    mobile = {"conv_sep.layers.0.weight": torch.ones(512, 128, 1, 1), "fc.weight": torch.ones(2, 2)}
    for number, values in enumerate(
        (
            {1: flat},
            {first: flat},
            {first: 3},
            {"state_dict": {f"model.{first.removeprefix('net.')}": flat}},
            {**mobile, "features.layers.0.layers.0.weight": flat},
            {"state_dict_softmax_fc": 3},
        )
    ):
        torch.save(values, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt"):
            load_model(tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x\.pt"):
            read_classes(tmp_path / "x.pt")
        trainer = {"state_dict_backbone": {}, "state_dict_softmax_fc": {"weight": torch.ones(2, 2)}}
        torch.save(trainer, tmp_path / "checkpoint_gpu_0.pt")
        torch.save(values if number else [flat], tmp_path / "checkpoint_gpu_1.pt")
        with pytest.raises(UserError, match="checkpoint_gpu_"):
            read_classes(tmp_path / "checkpoint_gpu_0.pt")


@pytest.mark.extended
def test_adaface_sorts_the_names_of_folders_as_text(net: PublishedNet, tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", identities=11, images=2)  # person1 to person11
    weight = torch.randn(11, 512)
    by_name = dict(zip(sorted(p.name for p in faces.iterdir()), weight, strict=True))
    assert list(by_name)[1] == "person10"
    config = tiny(faces, tmp_path / "run", model={"name": "ir18", "input_size": 112})
    trainer = trainer_of(config)
    file = tmp_path / "adaface.ckpt"
    for from_record in (False, True):
        settings = {"hyper_parameters": {"use_mxrecord": from_record}}
        torch.save(lightning(net, weight.T, **settings), file)
        said = start_from(trainer, file)
        assert ("their names as text" in said) is not from_record
        for i, name in enumerate(trainer.source.images.identities):
            expected = weight[i] if from_record else by_name[name]
            assert torch.equal(trainer.loss.class_loss.weight[i], expected)
