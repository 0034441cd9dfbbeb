"""Names of earlier versions: they work, and tell once what has replaced them."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def warn_of_old_name(old: str, new: str) -> None:
    """Warns once in a process; a FutureWarning is shown to users, not to developers alone."""
    warnings.warn(f"{old} is deprecated, use {new}", FutureWarning, stacklevel=3)
