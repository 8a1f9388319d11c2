"""The program in what a model wrote: between marks, in code fences, or amid conversation.

Text from a model is parsed here but never run: that is the business of `gem_ds.evaluate.sandbox`.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator

from gem_ds.data.tasks.mbpp import prompt_of

_MAX_PARSED = 1 << 17  # characters; a tree takes much memory, and it is made where the model lies

#: How every prompt begins; a model that goes on writing begins another one.
_RUN_ON = prompt_of("", ()).partition(":")[0]
_LANGUAGE = re.compile(r"\A(?:[\w+.-]*[ \t]*\r?\n|(?:python3?|py)\b[ \t]*)", re.IGNORECASE)
_CODE_LINE = re.compile(r"(?:def|class|import|from|async)\b|@|[A-Za-z_]\w*[ \t]*=[^=]")
_BUILTINS = frozenset(dir(builtins))
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def extract_program(completion: str, entry_point: str | None = None) -> str:
    """The program in a completion of an instruction, whatever stands around it.

    The text is what stands between `[BEGIN]` and `[DONE]`, as far as these occur. If it is Python
    and defines the entry point, it is taken as it stands. Else the last fenced block that defines
    it counts (a model that corrects itself does so below), behind the earlier blocks whose names
    it uses; else the first run of lines which is Python and defines it. Else what stands before
    `[BEGIN]` is searched in the same way. Where nothing defines it, the text is returned as it is.
    Without an entry point any definition will do.
    """
    if (found := find_program(completion, entry_point)) is not None:
        return found
    texts = _between_marks(completion)
    return next(filter(str.strip, texts), texts[0])


def find_program(completion: str, entry_point: str | None = None) -> str | None:
    """As `extract_program`, but None where nothing defines the entry point."""
    for text in _between_marks(completion):
        for candidate in _candidates(text, entry_point):
            if (tree := parse(candidate)) is not None and _defines(tree, entry_point):
                return _without_last_word(candidate, tree)
    return None


def parse(text: str) -> ast.Module | None:
    """The syntax tree of a text, None if it is not Python or more than the parser can take."""
    tree = _parsed(text)
    return None if isinstance(tree, int) else tree


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


def _candidates(text: str, entry_point: str | None) -> Iterator[str]:
    """Texts that may be the program, the likeliest first."""
    yield text
    pieces = text.split("```")
    blocks = [_dedented(_LANGUAGE.sub("", block, count=1)) for block in pieces[1::2]]
    for i in reversed(range(len(blocks))):
        yield from _with_needs(blocks[i], blocks[:i], entry_point)
    for piece in pieces:
        yield _dedented(piece)
        yield from _python_lines(piece)


def _with_needs(block: str, earlier: list[str], entry_point: str | None) -> Iterator[str]:
    """A block that defines the entry point, behind the earlier ones whose names it uses."""
    if (tree := parse(block)) is None or not _defines(tree, entry_point):
        return
    needed = _used(tree) - _bound(tree) - _BUILTINS
    before = [t for t in earlier if (other := parse(t)) is not None and needed & _globals(other)]
    yield "\n".join([*before, block])


def _python_lines(text: str) -> Iterator[str]:
    """Runs of lines that begin like code and are Python, each as long as can be."""
    lines = text.split("\n")
    start = 0
    while start < len(lines):
        if _CODE_LINE.match(lines[start]) is None:
            start += 1
            continue
        end = len(lines)
        while end > start and isinstance(bad := _parsed("\n".join(lines[start:end])), int):
            end = min(end - 1, start + bad - 1)
        if end > start:
            yield "\n".join(lines[start:end])
        start = max(end, start + 1)


def _dedented(text: str) -> str:
    """The text without the margin that it has as a whole or on its first line, if it is Python."""
    variants = (text, textwrap.dedent(text), text.lstrip())
    return next((variant for variant in variants if parse(variant) is not None), text)


def _without_last_word(text: str, tree: ast.Module) -> str:
    """The program without a closing word like `Done` or `[END]`, which could only be an error."""
    if len(tree.body) < 2 or not isinstance(last := tree.body[-1], ast.Expr):
        return text
    words = last.value.elts if isinstance(last.value, ast.List) else [last.value]
    known = _bound(tree) | _BUILTINS
    if "*" in known or not words:  # a star import may have bound any name
        return text
    if not all(isinstance(word, ast.Name) and word.id not in known for word in words):
        return text
    return "\n".join(text.split("\n")[: last.lineno - 1])


def _parsed(text: str) -> ast.Module | int:
    """The syntax tree, or the line (from 1) at which the text stops being Python."""
    if len(text) > _MAX_PARSED:
        return 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "\d" in a string
        try:
            return ast.parse(text)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, RecursionError, MemoryError):  # surrogates, deep nesting
            return 1


def _defines(tree: ast.Module, entry_point: str | None) -> bool:
    if entry_point is None:
        return any(isinstance(node, _DEFINITIONS) for node in ast.walk(tree))
    return entry_point in _globals(tree, with_foreign=False)


def _globals(tree: ast.Module, *, with_foreign: bool = True) -> set[str]:
    """The names that a program leaves behind when it has run.

    Foreign ones come from outside the standard library, where no program has its answer: a use of
    one imports it from a file like `solution`.
    """
    names = set()
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if not with_foreign and _is_foreign(node):
            continue
        names |= _names_given_by(node)
        if not isinstance(node, _DEFINITIONS | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return names


def _is_foreign(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        modules = ["." if node.level else str(node.module)]
    else:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    return any(name.partition(".")[0] not in sys.stdlib_module_names for name in modules)


def _bound(tree: ast.Module) -> set[str]:
    """All names to which a program gives a value anywhere, arguments of functions too."""
    return {name for node in ast.walk(tree) for name in _names_given_by(node)}


def _names_given_by(node: ast.AST) -> set[str]:
    if isinstance(node, _DEFINITIONS):
        return {node.name}
    if isinstance(node, ast.alias):
        return {node.asname or node.name.partition(".")[0]}
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return {node.id}
    return {node.arg} if isinstance(node, ast.arg) else set()


def _used(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
