"""What `benchmarks/step.py` measures: shapes, contenders that are no methods, memory, traffic."""
