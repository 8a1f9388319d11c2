"""Tests of the tuner of peft."""
