"""The room in which a worker's candidates run: namespaces of their own, and next to no files.

Each worker's server makes itself a `Room` and lives in it from then on:

    user     the server has every capability here, and none outside
    pid      the server is its first process: when it ends, all within is killed
    mount    a read-only root: the interpreter, the system's libraries, five devices
    network  no interface but the loopback one, and that is down
    ipc, uts of its own

For each candidate it enters a cell, a further pid, mount and ipc namespace in which /tmp and
/dev/shm are empty and of limited size, starts a judge in it and leaves it.

A candidate of root's must not be root, whom the kernel neither counts nor refuses, so root lends it
another identity: in the room an unprivileged one of the room's own, at the levels that have no room
of ours a number that nobody else has (`lend`). The interpreter may lie under root's own home: the
way to it is built anew in the room, open to all, or opened in a mount namespace of the server's. An
ordinary user's candidate has his identity, in a room that holds nothing of his.
"""

from __future__ import annotations

import os
import signal
import sys

from gem_ds.evaluate.sandbox import kernel
from gem_ds.evaluate.sandbox.kernel import ProcessTable, fork

SCRATCH = ("/tmp", "/dev/shm")  # all that a candidate may write to
SCRATCH_MB = 64  # in each of them
CODE = "/sandbox"  # the room's folder with the package `gem_ds.evaluate.sandbox`
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_OF_A_CELL = {"pid": kernel.CLONE_NEWPID, "mnt": kernel.CLONE_NEWNS, "ipc": kernel.CLONE_NEWIPC}
_OF_A_ROOM = sum(_OF_A_CELL.values()) | (
    kernel.CLONE_NEWUSER | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS
)
_LENT = 65534  # the number, outside, of the identity that root lends in a room
_FIRST_LENT = 1_000_000_000  # and without one: far from what systems and containers give out
_STAGE = "/proc"  # where the room is built: there on every system, and no library lies in it
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
_FILES = ("/etc/ld.so.cache", "/etc/localtime")
_NO_DEVICES = kernel.MS_NOSUID | kernel.MS_NODEV


class Room:
    """A room, and what its server keeps of the way into it; no child may keep any of that."""

    def __init__(self) -> None:
        """Moves the calling process into a new room, as a child of itself that this returns in.

        The calling process waits for it and then ends too. Raises `OSError` where the kernel, or
        what confines this process already, does not allow it.
        """
        uid, gid = os.geteuid(), os.getegid()
        #: user and group for candidates to take, or None if there is only the present one
        self.identity = 1 if uid == 0 else None
        if uid == 0:
            _unshare_with_lent_identity()
        else:
            kernel.unshare(_OF_A_ROOM)
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
        kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        _become_child()
        self.processes = ProcessTable()  # as they are seen outside
        self._namespaces = {
            kind: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name, kind in _OF_A_CELL.items()
        }
        _build()
        kernel.pivot_root(_STAGE)
        kernel.restrict_mount("/", kernel.MOUNT_ATTR_RDONLY, recursive=False)

    def enter_cell(self) -> None:
        """Moves the caller into a new cell, whose first process will be the caller's next child."""
        kernel.unshare(sum(_OF_A_CELL.values()))
        options = f"size={SCRATCH_MB}m,nr_inodes=16384,mode=1777"
        for folder in SCRATCH:
            kernel.mount("tmpfs", folder, "tmpfs", _NO_DEVICES, options)

    def leave_cell(self) -> None:
        """Moves the caller back; the cell lasts as long as its first process."""
        for kind, namespace in self._namespaces.items():
            kernel.setns(namespace, kind)


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
        kernel.unshare(_OF_A_ROOM)
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
    folder = os.path.abspath(__file__)
    for _ in __name__.split("."):
        folder = os.path.dirname(folder)
    return folder


def interpreter() -> str:
    """The program file of this Python, without the virtual environment around it."""
    return os.path.realpath(sys.executable)


def sources() -> dict[str, str]:
    """What a room shows, and where: an interpreter, libraries, the candidate's side of us."""
    paths = [*_library_folders(), *filter(os.path.exists, (*_FILES, interpreter()))]
    package = os.path.join("gem_ds", "evaluate", "sandbox")
    return {path: path for path in paths} | {
        os.path.join(code_folder(), package): os.path.join(CODE, package)
    }


def _library_folders() -> list[str]:
    """What an interpreter needs to start and to import the standard library."""
    folders = [folder for folder in _LIBRARIES if os.path.isdir(folder)]
    known = set(map(os.path.realpath, folders))
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        own = [os.path.join(prefix, name) for name in ("lib", "lib64")]
        folders += [f for f in own if os.path.isdir(f) and os.path.realpath(f) not in known]
    return folders


def _build() -> None:
    """Mounts the room's root at the stage and fills it."""
    kernel.mount("tmpfs", _STAGE, "tmpfs", kernel.MS_NOSUID, "size=1m,nr_inodes=4096,mode=755")
    protect = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
    for source, target in sources().items():
        if os.path.islink(source) and os.path.isdir(source):
            _make_target(_STAGE + os.path.dirname(target), is_folder=True)
            os.symlink(os.readlink(source), _STAGE + target)
        else:
            _bind(source, _STAGE + target, protect | kernel.MOUNT_ATTR_NODEV)
    for device in DEVICES:
        _bind(device, _STAGE + device, protect)
    for folder in SCRATCH:
        _make_target(_STAGE + folder, is_folder=True)


def _bind(source: str, target: str, attributes: int) -> None:
    _make_target(target, is_folder=os.path.isdir(source))
    kernel.mount(source, target, flags=kernel.MS_BIND | kernel.MS_REC)
    kernel.restrict_mount(target, attributes, recursive=True)


def _make_target(path: str, *, is_folder: bool) -> None:
    """Makes an empty folder or file to mount on, where there is none."""
    if is_folder:
        os.makedirs(path, 0o755, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


# Without a room


def lend(paths: list[str]) -> tuple[int | None, int | None]:
    """The identities that candidate and judge are to take, who can then read `paths`.

    Two numbers that no other process has, or none for a server that is not root's. Raises `OSError`
    if there is none to lend, or the paths cannot be opened to it.
    """
    if os.geteuid() != 0:
        return None, None
    hidden = [path for path in paths if _closed_folder(path)]
    if hidden:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        _open_way(hidden)
    number = _FIRST_LENT + 2 * os.getpid()
    return number, number + 1


def _closed_folder(path: str) -> str | None:
    """The first folder on the way to `path` that is not open to all."""
    parts = path.split("/")
    for length in range(2, len(parts)):
        folder = "/".join(parts[:length])
        if os.path.isdir(folder) and not os.stat(folder).st_mode & 0o001:
            return folder
    return None


def _open_way(paths: list[str]) -> None:
    """Covers each closed folder with an empty one that leads to the paths only."""
    trees = [(path, os.path.isdir(path), kernel.open_tree(path)) for path in paths]
    for path, is_folder, tree in trees:
        while closed := _closed_folder(path):
            kernel.mount("tmpfs", closed, "tmpfs", _NO_DEVICES, "mode=755,size=1m")
        _make_target(path, is_folder=is_folder)
        kernel.move_mount(tree, path)
        os.close(tree)
