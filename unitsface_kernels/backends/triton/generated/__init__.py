"""Triton policies of the losses that are defined by a formula; see ``policy/generate.py``."""
