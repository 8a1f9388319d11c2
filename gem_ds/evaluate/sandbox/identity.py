"""Who candidates are at the levels that have no room of ours: root lends them a number of its own.

A candidate of root's must not be root, whom the kernel neither counts nor refuses. Another user may
not reach an interpreter under root's home, though; so the way to it is opened first, in a mount
namespace of the server's that nobody else sees.
"""

from __future__ import annotations

import os

from gem_ds.evaluate.sandbox import kernel

_FIRST = 1_000_000_000  # far from the numbers that systems and containers give out
_OPEN_TREE, _MOVE_MOUNT = 428, 429
_CLONE_RECURSIVE = 0x8000 | 1
_FROM_DESCRIPTOR = 4
_HERE = -100


def lend(paths: list[str]) -> tuple[int | None, int | None]:
    """The identities that candidate and judge are to take, who can then read `paths`.

    Returns:
        Two numbers that no other process has, or none for a server that is not root's.

    Raises:
        OSError: There is none to lend, or the paths cannot be opened to it.
    """
    if os.geteuid() != 0:
        return None, None
    hidden = [path for path in paths if _closed_folder(path)]
    if hidden:
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
        _open_way(hidden)
    number = _FIRST + 2 * os.getpid()
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
    trees = {
        path: kernel.syscall(_OPEN_TREE, _HERE, path.encode(), _CLONE_RECURSIVE) for path in paths
    }
    are_folders = [os.path.isdir(path) for path in paths]
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    for (path, tree), is_folder in zip(trees.items(), are_folders, strict=True):
        while closed := _closed_folder(path):
            kernel.mount("tmpfs", closed, "tmpfs", flags, "mode=755,size=1m")
        make_target(path, is_folder=is_folder)
        kernel.syscall(_MOVE_MOUNT, tree, b"", _HERE, path.encode(), _FROM_DESCRIPTOR)
        os.close(tree)


def make_target(path: str, *, is_folder: bool) -> None:
    """Makes an empty folder or file to mount on, where there is none."""
    if is_folder:
        os.makedirs(path, 0o755, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
