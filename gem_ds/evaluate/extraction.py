"""The program in what a model wrote: between marks, in code fences, or amid conversation.

Text from a model is parsed here but never run: that is the business of `gem_ds.evaluate.sandbox`.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
from bisect import bisect_left
from collections.abc import Iterator

from gem_ds.data.tasks.mbpp import prompt_of
from gem_ds.evaluate.syntax import DEFINITION, Fault, Names, Parser

_EXACT_CUTS = 8  # then more than one line at a time is taken away from what is no Python

#: How every prompt begins; a model that goes on writing begins another one.
_RUN_ON = prompt_of("", ()).partition(":")[0]
_LANGUAGE = re.compile(r"\A(?:[\w+.-]*[ \t]*\r?\n|(?:python3?|py)\b[ \t]*)", re.IGNORECASE)
_CODE_LINE = re.compile(r"(?:def|class|import|from|async)\b|@|[A-Za-z_]\w*[ \t]*=[^=]")
#: A line at the margin that goes on with the statement above it.
_CONTINUATION = re.compile(r"[\s#)\]}]|$|(?:else|elif|except|finally)\b")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_TRIPLE = ('"""', "'''")
_QUOTE = re.compile(r"\\.|\"{3}|'{3}|[\"'#\n]", re.DOTALL)
_BUILTINS = frozenset(dir(builtins))


def extract_program(completion: str, entry_point: str | None = None) -> str:
    """The program in a completion of an instruction, whatever stands around it.

    The text is what stands between `[BEGIN]` and `[DONE]`, as far as these occur. If it is Python
    and defines the entry point, it is taken as it stands. Else the last fenced block that defines
    it counts (a model that corrects itself does so below), together with the other blocks whose
    names it uses; else the first run of lines which is Python and defines it. Fences stand at the
    start of a line; only if nothing is found so, others count too. Else what stands before
    `[BEGIN]` is searched in the same way. Where nothing defines it, the text is returned as it is.
    Without an entry point any definition will do.
    """
    if (found := find_program(completion, entry_point)) is not None:
        return found
    texts = _between_marks(completion)
    return next(filter(str.strip, texts), texts[0])


def find_program(completion: str, entry_point: str | None = None) -> str | None:
    """As `extract_program`, but None where nothing defines the entry point."""
    parser = Parser(len(completion))
    for text in _between_marks(completion):
        for candidate in _candidates(text, entry_point, parser):
            tree = parser.tree_of(candidate)
            if tree is not None and _defines(tree, entry_point):
                return _without_last_word(candidate, tree)
    return None


def _between_marks(text: str) -> list[str]:
    """The answer, then what stands before its mark; without reasoning or a run-on task."""
    text = text.rpartition("</think>")[2]
    answer, run_on, _ = text.partition(_RUN_ON)
    if run_on and answer.strip():
        text = answer
    before, begin, after = text.partition("[BEGIN]")
    texts = [text]
    if begin and "[DONE]" not in before:
        texts = [re.sub(r"\A[ \t]*\r?\n", "", after), before]
    text, done, _ = texts[0].partition("[DONE]")
    return [text.removesuffix("\n") if done else text, *texts[1:]]


def _candidates(text: str, entry_point: str | None, parser: Parser) -> Iterator[str]:
    """Texts that may be the program, the likeliest first."""
    yield text
    at_margin, anywhere = _fenced(text), text.split("```")
    for pieces in [at_margin] if at_margin == anywhere else [at_margin, anywhere]:
        blocks = [_dedented(_LANGUAGE.sub("", block, count=1), parser) for block in pieces[1::2]]
        yield from _last_block(blocks, entry_point, parser)
    for piece in anywhere:
        yield _dedented(piece, parser)
        yield from _python_lines(piece, parser)


def _fenced(text: str) -> list[str]:
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


