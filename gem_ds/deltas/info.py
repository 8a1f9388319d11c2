"""What a delta or a mask holds: ``gem-ds delta info delta.safetensors``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask
from gem_ds.flags import name_of
from gem_ds.report.places import table_of


def main(argv: Sequence[str] | None = None) -> None:
    """The program; raises a ValueError where the file is none of ours."""
    parser = argparse.ArgumentParser(
        prog=name_of("delta info"), description="Tell what a delta or a mask holds."
    )
    parser.add_argument("file", type=Path, help="delta.safetensors or mask.safetensors")
    path = parser.parse_args(argv).file
    delta = None
    try:
        mask = Mask.load(path)
    except ValueError:  # then its sentence is the delta's, which is the usual file
        delta = Delta.load(path)
        mask = delta.mask
    total = mask.num_entries
    print(f"{path}: a {'mask' if delta is None else 'delta'} of {path.stat().st_size:,} bytes")
    print(f"base      {mask.base_model}" + (f" at {mask.revision}" if mask.revision else ""))
    print(f"method    {mask.method} {json.dumps(mask.settings)}")
    print(
        f"entries   {mask.num_selected:,} of {total:,} ({mask.num_selected / total:.4%}) in "
        f"{len(mask.weights)} weights, {mask.dtype}"
    )
    if delta is not None and delta.head:
        size = sum(parameter.numel() for parameter in delta.head.values())
        print(f"head      {', '.join(delta.head)}: {size:,} parameters")
    counts = {name: float(index.numel()) for name, index in mask.indices.items()}
    table = table_of(counts).to_string(float_format="{:,.0f}".format)
    print(f"\nentries by layer and module\n{table}")
