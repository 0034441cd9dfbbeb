"""Public name of :mod:`unitsface_kernels.distributed.partial_fc`."""

from ..distributed import partial_fc as _implementation
from ..distributed.partial_fc import *  # noqa: F403
from ..distributed.partial_fc import __all__ as __all__


def __getattr__(name: str) -> object:
    return getattr(_implementation, name)
