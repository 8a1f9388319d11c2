"""A file of llama.cpp (GGUF), by llama.cpp's own converter, where that is installed.

The converter knows the architectures and their tokenizers; it reads the Hugging Face folder that is
written for it beside, and deleted then. The numbers are of the dtype that the converter chooses
from the weights' (``--outtype auto``); ``llama-quantize`` makes them fewer bits.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gem_ds.files.delta import Delta
from gem_ds.models.export import prepare_folder

#: The names under which llama.cpp's folder, and packages of it, have the converter.
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")


def prepare_gguf(
    delta: Delta, base: str, *, trust_remote_code: bool
) -> Callable[[Path], list[str]]:
    """What fills a folder with ``model.gguf``; refuses where no converter is on the PATH."""
    converter = next(filter(None, map(shutil.which, _CONVERTERS)), None)
    if converter is None:
        raise ValueError(
            f"There is no {_CONVERTERS[0]} on the PATH: clone "
            "https://github.com/ggml-org/llama.cpp, install its requirements.txt, and put its "
            "folder there."
        )
    write_model = prepare_folder(delta, base, trust_remote_code=trust_remote_code)

    def write(folder: Path) -> list[str]:
        model = folder / "model"
        model.mkdir()
        notes = write_model(model)
        command = [converter, str(model), "--outfile", str(folder / "model.gguf")]
        if converter.endswith(".py"):  # with the libraries of this interpreter
            command.insert(0, sys.executable)
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if ended.returncode or not (folder / "model.gguf").is_file():
            *_, reason = ["nothing said", *filter(None, map(str.strip, ended.stderr.split("\n")))]
            raise ValueError(f"{converter} cannot convert {base}: {reason}")
        shutil.rmtree(model)
        return notes

    return write
