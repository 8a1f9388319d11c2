"""pass@k on programs, in a sandbox (gem_ds/evaluate/passk.py)."""

from gem_ds.evaluate.passk import main

if __name__ == "__main__":
    main()
