"""Fine-tuning whole parameters: of the model itself, or of an adapter that peft adds to it.

What GEM is compared with. DeepSpeed trains them as it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.engine import DenseEngine
from gem_ds.distributed.weights import numel
from gem_ds.files.atomic import atomic_folder
from gem_ds.files.delta import Delta
from gem_ds.files.mask import Mask, WeightInfo, index_dtype
from gem_ds.models.adapters import add_adapter, is_of_head
from gem_ds.train.config import Arguments
from gem_ds.train.methods import ADAPTER_METHODS, product_of
from gem_ds.train.optimizer import make_dense_optimizer
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.reporting import Reporter
from gem_ds.train.results import run_settings


def trained_network(
    model: PreTrainedModel,
    args: Arguments,
    targets: Sequence[str],
    shira_rank: int,
    head: Sequence[str],
) -> Any:
    """The model, or peft's around it, where what ``--method`` trains requires grad and no more.

    Raises:
        ValueError: there is nothing to train but the head.
    """
    if args.method.method in ADAPTER_METHODS:
        return add_adapter(
            model,
            args.method.method,
            targets,
            head,
            seed=args.train.seed,
            rank=args.method.lora_r if args.method.method == "lora" else shira_rank,
            lora_alpha=args.method.lora_alpha,
            lora_dropout=args.method.lora_dropout,
        )
    trains_all = args.method.method == "full"
    biases = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if not trains_all and biases.issubset(head):
        raise ValueError(
            f"{args.model.model_name_or_path} has no biases, which is what --method bitfit trains: "
            "pass another method."
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_all or name in biases or name in head)
    return model


class DenseTuning:
    """Whole parameters of a model, and its head if it has one."""

    def __init__(
        self,
        args: Arguments,
        prepared: PreparedRun,
        model: PreTrainedModel,
        head: list[str],
        comm: Comm,
    ) -> None:
        self.args, self.prepared, self.comm = args, prepared, comm
        self.head = head
        network = trained_network(model, args, prepared.targets, prepared.shira_rank, head)
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]
        self.num_trainable = sum(numel(network.get_parameter(name)) for name in self.names)
        named = dict(network.named_parameters())
        of_head = [named[name] for name in self.names if is_of_head(name, head)]
        others = [named[name] for name in self.names if not is_of_head(name, head)]
        optimizer = make_dense_optimizer(args.train, others, of_head)
        self.engine = DenseEngine(network, optimizer, prepared.deepspeed, comm)
        self.network = network
        self.base = self._trained() if args.method.method == "bitfit" else {}

    def describe(self, reporter: Reporter) -> dict[str, float]:
        """Say what will be trained; returns what to log of it."""
        reporter.say(
            f"Training {self.num_trainable:,} parameters"
            + (" and with them the head" if self.head else "")
            + f"; the base model has {self.prepared.num_parameters:,}"
        )
        return {"num_trainable": self.num_trainable}

    def save_weights(self) -> None:
        """Write what was trained in the form that its users know; called on all ranks.

        ``model/``, a Hugging Face folder, for full fine-tuning; ``adapter/``, peft's folder;
        ``delta.safetensors`` with every bias for bitfit.
        """
        trained = self._trained()
        folder = self.prepared.output_dir
        with self.comm.agreement():
            if not self.comm.is_main:
                return
            product = product_of(self.args.method.method)
            if product == "delta":
                self._delta(trained).save(folder / "delta.safetensors")
            elif product == "model":
                atomic_folder(folder / "model", lambda path: self._save_model(path, trained))
            else:
                atomic_folder(
                    folder / "adapter",
                    lambda path: self.network.save_pretrained(path, state_dict=trained),
                )

    def _trained(self) -> dict[str, Tensor]:
        """The trained parameters, whole, on rank 0."""
        return self.engine.whole_parameters(self.names)

    def _save_model(self, folder: Path, trained: dict[str, Tensor]) -> None:
        # Names that transformers would write back if it had read them; at ZeRO stage 3 it takes all
        # that it knows for read, and would name a LayerNorm's weight gamma.
        self.network._weight_conversions = None
        self.network.save_pretrained(folder, state_dict=trained)
        self.prepared.tokenizer.save_pretrained(folder)

    def _delta(self, trained: dict[str, Tensor]) -> Delta:
        biases = {name: value for name, value in trained.items() if name not in self.head}
        mask = Mask(
            indices={
                name: torch.arange(value.numel(), dtype=index_dtype(value.numel()))
                for name, value in biases.items()
            },
            weights={
                name: WeightInfo.of(value.shape, self.base[name]) for name, value in biases.items()
            },
            base_model=str(self.args.model.model_name_or_path),
            revision=self.args.model.revision,
            method="bitfit",
            settings=run_settings(self.args, self.prepared),
        )
        head = {name: trained[name] for name in self.head}
        return Delta(mask=mask, values={n: v.flatten() for n, v in biases.items()}, head=head)
