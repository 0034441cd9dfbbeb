"""What only :func:`torch.compile` needs; importing it imports Dynamo."""

from __future__ import annotations

import torch

from . import dispatch

#: The answer depends on the installation alone, so torch.compile may bake it in.
resolve = torch.compiler.assume_constant_result(dispatch._resolve)
