"""Programs that try to get out, to stay, or to take all there is; see `tests.sandbox_programs`."""

from __future__ import annotations

from tests.sandbox_programs import CRASHED, FAILED, PASSED, TIMEOUT, Case, _cases

_HELD = ("assert f() == 'held'",)
#: `attempt` ends well where every one of its calls is refused
_ATTEMPT = """
def attempt(*calls):
    for call in calls:
        try:
            found = call()
        except (OSError, ImportError):
            continue
        return repr(found)
    return 'held'
"""

ESCAPES = _cases(
    "escape",
    PASSED,
    {
        "deletes_outside": (
            "import os, shutil\n" + _ATTEMPT + "def f():\n"
            "    shutil.rmtree(os.path.dirname('@canary@'), ignore_errors=True)\n"
            "    shutil.rmtree('/usr', ignore_errors=True)\n"
            "    return attempt(lambda: os.remove('@canary@'), lambda: os.rmdir('/usr/lib'))",
            _HELD,
        ),
        "writes_outside": (
            _ATTEMPT + "def f(): return attempt(*[(lambda p=p: open(p, 'w')) for p in "
            "('@canary@', '/escaped', '/usr/escaped', '/sandbox/eval/sandbox/judge.py', '/dev/escaped')])",
            _HELD,
        ),
        "changes_the_library": (
            "import json.decoder\n"
            + _ATTEMPT
            + "def f(): return attempt(lambda: open(json.decoder.__file__, 'a'))",
            _HELD,
        ),
        "reads_outside": (
            "import os\n"
            + _ATTEMPT
            + "def f(): return attempt(*[(lambda p=p: open(p).read()) for p in "
            "('@canary@', '/etc/passwd', '/etc/shadow', '/proc/self/environ', '/root/.bashrc')], "
            "*[(lambda p=p: os.listdir(p)) for p in ('/proc', '/sys', '/home', '/etc/ssl')])",
            _HELD,
        ),
        "climbs_out_by_dots": (
            _ATTEMPT + "def f(): return attempt(lambda: open('../' * 20 + '@canary@').read())",
            _HELD,
        ),
        "environment_secrets": (
            "import os, ctypes\n"
            "def f():\n"
            "    environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), 'environ')\n"
            "    texts, i = [repr(os.environ)], 0\n"
            "    while environ and environ[i]:\n        texts.append(environ[i].decode()); i += 1\n"
            "    for pid in ('1', '2', 'self', '@parent@', os.getppid()):\n"
            "        try: texts.append(open(f'/proc/{pid}/environ').read())\n"
            "        except OSError: pass\n"
            "    return 'held' if 'SECRET' not in ' '.join(texts) else texts",
            _HELD,
        ),
        "other_solutions": (
            "import gc, os\n"
            "def f():\n"
            "    files = [os.path.join(a, c) for a, _, b in os.walk('/tmp') for c in b]\n"
            "    text = repr([o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))])\n"
            "    return 'held' if not files and 'other_' + 'solution' not in text else files or text",
            _HELD,
        ),
        "internet_socket": (
            "import socket\n" + _ATTEMPT + "def f(): return attempt("
            "lambda: socket.create_connection(('127.0.0.1', int('@listener@')), 1), "
            "lambda: socket.create_connection(('::1', int('@listener@')), 1), "
            "lambda: socket.create_connection(('1.1.1.1', 53), 1))",
            _HELD,
        ),
        "unix_socket": (
            "import socket\n" + _ATTEMPT + "def f():\n"
            "    def connect(name):\n"
            "        s = socket.socket(socket.AF_UNIX)\n        s.connect(name)\n        return s\n"
            "    return attempt(lambda: connect('\\0@marker@'), lambda: connect('@canary@.socket'))",
            _HELD,
        ),
        "exotic_sockets": (
            "import socket\n"
            + _ATTEMPT
            + "def f(): return attempt(*[(lambda k=k: socket.socket(k, "
            "socket.SOCK_RAW)) for k in (socket.AF_INET, socket.AF_PACKET, socket.AF_NETLINK)], "
            "lambda: socket.socket(socket.AF_VSOCK), lambda: socket.socket(socket.AF_ALG, 5))",
            _HELD,
        ),
        "double_fork": (
            "import os, time\n"
            "def f():\n"
            "    if os.fork() == 0:\n"
            "        os.setsid()\n"
            "        if os.fork() == 0:\n"
            "            os.environ['MARK'] = '@marker@'\n"
            "            time.sleep(60)\n"
            "        os._exit(0)\n"
            "    os.wait()\n    return 'held'",
            _HELD,
        ),
        "child_that_outlives_its_parent": (
            "import os, signal, time\n"
            "for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)\n"
            "def f():\n"
            "    if os.fork():\n        os._exit(0)\n"
            "    time.sleep(60)",
            _HELD,
            {"expected": CRASHED},
        ),
        "fork_storm": (
            "import os\n"
            "def f():\n"
            "    while True:\n"
            "        try: os.fork()\n        except OSError: pass",
            _HELD,
            {"expected": TIMEOUT + CRASHED, "timeout": 1.5},
        ),
        "counted_forks": (
            "import os, time\n"
            "def f():\n"
            "    for n in range(1000):\n"
            "        try:\n            if os.fork() == 0: time.sleep(60)\n"
            "        except OSError: return 'held'",
            _HELD,
        ),
        "thread_storm": (
            "import threading, time\n"
            "def f():\n"
            "    for n in range(1000):\n"
            "        try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
            "        except RuntimeError: return 'held'",
            _HELD,
        ),
        "memory_flood": (
            "def f(): return len([bytes(1 << 20) for _ in range(1 << 20)])",
            _HELD,
            {"expected": CRASHED},
        ),
        "one_large_block": (
            "def f():\n    try: bytes(1 << 40)\n    except MemoryError: return 'held'",
            _HELD,
        ),
        "memory_flood_by_many": (
            "import os, time\n"
            "def f():\n"
            "    for _ in range(20): os.fork()  and None\n"
            "    data = b'x' * (100 << 20)\n    time.sleep(5)",
            _HELD,
            {"expected": CRASHED + TIMEOUT, "timeout": 3.0},
        ),
        "disk_flood": (
            "import os\n"
            "def f():\n"
            "    total, block = 0, bytes(1 << 20)\n"
            "    for folder in ('/tmp', '/dev/shm'):\n"
            "        try:\n"
            "            for n in range(64):\n"
            "                with open(f'{folder}/{n}', 'wb') as file:\n"
            "                    for _ in range(20): total += file.write(block)\n"
            "        except OSError: pass\n"
            "    return 'held' if total <= 160 << 20 else total",
            _HELD,
        ),
        "one_large_file": (
            "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            + _ATTEMPT
            + "def f(): return attempt(lambda: open('a', 'wb').truncate(1 << 40))",
            _HELD,
        ),
        "many_files": (
            "def f():\n"
            "    try:\n        for n in range(10 ** 5): open(str(n), 'w').close()\n"
            "    except OSError: return 'held'",
            _HELD,
        ),
        "shared_memory": (
            "import ctypes, os\n" + _ATTEMPT + "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def check(result):\n    if result < 0: raise OSError(ctypes.get_errno(), '')\n    return result\n"
            "def f(): return attempt(lambda: check(libc.shmget(0, 1 << 20, 0o1600)), "
            "lambda: check(libc.msgget(0, 0o1600)), lambda: os.memfd_create('x'))",
            _HELD,
        ),
        "leftover_in_shm": (
            "from multiprocessing import shared_memory\n"
            "def f():\n    shared_memory.SharedMemory('@marker@', True, 1 << 20)\n    return 'held'",
            _HELD,
        ),
        "output_flood": (
            "import os\n"
            "def f():\n    for fd in (1, 2):\n        for _ in range(500): os.write(fd, bytes(1 << 20))\n"
            "    return 'held'",
            _HELD,
        ),
        "kills_the_parent": (
            "import os, signal\n"
            + _ATTEMPT
            + "def f(): return attempt(*[(lambda p=p: os.kill(p, 9)) "
            "for p in (int('@parent@'), int('@parent@') + 1)], lambda: os.kill(1, 9) and None or 1 / 0)",
            ("try:\n    assert f() == 'held'\nexcept ZeroDivisionError: pass",),
        ),
        "kills_all_it_can": (
            "import os\ndef f():\n    os.kill(-1, 9)\n    return 'held'",
            ("assert f() in ('held', None)",),
            {"expected": PASSED + CRASHED},
        ),
        "kills_its_group_and_parent": (
            "import os\ndef f():\n    try: os.kill(os.getppid(), 15); os.killpg(0, 9)\n"
            "    except OSError: pass\n    return 'held'",
            _HELD,
            {"expected": PASSED + CRASHED},
        ),
        "traces_the_parent": (
            "import ctypes, os\n" + _ATTEMPT + "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def check(result):\n    if result < 0: raise OSError(ctypes.get_errno(), '')\n    return result\n"
            "def f():\n"
            "    buffer = ctypes.create_string_buffer(64)\n"
            "    vec = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)\n"
            "    return attempt(*[(lambda p=p: check(libc.ptrace(16, p, 0, 0))) "
            "for p in (1, os.getppid(), int('@parent@'))], "
            "lambda: check(libc.process_vm_readv(os.getppid(), vec, 1, vec, 1, 0)))",
            _HELD,
        ),
        "privileged_calls": (
            "import ctypes, os\n" + _ATTEMPT + "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def check(result):\n    if result < 0: raise OSError(ctypes.get_errno(), '')\n    return result\n"
            "def f(): return attempt("
            "lambda: check(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)), "
            "lambda: check(libc.umount2(b'/tmp', 2)), "
            "lambda: check(libc.unshare(0x10000000)), lambda: check(libc.unshare(0x20000)), "
            "lambda: check(libc.chroot(b'/tmp')), lambda: check(libc.sethostname(b'x', 1)), "
            "lambda: check(libc.syscall(425, 8, None)), lambda: check(libc.syscall(321, 0, 0, 0)), "
            "lambda: check(libc.syscall(250, 0, -3, 0)), "
            "lambda: os.setuid(0) or os.getuid() or 1 / 0, lambda: os.nice(-5))",
            ("try:\n    assert f() == 'held'\nexcept ZeroDivisionError: pass",),
        ),
        "new_user_namespace_by_clone": (
            "import ctypes, signal\n"
            "def f():\n"
            "    libc = ctypes.CDLL(None, use_errno=True)\n"
            "    for flags in (0x10000000, 0x20000000, 0x20000):\n"
            "        pid = libc.syscall(56, flags | signal.SIGCHLD, 0, 0, 0, 0)\n"
            "        if pid == 0: libc._exit(0)\n"
            "        if pid > 0: return flags\n"
            "    return 'held'",
            _HELD,
        ),
        "symlinks": (
            "import os\n" + _ATTEMPT + "def f():\n"
            "    os.symlink('@canary@', 'link'); os.symlink('/', 'root')\n"
            "    return attempt(lambda: open('link').read(), lambda: open('link', 'w'), "
            "lambda: open('root/../../@canary@').read(), lambda: os.chmod('link', 0))",
            _HELD,
        ),
        "inherited_descriptors": (
            "import os\n"
            "def f():\n"
            "    found = []\n"
            "    for fd in range(256):\n"
            "        try: kind = os.fstat(fd)\n        except OSError: continue\n"
            "        found.append((fd, kind.st_mode & 0o170000))\n"
            "    sockets = [fd for fd, mode in found if mode == 0o140000]\n"
            "    rest = [(fd, mode) for fd, mode in found if fd > 2 and fd not in sockets]\n"
            "    return 'held' if len(sockets) == 1 and not rest else found",
            _HELD,
        ),
        "standard_input": (
            "import sys\ndef f():\n    assert sys.stdin.read() == ''\n"
            "    try: input()\n    except EOFError: return 'held'",
            _HELD,
        ),
        "executes_programs": (
            "import os, subprocess\n" + _ATTEMPT + "def f(): return attempt("
            "lambda: subprocess.run(['/bin/sh', '-c', 'echo']), lambda: os.execv('/bin/ls', ['ls']))",
            _HELD,
        ),
        "raises_its_limits": (
            "import resource\n"
            "def f():\n"
            "    for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, "
            "resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):\n"
            "        _, hard = resource.getrlimit(kind)\n"
            "        try: resource.setrlimit(kind, (hard + 1, hard + 1))\n"
            "        except (ValueError, OSError): continue\n"
            "        return kind\n"
            "    return 'held'",
            _HELD,
        ),
        "limits_of_others": (
            "import os, resource\n"
            + _ATTEMPT
            + "def f(): return attempt(*[(lambda p=p: resource.prlimit("
            "p, resource.RLIMIT_CPU, (0, 0))) for p in (1, os.getppid() or 1)])",
            _HELD,
        ),
        "device_nodes": (
            "import os, stat\n" + _ATTEMPT + "def f(): return attempt("
            "lambda: os.mknod('d', 0o600 | stat.S_IFBLK, os.makedev(8, 0)), lambda: open('/dev/vda'), "
            "lambda: open('/dev/mem'), lambda: open('/dev/tty'))",
            _HELD,
        ),
    },
)

