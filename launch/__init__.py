"""Launchers: train.py (what `deepspeed` runs), export.py, and the embedded demonstration."""
