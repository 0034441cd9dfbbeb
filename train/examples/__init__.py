"""Worked examples for users: what ``loss.class`` and ``loss.pair`` may name."""
