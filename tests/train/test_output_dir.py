"""A run deletes and replaces what runs wrote, as their manifests say, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from gem_ds.files.manifest import MANIFEST, atomic_folder, delete_folder
from gem_ds.train import main as train
from gem_ds.train.arguments import parse_arguments
from gem_ds.train.output_dir import (
    RUN_FILES,
    RUN_FOLDERS,
    clear_output_dir,
    output_dir_of_one_run,
    refuse_taken_checkpoints,
)
from gem_ds.train.prepare import PreparedRun, prepare
from tests.tiny_model import Tiny

OLD = Path(__file__).parents[1] / "files_0_1" / "llama"
LEFTOVERS = [f".{name}.0a1b2c3d.tmp" for name in (*RUN_FILES, "README.md", "report.html", MANIFEST)]


@pytest.fixture(scope="module")
def finished(tiny: Tiny) -> Path:
    """A finished run with two checkpoints and TensorBoard's file."""
    folder = tiny.folder / "run"
    train.main(tiny.flags(folder, max_steps=4, save_steps=2, report_to="tensorboard"))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with a model/ and an adapter/ of a run, as other methods leave them."""
    folder = tmp_path / "a" / "run"
    shutil.copytree(finished, folder)
    for name in ("model", "adapter"):
        atomic_folder(folder / name, lambda path: (path / "config.json").write_text("{}"))
    return folder


def plan_of(tiny: Tiny, output_dir: Path, *switches: str, **values: object) -> PreparedRun:
    return prepare(parse_arguments(tiny.flags(output_dir, *switches, **values)), 1)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def without_manifests(folder: Path) -> None:
    """As a version before they were written left it."""
    for path in (*folder.rglob(MANIFEST), folder / "report.html"):
        path.unlink()


#: What users have, and what is in it: others give their own files such names.
MINE = [
    *(".checkpoint-mine/thesis.txt", ".checkpoint-7", "checkpoint-2024/photo.jpg", "notes.txt"),
    *("checkpoint-2024/optimizer.safetensors", "checkpoints/a", "runs/b", ".git/HEAD"),
    *("checkpoint-2/thesis.txt", "model/thesis.txt", "tensorboard/events.mine", "README.md.orig"),
    *(".checkpoint-8.0a1b2c3d.tmp/thesis.txt", ".model.0a1b2c3d.old/thesis.txt"),
]


def put_mine(folder: Path) -> dict[Path, str]:
    """Write them; returns them with their content."""
    for name in MINE:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"mine: {name}")
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("mine, behind a link")
    delete_folder(folder / "adapter")
    (folder / "adapter").symlink_to(elsewhere)
    return {folder / name: f"mine: {name}" for name in MINE} | {
        elsewhere / "config.json": "mine, behind a link"
    }


def test_overwriting_deletes_the_run_and_nothing_else(tiny, run):
    before = names(run)
    pages = {"README.md", "report.html"}
    assert before == {*RUN_FILES, *RUN_FOLDERS, *pages, MANIFEST} - {"predictions.jsonl"} | {
        *("checkpoint-2", "checkpoint-4")
    }
    mine = put_mine(run)
    for name in LEFTOVERS:
        (run / name).touch()
    kept = names(run) - {*LEFTOVERS}
    clear_output_dir(run, overwrite=False)
    assert names(run) == kept, "without overwriting only leftovers go"
    assert plan_of(tiny, run, "--overwrite_output_dir").output_dir == run
    assert (run / "delta.safetensors").exists(), "preparing deletes nothing"
    clear_output_dir(run, overwrite=True)
    assert {path: path.read_text() for path in mine} == mine
    files = {path for path in run.rglob("*") if path.is_symlink() or not path.is_dir()}
    assert files == {path for path in mine if path.is_relative_to(run)} | {run / "adapter"}


def test_a_run_of_its_own_only_is_gone_without_a_trace(run):
    clear_output_dir(run, overwrite=True)
    assert names(run) == set()


def test_a_version_without_manifests_is_gone_on_with_and_replaced(tiny, run):
    """Of it what its content shows to be a run's; a folder of a model or of peft does not show."""
    without_manifests(run)
    (run / ".checkpoint-3.old").mkdir()  # as it left one that it was deleting
    shutil.copy(run / "checkpoint-2" / "mask.safetensors", run / ".checkpoint-3.old")
    with pytest.raises(ValueError, match="holds a run: pass --resume_from_checkpoint last"):
        plan_of(tiny, run)
    plan = plan_of(tiny, run, resume_from_checkpoint="last")
    assert plan.checkpoint is not None
    with pytest.raises(ValueError, match=r"model holds what no manifest .* lists \(config.json\)"):
        plan_of(tiny, run, "--overwrite_output_dir", method="full", density=None)
    plan_of(tiny, run, "--overwrite_output_dir")
    clear_output_dir(run, overwrite=True)
    assert names(run) == {"model", "adapter", "tensorboard"}