TIME = _cases(
    "time",
    TIMEOUT,
    {
        "busy_loop": ("def f():\n    while True: pass", _HELD),
        "busy_loop_at_import": ("while True: pass", _HELD),
        "loop_in_c": ("def f(): return sum(iter(int, 1))", _HELD),
        "power_in_c": ("def f(): return pow(7 ** 10 ** 6, 7 ** 10 ** 5)", _HELD),
        "loop_in_c_that_blocks_signals": (
            "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
            "def f(): return any(iter(int, 1))",
            _HELD,
        ),
        "ignores_signals": (
            "import signal\n"
            "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n"
            "def f():\n    while True:\n        try:\n            while True: pass\n"
            "        except BaseException: pass",
            _HELD,
        ),
        "sleep": ("import time\ndef f(): time.sleep(100)", _HELD),
        "stops_itself": (
            "import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGSTOP)",
            _HELD,
        ),
        "regular_expression": (
            "import re\ndef f(): return re.match('(a+)+$', 'a' * 40 + 'b')",
            _HELD,
        ),
        "deadlock": (
            "import threading\ndef f():\n    lock = threading.Lock()\n    lock.acquire()\n    lock.acquire()",
            _HELD,
        ),
        "waits_for_a_thread": (
            "import threading, time\n"
            "def f():\n    t = threading.Thread(target=time.sleep, args=(100,))\n    t.start()\n    t.join()",
            _HELD,
        ),
        "thread_that_never_ends": (
            "import threading, time\n"
            "def f():\n    threading.Thread(target=time.sleep, args=(100,)).start()\n    return 'held'",
            _HELD,
        ),
        "endless_generator": (
            "def f():\n    while True: yield 1",
            ("assert list(f()) == 'held'",),
            {"expected": TIMEOUT + FAILED + CRASHED},
        ),
        "slow_equality_of_plain_data": (
            "def f():\n    x = []\n    for _ in range(60): x = [x, x]\n    return x",
            ("assert f() == f()",),
        ),
        "many_slow_calls": (
            "import time\ndef f():\n    time.sleep(0.1)\n    return 'held'",
            _HELD * 20,
        ),
        "waits_for_input_of_a_pipe": (
            "import os\ndef f(): return os.read(os.pipe()[0], 1)",
            _HELD,
        ),
    },
    timeout=0.7,
)

