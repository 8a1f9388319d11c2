"""Who defines the names that tests use: the candidate, the tests themselves, or Python.

Only the tests and their setup decide what is taken from the candidate. A program that defines its
own `abs`, `math` or `isclose` changes nothing about the one that the tests call.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What runs where."""

    #: the candidate's names in setup and tests
    candidate: tuple[str, ...]
    #: modules that the tests use and that the program, not the setup, imports
    modules: tuple[str, ...]
    #: what of the setup the program gets to see: imports, calls on them, and what it refers to
    program_setup: str
    #: whether that is more than imports, so that the program may have seen what is expected
    shares_setup: bool
    #: whether the setup uses the program, and so must follow it
    setup_is_last: bool
    #: whether setup and tests can only run beside the program
    in_jail: bool


def assign_roles(
    program: str, tests: Sequence[str], *, setup: str = "", entry_point: str | None = None
) -> Roles:
    """Reads the sources; nothing is run. A source that does not parse defines and uses nothing."""
    program_tree, setup_tree = _parse(program), _parse(setup)
    trusted = [setup_tree, *map(_parse, tests)]
    used, bound = _names(trusted, ast.Load), _names(trusted, ast.Store)
    defined = _names([program_tree], ast.Store)
    candidate = {name for name in used - bound if not hasattr(builtins, name)}
    modules = {
        name
        for name in candidate - {entry_point} - (defined - _imported([program_tree]))
        if name in sys.stdlib_module_names and name in defined
    }
    candidate -= modules
    if entry_point is not None:
        candidate.add(entry_point)
    elif not candidate:  # a task may want a function of a builtin's name
        candidate = {name for name in used - bound if name in defined}
    lacking = _names([program_tree], ast.Load) - defined
    shared = _shared(setup_tree, lacking)
    return Roles(
        candidate=tuple(sorted(candidate)),
        modules=tuple(sorted(modules)),
        program_setup="\n".join(map(ast.unparse, shared)),
        shares_setup=any(_names([node], ast.Store) and not _is_import(node) for node in shared),
        setup_is_last=bool(_names([setup_tree], ast.Load) & candidate),
        in_jail=any(_needs_class(tree, candidate) for tree in trusted),
    )


def _shared(setup: ast.Module, lacking: set[str]) -> list[ast.stmt]:
    """The setup's statements that the program needs, where `lacking` are names it has not."""
    imported = _imported([setup])
    lacking = lacking - imported
    shared = []
    for node in reversed(setup.body):
        bound, read = _names([node], ast.Store), _names([node], ast.Load)
        is_call = isinstance(node, ast.Expr) and any(name in imported for name in read)
        if bound & lacking:
            lacking |= read
        elif not _is_import(node) and not (is_call and read <= imported):
            continue
        shared.append(node)
    return shared[::-1]


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _names(trees: Iterable[ast.AST], context: type[ast.Load] | type[ast.Store]) -> set[str]:
    """The names that are read, or that are bound, in whatever scope."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, context):
                found.add(node.id)
            elif context is ast.Store:
                found.update(_bound_without_name(node))
    return found


def _bound_without_name(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.ExceptHandler) and node.name:
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    return []


def _imported(trees: Iterable[ast.AST]) -> set[str]:
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in imports for name in _bound_without_name(node)}


def _needs_class(tree: ast.AST, candidate: set[str]) -> bool:
    """Whether a class of the candidate's is used as only a class can be: caught or derived from."""
    for node in ast.walk(tree):
        places: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            places = [node.type]
        elif isinstance(node, ast.ClassDef):
            places = list(node.bases)
        elif isinstance(node, ast.With):
            places = [item.context_expr for item in node.items]
        if _names([place for place in places if place], ast.Load) & candidate:
            return True
    return False
