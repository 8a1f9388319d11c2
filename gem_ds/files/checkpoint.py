"""Checkpoints that know no topology: whole vectors in mask order, and the step.

    checkpoint-N/
      mask.safetensors        which entries
      optimizer.safetensors   master, exp_avg, exp_avg_sq: fp32 [K], and where a head is trained
                              head.master and so on: fp32 [its size]; metadata: updates, loss
                              scale, what the run must still agree with to go on, and the digests
                              of the other two files
      trainer_state.json      step, epoch and log history, with the names of transformers

The position in the data, random generators and the learning rate are functions of the seed, the
step and the number of updates. A folder has its name only while it is whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gem_ds.distributed.optim import STATE_KEYS
from gem_ds.errors import refusing
from gem_ds.files.atomic import beside, save_json
from gem_ds.files.delta import Delta
from gem_ds.files.digests import checksum, digest_of_file
from gem_ds.files.manifest import (
    atomic_folder,
    clear_leftovers,
    delete_folder,
    foreign_files,
    is_ours,
)
from gem_ds.files.mask import Mask
from gem_ds.files.schema import STRICT, from_json
from gem_ds.files.tensors import load_tensors, save_tensors

CHECKPOINT_KIND = "gem_checkpoint"
_HEAD = "head."
_FOLDER = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\.[0-9a-f]{8}\.(?:tmp|old)")
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
_MASK = "mask.safetensors"

Count = Annotated[int, Field(ge=0, lt=2**53)]  # 2^53: what a JSON number surely holds


@dataclass(kw_only=True)
class TrainerState:
    """Progress of a run, as ``trainer_state.json`` shows it."""

    global_step: Count = 0
    max_steps: Count = 0
    epoch: Annotated[float, Field(ge=0)] = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    unlogged_losses: list[float] = field(default_factory=list)  # since the last log entry
    settings: dict[str, Any] = field(default_factory=dict)  # flags that say how a step is taken
    # Of each target layer where layers are drawn: how likely it is, and its updates so far.
    layer_probabilities: list[float] = field(default_factory=list)
    layer_updates: list[int] = field(default_factory=list)
    __pydantic_config__ = STRICT

    def save(self, folder: Path) -> None:
        """Write ``trainer_state.json`` into a folder, atomically."""
        save_json(folder / STATE_FILE, asdict(self))


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a run must keep from one session to the next; the world size is not in it."""

    global_batch_size: Annotated[Count, Field(ge=1)]  # examples per step, over all ranks
    seed: int  # of the order of the data
    data: str  # fingerprint of the encoded examples, their rows and the kind of their order
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """The metadata of ``optimizer.safetensors``."""

    num_updates: Count
    loss_scale: Annotated[float, Field(gt=0)]
    identity: RunIdentity
    # Old ones have neither of these.
    head_shapes: dict[str, tuple[Count, ...]] = field(default_factory=dict)
    file_digests: dict[str, str] = field(default_factory=dict)  # of the other two files
    __pydantic_config__ = STRICT


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run needs to go on."""

    mask: Mask
    vectors: dict[str, Tensor]  # by `STATE_KEYS`: fp32 [K], in the mask's order
    num_updates: int  # those applied: fewer than steps where fp16 skipped some
    loss_scale: float  # of fp16
    identity: RunIdentity
    state: TrainerState
    # Of a task head, if there is one: its vectors, and its parameters' shapes in their order.
    head_vectors: dict[str, Tensor] = field(default_factory=dict)
    head_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        """Entries of the task head."""
        return self.head_vectors["master"].numel() if self.head_vectors else 0

    def digest(self) -> str:
        """A fingerprint of what a resumed run starts from, the mask left out."""
        vectors = [checksum(v) for v in (*self.vectors.values(), *self.head_vectors.values())]
        numbers = self.state.global_step, self.num_updates, self.loss_scale
        return repr((vectors, numbers))

    def delta(self) -> Delta:
        """The weights at this step, as a run writes them that ends here."""
        dtype: torch.dtype = getattr(torch, self.mask.dtype)
        sizes = [index.numel() for index in self.mask.indices.values()]
        parts = self.vectors["master"].to(dtype).split(sizes)
        values = dict(zip(self.mask.indices, parts, strict=True))
        shapes, head = self.head_shapes, {}
        sizes = [math.prod(shape) for shape in shapes.values()]
        if sum(sizes) != self.head_size:
            raise ValueError("it does not name its head's parameters, as those of older versions")
        if shapes:
            split = self.head_vectors["master"].to(dtype).split(sizes)
            head = {n: p.view(shapes[n]) for n, p in zip(shapes, split, strict=True)}
        return Delta(mask=self.mask, values=values, head=head)

    def save(self, output_dir: Path) -> Path:
        """Write ``checkpoint-N``; raises OSError as :func:`atomic_folder`."""
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        atomic_folder(folder, self._write)
        return folder

    def _write(self, folder: Path) -> None:
        self.mask.save(folder / _MASK)
        self.state.save(folder)
        numbers = _Numbers(
            num_updates=self.num_updates,
            loss_scale=self.loss_scale,
            identity=self.identity,
            head_shapes=self.head_shapes,
            file_digests={name: digest_of_file(folder / name) for name in (_MASK, STATE_FILE)},
        )
        head = {f"{_HEAD}{key}": vector for key, vector in self.head_vectors.items()}
        tensors = self.vectors | head
        save_tensors(folder / OPTIMIZER_FILE, tensors, asdict(numbers), kind=CHECKPOINT_KIND)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint folder; a ValueError says what of it is damaged."""
        if not (folder / OPTIMIZER_FILE).is_file():
            raise ValueError(
                f"{folder} is not a checkpoint of gem_ds: pass a checkpoint-N folder, or last."
            )
        with told_as_damaged(folder):
            tensors, metadata = load_tensors(folder / OPTIMIZER_FILE, CHECKPOINT_KIND)
            numbers = from_json(_Numbers, json.dumps(metadata))
            check_file_digests(folder, numbers.file_digests)
            mask = Mask.load(folder / _MASK)
            head = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
            vectors = {key: v for key, v in tensors.items() if not key.startswith(_HEAD)}
            _check_vectors(vectors, mask.num_selected)
            if head:
                _check_vectors(head, len(next(iter(head.values()))))
            state = from_json(TrainerState, (folder / STATE_FILE).read_bytes())
            step, named = state.global_step, _FOLDER.fullmatch(folder.name)
            if numbers.num_updates > step:
                raise ValueError(f"it counts {numbers.num_updates} updates in {step} steps")
            if named and int(named[1]) != step:
                raise ValueError(f"its trainer_state.json is of step {step}")
            own = {key: value for key, value in vars(numbers).items() if key != "file_digests"}
            return cls(mask=mask, vectors=vectors, head_vectors=head, state=state, **own)


