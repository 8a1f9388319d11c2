"""From files to micro-batches: tasks, encoding, datasets, the order they are read in."""
