"""Training selected entries inside a frozen model."""
