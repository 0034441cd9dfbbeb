"""Verification on people never trained on."""
