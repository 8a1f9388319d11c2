"""How a process in the sandbox imports packages that are shown to it (`packages`).

By their paths, since what else lies in their folder is not to be seen, or may not even be listed:
a package that is not shown is absent, as if it were not installed.
"""

from __future__ import annotations

import os
import sys
from _collections_abc import Sequence
from _frozen_importlib import ModuleSpec

#: what a program imports them by
NAMES: set[str] = set()


def show(paths: Sequence[str]) -> None:
    """Lets this process, and what it forks, import the packages of these folders and files."""
    if paths:
        NAMES.update(os.path.basename(path).partition(".")[0] for path in paths)
        sys.meta_path.append(_Finder(paths))


def location_of(path: str, name: str) -> str | None:
    """The file that is imported as `name`, where a folder or file is that package."""
    location = os.path.join(path, "__init__.py") if os.path.isdir(path) else path
    is_own = os.path.basename(path).partition(".")[0] == name
    return location if is_own and os.path.isfile(location) else None


class _Finder:
    """One of `sys.meta_path`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """As the import system asks it: of a package, not of its parts, which lie in its folder."""
        if name not in NAMES:
            return None
        from importlib.util import spec_from_file_location

        locations = filter(None, (location_of(path, name) for path in self._paths))
        return next((spec_from_file_location(name, location) for location in locations), None)
