"""Weights of other programs: the originals' names and shapes in, the originals' outputs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import IRESNET, tiny, train, trainer_of, write_faces
from test_train_backbones import OUTPUTS, SHAPES, fill, published_input

from train import checkpoint
from train.backbones import build_backbone
from train.backbones.weights import find_state, recognize, sizes
from train.errors import UserError
from train.tools import convert


def published(name: str) -> dict[str, torch.Tensor]:
    """The original's state dict, filled by the rule; counters are integers."""
    state = {
        key: torch.zeros(shape, dtype=torch.long if key.endswith("tracked") else torch.float32)
        for key, shape in SHAPES[name].items()
    }
    fill(state)
    return state


def converted(tmp_path: Path, values: Any, *options: str) -> dict[str, torch.Tensor]:
    torch.save(values, tmp_path / "in.pth")
    assert convert.run([str(tmp_path / "in.pth"), str(tmp_path / "out.pt"), *options]) == 0
    return torch.load(tmp_path / "out.pt", weights_only=True)


def test_unitsface_checkpoint_gives_the_published_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = published("unitsface_lresnet50eir")
    # As train.py writes it, from within DataParallel.
    wrapped = {f"module.{key}": value for key, value in original.items()}
    state = converted(tmp_path, {"epoch": 28, "state_dict": wrapped, "optimizer": {"state": {}}})
    assert "lresnet50e_ir at 112 x 112, 512 features, 474 tensors" in capsys.readouterr().out
    model = build_backbone("lresnet50e_ir").eval()
    model.load_state_dict(state)
    images = published_input()
    with torch.no_grad():
        output = model(images) + model(images.flip(3))
    expected = torch.from_numpy(OUTPUTS["unitsface_lresnet50eir"])
    assert (output - expected).norm() <= 1e-4 * expected.norm()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["iresnet18", pytest.param("mobilefacenet", marks=pytest.mark.extended)]
)
def test_insightface_checkpoint_and_back(tmp_path: Path, name: str) -> None:
    original = published(name)
    half = {k: v.half() if v.is_floating_point() else v for k, v in original.items()}
    state = converted(
        tmp_path,
        {"epoch": 3, "state_dict_backbone": half, "state_dict_softmax_fc": {}},
        f"--model={name}",
    )
    assert list(state) == list(original)
    assert all(state[k].dtype == original[k].dtype for k in original)
    assert all(torch.equal(state[k], half[k].to(state[k].dtype)) for k in original)
    # backbone.pth is a bare state dict, and so is what --to insightface writes.
    back = converted(tmp_path, state, "--to=insightface")
    assert {key: list(value.shape) for key, value in back.items()} == SHAPES[name]
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet"])
def test_outputs_of_an_insightface_backbone_survive_conversion(tmp_path: Path, name: str) -> None:
    state = converted(tmp_path, published(name))
    model = build_backbone(name).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        output = model(published_input())
    torch.testing.assert_close(output, torch.from_numpy(OUTPUTS[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SHAPES if n.startswith("iresnet")])
def test_architecture_is_recognized_by_the_published_names(name: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in SHAPES[name].items()}
    assert recognize(state) == name


@pytest.mark.parametrize("size", [48, 112])
def test_conv4_is_recognized_with_its_sizes(tmp_path: Path, size: int) -> None:
    state = build_backbone("conv4", size, embedding_size=24).state_dict()
    assert recognize(state) == "conv4"
    assert sizes(state) == (size, 24)
    plain = converted(tmp_path, state, "--model=conv4")
    assert all(torch.equal(plain[key], state[key]) for key in state)


def test_own_checkpoint_prefers_averaged_weights_and_serves_as_model_weights(
    tmp_path: Path,
) -> None:
    faces = write_faces(tmp_path / "faces", identities=2, images=4)
    config = tiny(
        faces, tmp_path / "run", train={"epochs": 1}, model=IRESNET | {"embedding_size": 24}
    )
    trainer = train(config)
    out = tmp_path / "out.pt"
    assert convert.run([str(tmp_path / "run"), str(out), "--model=iresnet18"]) == 0
    plain = torch.load(out, weights_only=True)
    trained = trainer.backbone.state_dict()
    assert all(torch.equal(plain[key], trained[key]) for key in trained)

    last = tmp_path / "run" / "checkpoints" / "last.pt"
    values = torch.load(last, weights_only=True)
    # As torch.optim.swa_utils.AveragedModel names them.
    averaged = {f"module.{k}": v + 1 for k, v in trained.items()}
    torch.save({**values, "ema": {"n_averaged": torch.tensor(5), **averaged}}, last)
    assert convert.run([str(last), str(out)]) == 0
    plain = torch.load(out, weights_only=True)
    assert plain.keys() == trained.keys()
    assert all(torch.equal(plain[key], trained[key] + 1) for key in trained)

    for weights in (out, last):
        sections = {"model": IRESNET | {"embedding_size": 24, "weights": str(weights)}}
        start = trainer_of(tiny(faces, tmp_path / "other", **sections)).backbone.state_dict()
        assert all(torch.equal(start[key], plain[key]) for key in plain)
    # Resuming goes on from the weights that were trained.
    state = find_state(torch.load(last, weights_only=True))
    assert state is not None
    assert torch.equal(state["fc.weight"], trained["fc.weight"])


def test_shards_of_classes_are_no_hindrance(tmp_path: Path) -> None:
    faces = write_faces(tmp_path / "faces", identities=2, images=4)
    sections: dict[str, dict[str, Any]] = {
        "model": IRESNET,
        "train": {"epochs": 1},
        "partial_fc": {"enabled": "always"},
    }
    trained = train(tiny(faces, tmp_path / "run", **sections)).backbone.state_dict()
    assert (tmp_path / "run" / "checkpoints" / "last").is_dir()
    assert convert.run([str(tmp_path / "run"), str(tmp_path / "out.pt")]) == 0
    plain = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(plain[key], trained[key]) for key in trained)


