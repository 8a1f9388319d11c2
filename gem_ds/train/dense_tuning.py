"""Fine-tuning whole parameters: of the model itself, or of an adapter that peft adds to it.

What GEM is compared with. DeepSpeed trains them as it always does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gem_ds.distributed.comm import Comm
from gem_ds.distributed.dense_engine import DenseEngine
from gem_ds.distributed.weights import numel
from gem_ds.files.checkpoint import TrainerState
from gem_ds.files.delta import Delta
from gem_ds.files.dense_checkpoint import DEEPSPEED_FOLDER, DenseCheckpoint, DenseNumbers
from gem_ds.files.digests import digest_of_file
from gem_ds.files.fingerprint import fingerprints
from gem_ds.files.manifest import atomic_folder, claim
from gem_ds.files.mask import WeightInfo
from gem_ds.models.adapters import add_adapter, is_of_head
from gem_ds.models.folder import base_folder, write_folder
from gem_ds.select.shards import index_dtype
from gem_ds.train.config import Arguments
from gem_ds.train.methods import ADAPTER_METHODS, product_of
from gem_ds.train.optimizer import make_dense_optimizer
from gem_ds.train.prepare import PreparedRun
from gem_ds.train.results import make_mask
from gem_ds.train.targets import Targets


def trained_network(
    model: PreTrainedModel, args: Arguments, targets: Targets, head: Sequence[str]
) -> Any:
    """The model, or peft's around it, where what ``--method`` trains requires grad and no more."""
    method = args.method
    if method.method in ADAPTER_METHODS:
        return add_adapter(
            model,
            method.method,
            targets.names,
            head,
            seed=args.train.seed,
            rank=method.lora_r if method.method == "lora" else targets.shira_rank,
            lora_alpha=method.lora_alpha,
            lora_dropout=method.lora_dropout,
        )
    trains_all = method.method == "full"
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

    def __init__(self, prepared: PreparedRun, model: Any, head: list[str], comm: Comm) -> None:
        self.prepared, self.comm, self.head = prepared, comm, head
        args = prepared.args
        self.network = trained_network(model, args, prepared.targets, head)
        trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.names = list(trained)
        self.num_trainable = sum(map(numel, trained.values()))
        of_head = {name: p for name, p in trained.items() if is_of_head(name, head)}
        others = [p for name, p in trained.items() if name not in of_head]
        optimizer = make_dense_optimizer(args.train, others, list(of_head.values()))
        self.engine = DenseEngine(self.network, optimizer, prepared.deepspeed, comm)
        self.base: dict[str, Tensor] = {}
        self.fingerprints: dict[str, str] = {}
        if product_of(args.method.method) == "delta":
            self.base = self.engine.whole_parameters(self.names)
            of_base = {n: p for n, p in self.engine.model.named_parameters() if n not in head}
            self.fingerprints = fingerprints(of_base, self.engine.weights.read_entries)
        if isinstance(prepared.checkpoint, DenseCheckpoint):
            self.restore(prepared.checkpoint)
        with comm.agreement():  # what cannot be fetched ends the run before its first step
            if comm.is_main and product_of(args.method.method) == "model":
                commit = getattr(prepared.config, "_commit_hash", None) or args.model.revision
                self.files = base_folder(str(args.model.model_name_or_path), commit)

    def save_checkpoint(self, state: TrainerState) -> None:
        """Write a checkpoint of the present state; called on all ranks, which share the folder."""
        begun = False

        def write(path: Path) -> None:
            nonlocal begun
            begun = True
            numbers = DenseNumbers(
                file_digests=self._save_parts(path),
                num_updates=self.engine.num_updates,
                identity=self.prepared.identity,
                settings=self.prepared.dense_settings,
            )
            numbers.save(path, state)

        with self.comm.agreement():
            try:
                if self.comm.is_main:
                    folder = self.prepared.output_dir / f"checkpoint-{state.global_step}"
                    atomic_folder(folder, write)
                else:
                    self._save_parts(None)
            finally:
                if self.comm.is_main and not begun:  # the others wait for the name of the folder
                    self.comm.broadcast_object(None)

    def restore(self, checkpoint: DenseCheckpoint) -> None:
        """Go to where a checkpoint of this run stands; called on all ranks."""
        with self.comm.agreement():
            checkpoint.check_files(self.comm.rank, self.comm.world_size)
        self.engine.load(checkpoint.folder / DEEPSPEED_FOLDER)

    def _save_parts(self, folder: Path | None) -> dict[str, str]:
        """Each rank writes its part into rank 0's folder; the digests of all, by path in it."""
        shared = self.comm.broadcast_object(folder)
        if shared is None:
            return {}
        error, digests = None, {}
        try:
            for path in self.engine.save(shared / DEEPSPEED_FOLDER):
                digests[str(path.relative_to(shared))] = digest_of_file(path)
        except OSError as caught:
            error = caught
        parts = self.comm.gather_objects((error, digests))  # when all files are there
        errors = [part[0] for part in parts if part[0] is not None]
        if error is not None or (errors and self.comm.is_main):
            raise error or errors[0]
        return {name: digest for _, part in parts for name, digest in part.items()}

    def save_weights(self) -> None:
        """Write what was trained in the form that its users know; called on all ranks."""
        trained = self.engine.whole_parameters(self.names)
        folder = self.prepared.output_dir
        with self.comm.agreement():
            if not self.comm.is_main:
                return
            product = product_of(self.prepared.args.method.method)
            if product == "delta":
                self._delta(trained).save(claim(folder, "delta.safetensors"))
            elif product == "model":
                notes: list[str] = []
                written = self.files, self.network, trained, self.head
                atomic_folder(
                    folder / "model", lambda path: notes.extend(write_folder(path, *written))
                )
                if notes:
                    print(f"Of {folder / 'model'}: {'; '.join(notes)}", flush=True)
            else:
                atomic_folder(
                    folder / "adapter",
                    lambda path: self.network.save_pretrained(path, state_dict=trained),
                )

    def _delta(self, trained: dict[str, Tensor]) -> Delta:
        """Every bias, whole, and the head."""
        biases = {name: value for name, value in trained.items() if name not in self.head}
        indices = {
            name: torch.arange(value.numel(), dtype=index_dtype(value.numel()))
            for name, value in biases.items()
        }
        weights = {n: WeightInfo.of(tuple(v.shape), self.base[n]) for n, v in biases.items()}
        return Delta(
            mask=make_mask(self.prepared, indices, weights, self.fingerprints),
            values={name: value.flatten() for name, value in biases.items()},
            head={name: trained[name] for name in self.head},
        )
