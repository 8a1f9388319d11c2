"""Packages of the caller's environment that programs may import beside the standard library.

They are named as programs import them, and come with all that they require. A jail shows their
folders and files, read-only and where they lie, and nothing else that lies there; `finder` imports
them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.metadata import Distribution

from packaging.requirements import Requirement

from gem_ds.evaluate.sandbox.finder import location_of

_owners = functools.cache(metadata.packages_distributions)  # by imported names; takes a second


def find_packages(names: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed here; raises ValueError where one is not."""
    return {name: _distribution(name).version for name in names}


def paths_of(names: Iterable[str]) -> tuple[str, ...]:
    """All that is to be shown for these packages; raises ValueError as `find_packages`."""
    found: dict[str, Distribution] = {}
    for name in names:
        _add_required(_distribution(name), found)
    paths = {path for distribution in found.values() for path in _entries(distribution)}
    return tuple(sorted(paths))


def _distribution(name: str) -> Distribution:
    """What is installed under the name that programs import."""
    for owner in _owners().get(name, ()):
        distribution = metadata.distribution(owner)
        if distribution.read_text("RECORD") is None:  # a checkout beside which this runs
            continue
        if any(location_of(path, name) for path in _entries(distribution)):
            return distribution
    raise ValueError(
        f"--sandbox_packages {name}: no package is installed here that programs import by this "
        "name (one linked to its sources does not count): install it, or leave it out."
    )


def _entries(distribution: Distribution) -> Iterator[str]:
    """The folders and files of a distribution that lie among the installed packages."""
    files = [file for file in distribution.files or () if not file.is_absolute()]
    names = {file.parts[0] for file in files} - {"..", "__pycache__"}
    for path in map(str, map(distribution.locate_file, sorted(names))):
        if os.path.exists(path) and not path.endswith((".dist-info", ".pth")):
            yield path


def _add_required(distribution: Distribution, found: dict[str, Distribution]) -> None:
    """Adds a distribution, and what it requires as far as that is installed."""
    if distribution.name in found:
        return
    found[distribution.name] = distribution
    for requirement in map(Requirement, distribution.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                _add_required(metadata.distribution(requirement.name), found)
            except metadata.PackageNotFoundError:
                continue
