"""The room in which a worker's candidates run: namespaces of their own, and next to no files.

Each worker's server builds one and lives in it from then on:

    user     the server has every capability here, and none outside
    pid      the server is its first process: when it ends, all within is killed
    mount    a read-only root: the interpreter, the system's libraries, five devices
    network  no interface but the loopback one, and that is down
    ipc, uts of its own

For each candidate it enters a cell, a further pid, mount and ipc namespace in which /tmp and
/dev/shm are empty and of limited size, starts a judge in it and leaves it.

A candidate of root's must not be root, whom the kernel neither counts nor refuses: it gets an
unprivileged identity of the room's own. An ordinary user has one identity only, so the candidate
has it too, in a room that holds nothing of the user's. The way to an interpreter under root's own
home is built anew, open to all.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from gem_ds.evaluate.sandbox import candidate, confine, kernel, system_calls
from gem_ds.evaluate.sandbox.kernel import ProcessTable, fork

SCRATCH = ("/tmp", "/dev/shm")  # all that a candidate may write to
SCRATCH_MB = 64  # in each of them
CODE = "/sandbox"  # the room's folder with the package `gem_ds.evaluate.sandbox`
PACKAGES = "/packages"  # in front of the paths of others, which /tmp, for one, would cover
ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # an arena per thread would use up the address space
    "OMP_NUM_THREADS": "1",  # of numpy's library too; each takes of the address space
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the same sample gets the same verdict
}
NO_DEVICES = kernel.MS_NOSUID | kernel.MS_NODEV
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_OF_A_CELL = {"pid": kernel.CLONE_NEWPID, "mnt": kernel.CLONE_NEWNS, "ipc": kernel.CLONE_NEWIPC}
_OF_A_ROOM = sum(_OF_A_CELL.values()) | (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS
)
_LENT = 65534  # the number, outside, of the identity that root lends
_STAGE = "/proc"  # where the room is built: there on every system, and no library lies in it
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_FILES = ("/etc/ld.so.cache", "/etc/localtime")


class NamespaceJail:
    """The level of namespaces that we build ourselves.

    The judge is process 1 of the cell's pid namespace: when it ends, the kernel kills the rest. It
    is deaf to signals from within, and there is no /proc to see it by. It shares the candidate's
    identity, filter and files, but imports nothing from where the candidate may write.
    """

    def __init__(self, fresh: bool, packages: Sequence[str] = ()) -> None:
        """Moves the calling process into a new room, as a child of itself that this returns in.

        The calling process waits for it and then ends too. Raises `OSError` where the kernel, or
        what confines this process already, does not allow it.
        """
        self._fresh = fresh
        self.packages = places_of(packages)
        self._rules = system_calls.filter_rules(hides_files=True)
        uid, gid = os.geteuid(), os.getegid()
        self._identity = 1 if uid == 0 else None
        if uid == 0:
            _unshare_with_lent_identity()
        else:
            kernel.call("unshare", _OF_A_ROOM)
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
        kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        _become_child()
        self.processes = ProcessTable()
        self._namespaces = {  # to come back to from a cell; no child may keep any of these files
            kind: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name, kind in _OF_A_CELL.items()
        }
        _build(packages)
        kernel.pivot_root(_STAGE)
        kernel.restrict_mount("/", kernel.MOUNT_ATTR_RDONLY, recursive=False)
        sys.path[:] = [folder for folder in sys.path if not folder.startswith(SCRATCH)]
        confine.limit()

    def start_judge(self, judge: Callable[[], None]) -> int:
        """Runs `judge` in a new process of the returned number, the first one of a new cell."""
        kernel.call("unshare", sum(_OF_A_CELL.values()))
        options = f"size={SCRATCH_MB}m,nr_inodes=16384,mode=1777"
        for folder in SCRATCH:
            kernel.mount("tmpfs", folder, "tmpfs", NO_DEVICES, options)
        pid = fork(judge)
        for kind, namespace in self._namespaces.items():
            kernel.call("setns", namespace, kind)
        return pid

    def start_candidate(self, job: int, channel: int, memory_mb: int) -> int:
        """Confines the calling judge, which has read no test yet, and starts its candidate.

        Of the judge's open files the candidate keeps these two. Returns its process's number.
        """
        os.setpgid(0, 0)  # signals to one's own group would leave the pid namespace
        confine.drop_privileges(self._identity)
        system_calls.install(self._rules)
        return fork(lambda: self._become_candidate(job, channel, memory_mb))

    def clear(self) -> None:
        """Ends what is left when the judge's process has ended: the kernel has done it."""

    def _become_candidate(self, job: int, channel: int, memory_mb: int) -> None:
        confine.keep_only([job, channel])
        confine.limit_memory(memory_mb)
        os.chdir(SCRATCH[0])
        if self._fresh:
            become_fresh(job, channel, self.packages, ENVIRONMENT)
        candidate.main(job, channel)


