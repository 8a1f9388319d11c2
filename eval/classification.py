"""Metrics of GLUE and SuperGLUE (gem_ds/evaluate/classification.py)."""

from gem_ds.evaluate.classification import main

if __name__ == "__main__":
    main()
