"""The embedded default: a tiny pretrained model, its generator, and two bundled tasks."""
