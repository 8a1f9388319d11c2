"""What is written: masks, deltas, checkpoints, atomically."""
