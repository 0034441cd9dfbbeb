"""Backends: reference (eager), native (compiled extension), triton."""
