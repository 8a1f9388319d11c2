"""What a process gives up before it runs, or reads, anything that a candidate made.

    memory, processes, descriptors, sizes of files   `limit`, `limit_memory`, `keep_only`
    who it is, and all capabilities                   `drop_privileges`
    files and TCP, by Landlock                        `keep_files`
    system calls, by seccomp                          `SystemCallFilter`

That filter is a list of refusals: honest programs use most of the rest, and the namespaces hide
what it could act on. Refused are also memory that no limit counts (memfd, System V and POSIX
queues, larger socket buffers), every socket but a connected pair, and new namespaces, in which a
candidate would have all capabilities. What fails raises `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
from collections.abc import Iterable

from gem_ds.evaluate.sandbox import kernel

_MAX_PROCESSES = 128  # of candidates; threads count too
_LIMITS = {
    resource.RLIMIT_FSIZE: 32 << 20,
    resource.RLIMIT_NOFILE: 64,  # each may hold a buffer that nobody counts
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_MEMLOCK: 1 << 16,
}
_MOST_DESCRIPTORS = 1 << 20  # that a process may have at all (fs.nr_open)


def keep_only(descriptors: Iterable[int]) -> None:
    """Closes every descriptor from 3 on but these, those above a lowered limit too."""
    start = 3
    for descriptor in sorted(descriptors):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _MOST_DESCRIPTORS)


def limit(num_others: int = 0) -> None:
    """Limits the calling process in what its descendants shall not have and it does not need.

    `num_others` are threads of the same user that the kernel counts with the candidates' processes.
    """
    for kind, most in (*_LIMITS.items(), (resource.RLIMIT_NPROC, num_others + _MAX_PROCESSES)):
        _limit(kind, most)
    kernel.drop_bounding_set()


def limit_memory(memory_mb: int) -> None:
    """Bounds the address space of the calling process and of each that it starts."""
    _limit(resource.RLIMIT_AS, memory_mb << 20)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(kind, (most, most))


def drop_privileges(identity: int | None) -> None:
    """Gives up all capabilities, for good; from here on the process dies with its parent.

    It becomes user and group `identity`, if there is one: an ordinary user has none to spare.
    """
    if identity is not None:
        os.setgroups([])
        os.setresgid(identity, identity, identity)
        os.setresuid(identity, identity, identity)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


# Landlock, which takes no privilege at all

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_FOLDER = 1, 2, 4, 8
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | 1 << 14  # what a rule on a file may grant
_READ_ONLY = _EXECUTE | _READ_FILE | _READ_FOLDER
_ALL_FILES = {3: (1 << 15) - 1, 5: (1 << 16) - 1}  # by version; 3 is the first to refuse truncating
_ALL_TCP, _ALL_SCOPES = 3, 3  # bind and connect; signals and abstract sockets of others


def landlock_version() -> int:
    """The kernel's Landlock version, if it has one that is of use."""
    found = kernel.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if found < min(_ALL_FILES):
        raise OSError(errno.ENOSYS, f"this kernel has Landlock {found}, and 3 is the least")
    return found


