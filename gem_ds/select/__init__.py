"""Which entries to train: scores, budgets, the exact top k. Pure and rank-blind."""