AWKWARD = _cases(
    "awkward",
    FAILED,
    {
        "syntax_error": ("def f(x) return x", _HELD),
        "indentation_error": ("def f():\nreturn 1", _HELD),
        "empty": ("", _HELD),
        "prose": ("Sure! Here is the function:\n\n```python\ndef f(): ...\n```", _HELD),
        "null_bytes": ("def f():\n    return '\0'\0", _HELD),
        "surrogates_in_the_source": ("def f(): return '\ud800'", _HELD),
        "surrogates_in_the_result": (
            "def f(): return '\\ud83d\\ude00'",
            ("assert f() == '\\ud83d\\ude00' != '\\U0001f600'",),
            {"expected": PASSED},
        ),
        "segmentation_fault": (
            "import ctypes\ndef f(): ctypes.string_at(0)",
            _HELD,
            {"expected": CRASHED},
        ),
        "abort": ("import os\ndef f(): os.abort()", _HELD, {"expected": CRASHED}),
        "kills_itself": (
            "import os\ndef f(): os.kill(os.getpid(), 9)",
            _HELD,
            {"expected": CRASHED},
        ),
        "terminates_itself": (
            "import os\ndef f(): os.kill(os.getpid(), 15)",
            _HELD,
            {"expected": CRASHED},
        ),
        "deep_recursion": ("def f(): return f()", _HELD),
        "deep_recursion_in_c": (
            "import sys\nsys.setrecursionlimit(10 ** 8)\n"
            "class A:\n    def __repr__(self): return repr(self)\n"
            "def f(): return repr(A())",
            _HELD,
            {"expected": CRASHED},
        ),
        "deeply_nested_source": ("x = " + "(" * 500 + "1" + ")" * 500, _HELD),
        "deeply_nested_result": (
            "def f():\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
            _HELD,
        ),
        "cyclic_result": (
            "def f():\n    x = [1]\n    x.append(x)\n    return x",
            ("r = f(); assert r[1] is r and r[0] == 1",),
            {"expected": PASSED},
        ),
        "too_large_a_result": ("def f(): return b'x' * (32 << 20)", _HELD),
        "exception_that_cannot_be_shown": (
            "class Odd(Exception):\n    def __str__(self): raise Odd\n"
            "    args = property(lambda self: 1 / 0)\n"
            "def f(): raise Odd",
            _HELD,
        ),
        "closes_all_descriptors": (
            "import os\ndef f():\n    os.closerange(0, 256)\n    return 'held'",
            _HELD,
            {"expected": CRASHED},
        ),
        "bare_except_around_all": (
            "def f():\n    while True:\n        try: raise KeyboardInterrupt\n        except: return 'no'",
            _HELD,
        ),
        "deletes_builtins": (
            "import builtins\n"
            "for name in list(vars(builtins)):\n"
            "    if name not in ('__build_class__', 'list', 'vars'): delattr(builtins, name)\n"
            "def f(): return 'no'",
            _HELD,
            {"expected": FAILED + CRASHED},
        ),
        "test_with_a_syntax_error": ("def f(): return 'held'", ("assert f( == 'held'",)),
        "test_that_names_nothing": ("def f(): return 'held'", ("assert g() == 'held'",)),
        "huge_exponent_in_a_test": (
            "def f(): return 1",
            ("assert f() == 10 ** 10 ** 9",),
            {"expected": TIMEOUT + FAILED, "timeout": 0.7},
        ),
        "non_utf8_locale_output": (
            "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')\ndef f(): return 'held'",
            _HELD,
            {"expected": PASSED},
        ),
    },
)

ALL: list[Case] = [*ESCAPES, *TIME, *AWKWARD]
