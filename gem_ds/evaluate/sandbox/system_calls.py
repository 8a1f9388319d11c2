"""Which system calls a candidate may make, by seccomp.

A list of what honest programs need: all else is refused, also what a kernel of tomorrow adds. What
is not on it for a reason: sockets but a connected pair, and addresses to send to; memory that no
limit counts (memfd, System V and POSIX queues, larger socket buffers); mounts and new namespaces,
in which a candidate would have all capabilities; the priorities, limits and memory of other
processes; owners and attributes of files. Where files of the user are in sight
(`jails.LandlockJail`), their modes and times too, which go by name and are no matter of Landlock's.

What is refused raises `OSError`. Signals to others are the business of namespaces and Landlock.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence

from gem_ds.evaluate.sandbox import kernel

# With their numbers on x86-64 and arm64.
_ALLOWED = """
    access                  21   -  getrandom              318 278  rseq                   334 293
    alarm                   37   -  getresgid              120 150  rt_sigaction            13 134
    arch_prctl             158   -  getresuid              118 148  rt_sigpending          127 136
    brk                     12 214  getrlimit               97 163  rt_sigprocmask          14 135
    capget                 125  90  getrusage               98 165  rt_sigqueueinfo        129 138
    chdir                   80  49  getsid                 124 156  rt_sigreturn            15 139
    clock_getres           229 114  getsockname             51 204  rt_sigsuspend          130 133
    clock_gettime          228 113  getsockopt              55 209  rt_sigtimedwait        128 137
    clock_nanosleep        230 115  gettid                 186 178  rt_tgsigqueueinfo      297 240
    close                    3  57  gettimeofday            96 169  sched_get_priority_max 146 125
    close_range            436 436  getuid                 102 174  sched_get_priority_min 147 126
    copy_file_range        326 285  getxattr               191   8  sched_getaffinity      204 123
    creat                   85   -  kill                    62 129  sched_getparam         143 121
    dup                     32  23  lgetxattr              192   9  sched_getscheduler     145 120
    dup2                    33   -  link                    86   -  sched_rr_get_interval  148 127
    dup3                   292  24  linkat                 265  37  sched_yield             24 124
    epoll_create           213   -  listxattr              194  11  select                  23   -
    epoll_create1          291  20  llistxattr             195  12  sendfile                40  71
    epoll_ctl              233  21  lseek                    8  62  sendmmsg               307 269
    epoll_pwait            281  22  lstat                    6   -  sendmsg                 46 211
    epoll_pwait2           441 441  madvise                 28 233  sendto                  44 206
    epoll_wait             232   -  membarrier             324 283  set_robust_list        273  99
    eventfd                284   -  mincore                 27 232  set_tid_address        218  96
    eventfd2               290  19  mkdir                   83   -  setitimer               38 103
    execve                  59 221  mkdirat                258  34  setpgid                109 154
    execveat               322 281  mknod                  133   -  setrlimit              160 164
    exit                    60  93  mknodat                259  33  setsid                 112 157
    exit_group             231  94  mmap                     9 222  shutdown                48 210
    faccessat              269  48  mprotect                10 226  sigaltstack            131 132
    faccessat2             439 439  mremap                  25 216  signalfd               282   -
    fadvise64              221 223  msync                   26 227  signalfd4              289  74
    fallocate              285  47  munmap                  11 215  splice                 275  76
    fchdir                  81  50  nanosleep               35 101  stat                     4   -
    fdatasync               75  83  newfstatat             262  79  statfs                 137  43
    fgetxattr              193  10  open                     2   -  statx                  332 291
    flistxattr             196  13  openat                 257  56  symlink                 88   -
    flock                   73  32  openat2                437 437  symlinkat              266  36
    fork                    57   -  pause                   34   -  sysinfo                 99 179
    fstat                    5  80  pidfd_open             434 434  tee                    276  77
    fstatfs                138  44  pidfd_send_signal      424 424  tgkill                 234 131
    fsync                   74  82  pipe                    22   -  time                   201   -
    ftruncate               77  46  pipe2                  293  59  timer_create           222 107
    futex                  202  98  poll                     7   -  timer_delete           226 111
    futex_requeue          456 456  ppoll                  271  73  timer_getoverrun       225 109
    futex_wait             455 455  pread64                 17  67  timer_gettime          224 108
    futex_waitv            449 449  preadv                 295  69  timer_settime          223 110
    futex_wake             454 454  preadv2                327 286  timerfd_create         283  85
    get_robust_list        274 100  pselect6               270  72  timerfd_gettime        287  87
    getcpu                 309 168  pwrite64                18  68  timerfd_settime        286  86
    getcwd                  79  17  pwritev                296  70  times                  100 153
    getdents                78   -  pwritev2               328 287  tkill                  200 130
    getdents64             217  61  read                     0  63  truncate                76  45
    getegid                108 177  readlink                89   -  umask                   95 166
    geteuid                107 175  readlinkat             267  78  uname                   63 160
    getgid                 104 176  readv                   19  65  unlink                  87   -
    getgroups              115 158  recvfrom                45 207  unlinkat               263  35
    getitimer               36 102  recvmmsg               299 243  vfork                   58   -
    getpeername             52 205  recvmsg                 47 212  wait4                   61 260
    getpgid                121 155  rename                  82   -  waitid                 247  95
    getpgrp                111   -  renameat               264  38  write                    1  64
    getpid                  39 172  renameat2              316 276  writev                  20  66
    getppid                110 173  restart_syscall        219 128
    getpriority            140 141  rmdir                   84   -
