"""Fixtures that several test files share."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from gem_ds.evaluate.sandbox import Sandbox, SandboxUnavailableError

# How long an example takes says how busy the machine is.
settings.register_profile("any_speed", deadline=None)
settings.load_profile("any_speed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """DeepSpeed collects garbage for each engine: what was imported need not be walked again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Else libraries tell at the end of what they could not free."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def gem_data_dir() -> Path:
    """The folder of real data: GEM_DATA_DIR, by default ../shared/data beside the repository."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("GEM_DATA_DIR", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set GEM_DATA_DIR")
    return folder


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """The best sandbox of this host; tests that run programs skip where there is none."""
    try:
        opened = Sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))
    with opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model folder that trains in a second; programs may be called in this process."""
    from tests.tiny_model import make_tiny, one_rank  # which takes long to import

    with one_rank():
        yield make_tiny(tmp_path_factory.mktemp("tiny"))
