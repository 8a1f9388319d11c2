"""A run as a page: where its entries lie, how far they moved, and its curves."""
