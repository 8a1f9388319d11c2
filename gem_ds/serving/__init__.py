"""Deltas where models answer: several on one base, in vLLM, and kept up to date by a trainer."""