def test_files_that_version_0_1_wrote_are_known(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(OLD, folder)
    clear_output_dir(folder, overwrite=True)
    assert names(folder) == set()


@pytest.mark.parametrize("name", [*RUN_FILES, "model", "adapter"])
@pytest.mark.parametrize("switches", [[], ["--overwrite_output_dir"]])
def test_what_others_call_so_is_named_and_stays(tiny, tmp_path, name, switches):
    """With what transformers' Trainer writes under these names, and through links."""
    path = tmp_path / name
    if name in RUN_FOLDERS:
        path.mkdir()
        (path / "config.json").write_text("{}")
    elif name.endswith(".safetensors"):
        LlamaForCausalLM.from_pretrained(tiny.model).save_pretrained(tmp_path / "m")
        shutil.move(tmp_path / "m" / "model.safetensors", path)
        shutil.rmtree(tmp_path / "m")
    else:
        trainer = {"epoch": 1.0, "step": 3, "global_step": 3, "log_history": [], "max_steps": 3}
        path.write_text(json.dumps(trainer) + "\n")
    values: dict[str, object] = {}
    if method := {"model": "full", "adapter": "lora"}.get(name):
        values = {"method": method, "density": None}
    for is_link in (False, True):
        if is_link:
            shutil.move(path, tmp_path.with_name(f"{tmp_path.name}_elsewhere"))
            path.symlink_to(tmp_path.with_name(f"{tmp_path.name}_elsewhere"))
        before = {p: p.is_dir() or p.read_bytes() for p in [path, *tmp_path.rglob("*")]}
        with pytest.raises(ValueError, match=rf"{name}.*another folder"):
            plan_of(tiny, tmp_path, *switches, **values)
        clear_output_dir(tmp_path, overwrite=bool(switches))
        assert {p: p.is_dir() or p.read_bytes() for p in before} == before


def test_a_users_card_stays_and_a_run_beside_it_comes_to_its_end(tiny, tmp_path, capsys):
    mine = [tmp_path / "README.md", tmp_path / "report.html"]
    for path in mine:
        path.write_text("mine")
    for switches in ([], ["--overwrite_output_dir"]):
        train.main(tiny.flags(tmp_path, *switches, max_steps=1))
        told = capsys.readouterr().out
        assert "README.md is no run's and stays" in told
        assert "report.html was not written: " in told
        assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_a_checkpoints_name_that_is_taken_is_refused_before_training(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "photo.jpg").touch()
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-final" / "photo.jpg").touch()
    for steps in (range(1, 5), range(6, 9), range(0)):
        refuse_taken_checkpoints(tmp_path, steps)
    with pytest.raises(ValueError, match=r"checkpoint-5 holds .*photo.jpg"):
        refuse_taken_checkpoints(tmp_path, range(1, 6))


def test_the_limit_holds_after_a_kill(tiny, run):
    """Killed after it had written checkpoint-4 and before checkpoint-2 was deleted."""
    limits = {"save_total_limit": 1, "max_steps": 5, "save_strategy": "no"}
    train.main(tiny.flags(run, resume_from_checkpoint="last", **limits))
    kept = {name for name in names(run) if "checkpoint" in name}
    assert kept == {"checkpoint-4"}


#: What another run may read of a run's folder: its flag, and whether that is the run's own.
SOURCES = [
    ("model_name_or_path", "model", True),
    ("model_name_or_path", "checkpoint-2/weights", False),
    ("model_name_or_path", "link", True),
    ("model_name_or_path", "base", False),
    ("mask", "mask.safetensors", True),
    ("mask", "checkpoint-4/mask.safetensors", True),
    ("mask", "my.safetensors", False),
]


@pytest.mark.parametrize(("flag", "source", "is_own"), SOURCES)
def test_a_run_does_not_delete_what_it_reads(tiny, run, flag, source, *, is_own):
    """What lies beside the files of a run it may read."""
    shutil.rmtree(run / "model")
    atomic_folder(run / "model", lambda path: shutil.copytree(tiny.model, path, dirs_exist_ok=True))
    for name in ("checkpoint-2/weights", "base"):
        shutil.copytree(tiny.model, run / name)
    shutil.copy(run / "mask.safetensors", run / "my.safetensors")
    (run / "link").symlink_to("model")
    path = run / source
    flags: dict[str, object] = {"density": None, flag: path}
    if is_own:
        with pytest.raises(ValueError, match=f"would delete --{flag} {path}: name another [^\n]*$"):
            plan_of(tiny, run, "--overwrite_output_dir", **flags)
        return
    plan_of(tiny, run, "--overwrite_output_dir", **flags)
    clear_output_dir(run, overwrite=True)
    assert names(run) == {"base", "checkpoint-2", "link", "my.safetensors"}
    assert names(run / "checkpoint-2") == {"weights"}


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    folder = tmp_path / "a" / "b"
    with output_dir_of_one_run(folder):
        with pytest.raises(ValueError, match="Another run writes to --output_dir"):
            output_dir_of_one_run(folder).__enter__()
        with output_dir_of_one_run(tmp_path / "a" / "c"):
            pass
    with output_dir_of_one_run(folder):
        assert list(folder.iterdir()) == [], "nothing shows it"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once():
    with pytest.raises(OSError, match=r"cannot be written .*: choose a folder"):
        output_dir_of_one_run(Path("/sys/kernel")).__enter__()
