"""What is done with finished deltas: looking into them, comparing them, merging them."""
