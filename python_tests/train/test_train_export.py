"""Exported models: their form, their features, and what the challenge would refuse."""

from __future__ import annotations

import builtins
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import tiny, train, write_faces
from torch import nn
from torch.nn import functional as F

from train.backbones import build_backbone
from train.data.augment import normalize, to_unit
from train.data.decode import to_pixels
from train.data.orl import scan_orl
from train.errors import UserError, exit_code
from train.tools import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained backbone with statistics of its own, and its run folder."""
    folder = tmp_path_factory.mktemp("export")
    data = write_faces(folder / "data")
    trainer = train(tiny(data, folder / "run", train={"epochs": 1}))
    return trainer, folder / "run"


def features(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"data": images.numpy()})[0])


@pytest.mark.parametrize("opset", [11, 17])
def test_features_are_those_of_torch_for_any_number_of_faces(
    trained: tuple[Any, Path], tmp_path: Path, opset: int
) -> None:
    trainer, run = trained
    path = tmp_path / "new" / "model.onnx"
    assert export.run([str(run), "--onnx", str(path), "--opset", str(opset)]) == 0
    model = onnx.load(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    (given,), (output,) = model.graph.input, model.graph.output
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, dims) == ("data", ["batch", 3, 16, 16])
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["batch", 512]
    properties = {p.key: p.value for p in model.metadata_props}
    assert float(properties["cosine_threshold"]) == pytest.approx(trainer.threshold(), abs=1e-6)

    faces = scan_orl()
    pixels = [torch.from_numpy(to_pixels(faces.read(i), 16)) for i in range(0, 50, 10)]
    images = normalize(to_unit(torch.stack(pixels)))
    trainer.backbone.eval()
    with torch.inference_mode():
        wanted = trainer.backbone(images)
    assert wanted.std(dim=0).max() > 1e-3  # different faces have different features
    for count in (1, 3, 5):
        found = features(path, images[:count])
        errors = (found - wanted[:count]).norm(dim=1) / wanted[:count].norm(dim=1)
        assert float(errors.max()) < 1e-4


def test_a_submission_takes_112_pixels_whatever_the_model_does(
    trained: tuple[Any, Path], tmp_path: Path
) -> None:
    trainer, run = trained
    archives = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for path in archives:
        assert export.run([str(run), "--zip", str(path)]) == 0
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with zipfile.ZipFile(archives[0]) as archive:
        assert archive.namelist() == ["model.onnx"]
        archive.extractall(tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    # What onnxruntime 1.8 reads.
    assert (model.opset_import[0].version, model.ir_version) == (11, 6)
    assert not any(n.name.startswith(("Sub", "Mul", "_m")) for n in model.graph.node[:8])

    # A face at 112 pixels, and the same scaled by the decoder: up to the latter's rounding.
    face = to_pixels(scan_orl().read(0), 112)
    image = Image.fromarray(face.transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BILINEAR)
    small = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    trainer.backbone.eval()
    with torch.inference_mode():
        wanted = trainer.backbone(normalize(to_unit(small[None])))[0]
    found = features(tmp_path / "model.onnx", normalize(to_unit(torch.from_numpy(face)[None])))[0]
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


def test_scaling_is_that_of_the_decoder() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    wanted = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float()
    found = export.scaled(nn.Identity(), 112, 32)(
        torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()[None]
    )[0]
    assert float((found - wanted).abs().max()) <= 1.0  # of 255; PIL rounds after either axis


@pytest.mark.extended
@pytest.mark.parametrize("name", ["mobilefacenet", "ghostfacenet"])
def test_small_backbones_are_exported(name: str) -> None:
    network = build_backbone(name, 32, 0.0, 64)
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # statistics are those of these images, as after training
    with torch.no_grad():
        network(images)
    model = export.to_onnx(network.eval(), 32, 11, {})
    assert {node.domain for node in model.graph.node} == {""}
    content = model.SerializeToString()
    assert export.compare(content, network, images) <= export.TOLERANCE


def test_a_model_that_deviates_is_not_written(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = export.to_onnx

    def altered(*arguments: Any) -> Any:
        model = original(*arguments)
        weight = next(t for t in model.graph.initializer if t.name.endswith("fc.weight"))
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return model

    monkeypatch.setattr(export, "to_onnx", altered)
    with pytest.raises(UserError, match=r"deviate from Torch's by .* nothing was written"):
        export.run([str(trained[1]), "--onnx", str(tmp_path / "model.onnx")])
    assert list(tmp_path.iterdir()) == []


def test_what_an_operator_set_lacks_is_one_line() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x).flatten(1)

    assert export.to_onnx(Attention(), 16, 14, {}).opset_import[0].version == 14
    with pytest.raises(UserError, match=r"opset 11 cannot express this backbone: .* opset version"):
        export.to_onnx(Attention(), 16, 11, {})


def graph(
    *,
    shape: tuple[str | int, ...] = ("batch", 3, 112, 112),
    features: int = 512,
    half: bool = False,
) -> Any:
    """A graph of the right form, or wrong in one respect."""
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    values = np.zeros(1, np.float16 if half else np.float32)
    data = onnx.helper.make_tensor_value_info("data", kind, shape)
    output = onnx.helper.make_tensor_value_info("features", kind, ("batch", features))
    weight = onnx.numpy_helper.from_array(values, "weight")
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [data], [output], [weight]))


def test_what_the_challenge_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    export.check_submission(graph())
    with pytest.raises(UserError, match="112 x 112, not"):
        export.check_submission(graph(shape=("batch", 3, 96, 96)))
    with pytest.raises(UserError, match="112 x 112, not"):
        export.check_submission(graph(shape=(1, 3, 112, 112)))
    with pytest.raises(UserError, match="at most 512 features, got 1024"):
        export.check_submission(graph(features=1024))
    with pytest.raises(UserError, match="weight is FLOAT16"):
        export.check_submission(graph(half=True))
    raw = graph()
    raw.graph.node.extend(
        onnx.helper.make_node(kind, ["data", "weight"], [kind], name=f"{kind}_0")
        for kind in ("Sub", "Mul")
    )
    with pytest.raises(UserError, match="raw pixels"):
        export.check_submission(raw)
    monkeypatch.setattr(export, "CHALLENGE_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 bytes"):
        export.check_submission(graph())


def test_mistakes_are_one_line(
    trained: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, model = str(trained[1]), str(tmp_path / "model.onnx")
    for given, message in (
        ([run], "name a file with --onnx or --zip"),
        ([run, "--onnx", model, "--opset", "10"], "--opset: expected 11 to 20, got 10"),
        ([run, "--zip", model, "--opset", "17"], "expected 11 to 14 with --zip, got 17"),
        ([run, "--zip", model, "--input-size", "96"], "MFR-Ongoing takes 112, got 96"),
        ([run, "--onnx", model, "--input-size", "4"], "at least 16, got 4"),
        ([str(tmp_path / "x.pt"), "--onnx", model], "no such checkpoint"),
        ([run, "--onnx", model, "--images", str(tmp_path / "x")], "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            export.run(given)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*model\.onnx"):
        export.run([run, "--onnx", str(tmp_path / "file" / "model.onnx")])

    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("no onnxruntime", name=name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert exit_code(lambda: export.run([run, "--onnx", model])) == 2
    with pytest.raises(UserError, match="needs onnxruntime, not installed here: pip install onnx"):
        export.run([run, "--onnx", model])
