"""The model card: the README.md of a run's folder, in the form that the Hugging Face Hub reads.

Plain values in, text out. It says what the folder holds, how the weights were chosen, what was
measured, and how to load it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
    "course": "| `metrics.jsonl`, `trainer_state.json` | the course of the run |",
    "results": "| `all_results.json`, `report.html` | its results |",
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
applied = apply_delta(model, {delta})
# `model` is the fine-tuned model now; applied.revert() gives the base model back exactly.
```

An ordinary Hugging Face folder, which needs nothing of GEM to load, is made with:

```shell
gem-ds export --model_name_or_path {base_argument} --delta delta.safetensors \\
    --output_dir exported
```
""",
}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a run's card tells; `text` is the file."""

    base_model: str
    revision: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    num_labels: int | None = None
    task: str
    dataset: str | None = None
    method: str
    product: Literal["delta", "adapter", "model"]
    has_mask: bool
    num_trainable: int
    num_parameters: int
    dtype: str
    settings: Mapping[str, object]
    results: Mapping[str, float]
    base_results: Mapping[str, float] = field(default_factory=dict)
    license: str | None = None  # the base's, as the Hub names it
    repo: str | None = None  # on the Hub, of a delta that is there without its run

    def text(self) -> str:
        """Markdown with YAML front matter."""
        options = {"revision": self.revision, "num_labels": self.num_labels}
        given = [f"{name}={value!r}" for name, value in options.items() if value]
        facts = vars(self) | {
            "task": _one_line(self.task),
            "base": f"`{_one_line(self.base_model)}`"
            + (f" (revision `{self.revision}`)" if self.revision else ""),
            "base_argument": shlex.quote(self.base_model),
            "load_arguments": ", ".join([repr(self.base_model), *given]),
            "method": _GEM if self.method == "gem" else f"`{_one_line(self.method)}`",
            "density": self.num_trainable / self.num_parameters,
            "delta": 'Delta.load("delta.safetensors")'
            if self.repo is None
            else f"Delta.from_pretrained({self.repo!r})",
        }
        told = "GEM" if self.method == "gem" else self.method
        title = _one_line(f"{Path(self.base_model).name} fine-tuned on {self.task} with {told}")
        of_run = (*["mask"] * self.has_mask, "course", "results")
        files = (self.product, *(of_run if self.repo is None else ()))
        return _CARD.format(
            metadata=self._metadata(title).to_yaml(),
            title=title,
            what=(_SELECTED if self.has_mask else _TRAINED).format(**facts),
            files="\n".join(_FILES[file].format(**facts) for file in files),
            results=self._results() if self.results else "It was not evaluated.",
            use=_USE[self.product].format(**facts),
            settings=_table(("Setting", "Value"), self.settings.items()),
        )

    def _metadata(self, title: str) -> ModelCardData:
        base_model = self.base_model if _is_hub_name(self.base_model) else None
        method, task, dataset = _one_line(self.method), _one_line(self.task), self.dataset
        measured = [
            EvalResult(
                task_type="text-classification" if self.num_labels else "text-generation",
                dataset_type=dataset or task,
                dataset_name=task,
                metric_type=name,
                metric_value=value,
            )
            for name, value in self.results.items()
            if name != TRAINING_LOSS  # which measures the training examples
        ]
        return ModelCardData(
            library_name="gem_ds",
            license=self.license,
            base_model=base_model,
            base_model_relation=base_model and "finetune",
            datasets=[dataset] if dataset is not None and _is_hub_name(dataset) else None,
            tags=[method, *["sparse-fine-tuning"] * self.has_mask, "deepspeed", task],
            model_name=title,
            eval_results=measured or None,
        )

    def _results(self) -> str:
        if not self.base_results:
            return _table(("Metric", "Fine-tuned"), self.results.items())
        rows = [(k, self.base_results.get(k, "not measured"), v) for k, v in self.results.items()]
        return _table(("Metric", "Base model", "Fine-tuned"), rows)


def _is_hub_name(name: str) -> bool:
    """Whether the Hub takes it: ``repository`` or ``owner/repository``, and no folder here."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).is_dir()


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    def cell(value: object) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return _one_line(text).replace("|", "\\|")

    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
