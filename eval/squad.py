"""Answers that are written: SQuAD, STS-B (gem_ds/evaluate/squad.py)."""

from gem_ds.evaluate.squad import main

if __name__ == "__main__":
    main()
