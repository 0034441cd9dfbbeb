"""Names of earlier versions: they remain valid, with one warning that has the new name."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_of_old_name(old: str, new: str) -> None:
    """Once per process; Python shows a FutureWarning by default, unlike a DeprecationWarning."""
    warnings.warn(f"{old} is deprecated, use {new}", FutureWarning, stacklevel=3)
