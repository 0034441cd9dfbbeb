"""Training harness: an ordinary user of ``unitsface_kernels`` (public API only)."""
