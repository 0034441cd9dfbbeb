"""A trained backbone as ONNX, checked against Torch, and as a submission to MFR-Ongoing.

python train/export.py CHECKPOINT --onnx model.onnx [--opset 11] [--input-size 112]
python train/export.py CHECKPOINT --zip submission.zip

The challenge's rules are in insightface's challenges/mfr/README.md and in its
recognition/arcface_torch/onnx_helper.py: RGB of 112 x 112 pixels, any number of images at once,
at most 512 features, at most 1024 MiB in float32, and onnxruntime 1.8, so at most opset 14.
Pixels arrive as (x - 127.5) / 127.5, as in training: the helper divides unless the graph begins
with nodes called Sub and Mul, and ours does not.
"""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.data.augment import normalize, to_unit
from train.data.dataset import scan
from train.data.loader import open_images
from train.errors import Parser, UserError, exit_code, reported
from train.evaluation.model import load_model
from train.small_files import replacing

INSTALL = "pip install onnx onnxruntime"
INPUT, OUTPUT = "data", "features"
# Before 11, Resize and Clip differ; Torch's exporter supports operator sets up to 20.
OPSETS = (11, 20)
# Largest deviation of a feature vector from Torch's, relative to its norm.
TOLERANCE = 1e-4

CHALLENGE_SIZE = 112
CHALLENGE_OPSET = 14
CHALLENGE_FEATURES = 512
CHALLENGE_BYTES = 1024 * 2**20
CHALLENGE_MEMBER = "model.onnx"


def _parse(argv: list[str] | None) -> Namespace:
    parser = Parser(prog="train/export.py", description="Export a trained backbone as ONNX.")
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="checkpoint file or folder, a run folder (its last one), or published weights",
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="where to write the model")
    parser.add_argument(
        "--zip", type=Path, metavar="FILE", help="where to write a submission to MFR-Ongoing"
    )
    parser.add_argument("--opset", type=int, default=OPSETS[0], help="ONNX operator set")
    parser.add_argument(
        "--input-size",
        type=int,
        help="side of the images the exported model takes, which it scales to its own if they "
        f"differ; default: its own, {CHALLENGE_SIZE} with --zip",
    )
    parser.add_argument(
        "--images", default="orl", help="folder of faces, or 'orl', for the check against Torch"
    )
    arguments = parser.parse_args(argv)
    if arguments.onnx is None and arguments.zip is None:
        raise UserError("nothing to write: name a file with --onnx or --zip")
    low, high = OPSETS
    side = arguments.input_size
    if arguments.zip is not None:
        high = CHALLENGE_OPSET
        if side not in (None, CHALLENGE_SIZE):
            raise UserError(f"--input-size: MFR-Ongoing takes {CHALLENGE_SIZE}, got {side}")
    if not low <= arguments.opset <= high:
        with_zip = " with --zip" if arguments.zip is not None else ""
        raise UserError(f"--opset: expected {low} to {high}{with_zip}, got {arguments.opset}")
    if side is not None and side < 16:
        raise UserError(f"--input-size: expected at least 16, got {side}")
    return arguments


class Scaled(nn.Module):
    """A backbone behind a scaling of (N, 3, size, size) images to its ``own`` size.

    Scaling is linear along either axis: two matmuls with a fixed matrix are the antialiased
    filter of training, which ONNX has no operator for before opset 18.
    """

    def __init__(self, backbone: nn.Module, size: int, own: int) -> None:
        super().__init__()
        self.backbone = backbone
        unit = torch.eye(size)[None, None]
        matrix = F.interpolate(unit, (own, size), mode="bilinear", antialias=True)[0, 0]
        self.register_buffer("rows", matrix)
        self.register_buffer("columns", matrix.T.contiguous())

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(self.rows @ images @ self.columns)


def scaled(backbone: nn.Module, size: int, own: int) -> nn.Module:
    return backbone if size == own else Scaled(backbone, size, own).eval()


def to_onnx(network: Any, size: int, opset: int, properties: dict[str, str]) -> Any:
    """An ONNX model of (batch, 3, size, size) to (batch, features), checked for consistency.

    By Torch's older exporter: the newer one begins at opset 18.
    """
    import onnx

    buffer = io.BytesIO()
    failed = f"opset {opset} cannot express this backbone"
    with warnings.catch_warnings(), reported(failed, torch.onnx.errors.OnnxExporterError):
        # That it is the older exporter.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(
            network,
            (torch.zeros(2, 3, size, size),),
            buffer,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
            opset_version=opset,
            dynamo=False,
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    return model


