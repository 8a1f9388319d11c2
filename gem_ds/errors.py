"""What goes wrong, in one sentence: on the rank that tells the user, and on the others."""

from __future__ import annotations


class PeerError(RuntimeError):
    """Rank 0 tells the user what went wrong; this rank only stops."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user stopped the program; the same command goes on from there."""


def sentence_of(error: Exception) -> str:
    """What an error says to the user: of an OSError whose text is a sentence, no number."""
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error)
