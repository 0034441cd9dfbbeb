"""Benchmarks: fused losses against eager formulations of the same work."""