def test_losses_within_the_network_are_left_out() -> None:
    names = ("sample_to_class_loss.weight", "sample_to_sample_loss.bias")  # UniTSFace
    names += ("loss.weight", "loss.bias", "loss.weight_mom")  # UniFace
    state = {name: torch.zeros(1) for name in (*names, "conv1.weight")}
    found = find_state({"state_dict": {f"module.{key}": v for key, v in state.items()}})
    assert found is not None
    assert list(found) == ["conv1.weight"]


def test_mistakes_name_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shapes are enough: tensors without memory of their own, which a file may not hold.
    def refused(values: Any, message: str, *options: str) -> None:
        monkeypatch.setattr(checkpoint, "read_any", lambda path: (path, values))
        with pytest.raises(UserError, match=message):
            convert.run([str(tmp_path / "in.pth"), str(tmp_path / "out.pt"), *options])
        assert not (tmp_path / "out.pt").exists()

    state, other = (
        {key: torch.zeros(()).expand(shape) for key, shape in SHAPES[name].items()}
        for name in ("iresnet18", "unitsface_lresnet50eir")
    )
    refused(state, "holds iresnet18", "--model=iresnet50")
    bias = state.pop("fc.bias")
    refused(state, "in.pth is not quite iresnet18: missing: fc.bias$")
    state |= {"fc.bias": bias, "extra.weight": bias}
    refused(state, "not quite iresnet18: unexpected: extra.weight$")
    del state["extra.weight"]
    state["bn1.weight"] = torch.zeros(3)
    refused(state, r"bn1.weight is \(3,\), expected \(64,\)")
    refused({"a": torch.zeros(2)}, "holds 1 tensors that are those of none of .*conv4")
    refused([1, 2], "holds no backbone state dict")
    refused({}, "holds no backbone state dict")
    refused(other, "holds lresnet50e_ir at 112 x 112", "--to=insightface")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no such checkpoint: .*none\.pth"):
        convert.run([str(tmp_path / "none.pth"), str(tmp_path / "out.pt")])


def test_whole_pickled_models_are_not_unpickled(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "in.pth")
    with pytest.raises(UserError, match=r"cannot read checkpoint .*in\.pth: it refers to torch.nn"):
        convert.run([str(tmp_path / "in.pth"), str(tmp_path / "out.pt")])
