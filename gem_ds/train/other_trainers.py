"""Flags of other trainers' command lines and recipes, said in this one's.

Those of transformers' Trainer and its examples, TRL, LLaMA-Factory, axolotl and the scripts that
follow them. A flag that means the same under another name is renamed, one that has no meaning here
is left out with a word; a value that means something else is refused. What stands in no table is
for :mod:`gem_ds.train.arguments` to know.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Meaning = Callable[[str], dict[str, Any]]

#: Other names of flags.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    **dict.fromkeys(("model_max_length", "max_seq_length", "max_seq_len"), "max_length"),
    **dict.fromkeys(("cutoff_len", "sequence_len", "block_size"), "max_length"),
    **dict.fromkeys(("model_name", "base_model"), "model_name_or_path"),
    "model_revision": "revision",
    "data_path": "train_file",
    **dict.fromkeys(("validation_file", "eval_file"), "test_file"),
    **dict.fromkeys(("max_train_samples", "max_samples"), "train_examples"),
    "lora_rank": "lora_r",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "sample_packing": "packing",
}

#: Flags that decide nothing here, and why.
WITHOUT_EFFECT = {
    name: why
    for why, names in {
        "a run trains, and evaluates where it has examples": "do_train do_eval",
        "examples are read once, before training": """
            dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
            dataloader_prefetch_factor preprocessing_num_workers preprocessing_batch_size
            dataset_num_proc overwrite_cache lazy_preprocess remove_unused_columns use_cache""",
        "DeepSpeed and its launcher decide": """
            ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb
            low_cpu_mem_usage""",
        "metrics.jsonl has every entry": """
            logging_strategy logging_first_step logging_dir plot_loss
            include_num_input_tokens_seen log_level""",
        "a run is called by its --output_dir": "run_name",
        "a run can go on from each of its checkpoints": """
            save_only_model save_safetensors save_on_each_node""",
        "the tokenizer is that of the model's files": "use_fast_tokenizer use_fast",
        "the trainer chooses how activations are recomputed": "gradient_checkpointing_kwargs",
        "the loss is computed without whole logits anyway": "use_liger_kernel",
        "no logits are kept": "eval_accumulation_steps",
    }.items()
    for name in names.split()
}


def _choice(meanings: Mapping[str, dict[str, Any]]) -> Meaning:
    """What a flag means by its value; a ValueError names the values that mean something."""

    def meaning(value: str) -> dict[str, Any]:
        if value.lower() not in meanings:
            raise ValueError(f"cannot be {value} here: pass {' or '.join(meanings)}")
        return meanings[value.lower()]

    return meaning


def _switch(**flags: str) -> Meaning:
    return _choice({"true": flags, "false": _NOTHING})


def _warmup(value: str) -> dict[str, Any]:
    """A share of all steps, which --warmup_steps takes below 1."""
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"must be at least 0 and below 1, not {value}")
    return {"warmup_steps": value}


def _modules(value: str) -> dict[str, Any]:
    return {"target_modules": ["all-linear"] if value == "all" else value.replace(",", " ").split()}


_ADAMW = {
    name: {"optimizer": "adamw"}
    for name in ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused")
} | {
    name: {"optimizer": "adamw_8bit"}
    for name in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
}
_BF16, _FP16, _NOTHING = {"bf16": "true"}, {"fp16": "true"}, dict[str, str]()
_DTYPES = {"bfloat16": _BF16, "float16": _FP16, "float32": _NOTHING, "auto": _NOTHING}
_METHODS = {"lora": {"method": "lora"}, "full": {"method": "full"}}
_FLASH = {"attn_implementation": "flash_attention_2"}

#: Flags whose value says which flags they are here.
MEANINGS: dict[str, Meaning] = {
    "warmup_ratio": _warmup,
    "optim": _choice(_ADAMW),
    **dict.fromkeys(("dtype", "torch_dtype"), _choice(_DTYPES)),
    **dict.fromkeys(("use_peft", "use_lora"), _switch(method="lora")),
    **dict.fromkeys(("finetuning_type", "train_type", "adapter"), _choice(_METHODS)),
    **dict.fromkeys(("lora_target", "lora_target_modules"), _modules),
    "group_by_length": _switch(train_sampling_strategy="group_by_length"),
    "flash_attn": _choice(
        {"fa2": _FLASH, "sdpa": {"attn_implementation": "sdpa"}, "auto": _NOTHING}
    ),
    **dict.fromkeys(("use_flash_attn", "flash_attention"), _switch(**_FLASH)),
    "stage": _choice({"sft": _NOTHING}),
    "lora_task_type": _choice({"causal_lm": _NOTHING}),
}

#: Of flags that are this trainer's too, other words for some values.
OTHER_WORDS = {
    "bf16": {"auto": "true"},  # where the device can, and one that trains can
    "optimizer": {name: flags["optimizer"] for name, flags in _ADAMW.items()},
}


def _meant(name: str, value: Any) -> dict[str, Any]:
    """What a flag says in this trainer's flags; of several words the value is a list."""
    if name not in MEANINGS:
        own = RENAMED.get(name, name)
        word = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(word, str):
            value = OTHER_WORDS.get(own, {}).get(word.lower(), value)
        return {own: value}
    text = " ".join(map(str, value)) or "true" if isinstance(value, list) else str(value)
    try:
        return dict(MEANINGS[name](text))
    except ValueError as error:
        raise ValueError(f"--{name} {error}.") from None


def translate(said: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """Flags and their values in this trainer's words, and the names of those left out.

    Raises:
        ValueError: two names of one flag say different things, or one of them what there is not
            here.
    """
    flags: dict[str, Any] = {}
    sources: dict[str, str] = {}
    left_out = []
    for name, value in said:
        if name in WITHOUT_EFFECT:
            left_out.append(name)
            continue
        for own, own_value in _meant(name, value).items():
            source = sources.setdefault(own, name)
            if source != name and _words(flags[own]) != _words(own_value):
                raise ValueError(f"--{source} and --{name} both say {own}: pass one of them.")
            flags[own] = own_value
    return flags, left_out


def told(left_out: Iterable[str]) -> str:
    """One line on the flags that were left out."""
    reasons: dict[str, list[str]] = {}
    for name in left_out:
        reasons.setdefault(WITHOUT_EFFECT[name], []).append(f"--{name}")
    listed = [f"{', '.join(names)} ({why})" for why, names in reasons.items()]
    return f"These flags decide nothing here: {'; '.join(listed)}"


def _words(value: Any) -> list[str]:
    """A flag's value as a command line writes it; a flag alone is true."""
    words = value if isinstance(value, list) else [value]
    return [str(word).lower() for word in words] or ["true"]
