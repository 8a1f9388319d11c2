"""A training run, from the flags to the results."""
