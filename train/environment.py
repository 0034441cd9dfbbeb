"""Process settings that must be in place before torch is imported."""

from __future__ import annotations

import os


def prepare_environment() -> None:
    # Activations of tens of megabytes are mapped anew at every step; with huge pages the page
    # faults go from a fifth of a CPU training step to almost nothing. No effect outside Linux.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
