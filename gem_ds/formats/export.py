"""A base model and a delta as what others load: ``gem-ds export --format F``.

    hf      an ordinary Hugging Face folder: the base's with other weights (gem_ds.models.folder)
    peft    an adapter of gem_ds' tuner of peft (gem_ds.tuner.convert)
    shira   an adapter of peft's method SHiRA (gem_ds.formats.shira)
    gguf    one file of llama.cpp, by its converter (gem_ds.formats.gguf)

The delta may be an adapter's folder, too. What is written appears under its name when it is whole,
not before. One process, no accelerator.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from gem_ds.files.checkpoint import load_delta
from gem_ds.files.manifest import atomic_folder, clear_leftovers, refuse_foreign
from gem_ds.flags import name_of
from gem_ds.formats.adapter import import_adapter
from gem_ds.formats.gguf import prepare_gguf
from gem_ds.formats.shira import prepare_shira
from gem_ds.models.export import prepare_folder
from gem_ds.progress import loading_bars
from gem_ds.tuner.convert import prepare_adapter
from gem_ds.tuner.dequantize import prepare_dequantized

#: What reads and checks all that a format needs, of a delta and its base; it returns what then
#: fills a folder, and that returns sentences on what a user of the folder should know.
FORMATS: dict[str, Callable[..., Callable[[Path], list[str]]]] = {
    "hf": prepare_folder,
    "peft": prepare_adapter,
    "shira": prepare_shira,
    "gguf": prepare_gguf,
}


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises what `export` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("export"), description="Write a base model and a delta in a format of others."
    )
    base_help = "base model: a folder or a name on the Hugging Face Hub (default: the delta's)"
    replace_help = "replace an earlier export in output_dir"
    parser.add_argument("--model_name_or_path", help=base_help)
    delta_help = (
        "delta.safetensors of a run, its weights at a step (a checkpoint-N folder), or the folder "
        "of an adapter that gem-ds import takes"
    )
    parser.add_argument("--delta", type=Path, required=True, help=delta_help)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    format_help = (
        "hf (the default): a Hugging Face folder; peft: an adapter for peft with gem_ds; shira: an "
        "adapter of peft's method SHiRA; gguf: llama.cpp's file"
    )
    parser.add_argument("--format", default="hf", choices=FORMATS, help=format_help)
    dequantize_help = (
        "of an adapter whose base was quantized: write the weights that its training saw, and not "
        "the base's own with what the training has changed"
    )
    parser.add_argument("--dequantize", action="store_true", help=dequantize_help)
    parser.add_argument("--overwrite_output_dir", action="store_true", help=replace_help)
    code_help = "run model code that comes with the weights"
    parser.add_argument("--trust_remote_code", action="store_true", help=code_help)
    args = parser.parse_args(argv)
    with loading_bars(is_shown=True):
        export(**vars(args))


def export(
    model_name_or_path: str | None,
    delta: Path,
    output_dir: Path,
    *,
    format: str = "hf",
    dequantize: bool = False,
    overwrite_output_dir: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Writes a delta, with its base model, as a folder of a format; the arguments are the flags."""
    base, output_dir = model_name_or_path, output_dir.resolve()
    clear_leftovers(output_dir)
    sources = [Path(source) for source in (base, delta) if source is not None]
    _check_output_dir(output_dir, sources, overwrite_output_dir)
    options = {"trust_remote_code": trust_remote_code}
    if dequantize:
        if format != "hf":
            raise ValueError(f"--dequantize writes a model: leave --format {format} out.")
        trained, write = prepare_dequantized(str(delta), base, **options)
    else:
        if (delta / "adapter_config.json").is_file():
            trained = import_adapter(str(delta), base, **options)
        else:
            trained = load_delta(delta)
        write = FORMATS[format](trained, base or trained.mask.base_model, **options)
    base = base or trained.mask.base_model
    notes: list[str] = []
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    atomic_folder(output_dir, lambda folder: notes.extend(write(folder)))
    values = f"{trained.mask.num_selected:,} trained values in {len(trained.values)} weights"
    print("; ".join([f"{output_dir}: {base} with {values}", *notes]))


def _check_output_dir(output_dir: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Refuses a folder whose writing would destroy something, before anything is loaded."""
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(output_dir):
            raise ValueError(f"output_dir {output_dir} is or holds {source}: choose another folder")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir {output_dir} is a file: choose another name")
    if output_dir.is_dir() and any(output_dir.iterdir()):
        refuse_foreign(output_dir)
        if (output_dir / "trainer_state.json").is_file():
            raise ValueError(f"output_dir {output_dir} holds a run: choose another folder")
        if not overwrite:
            raise ValueError(
                f"output_dir {output_dir} holds an export: pass --overwrite_output_dir to replace "
                "it, or choose another folder"
            )
