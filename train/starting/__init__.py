"""Where a new run starts: at weights of a file, another program's checkpoint, or another run."""
