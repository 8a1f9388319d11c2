"""Code fences in what a model wrote: they stand at the start of a line, and in no docstring."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_TRIPLE = ('"""', "'''")
_QUOTE = re.compile(r"\\.|\"{3}|'{3}|[\"'#\n]", re.DOTALL)


def fenced(text: str) -> list[str]:
    """What stands outside and inside of fences in turn, where a fence in a docstring is text."""
    pieces: list[str] = []
    start, read, quote = 0, 0, ""
    for fence in _FENCE.finditer(text):
        quote = _open_quote(text[read : fence.start()], quote) if len(pieces) % 2 else ""
        read = fence.start()
        if quote not in _TRIPLE:
            pieces.append(text[start : fence.start()])
            start = read = fence.end()
    return [*pieces, text[start:]]


def _open_quote(code: str, quote: str) -> str:
    """What string or comment a piece of Python leaves open that began in `quote`."""
    for match in _QUOTE.finditer(code):
        mark = match[0]
        if not quote:
            quote = "" if mark[0] == "\\" else mark.strip()
        elif mark == quote or (mark == "\n" and quote not in _TRIPLE):
            quote = ""
    return quote
