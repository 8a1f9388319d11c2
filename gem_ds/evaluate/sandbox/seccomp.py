"""The system calls that a candidate is refused: what reaches into the kernel or a neighbour.

A list of refusals, not of permissions: honest programs use most of the rest, and the namespaces
already hide what those calls could act on. Refused are also memory that no limit counts (memfd,
System V and POSIX queues, larger socket buffers), every socket but a connected pair, and new
namespaces, in which a candidate would have all capabilities.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from gem_ds.evaluate.sandbox import kernel

_COLUMN = {"x86_64": 0, "aarch64": 1}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {  # numbers on x86-64 and arm64
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setsockopt": (54, 208),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW flag of clone

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data; the low half comes first
_Rule = tuple[int, int, int, int]  # struct sock_filter: operation, jump if true, if false, operand
_KILL, _ERROR = 0x80000000, 0x00050000
_ALLOW: _Rule = (_RETURN, 0, 0, 0x7FFF0000)
_REFUSE: _Rule = (_RETURN, 0, 0, _ERROR | errno.EPERM)
_X32 = 0x40000000  # the other numbering that an x86-64 kernel takes


class Filter:
    """A filter, made once and then applied in any number of forks; raises `OSError`."""

    def __init__(self) -> None:
        self._rules = rules()
        self._program = _Program(len(self._rules) // 8, self._rules)
        self._pointer = ctypes.byref(self._program)

    def install(self) -> None:
        """Applies it to the calling process, for good, and to all that it starts.

        The process must have given up new privileges before.
        """
        filter_mode = 2
        kernel.prctl(kernel.PR_SET_SECCOMP, filter_mode, self._pointer)

    def as_file(self) -> int:
        """A new open file in memory that holds the rules."""
        file = os.memfd_create("seccomp")
        os.pwrite(file, self._rules, 0)
        return file


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_char_p)]


def rules() -> bytes:
    """The filter as an array of struct sock_filter.

    Raises:
        OSError: The processor's system calls are not listed here.
    """
    if kernel.MACHINE not in _COLUMN:
        raise OSError(errno.ENOSYS, f"no seccomp filter is known for {kernel.MACHINE}")
    column = _COLUMN[kernel.MACHINE]
    refused = (numbers[column] for numbers in _REFUSED.values())
    answers = {number: [_REFUSE] for number in refused if number is not None}
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
        (_IF_EQUAL, 1, 0, _AUDIT_ARCH[kernel.MACHINE]),
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
