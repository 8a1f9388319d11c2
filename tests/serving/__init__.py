"""Tests of deltas where models answer."""
