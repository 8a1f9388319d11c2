"""What the runs of a comparison have done, by the files that they left."""
