"""The model card: the README.md of a run's folder, in the form that the Hugging Face Hub reads.

Plain values in, text out. It says what the folder holds, how the weights were chosen, what was
measured, and how to load it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData

#: What of the results is no measurement of held-out examples.
TRAINING_LOSS = "training loss"

_CARD = """\
---
{metadata}
---

# {title}

{what}

| File | What it holds |
|---|---|
{files}
| `metrics.jsonl`, `trainer_state.json` | the course of the run |
| `all_results.json` | its results |

## Results

{results}

## Use

{use}
## Settings

{settings}
"""

_SELECTED = """\
The weights of {base} at {num_trainable:,} of its {num_parameters:,} parameters ({density:.4%}),
fine-tuned on {task} with {method}. Every other parameter of the base is unchanged, bit for bit; a
task head that it lacks was trained whole."""

_TRAINED = """\
{base} fine-tuned on {task} with {method}: {num_trainable:,} trained parameters beside a base of
{num_parameters:,} ({density:.4%})."""

_GEM = "GEM ([arXiv 2508.16191](https://arxiv.org/abs/2508.16191))"

_FILES = {
    "delta": "| `delta.safetensors` | the trained values, in {dtype} |",
    "mask": "| `mask.safetensors` | which entries of which weights were selected |",
    "model": "| `model/` | the fine-tuned model, a Hugging Face folder |",
    "adapter": "| `adapter/` | the adapter, as the library peft writes it |",
}

_USE = {
    "model": '`{auto_class}.from_pretrained("model")` loads it.\n',
    "adapter": """\
```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({load_arguments})
model = PeftModel.from_pretrained(base, "adapter")
```
""",
    "delta": """\
The delta goes onto the base model in memory, and comes off again:

```python
import torch
from gem_ds import Delta, apply_delta
from transformers import {auto_class}

model = {auto_class}.from_pretrained({load_arguments}, dtype=torch.{dtype})
applied = apply_delta(model, Delta.load("delta.safetensors"))
# `model` is the fine-tuned model now; applied.revert() gives the base model back exactly.
```

An ordinary Hugging Face folder, which needs nothing of GEM to load, is made with:

```shell
gem-ds export --model_name_or_path {base_argument} --delta delta.safetensors \\
    --output_dir exported
```
""",
}


def model_card(
    *,
    base_model: str,
    task: str,
    method: str,
    product: Literal["delta", "adapter", "model"],
    has_mask: bool,
    num_trainable: int,
    num_parameters: int,
    dtype: str,
    settings: Mapping[str, object],
    results: Mapping[str, float],
    base_results: Mapping[str, float] | None = None,
    revision: str | None = None,
    dataset: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    num_labels: int | None = None,
) -> str:
    """The model card of a run: Markdown with YAML front matter."""
    method, task = _one_line(method), _one_line(task)
    told = "GEM" if method == "gem" else method
    title = _one_line(f"{Path(base_model).name} fine-tuned on {task} with {told}")
    load_arguments = [repr(base_model)] + ([f"revision={revision!r}"] if revision else [])
    load_arguments += [f"num_labels={num_labels}"] if num_labels else []
    facts = {
        "base": f"`{_one_line(base_model)}`" + (f" (revision `{revision}`)" if revision else ""),
        "base_argument": shlex.quote(base_model),
        "method": _GEM if method == "gem" else f"`{method}`",
        "num_trainable": num_trainable,
        "num_parameters": num_parameters,
        "density": num_trainable / num_parameters,
        "task": task,
        "dtype": dtype,
        "auto_class": auto_class,
        "load_arguments": ", ".join(load_arguments),
    }
    measured = [
        EvalResult(
            task_type="text-classification" if num_labels else "text-generation",
            dataset_type=dataset or task,
            dataset_name=task,
            metric_type=name,
            metric_value=value,
        )
        for name, value in results.items()
        if name != TRAINING_LOSS  # which measures the training examples
    ]
    header: tuple[str, ...] = ("Metric", "Base model", "Fine-tuned")
    before = base_results or {}
    rows = [(name, before.get(name, "not measured"), value) for name, value in results.items()]
    if not before:
        header, rows = ("Metric", "Fine-tuned"), list(results.items())  # type: ignore[arg-type]
    is_public = _is_hub_name(base_model)  # the Hub refuses other names
    metadata = ModelCardData(
        library_name="gem_ds",
        base_model=base_model if is_public else None,
        base_model_relation="finetune" if is_public else None,
        datasets=[dataset] if dataset is not None and _is_hub_name(dataset) else None,
        tags=[method, *["sparse-fine-tuning"] * has_mask, "deepspeed", task],
        model_name=title,
        eval_results=measured or None,
    )
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=title,
        what=(_SELECTED if has_mask else _TRAINED).format(**facts),
        files="\n".join(_FILES[f].format(**facts) for f in (product, *["mask"] * has_mask)),
        results=_table(header, rows) if rows else "This run was not evaluated.",
        use=_USE[product].format(**facts),
        settings=_table(("Setting", "Value"), settings.items()),
    )


def _is_hub_name(name: str) -> bool:
    """Whether `name` is ``repository`` or ``owner/repository`` and no folder on this machine."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).is_dir()


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""

    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return _one_line(text).replace("|", "\\|")

    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