def _unshare_with_lent_identity() -> None:
    """Unshares; a second process, which stays outside, then maps two identities into it."""
    asked, ask = os.pipe()
    server = os.getpid()

    def map_both() -> None:
        os.close(ask)
        if os.read(asked, 1):
            for name in ("uid_map", "gid_map"):
                _write(f"/proc/{server}/{name}", f"0 0 1\n1 {_LENT} 1")

    mapper = fork(map_both)
    try:
        kernel.call("unshare", _OF_A_ROOM)
        os.write(ask, b"!")
    finally:
        os.close(asked)
        os.close(ask)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise PermissionError("user numbers cannot be mapped into a namespace")


def _write(path: str, text: str) -> None:
    with open(path, "wb", buffering=0) as file:  # in one piece, as the kernel wants it
        file.write(text.encode())


def _become_child() -> None:
    """Forks, returns in the child, and makes the parent a shadow that ends when the child does."""
    child = os.fork()
    if child:
        os.closerange(0, 1 << 16)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)


# What a room shows


def code_folder() -> str:
    """The folder that holds the package `gem_ds`."""
    return os.path.abspath(f"{__file__}/../../../..")


def interpreter() -> str:
    """The program file of this Python, without the virtual environment around it."""
    return os.path.realpath(sys.executable)


def command(folder: str, module: str, function: str, *arguments: object) -> list[str]:
    """A fresh interpreter that calls a function of ours, found in `folder` and nothing else there.

    The folder may be that of all installed packages, from which programs are not to import.
    """
    source = f"import sys; sys.path.append({folder!r}); "
    source += f"from gem_ds.evaluate.sandbox.{module} import {function}; sys.path.pop(); "
    source += f"{function}(*{arguments})"
    return [interpreter(), "-s", "-S", "-P", "-c", source]


def become_fresh(
    job: int,
    channel: int,
    packages: Sequence[str],
    environment: dict[str, str],
    prefix: Iterable[str] = (),
) -> None:
    """Becomes a fresh interpreter in a room, started by another program if there is a prefix."""
    for descriptor in (job, channel):
        os.set_inheritable(descriptor, True)
    words = [*prefix, *command(CODE, "candidate", "main", job, channel, packages)]
    os.execve(words[0], words, environment)


def places_of(packages: Iterable[str]) -> tuple[str, ...]:
    """Where a room shows packages that lie at these paths."""
    return tuple(PACKAGES + path for path in packages)


def sources(packages: Sequence[str] = ()) -> dict[str, str]:
    """What a room shows, and where: an interpreter, libraries, packages, the candidate's side."""
    folders = [folder for folder in _LIBRARIES if os.path.isdir(folder)]
    known = set(map(os.path.realpath, folders))
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        own = [os.path.join(prefix, name) for name in ("lib", "lib64")]
        folders += [f for f in own if os.path.isdir(f) and os.path.realpath(f) not in known]
    paths = [*folders, *filter(os.path.exists, (*_FILES, interpreter()))]
    package = os.path.join("gem_ds", "evaluate", "sandbox")
    return {
        **{path: path for path in paths},
        **dict(zip(map(os.path.realpath, packages), places_of(packages), strict=True)),
        os.path.join(code_folder(), package): os.path.join(CODE, package),
    }


def _build(packages: Sequence[str]) -> None:
    """Mounts the room's root at the stage and fills it."""
    kernel.mount("tmpfs", _STAGE, "tmpfs", kernel.MS_NOSUID, "size=1m,nr_inodes=4096,mode=755")
    protect = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
    for source, target in sources(packages).items():
        if os.path.islink(source) and os.path.isdir(source):
            make_target(_STAGE + os.path.dirname(target), is_folder=True)
            os.symlink(os.readlink(source), _STAGE + target)
        else:
            _bind(source, _STAGE + target, protect | kernel.MOUNT_ATTR_NODEV)
    for device in DEVICES:
        _bind(device, _STAGE + device, protect)
    for folder in SCRATCH:
        make_target(_STAGE + folder, is_folder=True)


def _bind(source: str, target: str, attributes: int) -> None:
    make_target(target, is_folder=os.path.isdir(source))
    kernel.mount(source, target, flags=kernel.MS_BIND | kernel.MS_REC)
    kernel.restrict_mount(target, attributes, recursive=True)


def make_target(path: str, *, is_folder: bool) -> None:
    """Makes an empty folder or file to mount on, where there is none."""
    if is_folder:
        os.makedirs(path, 0o755, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
