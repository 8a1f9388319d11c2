"""Score samples again, without a model (gem_ds/evaluate/score.py)."""

from gem_ds.evaluate.score import main

if __name__ == "__main__":
    main()
