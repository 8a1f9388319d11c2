"""Who may import whom: packages in order, doors to two libraries, nothing heavy too early."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gem_ds"

#: Imports run from a later line to an earlier one. Packages of one line do not import each other.
ORDER = [
    {"errors", "flags", "progress"},
    {"select", "sddmm"},
    {"distributed"},
    {"files"},
    {"data", "sparse"},
    {"models"},
    {"calibration", "report", "serving"},
    {"tuner"},
    {"train", "evaluate", "deltas", "pruning"},
    {"comparison", "planning", "formats"},
    {"cli"},
    {""},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

#: What only some modules import, inside functions or not.
DOORS = {
    "deepspeed": {"distributed/weights.py"},
    "torch.distributed": {"distributed/comm.py"},
}


FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, by its whole name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _package_of(module: str) -> str:
    """gem_ds.select.rules.RULES -> select; gem_ds.Mask -> the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else ""


def _is_of(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    is_program = name == "__init__" or path.name == "__main__.py"
    own = "" if is_program else name
    for module in _imports(path):
        for library, doors in DOORS.items():
            if _is_of(module, library):
                assert path.relative_to(PACKAGE).as_posix() in doors, f"{module} has its doors"
        if _is_of(module, "gem_ds") and (other := _package_of(module)) != own:
            assert LEVEL[other] < LEVEL[own], f"{module} is above or beside {own}"


def test_every_package_has_a_place():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert found - {"__init__"} <= LEVEL.keys()


SCRIPT = """
import sys, time
started = time.process_time()
import gem_ds
seconds = time.process_time() - started
heavy = {"torch", "transformers", "deepspeed", "numpy"} & sys.modules.keys()
assert not heavy, heavy
assert seconds < 0.5, seconds
for name in gem_ds.__all__:
    assert getattr(gem_ds, name).__name__ == name
assert "deepspeed" not in sys.modules
try:
    gem_ds.absent
except AttributeError as error:
    assert "absent" in str(error)
else:
    raise AssertionError("anything can be imported")
"""


def test_the_package_loads_nothing_until_it_is_used():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
