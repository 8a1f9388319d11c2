"""An adapter of peft as a delta: ``gem-ds import runs/shira --output_file delta.safetensors``.

Of those whose training changes single entries: gem_ds' own tuner, and SHiRA.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, ShiraConfig

from gem_ds.errors import refusing
from gem_ds.files.delta import Delta
from gem_ds.flags import name_of
from gem_ds.formats.shira import shira_to_delta
from gem_ds.tuner.convert import adapter_to_delta
from gem_ds.tuner.dequantize import on_unquantized_base


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises what `import_adapter` does."""
    parser = argparse.ArgumentParser(
        prog=name_of("import"), description="Write an adapter of peft as a delta."
    )
    parser.add_argument("adapter", help="its folder, or its id on the Hugging Face Hub")
    base_help = (
        "the base model of SHiRA, or one that was quantized: a folder or Hub name (default: the "
        "one it names)"
    )
    parser.add_argument("--model_name_or_path", help=base_help)
    parser.add_argument("--output_file", required=True, type=Path, help="file to write")
    args = parser.parse_args(argv)
    if args.output_file.exists():
        raise ValueError(f"--output_file {args.output_file} exists: name another.")
    delta = import_adapter(args.adapter, args.model_name_or_path)
    delta.save(args.output_file)
    print(f"{args.output_file}: {delta!r}")


def import_adapter(
    folder: str, base: str | None = None, *, trust_remote_code: bool = False
) -> Delta:
    """An adapter of SHiRA or of gem_ds' tuner, a folder or an id of the Hub, as a delta."""
    with refusing(f"{folder} is no adapter's folder: {{}}", ValueError, TypeError, KeyError):
        config = PeftConfig.from_pretrained(folder)
    if isinstance(config, ShiraConfig):
        return shira_to_delta(config, folder, base)
    if getattr(config, "base_quantization", None):
        return on_unquantized_base(folder, base, trust_remote_code=trust_remote_code)[0]
    return adapter_to_delta(folder)
