"""From a model and some examples to the entries that are trained."""
