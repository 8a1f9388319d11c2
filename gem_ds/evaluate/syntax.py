"""Python text to its syntax tree, in time and memory that grow with the text and no faster.

What a model wrote may be anything, and this runs in the evaluator's own process, without a clock.
CPython's parser reads a text once, but joins the parts of `import a.a.a` one by one: the square of
their number, in time and in memory. So a name of many parts is no Python here, and neither is what
is longer than a tree should be made of.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass

MAX_LENGTH = 1 << 17  # characters; a tree takes a thousand times the memory
#: Characters that are parsed for each one of a completion, and for a short one: what stands in a
#: fence amid words is read some ten times, a text that repeats itself could be without end.
_PASSES = 64
_SHORT = 1_000
_ENDLESS_NAME = re.compile(r"(?:\.[\s\\]*+\w++[\s\\]*+){64}")
_UNFINISHED = ("was never closed", "unterminated triple-quoted")  # of CPython's messages


DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
IMPORT = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Fault:
    """Where a text stops being Python, and whether more text could mend it."""

    line: int  # from 1
    is_unfinished: bool = False  # a bracket or a string is open, or decorators lack their function


def parse(text: str, max_length: int = MAX_LENGTH) -> ast.Module | Fault:
    """The syntax tree of a text, or what is wrong with it; raises nothing."""
    if len(text) > max_length or _ENDLESS_NAME.search(text):
        return Fault(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string
        try:
            return ast.parse(text)
        except SyntaxError as error:
            line = error.lineno or 1
            lacks_function = text.startswith("@") and line == len(text.rstrip().splitlines())
            is_open = any(words in error.msg for words in _UNFINISHED)
            return Fault(line, is_open or lacks_function)
        except (ValueError, RecursionError, MemoryError):  # surrogates, deep nesting
            return Fault(1)


def tree_of(text: str, max_length: int = MAX_LENGTH) -> ast.Module | None:
    """The syntax tree of a text, None if it is no Python."""
    parsed = parse(text, max_length)
    return None if isinstance(parsed, Fault) else parsed


class Parser:
    """Parses parts of one completion; when so much has been read, nothing is Python any more."""

    def __init__(self, num_characters: int) -> None:
        self._left = _PASSES * (num_characters + _SHORT)
        self._reserve = self._left // 2

    def parse(self, text: str) -> ast.Module | Fault:
        """As `syntax.parse`."""
        if len(text) > self._left:
            return Fault(1)
        self._left -= len(text)
        return parse(text)

    def tree_of(self, text: str) -> ast.Module | None:
        """As `syntax.tree_of`."""
        parsed = self.parse(text)
        return None if isinstance(parsed, Fault) else parsed

    @property
    def is_patient(self) -> bool:
        """Whether there is enough left to try what may be in vain."""
        return self._left > self._reserve


class Names:
    """The names in some trees, in whatever scope; `imported` are those bound by an import.

    Each node is visited once: a program may nest them at will.
    """

    def __init__(self, *trees: ast.AST) -> None:
        self.read: set[str] = set()
        self.bound: set[str] = set()
        self.imported: set[str] = set()
        for tree in trees:
            for node in ast.walk(tree):
                self.add(node)

    def add(self, node: ast.AST) -> None:
        """Add the names of a node, but not those of its children."""
        if isinstance(node, ast.Name):
            (self.read if isinstance(node.ctx, ast.Load) else self.bound).add(node.id)
        elif isinstance(node, ast.arg):
            self.bound.add(node.arg)
        elif isinstance(node, DEFINITION):
            self.bound.add(node.name)
        elif isinstance(node, ast.ExceptHandler):
            self.bound.update([node.name] if node.name else [])
        elif isinstance(node, IMPORT):
            names = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            self.bound |= names
            self.imported |= names
