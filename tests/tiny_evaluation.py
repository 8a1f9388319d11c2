"""What tests of the evaluators share: made samples, a delta, and files read back."""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaConfig

from gem_ds.evaluate.generation import GenerationSettings
from gem_ds.evaluate.model import SamplingArguments
from gem_ds.evaluate.samples import Sample
from gem_ds.evaluate.sampling import sample_all
from gem_ds.files.delta import Delta
from tests.deltas import make_delta

#: By what refuses: what is passed, and words of the sentence.
REFUSED = tomllib.loads((Path(__file__).parent / "evaluate" / "refused.toml").read_text())

DRAWN = GenerationSettings(
    max_new_tokens=9, stop_strings=("zz",), temperature=1.2, top_p=0.9, seed=1
)


def draw(
    model: Path, output_dir: Path, prompts: Mapping[str, str], num_samples: int, /, **options: Any
) -> list[Sample] | None:
    """Samples of prompts, in fp32 and batches of four where the options say nothing else."""
    options = {"batch_size": 4, "dtype": "float32", "disable_tqdm": True} | options
    settings = options.pop("settings", DRAWN)
    options = {"model_name_or_path": str(model), "output_dir": str(output_dir)} | options
    return sample_all(SamplingArguments(**options), prompts, settings, num_samples=num_samples)


def make_sample(task_id: str, number: int = 0, completion: str = "", **changes: Any) -> Sample:
    """A sample that a model might have written."""
    fields = {"prompt": "p", "finish_reason": "stop", "num_tokens": 9, "settings": {"seed": 0}}
    return Sample(task_id=task_id, sample=number, completion=completion, **fields | changes)


def save_delta(
    path: Path,
    model: Any,
    changes: Mapping[str, tuple[Tensor, Tensor]],
    head: Mapping[str, Tensor] | None = None,
) -> Delta:
    """A delta of `model`, named base: by weight the flat indices, and what is added there."""
    head, values = dict(head or {}), {}
    mask = make_delta(model, {name: index.tolist() for name, (index, _) in changes.items()}).mask
    for name, (index, added) in changes.items():
        before = model.get_parameter(name).detach().reshape(-1)[index.long()]
        values[name] = before + added.to(before.dtype)
    known = {name: text for name, text in mask.fingerprints.items() if name not in head}
    delta = Delta(mask=replace(mask, fingerprints=known), values=values, head=head)
    delta.save(path)
    return delta


def one_layer(vocab_size: int, **more: Any) -> LlamaConfig:
    """The smallest Llama there is."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    return LlamaConfig(vocab_size=vocab_size, num_attention_heads=1, **sizes, **more)


def refusal(run: Any, *args: Any, **options: Any) -> str:
    """The one sentence with which a call is refused."""
    with pytest.raises((ValueError, OSError), match=r"\S") as caught:
        run(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
