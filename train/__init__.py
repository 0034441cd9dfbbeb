"""Training harness: an ordinary user of ``unitsface_kernels`` (public API only)."""

import os

# Before torch is imported. Activations of tens of megabytes are mapped anew at every step; with
# huge pages the page faults go from a fifth of a CPU training step to almost nothing. No effect
# outside Linux.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
