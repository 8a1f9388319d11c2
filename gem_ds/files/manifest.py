"""What of a folder is ours: a manifest in it lists the files that gem_ds has written there.

    .gem_ds.json    {"kind": "gem_manifest", "format_version": 1, "files": ["config.json", ...]}

Others write a `config.json` or a `checkpoint-3/` too, so only what a manifest lists is ever deleted
or replaced, and never through a link.

`atomic_folder` writes a folder that is whole or absent, with its manifest. Under its temporary
name, ``.<name>.<8 digits>.tmp``, all that is in it is ours (`"files": null`); a killed process
leaves it there, and `clear_leftovers` deletes it. An earlier folder is exchanged for the new one in
one step where the system can do that; elsewhere it has for a moment a name that ends with ``.old``,
from which `clear_leftovers` brings it back.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from gem_ds.files.atomic import beside, explained, flush, leftovers, locked, save_json

MANIFEST = ".gem_ds.json"
KIND = "gem_manifest"

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def is_ours(folder: Path) -> bool:
    """Whether a folder, which is no link, has a manifest."""
    return folder.is_dir() and not folder.is_symlink() and _read(folder) is not None


def listed_files(folder: Path) -> list[Path]:
    """The files in a folder that its manifest lists, without links and what lies behind them."""
    found = []
    for name in _read(folder) or ():
        parts = PurePosixPath(name).parts
        steps = [folder.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
        if not any(step.is_symlink() for step in steps) and steps[-1].is_file():
            found.append(steps[-1])
    return found


def foreign_files(folder: Path) -> list[str]:
    """What is in a folder, at any depth, and not listed: paths below it, empty folders included."""
    own = {*_marks(folder), *listed_files(folder)}
    found = (path for path in folder.rglob("*") if path not in own)  # which follows no links
    ends = (path for path in found if path.is_symlink() or not path.is_dir() or _is_empty(path))
    return sorted(str(path.relative_to(folder)) for path in ends)


def refuse_foreign(folder: Path) -> None:
    """Refuses to replace what gem_ds has not written; a ValueError names it."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder} is no folder of gem_ds: move it, or name another folder.")
    if foreign := foreign_files(folder):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"{folder} holds what no manifest of gem_ds lists ({', '.join(foreign[:3])}{more}), so "
            "it is not replaced: move that, or name another folder."
        )


def list_files(folder: Path, names: Iterable[str]) -> None:
    """Adds paths below a folder to its manifest; call it before they are written."""
    _write(folder, list(dict.fromkeys([*(_read(folder) or ()), *names])))


def claim(folder: Path, name: str) -> Path:
    """The path of a file that is about to be written, listed as ours; refuses somebody else's."""
    path = folder / name
    if path not in listed_files(folder):
        if os.path.lexists(path):
            raise ValueError(
                f"{path} is no file of gem_ds, and would be replaced: move it, or name another "
                "folder."
            )
        list_files(folder, [name])
    return path


def delete_listed(folder: Path) -> None:
    """Deletes what a folder's manifest lists, and the manifest; empty folders in it go along."""
    listed = listed_files(folder)
    for path in listed:
        path.unlink()
    parents = {parent for path in listed for parent in path.relative_to(folder).parents}
    for parent in sorted({folder / parent for parent in parents} - {folder}, reverse=True):
        if _is_empty(parent):
            parent.rmdir()
    for path in reversed(_marks(folder)):
        path.unlink()


def delete_folder(folder: Path) -> None:
    """Deletes what a folder's manifest lists, and the folder if nothing else is in it."""
    delete_listed(folder)
    if _is_empty(folder):
        folder.rmdir()


def atomic_folder(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a folder, by `write(temporary folder)`, so that `path` never holds a part of it.

    Raises:
        ValueError: What stands at `path` is not all ours.
        OSError: With its number, and what to do; what stood there is whole, no temporary left.
    """
    path = Path(path)
    temporary = beside(path, "tmp")
    try:
        with explained(path):
            temporary.mkdir()
            with locked(temporary):  # against `clear_leftovers` of others
                _write(temporary, None)
                write(temporary)
                files = (entry for entry in temporary.rglob("*") if not entry.is_dir())
                names = sorted(entry.relative_to(temporary).as_posix() for entry in files)
                _write(temporary, [name for name in names if name != MANIFEST])
                for entry in (*temporary.rglob("*"), temporary):
                    flush(entry)
                refuse_foreign(path)
                _replace(temporary, path)
                flush(path.parent)
    finally:
        _delete_temporary(temporary)


def clear_leftovers(path: Path) -> None:
    """Clears what killed writes of `path` left beside it; nothing that is still written."""
    for entry in leftovers(path):
        if entry.is_symlink():
            continue  # we make none
        if not entry.is_dir():
            entry.unlink()
        elif entry.suffix == ".old" and not os.path.lexists(path):
            os.replace(entry, path)
        else:
            with locked(entry) as is_free:
                if is_free:
                    _delete_temporary(entry)


def _delete_temporary(folder: Path) -> None:
    """Deletes a folder under a temporary name, as far as it is ours."""
    if _content(folder).get("files", ()) is None:
        shutil.rmtree(folder)
    elif folder.is_dir():
        delete_folder(folder)


def _replace(source: Path, path: Path) -> None:
    """Renames a folder; one that stands at `path` has its name afterwards, or is deleted."""
    if not path.is_dir():
        os.replace(source, path)
    elif not _exchange(source, path):
        earlier = beside(path, "old")
        os.replace(path, earlier)
        try:
            os.replace(source, path)
        except OSError:
            os.replace(earlier, path)
            raise
        _delete_temporary(earlier)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step, where system and file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number))


def _marks(folder: Path) -> list[Path]:
    """A manifest that can be trusted, and what a killed write of one left."""
    return [folder / MANIFEST] * is_ours(folder) + leftovers(folder / MANIFEST)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _write(folder: Path, names: list[str] | None) -> None:
    save_json(folder / MANIFEST, {"kind": KIND, "format_version": 1, "files": names})


def _read(folder: Path) -> list[str] | None:
    """The paths that a folder's manifest lists; None where there is none that can be trusted."""
    names = _content(folder).get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    paths = [PurePosixPath(name) for name in names]
    if any(path.is_absolute() or ".." in path.parts or not path.parts for path in paths):
        return None  # no gem_ds wrote that
    return names


def _content(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        content = {} if path.is_symlink() else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_manifest = isinstance(content, dict) and content.get("kind") == KIND
    return content if is_manifest and content.get("format_version") == 1 else {}