def _last_block(blocks: list[str], entry_point: str | None, parser: Parser) -> Iterator[str]:
    """The last block that defines the entry point, with all blocks whose names it needs.

    A helper from below goes before it, unless it uses what the block defines.
    """
    parsed = ((i, parser.tree_of(block)) for i, block in enumerate(blocks))
    trees = {i: tree for i, tree in parsed if tree is not None}
    defining = [i for i, tree in trees.items() if _defines(tree, entry_point)]
    if not defining:
        return
    last = defining[-1]
    givers: dict[str, list[int]] = {}
    for i, tree in trees.items():
        for name in _globals(tree, with_foreign=i < last):
            givers.setdefault(name, []).append(i)
    needed, unread = {last}, [last]
    while unread:
        names = Names(trees[unread.pop()])
        lacking = names.read - names.bound - _BUILTINS
        found = {i for name in lacking for i in givers.pop(name, [])} - needed
        needed |= found
        unread += found
    given = _globals(trees[last])
    after = {i for i in needed if i > last and not given.isdisjoint(Names(trees[i]).read)}
    order = (*sorted(needed - after - {last}), last, *sorted(after))
    yield "\n".join(blocks[i] for i in order)


def _python_lines(text: str, parser: Parser) -> Iterator[str]:
    """Runs of lines that begin like code and are Python, each as long as can be.

    A part goes from a line at the margin to the next, and is parsed by itself.
    """
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if not i or not _CONTINUATION.match(line)]
    borders = [*starts, len(lines)]
    i = 0
    while i < len(starts):
        begun = borders[i]
        if _CODE_LINE.match(lines[begun]) is None:
            i += 1
            continue
        end = begun
        while end == borders[i] and i < len(starts):
            end = _statement_end(lines, borders, i, parser)
            i = max(i + 1, bisect_left(borders, end))
        if end > begun:
            yield "\n".join(lines[begun:end])


def _statement_end(lines: list[str], borders: list[int], i: int, parser: Parser) -> int:
    """Up to which line the i-th part is Python; with the next ones, where it has no end itself."""
    start, num_parts = borders[i], 1
    while True:
        stop = borders[min(i + num_parts, len(borders) - 1)]
        fault = parser.parse("\n".join(lines[start:stop]))
        if not isinstance(fault, Fault):
            return stop
        if not fault.is_unfinished or stop == len(lines) or not parser.is_patient:
            break
        num_parts *= 2
    num_cuts = 0
    while isinstance(fault, Fault) and stop > start:
        step = 1 << max(0, num_cuts - _EXACT_CUTS)
        stop = max(start, min(stop - step, start + fault.line - 1))
        fault = parser.parse("\n".join(lines[start:stop]))
        num_cuts += 1
    return stop


def _dedented(text: str, parser: Parser) -> str:
    """The text without the margin that it has as a whole or on its first line, if it is Python."""
    variants = (text, textwrap.dedent(text), text.lstrip())
    return next((v for v in variants if parser.tree_of(v) is not None), text)


def _without_last_word(text: str, tree: ast.Module) -> str:
    """The program without a closing word like `Done` or `[END]`, which could only be an error."""
    if len(tree.body) < 2 or not isinstance(last := tree.body[-1], ast.Expr):
        return text
    words = last.value.elts if isinstance(last.value, ast.List) else [last.value]
    known = Names(tree).bound | _BUILTINS
    if "*" in known or not words:  # a star import may have bound any name
        return text
    if not all(isinstance(word, ast.Name) and word.id not in known for word in words):
        return text
    return "\n".join(text.split("\n")[: last.lineno - 1])


def _defines(tree: ast.Module, entry_point: str | None) -> bool:
    if entry_point is None:
        return any(isinstance(node, DEFINITION) for node in ast.walk(tree))
    return entry_point in _globals(tree, with_foreign=False)


def _globals(tree: ast.Module, *, with_foreign: bool = True) -> set[str]:
    """The names that a program leaves behind when it has run.

    Foreign ones come from outside the standard library, where no program has its answer: a use of
    one imports it from a file like `solution`.
    """
    names = Names()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if not with_foreign and _is_foreign(node):
            continue
        if not isinstance(node, ast.ExceptHandler):  # which takes its name back
            names.add(node)
        if not isinstance(node, DEFINITION | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names.bound


def _is_foreign(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        modules = ["." if node.level else str(node.module)]
    else:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] not in sys.stdlib_module_names for name in modules)
