"""Exact match on GSM8K (gem_ds/evaluate/gsm8k.py)."""

from gem_ds.evaluate.gsm8k import main

if __name__ == "__main__":
    main()
