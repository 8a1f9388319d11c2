"""Models: loading, targets, heads, losses."""
