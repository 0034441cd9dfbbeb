"""What train/evaluate.py can do: one module per command."""
