"""Writing files that are whole or absent.

Everything goes to a temporary name in the same folder, is flushed to the disk and only then
renamed. Whatever interrupts a write, the real name holds either the earlier content or the new
one. A killed process may leave a temporary, ``.<name>.<8 digits>.tmp`` (`leftovers` finds it).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

_REMEDIES = {
    errno.ENOSPC: "free space on that disk or choose another folder",
    errno.EDQUOT: "free space in your quota or choose another folder",
    errno.ENOENT: "create its folder first",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOTDIR: "name a folder that is below no file",
}

#: What file systems without locks answer.
_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes one file, by `write(temporary path)`, so that `path` never holds a part of it.

    An OSError keeps its number and says what to do; the earlier file is whole, no temporary left.
    """
    path = Path(path)
    temporary = beside(path, "tmp")
    try:
        with explained(path):
            write(temporary)
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path, end: str) -> Path:
    """An unused hidden name beside `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{end}")


def leftovers(path: Path) -> list[Path]:
    """What killed writes of `path` left beside it, whole or not."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    return [entry for entry in path.parent.glob(".*") if name.fullmatch(entry.name)]


def try_lock(file: int | IO[bytes]) -> bool:
    """Locks an open file or folder until the last copy of its descriptor is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether a folder could be locked; if so it is while the block lasts, or this process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)  # which also unlocks


def make_folder(path: str | Path) -> None:
    """Makes a folder with its parents, and sees whether files can be written in it."""
    path = Path(path)
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{secrets.token_hex(4)}.tmp"
        probe.touch()
        probe.unlink()


def save_json(path: str | Path, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; raises as `atomic_write`."""
    save_text(path, json.dumps(obj, indent=2) + "\n")


def save_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Writes `rows` as JSON, one on a line, atomically; raises as `atomic_write`."""
    save_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def save_text(path: str | Path, text: str) -> None:
    """Writes a text in UTF-8, atomically; raises as `atomic_write`."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode()))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds to an OSError about `path` what the user can do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells the number
        number = error.errno if isinstance(error, OSError) else in_text and int(in_text[1])
        if number is None:
            raise
        remedy = _REMEDIES.get(number, "check the path and the disk")
        problem = f"{path} cannot be written ({os.strerror(number)})"
        raise OSError(number, f"{problem}: {remedy}; nothing was changed.") from error


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's names where it can do that, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network file systems flush no folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
