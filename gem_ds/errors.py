"""What goes wrong, in one sentence: on the rank that tells the user, and on the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

#: What libraries say where the machine has no more of something, and what a user can do.
_LIMITS = {
    r"Too many open files": "raise the number of files that a process may open (ulimit -n)",
    r"start new thread": "raise the number of processes (ulimit -u)",
    r"out of memory|allocate memory|bad_alloc": (
        "lower the batch size or the length, spread the model over more GPUs, or free memory"
    ),
}


class PeerError(RuntimeError):
    """Rank 0 tells the user what went wrong; this rank only stops."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user stopped the program; the same command goes on from there."""


def sentence_of(error: Exception) -> str:
    """What an error says to the user: of an OSError whose text is a sentence, no number."""
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error)


def sentence_of_limit(error: Exception) -> str | None:
    """What to do where memory, files or threads ran out, in whatever words; None otherwise."""
    if not isinstance(error, (MemoryError, OSError, RuntimeError)):
        return None
    told = str(error).strip().partition("\n")[0] or "out of memory"  # as Python's MemoryError
    for words, remedy in _LIMITS.items():
        if re.search(words, told):
            return f"A limit of this machine is reached ({told}): {remedy}."
    return None


@contextmanager
def refusing(sentence: str, *errors: type[Exception]) -> Iterator[None]:
    """Tells such errors of a library as a ValueError: the sentence, with their first line as {}."""
    try:
        yield
    except errors as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next(filter(None, lines), type(error).__name__)
        raise ValueError(sentence.replace("{}", reason)) from error
