"""Comparing methods: which runs there are, running them, and what they say together."""