def compare(content: bytes, network: Any, images: Any) -> float:
    """Largest relative deviation of onnxruntime's features from Torch's, for one image and for
    the others together; (N, 3, S, S) normalized images.
    """
    import onnxruntime

    # Its exceptions have no common base.
    with reported("onnxruntime cannot load the exported model", Exception):
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images[:1], images[1:]):
        with torch.inference_mode():
            wanted = network(batch).double()
        found = torch.from_numpy(session.run([OUTPUT], {INPUT: batch.numpy()})[0]).double()
        errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
        worst = max(worst, float(errors.max()))
    return worst


def check_submission(model: Any) -> None:
    """Refuse what onnx_helper.py would refuse or misread."""
    from onnx import TensorProto, numpy_helper

    (given,), (output,) = model.graph.input, model.graph.output
    shape = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    if shape != ["batch", 3, CHALLENGE_SIZE, CHALLENGE_SIZE]:
        raise UserError(f"MFR-Ongoing takes {CHALLENGE_SIZE} x {CHALLENGE_SIZE}, not {shape}")
    features = output.type.tensor_type.shape.dim[1].dim_value
    if not 0 < features <= CHALLENGE_FEATURES:
        raise UserError(f"MFR-Ongoing takes at most {CHALLENGE_FEATURES} features, got {features}")
    size = model.ByteSize()
    if size > CHALLENGE_BYTES:
        raise UserError(f"MFR-Ongoing takes at most {CHALLENGE_BYTES} bytes, the model has {size}")
    for tensor in model.graph.initializer:
        if numpy_helper.to_array(tensor).dtype.itemsize < 4:
            kind = TensorProto.DataType.Name(tensor.data_type)
            raise UserError(f"MFR-Ongoing takes no weights below 32 bits: {tensor.name} is {kind}")
    first = [node.name for node in model.graph.node[:8]]
    if any(name.startswith(("Sub", "_minus")) for name in first) and any(
        name.startswith(("Mul", "_mul")) for name in first
    ):
        raise UserError("MFR-Ongoing would feed raw pixels: the graph begins with Sub and Mul")


def submission(content: bytes) -> bytes:
    """The archive of the submission guide: the model alone. The same bytes for the same model."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        member = zipfile.ZipInfo(CHALLENGE_MEMBER, date_time=(1980, 1, 1, 0, 0, 0))
        member.external_attr = 0o644 << 16
        archive.writestr(member, content)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    with reported(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def _faces(path: str, size: int) -> Any:
    """Four images, spread over a folder, as (4, 3, size, size) normalized."""
    images = scan(path)
    if len(images) < 4:
        raise UserError(f"--images: need 4 images to check with, found {len(images)} in {path}")
    chosen = images.keep(np.linspace(0, len(images) - 1, 4).astype(np.int64))
    return normalize(to_unit(open_images(chosen, size, on_error="fail", cache="always").stacked()))


def run(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"export needs {error.name}, not installed here: {INSTALL}") from error
    model = load_model(arguments.checkpoint, ["train.device=cpu"])
    own = model.config.model.input_size
    size = arguments.input_size or (CHALLENGE_SIZE if arguments.zip is not None else own)
    network = scaled(model.backbone.float(), size, own)
    properties = {
        "backbone": f"{model.config.model.name} at {own} x {own}",
        "input": "RGB, (x - 127.5) / 127.5",
        "cosine_threshold": "none" if model.threshold is None else f"{model.threshold:.6f}",
    }
    exported = to_onnx(network, size, arguments.opset, properties)
    content = exported.SerializeToString(deterministic=True)
    error = compare(content, network, _faces(arguments.images, size))
    if not error <= TOLERANCE:  # also NaN
        raise UserError(
            f"features of onnxruntime {onnxruntime.__version__} deviate from Torch's by "
            f"{error:.1e} of their norm, more than {TOLERANCE:g}: nothing was written"
        )
    print(
        f"{properties['backbone']}, {size} x {size} RGB, opset {arguments.opset}, "
        f"{len(content) / 2**20:.1f} MiB, onnx {onnx.__version__}: features are Torch's to "
        f"{error:.1e} of their norm"
    )
    if arguments.zip is not None:
        check_submission(exported)
        _write(arguments.zip, submission(content))
        print(f"submission to MFR-Ongoing: {arguments.zip}")
    if arguments.onnx is not None:
        _write(arguments.onnx, content)
        print(f"model: {arguments.onnx}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(run))
