"""The embedded default: a tiny pretrained model, its generator, and a bundled task."""
