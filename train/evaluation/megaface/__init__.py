"""MegaFace: probes among a million distractors."""
