"""What a run will need, from the model's configuration alone."""
