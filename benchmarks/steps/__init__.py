"""What the measurements share: contenders, their processes, turns, memory, traffic, tables."""
