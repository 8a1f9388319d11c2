"""What tests do with a program, read from their text: whether they can run away from it.

Stand-ins (`remote`) are faithful where tests call functions, hand over data and look at data. What
looks at objects instead (their names, classes, signatures), at what a module holds, or at what
surrounds a program (output, files, clocks, threads) has to run beside it. The tests' text alone
decides that: the program has no say in how it is judged.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Collection, Iterable, Mapping

_BESIDE = (ast.AsyncFor, ast.AsyncFunctionDef, ast.AsyncWith, ast.Await, ast.Match, ast.TryStar)
_DUNDER = re.compile(r"__\w+__")
_CLASS_NAME = re.compile(r"_*[A-Z][^_]*")
#: builtins that look at an object, or at what surrounds the program
_LOOKING = {
    *("BaseExceptionGroup", "ExceptionGroup", "__import__", "callable", "compile", "delattr"),
    *("dir", "eval", "exec", "hasattr", "input", "issubclass", "open", "vars"),
}
#: builtins that call a function which they are given
_CALLING = {"filter", "map", "max", "min", "sorted"}
#: modules whose functions see no more than data
_OF_DATA = {
    *("abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections"),
    *("contextlib", "copy", "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions"),
    *("functools", "hashlib", "heapq", "html", "io", "ipaddress", "itertools", "json", "math"),
    *("numbers", "operator", "pprint", "random", "re", "secrets", "statistics", "string"),
    *("struct", "textwrap", "time", "timeit", "typing", "unicodedata", "unittest", "uuid", "zlib"),
}
#: but for these, which see objects, or what the program sees too
_EXCEPTIONS = {
    *("contextlib.chdir", "contextlib.redirect_stderr", "contextlib.redirect_stdout"),
    *("dataclasses.asdict", "dataclasses.astuple", "dataclasses.fields"),
    *("dataclasses.is_dataclass", "dataclasses.replace"),
    *("decimal.getcontext", "decimal.localcontext", "decimal.setcontext"),
    *("random.getstate", "random.seed", "random.setstate"),
    *("typing.get_type_hints", "unittest.mock"),
}
#: what sees no more than data in other modules
_PARTS = {
    *("os.linesep", "os.path", "os.sep", "sys.byteorder", "sys.float_info", "sys.getsizeof"),
    *("sys.getrecursionlimit", "sys.int_info", "sys.maxsize", "sys.maxunicode", "sys.version"),
    *("sys.version_info", "types.SimpleNamespace"),
}


class Usage:
    """What the trees of some tests do, node by node.

    Of the names in `trees`, `candidate` are the program's, `modules` are modules that the program
    imports, and `bound` are given values there.
    """

    def __init__(
        self,
        trees: Iterable[ast.Module],
        candidate: Collection[str],
        entry_point: str | None,
        bound: Collection[str],
        modules: Collection[str],
    ) -> None:
        self._nodes: list[ast.AST] = list(trees)
        self._candidate = candidate
        self._entry_point = entry_point
        self._builtins = vars(builtins).keys() - set(bound)
        self._imports = {name: name for name in modules}
        self._parents: dict[ast.AST, ast.AST] = {}
        self._reads: dict[str, list[ast.Name]] = {}
        for node in self._nodes:  # which grows meanwhile
            self._imports |= _imports(node)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._reads.setdefault(node.id, []).append(node)
            for child in ast.iter_child_nodes(node):
                self._parents[child] = node
                self._nodes.append(child)
        called = (node.func for node in self._nodes if isinstance(node, ast.Call))
        self._called = {function.id for function in called if isinstance(function, ast.Name)}

    def runs_beside(self) -> bool:
        """Whether the tests have to run beside the program."""
        return any(map(self._is_beyond_data, self._nodes))

    def _is_beyond_data(self, node: ast.AST) -> bool:
        """Whether it does what stand-ins cannot bear."""
        match node:
            case ast.Attribute(attr=name):
                is_changed = not isinstance(node.ctx, ast.Load) and self._full_name(node.value)
                return bool(_DUNDER.fullmatch(name) or is_changed)
            case ast.Constant(value=str(text)):  # as an argument of getattr
                return bool(_DUNDER.fullmatch(text)) and isinstance(self._parents[node], ast.Call)
            case ast.With(items=items):
                expressions = [item.context_expr for item in items]
                return any(isinstance(e, ast.Name) or self._is_own(e) for e in expressions)
            case ast.ClassDef(bases=classes):
                return any(map(self._is_own, classes))
            case ast.ExceptHandler(type=ast.AST() as kind):
                return self._is_own(kind)
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, *kinds]):
                return any(not _names(kind) <= self._builtins for kind in kinds)
            case ast.ImportFrom(names=[ast.alias(name="*")]):
                return True
            case ast.Name(ctx=ast.Load()):
                return self._is_read_as_object(node)
        return isinstance(node, _BESIDE)

    def _is_read_as_object(self, node: ast.Name) -> bool:
        if (name := self._full_name(node)) is not None:
            module, *parts = name.split(".")
            start = ".".join([module, *parts[:1]])
            return start not in _PARTS and (module not in _OF_DATA or start in _EXCEPTIONS)
        if node.id in self._candidate:
            is_class = _CLASS_NAME.fullmatch(node.id) and node.id != self._entry_point
            return not (self._is_by_methods(node) if is_class else self._is_function(node))
        return node.id in _LOOKING & self._builtins

    def _is_own(self, node: ast.AST) -> bool:
        """Whether an expression has a name of the candidate's in it."""
        return not _names(node).isdisjoint(self._candidate)

    def _full_name(self, node: ast.AST) -> str | None:
        """The name of what a dotted name stands for, from its module on; None if it has none."""
        if not isinstance(node, ast.Name) or node.id not in self._imports:
            return None
        name = self._imports[node.id]
        parent = self._parents[node]
        while isinstance(parent, ast.Attribute):
            name += f".{parent.attr}"
            parent = self._parents[parent]
        return name

    def _is_function(self, node: ast.Name) -> bool:
        """Whether a name is taken for that of a function."""
        parent = self._parents[node]
        if isinstance(parent, ast.Call) and parent.func is not node:
            calls = isinstance(parent.func, ast.Name) and parent.func.id
            return node.id in self._called or calls not in self._builtins - _CALLING
        kinds = (ast.Assign, ast.Attribute, ast.Call, ast.FunctionDef, ast.keyword)
        return node.id == self._entry_point or isinstance(parent, kinds)

    def _is_by_methods(self, node: ast.Name) -> bool:
        """Whether a class is called, and of the object no more is used than its attributes."""
        call = self._parents[node]
        if not isinstance(call, ast.Call) or call.func is not node:
            return False
        parent = self._parents[call]
        if isinstance(parent, ast.Assign) and isinstance(name := parent.targets[0], ast.Name):
            return all(map(self._is_attribute, self._reads.get(name.id, [])))
        return self._is_attribute(call)

    def _is_attribute(self, value: ast.AST) -> bool:
        """Whether no more is used of a value than an attribute, and of that none in turn."""
        parent = self._parents[value]
        is_last = not isinstance(self._parents[parent], ast.Attribute | ast.Subscript)
        return isinstance(parent, ast.Attribute) and is_last


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _imports(node: ast.AST) -> Mapping[str, str]:
    """What an import binds, and what that stands for."""
    match node:
        case ast.Import(names=names):
            full = {alias.asname: alias.name for alias in names if alias.asname}
            firsts = [alias.name.partition(".")[0] for alias in names if not alias.asname]
            return full | {name: name for name in firsts}
        case ast.ImportFrom(module=module, names=names):
            return {alias.asname or alias.name: f"{module}.{alias.name}" for alias in names}
    return {}
