"""A delta in the formats of others, and theirs as a delta."""
