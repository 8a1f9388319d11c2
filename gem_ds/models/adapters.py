"""The adapters of the library peft: LoRA, IA3 and SHiRA, with a head that is trained whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from gem_ds.train.config import Arguments


def add_adapter(
    model: PreTrainedModel,
    args: Arguments,
    targets: Sequence[str],
    shira_rank: int,
    head: Sequence[str],
) -> Any:
    """Put the adapter that ``--method`` names on a model; all but it and the head is frozen.

    LoRA and SHiRA change the target layers of the sparse methods; SHiRA trains about K entries. IA3
    scales what peft's own table names for the architecture, unless ``--target_modules`` says
    otherwise.

    Args:
        model: is changed.
        args: the flags.
        targets: names of the target weights; IA3 may have none.
        shira_rank: with SHiRA its rank.
        head: names of the parameters of the head.

    Raises:
        ValueError: peft does not know where IA3 belongs in this model.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns
    from peft import IA3Config, LoraConfig, PeftConfig, ShiraConfig, get_peft_model

    torch.manual_seed(args.train.seed)
    modules = [name.removesuffix(".weight") for name in targets]
    common: dict[str, Any] = {"modules_to_save": _owners(head) or None}
    config: PeftConfig
    if args.method.method == "lora":
        config = LoraConfig(
            r=args.method.lora_r,
            lora_alpha=args.method.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=args.method.lora_dropout,
            target_modules=modules,
            **common,
        )
    elif args.method.method == "shira":
        config = ShiraConfig(r=shira_rank, target_modules=modules, **common)
    elif args.method.target_modules:
        config = IA3Config(target_modules=modules, feedforward_modules=[], **common)
    else:
        config = IA3Config(**common)
    try:
        # In the model's dtype: the optimizer keeps fp32 masters of what DeepSpeed trains, and its
        # stage 3 takes no two dtypes.
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if args.method.method != "ia3":
            raise
        raise ValueError(
            f"peft does not know where IA3 belongs in a {model.config.model_type} model: name the "
            "layers with --target_modules."
        ) from error


def is_of_head(name: str, head: Sequence[str]) -> bool:
    """Whether a parameter, perhaps renamed by peft, is the head's."""
    return name in head or ".modules_to_save." in name


def _owners(head: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in head})
