"""Honest, hostile and awkward programs, as data: what each is, and the verdict that it deserves.

A program that tries to escape says what came of it, so that its test passes where it was contained.
What `tests/test_sandbox_programs.py` puts in place of names between two @ signs:

    @canary@   a file outside that must stay as it is       @listener@  port of the parent's socket
    @parent@   the parent's process id                      @marker@    names this run's processes
"""

from __future__ import annotations

from dataclasses import dataclass

PASSED, FAILED, TIMEOUT, CRASHED = ("passed",), ("failed",), ("timeout",), ("crashed",)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program, its tests and the statuses that are right for it."""

    family: str
    name: str
    program: str
    tests: tuple[str, ...]
    expected: tuple[str, ...]
    setup: str = ""
    timeout: float = 10.0
    memory_mb: int = 512


def _cases(family: str, expected: tuple[str, ...], programs: dict[str, tuple], **options) -> list:
    return [
        Case(
            family=family,
            name=name,
            program=program,
            tests=tests,
            **{"expected": expected} | options | (more[0] if more else {}),
        )
        for name, (program, tests, *more) in programs.items()
    ]


HONEST = _cases(
    "honest",
    PASSED,
    {
        "recursion": (
            "def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)",
            ("assert f(15) == 610",),
        ),
        "recursion_to_900": (
            "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)",
            ("assert f(900) == 900",),
        ),
        "raised_recursion_limit": (
            "import sys\nsys.setrecursionlimit(20000)\n"
            "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)",
            ("assert f(10000) == 10000",),
        ),
        "threads": (
            "import threading\n"
            "def f(n):\n"
            "    found = []\n"
            "    threads = [threading.Thread(target=found.append, args=(i,)) for i in range(n)]\n"
            "    [t.start() for t in threads]\n"
            "    [t.join() for t in threads]\n"
            "    return sorted(found)",
            ("assert f(40) == list(range(40))",),
        ),
        "thread_pool": (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "def f(xs):\n"
            "    with ThreadPoolExecutor() as pool:\n"
            "        return list(pool.map(lambda x: x * x, xs))",
            ("assert f([1, 2, 3]) == [1, 4, 9]",),
        ),
        "child_process": (
            "import os\n"
            "def f():\n"
            "    read, write = os.pipe()\n"
            "    if os.fork() == 0:\n"
            "        os.write(write, b'child')\n"
            "        os._exit(0)\n"
            "    os.wait()\n"
            "    return os.read(read, 10)",
            ("assert f() == b'child'",),
        ),
        "multiprocessing": (
            "import multiprocessing\n"
            "def square(x): return x * x\n"
            "def f(xs):\n"
            "    with multiprocessing.get_context('fork').Pool(2) as pool:\n"
            "        return pool.map(square, xs)",
            ("assert f([1, 2, 3]) == [1, 4, 9]",),
        ),
        "asyncio": (
            "import asyncio\n"
            "async def g(x):\n    await asyncio.sleep(0.01)\n    return x + 1\n"
            "def f(x): return asyncio.run(g(x))",
            ("assert f(1) == 2",),
        ),
        "large_integers": (
            "def f(n):\n    return 3 ** n",
            ("assert f(100000) == 3 ** 100000", "assert f(0) == 1"),
        ),
        "floats": (
            "def f(x): return [x, -x, x * 10 ** 300 * 10 ** 300, float('nan')]",
            ("r = f(0.1); assert r[:3] == [0.1, -0.1, float('inf')] and r[3] != r[3]",),
        ),
        "files_in_the_working_folder": (
            "import os\n"
            "def f(text):\n"
            "    with open('notes.txt', 'w') as file:\n        file.write(text)\n"
            "    with open(os.path.abspath('notes.txt')) as file:\n        return file.read()",
            ("assert f('hello') == 'hello'",),
        ),
        "temporary_files": (
            "import tempfile\n"
            "def f(text):\n"
            "    with tempfile.TemporaryFile('w+') as file:\n"
            "        file.write(text)\n        file.seek(0)\n        return file.read()",
            ("assert f('hello') == 'hello'",),
        ),
        "dataclass": (
            "from dataclasses import dataclass\n"
            "@dataclass(order=True)\n"
            "class Point:\n    x: int\n    y: int = 0\n"
            "def f(points): return [(p.x, p.y) for p in sorted(Point(*p) for p in points)]",
            ("assert f([(2, 1), (1,), (1, -1)]) == [(1, -1), (1, 0), (2, 1)]",),
        ),
        "own_class_in_the_tests": (
            "class Point:\n"
            "    def __init__(self, x, y): self.x, self.y = x, y\n"
            "    def __eq__(self, other): return (self.x, self.y) == (other.x, other.y)\n"
            "    def norm(self): return (self.x ** 2 + self.y ** 2) ** 0.5\n"
            "def mirror(p): return Point(p.y, p.x)",
            (
                "assert Point(3, 4).norm() == 5",
                "p = mirror(Point(1, 2)); assert (p.x, p.y) == (2, 1)",
                "assert mirror(Point(1, 2)) == Point(2, 1)",
                "p.x = 7; assert mirror(p).y == 7 and isinstance(p, Point)",
            ),
        ),
        "own_exception_in_the_tests": (
            "class TooBig(Exception): pass\ndef f(x):\n    if x > 9: raise TooBig(x)\n    return x",
            (
                "assert f(3) == 3",
                "try:\n    f(10)\nexcept TooBig:\n    pass\nelse:\n    raise AssertionError",
            ),
        ),
        "builtin_exception_in_the_tests": (
            "def f(x):\n    if x < 0: raise ValueError('negative', x)\n    return x",
            ("try:\n    f(-1)\nexcept ValueError as e:\n    assert e.args == ('negative', -1)",),
        ),
        "setup_builds_a_tree_of_its_class": (
            "class Node:\n    def __init__(self, v): self.v, self.left, self.right = v, None, None\n"
            "def total(node): return node.v + total(node.left) + total(node.right) if node else 0",
            ("assert total(root) == 6",),
            {"setup": "root = Node(1)\nroot.left = Node(2)\nroot.left.right = Node(3)"},
        ),
        "setup_defines_the_class": (
            "def total(node): return node.v + total(node.next) if node else 0\n"
            "def build(values):\n    head = None\n"
            "    for v in reversed(values): head = Node(v, head)\n    return head",
            ("assert total(Node(1, Node(2))) == 3", "assert build([4, 5]).next.v == 5"),
            {
                "setup": "class Node:\n    def __init__(self, v, next=None): self.v, self.next = v, next"
            },
        ),
        "setup_gives_imports_and_a_constant": (
            "def f(r): return math.floor(r) % MOD",
            ("assert f(13.5) == math.floor(3.7)",),
            {"setup": "import math\nMOD = 10"},
        ),
        "named_like_a_builtin": (
            "def sum(a, b): return a * b",
            ("assert sum(3, 4) == 12",),
        ),
        "module_imported_by_the_program_only": (
            "import sys\ndef f(x): return sys.getsizeof(x)",
            ("assert f((1, 2)) == sys.getsizeof((1, 2))",),
        ),
        "arguments_changed_in_place": (
            "def f(rows, seen):\n    rows.sort()\n    rows[0].append(9)\n    seen.add(len(rows))",
            (
                "a = [[2], [1]]; b = a[1]; s = set(); f(a, s); assert b == [1, 9] and a[0] is b and s == {2}",
            ),
        ),
        "returns_its_argument": (
            "def f(x):\n    x.append(x[0])\n    return x",
            ("a = [[1]]; r = f(a); assert r is a and r[0] is r[1]",),
        ),
        "function_arguments": (
            "def f(g, xs): return sorted(map(g, xs))",
            ("assert f(lambda x: -x, [1, 2]) == [-2, -1]", "assert f(len, ['aa', 'b']) == [1, 2]"),
        ),
        "returns_a_function": (
            "def f(n): return lambda x: x + n",
            ("assert f(3)(4) == 7", "add = f(1); assert list(map(add, [1, 2])) == [2, 3]"),
        ),
        "generators": (
            "import itertools\n"
            "def f(n):\n    yield from range(n)\n"
            "def g(): return itertools.count(5)\n",
            (
                "assert list(f(3000)) == list(range(3000))",
                "assert next(iter(g())) == 5 and [x for x, _ in zip(g(), 'abc')] == [5, 6, 7]",
                "it = f(2); assert next(it) == 0 and next(it) == 1 and next(it, None) is None",
            ),
        ),
        "lazy_results": (
            "def f(xs): return map(str, xs)\ndef g(d): return d.keys()",
            ("assert list(f([1, 2])) == ['1', '2']", "assert set(g({1: 2})) == {1} == g({1: 2})"),
        ),
        "match_as_truth": (
            "import re\ndef f(s): return re.fullmatch('[a-z]+', s)",
            (
                "assert f('abc')",
                "assert not f('ABC')",
                "assert f('A') is None",
                "assert f('b')[0] == 'b'",
            ),
        ),
        "typed_containers": (
            "from collections import *\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
            "def f(s):\n    d = defaultdict(list)\n    d[s].append(1)\n"
            "    P = namedtuple('P', 'x y')\n"
            "    return [Counter(s), OrderedDict(a=1), d, deque([1], 3), P(1, 2), Decimal('0.10'), "
            "Fraction(1, 3), range(3), frozenset(s), bytearray(b'x'), 1j, ..., slice(1)]",
            (
                "r = f('aab')",
                "assert r[0].most_common(1) == [('a', 2)] and r[0]['z'] == 0",
                "r[2]['new'].append(2); assert r[2] == {'aab': [1], 'new': [2]}",
                "assert r[3].maxlen == 3 and r[4].y == 2 and r[4] == (1, 2)",
                "assert str(r[5]) == '0.10' and r[6] * 3 == 1 and list(r[7]) == [0, 1, 2]",
                "assert type(r[8]) is frozenset and type(r[9]) is bytearray and r[10] ** 2 == -1",
            ),
        ),
        "subclass_results": (
            "import enum\nclass Color(enum.IntEnum):\n    RED = 3\n"
            "class Name(str): pass\n"
            "def f(): return [Color.RED, Name('x')]",
            ("assert f() == [3, 'x']",),
        ),
        "humaneval_style": (
            "def double(x): return 2 * x",
            ("def check(candidate):\n    assert candidate(2) == 4\n", "check(double)"),
        ),
        "crlf_and_unicode": (
            "def größe(s):\r\n\tπ = 'π≈3'\r\n\treturn π + s\r\n",
            ("assert größe('😀\\ud800') == 'π≈3😀\\ud800'",),
        ),
        "prints": (
            "import sys\nprint('hello', file=sys.stderr)\n"
            "def f(x):\n    print('x' * 10 ** 6)\n    sys.stdout.write('y')\n    return x",
            ("assert f(1) == 1",),
        ),
        "captures_its_own_prints": (
            "import io, contextlib\n"
            "def f():\n    with contextlib.redirect_stdout(io.StringIO()) as out: print('a')\n"
            "    return out.getvalue()",
            ("assert f() == 'a\\n'",),
        ),
        "one_second_of_work": (
            "import time\n"
            "def f():\n    end, n = time.monotonic() + 1, 0\n"
            "    while time.monotonic() < end: n += 1\n    return n > 0",
            ("assert f()",),
        ),
        "main_block_is_not_run": (
            "def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(1)",
            ("assert f() == 1",),
        ),
        "signal_alarm": (
            "import signal\n"
            "class Late(Exception): pass\n"
            "def ring(*_): raise Late\n"
            "def f():\n    signal.signal(signal.SIGALRM, ring)\n"
            "    signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
            "    try:\n        while True: pass\n    except Late: return 'late'",
            ("assert f() == 'late'",),
        ),
        "memory_within_the_limit": (
            "def f(): return sum(len(bytes(1 << 20)) for _ in range(2000)) + len(bytes(100 << 20))",
            ("assert f() == 2100 << 20",),
        ),
        "large_result": ("def f(n): return list(range(n))", ("assert f(300000)[-1] == 299999",)),
    },
)

_EQUAL = """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __getattr__(self, name): return self
    def __call__(self, *args): return self
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    __sub__ = __rsub__ = __add__ = __radd__ = __abs__ = lambda self, *args: self
"""
_ANY = _EQUAL.replace("(int)", "")
_ONE = ("assert f(3) == 9",)

FORGED = _cases(
    "forged",
    FAILED,
    {
        "exit_code_zero": ("import os\ndef f(x): os._exit(0)", _ONE, {"expected": CRASHED}),
        "exit_at_import": ("import os\nos._exit(0)", _ONE, {"expected": CRASHED}),
        "system_exit": ("def f(x): raise SystemExit(0)", _ONE),
        "system_exit_at_import": ("import sys\nsys.exit(0)", _ONE),
        "quit_in_a_thread": (
            "import os, threading\nthreading.Timer(0.05, os._exit, [0]).start()\n"
            "def f(x):\n    while True: pass",
            _ONE,
            {"expected": CRASHED},
        ),
        "equal_to_everything": (_ANY + "def f(x): return Equal()", _ONE),
        "equal_to_everything_as_int": (_EQUAL + "def f(x): return Equal(5)", _ONE),
        "class_in_place_of_the_function": (_ANY + "f = Equal", _ONE),
        "class_named_as_the_function": (
            _ANY + "class f(Equal):\n    def __init__(self, x): pass",
            _ONE,
        ),
        "equal_inside_a_list": (_ANY + "def f(x): return [Equal()]", ("assert f(3) == [9]",)),
        "close_to_everything": (
            _ANY + "def f(x): return Equal()",
            ("assert abs(f(3) - 9.5) < 1e-6",),
        ),
        "close_by_math": (
            _ANY + "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return Equal()",
            ("assert math.isclose(f(3), 9.5)",),
            {"setup": "import math"},
        ),
        "contains_everything": (_ANY + "def f(x): return Equal()", ("assert 9 in f(3)",)),
        "member_of_everything": (_ANY + "def f(x): return Equal()", ("assert f(3) in (9, 10)",)),
        "less_than_everything": (_ANY + "def f(x): return Equal()", ("assert f(3) < -9",)),
        "equal_as_float": (
            _ANY.replace("class Equal", "class Equal(float)") + "def f(x): return Equal(1)",
            ("assert round(f(3), 2) == 9.5",),
        ),
        "equal_by_hash": (_ANY + "def f(x): return {Equal()}", ("assert f(3) == {9}",)),
        "metaclass": (
            "class Meta(type):\n    def __eq__(self, other): return True\n"
            "    def __instancecheck__(self, other): return True\n    __hash__ = None\n"
            "class f(metaclass=Meta):\n    def __new__(cls, x): return cls",
            _ONE,
        ),
        "patched_builtins": (
            "import builtins\n"
            "for name in ('all', 'any', 'isinstance', 'len', 'abs', 'sorted', 'set', 'bool'):\n"
            "    setattr(builtins, name, lambda *a, **k: True)\n"
            "builtins.AssertionError = type('Quiet', (BaseException,), {})\n"
            "def f(x): return 0",
            ("assert all(v == 9 for v in [f(3)]) and len(str(f(3))) == 7",),
        ),
        "own_abs": ("def abs(x): return 0\ndef f(x): return 1", ("assert abs(f(3) - 9) < 1",)),
        "own_isclose_module": (
            "import types\nmath = types.SimpleNamespace(isclose=lambda *a: True)\ndef f(x): return 1",
            ("assert math.isclose(f(3), 9)",),
            {"setup": "import math"},
        ),
        "patched_sys_modules": (
            "import sys, types\n"
            "sys.modules['math'] = types.SimpleNamespace(isclose=lambda *a, **k: True)\n"
            "def f(x): return 1",
            ("assert math.isclose(f(3), 9)",),
            {"setup": "import math"},
        ),
        "patched_exec_and_compile": (
            "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\n"
            "def f(x): return 0",
            _ONE,
        ),
        "frames": (
            "import sys\n"
            "def f(x):\n"
            "    found, frame = [], sys._getframe()\n"
            "    while frame:\n"
            "        found += [v for v in (*frame.f_locals.values(), *frame.f_globals.values())]\n"
            "        frame = frame.f_back\n"
            "    text = repr(found)\n"
            "    return 'seen' if '5077' + '23' in text or 'assert ' + 'f(' in text else 'not seen'",
            ("assert f(3) == 507723 or f(3) == 'seen'",),
        ),
        "garbage_collector": (
            "import gc\n"
            "def f(x):\n"
            "    text = repr([o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))])\n"
            "    return 'seen' if '5077' + '23' in text or 'assert ' + 'f(' in text else 'not seen'",
            ("assert f(3) == 507723 or f(3) == 'seen'",),
        ),
        "own_memory": (
            "import ctypes\n"
            "def f(x):\n"
            "    base, size = ctypes.addressof(ctypes.c_char_p.in_dll(ctypes.pythonapi, 'environ')), 1\n"
            "    at, data = id(object()) & ~0xfff, b''\n"
            "    for page in range(-200, 200):\n"
            "        try:\n"
            "            fd = __import__('os').pipe()\n"
            "            __import__('os').write(fd[1], (ctypes.c_char * 4096).from_address(at + page * 4096))\n"
            "            data += __import__('os').read(fd[0], 4096)\n"
            "            [__import__('os').close(d) for d in fd]\n"
            "        except OSError: pass\n"
            "    return 'seen' if b'5077' + b'23' in data else 'not seen'",
            ("assert f(3) == 507723 or f(3) == 'seen'",),
        ),
        "success_markers": (
            "import sys\n"
            "for text in ('passed', 'OK', '{\"status\": \"passed\"}', 'ready'):\n"
            "    print(text); print(text, file=sys.stderr)\n"
            "def f(x): print('passed'); return 0",
            _ONE,
        ),
        "atexit": (
            "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise ValueError('passed')",
            _ONE,
        ),
        "descriptor_spraying": (
            "import os\n"
            "def f(x):\n"
            "    for fd in range(3, 256):\n"
            "        for text in (b'passed\\n', b'{\"status\": \"passed\"}', b'\\0' * 64):\n"
            "            try: os.write(fd, text)\n            except OSError: pass\n"
            "    return 0",
            _ONE,
        ),
        "well_formed_spraying": (
            "import os\nfrom eval.sandbox.wire import Encoder\n"
            "def spray(message):\n"
            "    data = Encoder().encode(message)\n"
            "    for fd in range(3, 256):\n"
            "        try: os.write(fd, len(data).to_bytes(4, 'little') + data)\n"
            "        except OSError: pass\n"
            "for message in (('passed', '', False), ('ready',), ('value', True, ()), ('ready',)):\n"
            "    spray(message)\n"
            "def f(x): return 0",
            _ONE,
        ),
        "patched_reply": (
            "import sys\n"
            "wire = sys.modules.get('eval.sandbox.wire')\n"
            "wire.Encoder.encode = lambda self, value: b'(\\x01\\0\\0\\0s\\x06\\0\\0\\0passed'\n"
            "def f(x): return 0",
            _ONE,
        ),
        "changes_the_argument_to_match": (
            "def f(xs):\n    xs.clear()\n    return xs",
            ("assert f([3, 1]) == [1, 3]",),
        ),
        "reads_the_setup": (
            "def f(x):\n    import __main__, sys\n"
            "    for module in list(sys.modules.values()):\n"
            "        if hasattr(module, 'EXPECTED_HERE'): return module.EXPECTED_HERE\n"
            "    return 0",
            ("assert f(3) == EXPECTED_HERE",),
            {"setup": "EXPECTED_HERE = 507723"},
        ),
        "no_such_function": ("def g(x): return 9", _ONE),
        "one_test_of_two": ("def f(x): return 9", ("assert f(3) == 9", "assert f(4) == 16")),
        "assert_in_the_program": ("def f(x): assert x == 9", _ONE),
        "raises_assertion_quietly": (
            "def f(x):\n    import sys\n    sys.excepthook = lambda *a: None\n    raise AssertionError",
            _ONE,
        ),
        "tracing_the_caller": (
            "import sys\n"
            "def f(x):\n"
            "    def trace(frame, event, arg): return trace\n"
            "    sys.settrace(trace)\n    sys._getframe(1).f_trace = trace\n    return 0",
            _ONE,
        ),
        "references_to_nothing": (
            "import sys\n"
            "service = sys.modules['eval.sandbox.candidate']._Service\n"
            "service._refer = lambda self, value: ('name', 'AssertionError')\n"
            "def f(x): return object()",
            _ONE,
        ),
    },
)
