"""Losses across a process group: collectives, agreement, pair losses and partial FC."""