def keep_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves a process that has given up new privileges these paths and no TCP, for good."""
    version = landlock_version()
    files = _ALL_FILES[max(v for v in _ALL_FILES if v <= version)]
    refused = [files, *[_ALL_TCP] * (version >= 4), *[_ALL_SCOPES] * (version >= 6)]
    attr = struct.pack(f"={len(refused)}Q", *refused)
    ruleset = kernel.syscall(_CREATE_RULESET, attr, ctypes.c_size_t(len(attr)), 0)
    for paths, allowed in ((readable, _READ_ONLY), (writable, files)):
        for path in paths:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = allowed if os.path.isdir(path) else allowed & _OF_FILES & files
            rule = struct.pack("=Qi", granted, folder)
            kernel.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
            os.close(folder)
    kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# seccomp

#: system calls with their numbers on x86-64 and arm64
_REFUSED = """
    acct                163  89    kexec_load          246 104    process_vm_readv    310 270
    add_key             248 217    keyctl              250 219    process_vm_writev   311 271
    adjtimex            159 171    lookup_dcookie      212  18    ptrace              101 117
    bpf                 321 280    memfd_create        319 279    quotactl            179  60
    chroot              161  51    memfd_secret        447 447    quotactl_fd         443 443
    clock_adjtime       305 266    migrate_pages       256 238    reboot              169 142
    clock_settime       227 112    modify_ldt          154   -    request_key         249 218
    delete_module       176 106    mount               165  40    semget               64 190
    fanotify_init       300 262    mount_setattr       442 442    setdomainname       171 162
    finit_module        313 273    move_mount          429 429    sethostname         170 161
    fsconfig            431 431    move_pages          279 239    setns               308 268
    fsmount             432 432    mq_open             240 180    setsockopt           54 208
    fsopen              430 430    msgget               68 186    settimeofday        164 170
    fspick              433 433    name_to_handle_at   303 264    shmget               29 194
    init_module         175 105    open_by_handle_at   304 265    socket               41 198
    io_uring_enter      426 426    open_tree           428 428    swapoff             168 225
    io_uring_register   427 427    perf_event_open     298 241    swapon              167 224
    io_uring_setup      425 425    personality         135  92    syslog              103 116
    ioperm              173   -    pidfd_getfd         438 438    umount2             166  39
    iopl                172   -    pivot_root          155  41    unshare             272  97
    kcmp                312 272    process_madvise     440 440    userfaultfd         323 282
    kexec_file_load     320 294    process_mrelease    448 448    vhangup             153  58
"""
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_COLUMN = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW flag of clone

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; the low half comes first
_Rule = tuple[int, int, int, int]  # struct sock_filter: operation, jump if true, if false, operand
_KILL, _ERROR = 0x80000000, 0x00050000
_ALLOW: _Rule = (_RETURN, 0, 0, 0x7FFF0000)
_REFUSE: _Rule = (_RETURN, 0, 0, _ERROR | errno.EPERM)
_FILTER_MODE = 2
_X32 = 0x40000000  # the other numbering that an x86-64 kernel takes


class SystemCallFilter:
    """A seccomp filter, made once and then applied in any number of forks."""

    def __init__(self) -> None:
        self._rules = _rules()
        self._program = _Program(len(self._rules) // 8, self._rules)

    def install(self) -> None:
        """Applies it, for good, to a process that has given up new privileges and all it starts."""
        kernel.prctl(kernel.PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(self._program))

    def as_file(self) -> int:
        """A new open file in memory that holds the rules."""
        file = os.memfd_create("seccomp")
        os.pwrite(file, self._rules, 0)
        return file


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]


def _rules() -> bytes:
    """The filter as an array of struct sock_filter."""
    machine = kernel.MACHINE
    if machine not in _COLUMN:
        raise OSError(errno.ENOSYS, f"no seccomp filter is known for {machine}")
    column = _COLUMN[machine]
    refused = _REFUSED.split()[1 + column :: 3]
    answers = {int(number): [_REFUSE] for number in refused if number != "-"}
    answers[_CLONE3[column]] = [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)]  # libc then calls clone
    answers[_CLONE[column]] = [
        (_LOAD, 0, 0, _ARGUMENT_AT),
        (_IF_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        _REFUSE,
        _ALLOW,
    ]
    answers[_PRLIMIT[column]] = [
        (_LOAD, 0, 0, _ARGUMENT_AT),
        (_IF_EQUAL, 1, 0, 0),  # of the process itself
        _REFUSE,
        _ALLOW,
    ]
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_IF_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_IF_AT_LEAST, 0, 1, _X32),
        _REFUSE,
        *_search(sorted(answers.items())),
    ]
    return b"".join(struct.pack("=HBBI", *rule) for rule in program)


def _search(answers: list[tuple[int, list[_Rule]]]) -> list[_Rule]:
    """The rules for system calls in the order of their numbers, all others being allowed.

    They halve the list, because the kernel tries out every system call when a filter is installed.
    """
    if len(answers) == 1:
        ((number, answer),) = answers
        return [(_IF_EQUAL, 0, len(answer), number), *answer, _ALLOW]
    middle = len(answers) // 2
    low = _search(answers[:middle])
    return [(_IF_AT_LEAST, len(low), 0, answers[middle][0]), *low, *_search(answers[middle:])]