"""
#: of modes and times of files
_ON_FILES = """
    chmod                   90   -  fchmodat2              452 452  utimensat              280  88
    fchmod                  91  52  futimesat              261   -  utimes                 235   -
    fchmodat               268  53  utime                  132   -
"""
_CONDITIONAL = """
    clone                   56 220  ioctl                   16  29  sched_setaffinity      203 122
    clone3                 435 435  prctl                  157 167  setpriority            141 140
    fcntl                   72  25  prlimit64              302 261  socketpair              53 199
"""
_COLUMN = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06
_IF_EQUAL, _IF_AT_LEAST = 0x15, 0x35
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data; the low half comes first
_Rule = tuple[int, int, int, int]  # struct sock_filter: operation, jump if true, if false, operand
_KILL, _ERROR = 0x80000000, 0x00050000
_ALLOW: _Rule = (_RETURN, 0, 0, 0x7FFF0000)
_REFUSE: _Rule = (_RETURN, 0, 0, _ERROR | errno.EPERM)
_UNKNOWN: _Rule = (_RETURN, 0, 0, _ERROR | errno.ENOSYS)  # so that libc takes another one
_FILTER_MODE = 2

_ALL_BITS = 0xFFFFFFFF
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW flag of clone
_SOCKET_FLAGS = 0o2004000  # SOCK_CLOEXEC, SOCK_NONBLOCK
_STREAMS = (1, 5)  # which take no address, unlike datagrams
_AF_UNIX = 1
#: F_DUPFD, F_[GS]ETFD, F_[GS]ETFL, locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ
_OF_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
#: TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX, TCGETS2
_OF_IOCTL = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)
#: PR_[GS]ET_PDEATHSIG, PR_GET_DUMPABLE, PR_[GS]ET_NAME, PR_GET_SECCOMP, PR_CAPBSET_READ,
#: PR_[GS]ET_CHILD_SUBREAPER, PR_[GS]ET_NO_NEW_PRIVS, PR_SET_VMA
_OF_PRCTL = (1, 2, 3, 15, 16, 21, 23, 36, 37, 38, 39, 0x53564D41)
#: by a system call: which arguments decide, which of their bits, and what these may be
_CONDITIONS: dict[str, tuple[tuple[int, int, Sequence[int]], ...]] = {
    "clone": ((0, _NEW_NAMESPACES, (0,)),),
    "fcntl": ((1, _ALL_BITS, _OF_FCNTL),),
    "ioctl": ((1, _ALL_BITS, _OF_IOCTL),),
    "prctl": ((0, _ALL_BITS, _OF_PRCTL),),
    "prlimit64": ((0, _ALL_BITS, (0,)),),  # of the process itself, as the next two
    "sched_setaffinity": ((0, _ALL_BITS, (0,)),),
    "setpriority": ((0, _ALL_BITS, (0,)), (1, _ALL_BITS, (0,))),
    "socketpair": ((0, _ALL_BITS, (_AF_UNIX,)), (1, _ALL_BITS ^ _SOCKET_FLAGS, _STREAMS)),
}


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]


def install(rules: bytes) -> None:
    """Applies `filter_rules`, for good, to a process that has given up new privileges."""
    program = _Program(len(rules) // 8, rules)
    kernel.prctl(kernel.PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program))


def numbers(table: str) -> dict[str, int]:
    """The system calls of a table of this file that this machine has, with their numbers."""
    if kernel.MACHINE not in _COLUMN:
        raise OSError(errno.ENOSYS, f"no seccomp filter is known for {kernel.MACHINE}")
    words = table.split()
    found = zip(words[::3], words[1 + _COLUMN[kernel.MACHINE] :: 3], strict=True)
    return {name: int(number) for name, number in found if number != "-"}


def filter_rules(*, hides_files: bool) -> bytes:
    """The filter as an array of struct sock_filter, for any number of forks.

    `hides_files` is whether no file of the user's is in sight of whom it is applied to.
    """
    allowed = numbers(_ALLOWED + (_ON_FILES if hides_files else "")).values()
    answers = {number: [_ALLOW] for number in allowed}
    for name, number in numbers(_CONDITIONAL).items():
        answers[number] = _when(_CONDITIONS[name]) if name in _CONDITIONS else [_UNKNOWN]
    last = max(answers)
    starts = [(n, answers.get(n, [_REFUSE])) for n in range(last + 1)] + [(last + 1, [_UNKNOWN])]
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, _AUDIT_ARCH[kernel.MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        *_search([s for i, s in enumerate(starts) if not i or s[1] != starts[i - 1][1]]),
    ]
    return b"".join(struct.pack("=HBBI", *rule) for rule in program)


def _when(conditions: Sequence[tuple[int, int, Sequence[int]]]) -> list[_Rule]:
    """Allows a system call whose arguments all are as they may be."""
    rules: list[_Rule] = []
    for argument, bits, values in conditions:
        rules += [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument), (_AND, 0, 0, bits)]
        rules += [(_IF_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        rules.append(_REFUSE)
    return [*rules, _ALLOW]


def _search(answers: list[tuple[int, list[_Rule]]]) -> list[_Rule]:
    """The rules for all numbers, where each answer counts up to the start of the next one.

    They halve the list, because the kernel tries out every system call when a filter is installed.
    """
    if len(answers) == 1:
        return answers[0][1]
    middle = len(answers) // 2
    low, high = _search(answers[:middle]), _search(answers[middle:])
    return [(_IF_AT_LEAST, 0, 1, answers[middle][0]), (_JUMP, 0, 0, len(low)), *low, *high]
