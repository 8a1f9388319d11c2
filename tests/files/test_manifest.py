"""Only what a manifest lists is deleted or replaced."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gem_ds.files import manifest
from gem_ds.files.manifest import (
    MANIFEST,
    atomic_folder,
    claim,
    clear_leftovers,
    delete_folder,
    foreign_files,
    is_ours,
    list_files,
)


def content(folder: Path) -> dict[str, str]:
    """All files at any depth but manifests, by their paths."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def make(folder: Path, *names: str, text: str = "ours") -> Path:
    """A folder of ours with these files."""

    def write(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(text)

    atomic_folder(folder, write)
    return folder


def a_file(folder: Path) -> None:
    (folder / "thesis.txt").write_text("mine")


def a_hidden_folder(folder: Path) -> None:
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "ab").write_text("mine")


def a_file_deep_down(folder: Path) -> None:
    (folder / "deep" / "notes").write_text("mine")


def a_link(folder: Path) -> None:
    (folder / "weights").symlink_to(folder.parent / "mine")


def a_link_in_place_of_ours(folder: Path) -> None:
    shutil.move(folder / "deep", folder.parent / "mine" / "deep")
    (folder / "deep").symlink_to(folder.parent / "mine" / "deep")


def an_empty_folder(folder: Path) -> None:
    (folder / "data").mkdir()


FOREIGN = [
    (a_file, "thesis.txt"),
    (a_hidden_folder, ".git/objects/ab"),
    (a_file_deep_down, "deep/notes"),
    (a_link, "weights"),
    (a_link_in_place_of_ours, "deep"),
    (an_empty_folder, "data"),
]


@pytest.mark.parametrize(("put", "name"), FOREIGN)
def test_a_folder_with_something_of_others_is_not_replaced_and_loses_its_own_only(
    tmp_path, put, name
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.bin").write_text("mine")
    folder = make(tmp_path / "f", "a.json", "deep/b.json")
    put(folder)
    assert foreign_files(folder) == [name]
    before = content(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"lists ({name})")):
        make(folder, "a.json", text="new")
    assert content(tmp_path) == before
    delete_folder(folder)
    own = {"f/a.json"} | ({"f/deep/b.json"} if put is not a_link_in_place_of_ours else set())
    assert content(tmp_path) == {path: text for path, text in before.items() if path not in own}
    assert os.path.lexists(folder / name)


def test_a_folder_of_ours_is_replaced_and_deleted_as_a_whole(tmp_path):
    folder = make(tmp_path / "f", "a.json", "deep/b.json")
    link = tmp_path / "link"
    link.symlink_to(folder)
    make(folder, "c.json", text="new")
    assert content(tmp_path) == {"f/c.json": "new"}
    with pytest.raises(ValueError, match="is no folder of gem_ds"):
        make(link, "d.json")
    assert sorted(os.listdir(tmp_path)) == ["f", "link"]
    delete_folder(folder)
    assert os.listdir(tmp_path) == ["link"]
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "a.json")
    assert sorted(os.listdir(tmp_path)) == ["empty", "link"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[" * 100_000, "[]", '{"files": ["../mine"]}', "\xff"),
        *(
            json.dumps({"kind": "gem_manifest", "format_version": 1} | content)
            for content in (
                {"files": ["../mine"]},
                {"files": ["a/../../mine"]},
                {"files": [3]},
                {"files": None},
                {"files": ["mine"], "format_version": 2},
                {"files": ["mine"], "kind": "other"},
            )
        ),
        json.dumps({"kind": "gem_manifest", "format_version": 1, "files": ["/etc/mine"]}),
    ],
)
def test_a_manifest_that_gem_ds_did_not_write_makes_nothing_ours(tmp_path, text):
    (tmp_path / "mine").touch()
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "mine").touch()
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    delete_folder(folder)
    assert not is_ours(folder)
    assert (folder / "mine").exists()
    assert (tmp_path / "mine").exists()


def test_a_name_is_ours_once_it_is_claimed_and_not_before(tmp_path):
    claim(tmp_path, "log").write_text("ours")
    claim(tmp_path, "log").write_text("ours again")
    (tmp_path / "results").write_text("mine")
    (tmp_path / "link").symlink_to("results")
    (tmp_path / "folder").mkdir()
    for name in ("results", "link", "folder"):
        with pytest.raises(ValueError, match=f"{name} is no file of gem_ds"):
            claim(tmp_path, name)
    list_files(tmp_path, ["absent"])
    manifest.delete_listed(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "results"]


# Kills: the suite forks real ones, here each moment is reached in turn


class Killed(BaseException):
    """Nothing of the process runs after it."""


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> bool:
    """Replace a folder until so many changes of the disk were made; whether it came to the end."""
    left = [number]

    def limited(change: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return change(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            *((os, name) for name in ("replace", "mkdir", "rmdir", "unlink")),
            *((Path, name) for name in ("mkdir", "rmdir", "unlink", "write_text", "write_bytes")),
            *((manifest, "_exchange"), (shutil, "rmtree")),
        ):
            patch.setattr(owner, name, limited(getattr(owner, name)))
        try:
            make(folder, "b.json", "deep/c.json", text="new")
        except Killed:
            return False
    return True


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(
    tmp_path, monkeypatch, *, can_exchange
):
    if not can_exchange:
        monkeypatch.setattr(manifest, "_exchange", lambda *names: False)
    old, new = {"a.json": "ours"}, {"b.json": "new", "deep/c.json": "new"}
    found = []
    for number in range(100):
        folder = tmp_path / str(number) / "f"
        folder.parent.mkdir()
        (folder.parent / ".f.0123abcd.tmp").mkdir()
        (folder.parent / ".f.0123abcd.tmp" / "mine").write_text("of somebody with odd names")
        make(folder, "a.json")
        is_done = killed_at(number, monkeypatch, folder)
        if can_exchange:
            assert content(folder) in (old, new)
        clear_leftovers(folder)
        found.append(content(folder))
        assert found[-1] in (old, new)
        assert sorted(os.listdir(folder.parent)) == [".f.0123abcd.tmp", "f"]
        assert os.listdir(folder.parent / ".f.0123abcd.tmp") == ["mine"]
        make(folder, "a.json")
        if is_done:
            break
    assert is_done
    assert found[0] == old
    assert found[-1] == new


def test_what_is_still_written_is_no_leftover(tmp_path):
    folder = tmp_path / "f"

    def write(path: Path) -> None:
        (path / "a").touch()
        clear_leftovers(folder)  # as another process would

    atomic_folder(folder, write)
    assert os.listdir(tmp_path) == ["f"]
    assert content(folder) == {"a": ""}