def load_delta(path: str | Path) -> Delta:
    """A delta file, or the weights at the step of a ``checkpoint-N`` folder."""
    path = Path(path)
    if not path.is_dir():
        return Delta.load(path)
    checkpoint = Checkpoint.load(path)
    problem = f"{path} gives no delta ({{}}): pass the delta.safetensors of the finished run."
    with refusing(problem, ValueError):
        return checkpoint.delta()


def told_as_damaged(folder: Path) -> AbstractContextManager[None]:
    """Tells what is wrong with the files of a checkpoint, and what to do."""
    problem = f"{folder} is damaged ({{}}): resume an earlier one."
    return refusing(problem, ValueError, FileNotFoundError)


def check_file_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Refuse files of a checkpoint, by their paths in it, that are not as they were written."""
    for name, digest in digests.items():
        if digest_of_file(folder / name) != digest:
            raise ValueError(f"{name} is not the one that was saved with it")


def _check_vectors(vectors: Mapping[str, Tensor], size: int) -> None:
    """Refuses what are no masters and moments of so many entries."""
    found = {name: (tuple(vector.shape), vector.dtype) for name, vector in vectors.items()}
    if found != dict.fromkeys(STATE_KEYS, ((size,), torch.float32)):
        raise ValueError("its optimizer state does not fit its mask")
    for name in ("master", "exp_avg"):
        if not vectors[name].isfinite().all():
            raise ValueError(f"its {name} holds NaN or infinity")
    if not (vectors["exp_avg_sq"] >= 0).all():  # it may overflow, which only stops an entry
        raise ValueError("its exp_avg_sq holds NaN or negative numbers")


def list_checkpoints(output_dir: Path) -> dict[int, Path]:
    """The checkpoint folders of a run by their step, ascending; not all so named are any."""
    named = {int(m[1]): p for p in output_dir.glob("*") if (m := _FOLDER.fullmatch(p.name))}
    found = {n: p for n, p in named.items() if is_ours(p) or (p / OPTIMIZER_FILE).is_file()}
    return dict(sorted(found.items()))


def remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed run left of a checkpoint that it was writing or deleting."""
    found = (_LEFTOVER.fullmatch(path.name) for path in output_dir.glob(".checkpoint-*"))
    for name in {match[1] for match in found if match}:
        clear_leftovers(output_dir / name)


def delete_old_checkpoints(output_dir: Path, limit: int, best: int | None = None) -> None:
    """Delete all but the newest ``limit``, of which one may be the ``best``, by its step, instead.

    The newest stays. Each loses its name before its files, but for one that somebody has put a file
    into, which keeps it.
    """
    folders = {n: folder for n, folder in list_checkpoints(output_dir).items() if is_ours(folder)}
    kept = list(folders)[-limit:]
    if best is not None and best not in kept:
        kept = [best, *(kept[1:] or kept)]
    for old in [folder for step, folder in folders.items() if step not in kept]:
        is_shared = bool(foreign_files(old))
        delete_folder(old if is_shared else old.rename(beside(old, "tmp")))


def find_checkpoint(output_dir: Path, resume_from: str) -> Path:
    """The checkpoint that ``--resume_from_checkpoint`` means."""
    if resume_from != "last":
        return Path(resume_from)
    if checkpoints := list_checkpoints(output_dir):
        return checkpoints[max(checkpoints)]
    raise ValueError(
        f"{output_dir} holds no checkpoint to resume: leave --resume_from_checkpoint out."
    )
