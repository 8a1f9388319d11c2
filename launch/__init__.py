"""What a checkout starts: train.py (by `deepspeed`), export.py, compare.py, plan.py, the demo."""
