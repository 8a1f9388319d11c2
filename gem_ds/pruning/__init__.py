"""Models that are sparse already: making one by pruning, and mending it block after block."""
