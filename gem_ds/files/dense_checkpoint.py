"""Checkpoints of methods that train whole parameters: DeepSpeed's own, and what a run adds to it.

    checkpoint-N/
      deepspeed/           what DeepSpeed's ``save_checkpoint`` writes: of each rank its part of the
                           masters and moments, and what is trained
      dense.json           what a run must still agree with to go on, updates, digests of all files
      trainer_state.json   as in the checkpoints of sparse methods

Unlike those they go on only on as many ranks, at the same ZeRO stage. DeepSpeed's files are
pickles, which run code when they are loaded: go on from those of people you trust.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gem_ds.files.atomic import save_json
from gem_ds.files.checkpoint import (
    STATE_FILE,
    Count,
    RunIdentity,
    TrainerState,
    check_file_digests,
    told_as_damaged,
)
from gem_ds.files.digests import digest_of_file
from gem_ds.files.schema import STRICT, from_json

DENSE_FILE, DEEPSPEED_FOLDER = "dense.json", "deepspeed"


@dataclass(frozen=True, kw_only=True)
class DenseNumbers:
    """What ``dense.json`` holds."""

    num_updates: Count  # those applied: fewer than steps where fp16 skipped some
    identity: RunIdentity
    settings: dict[str, Any]  # by flag or name: what decides which numbers DeepSpeed's files hold
    file_digests: dict[str, str]  # of all other files, by their paths in the folder
    __pydantic_config__ = STRICT

    def save(self, folder: Path, state: TrainerState) -> None:
        """Write the two JSON files beside DeepSpeed's, whose digests are here."""
        state.save(folder)
        digests = self.file_digests | {STATE_FILE: digest_of_file(folder / STATE_FILE)}
        save_json(folder / DENSE_FILE, asdict(replace(self, file_digests=digests)))


@dataclass(frozen=True, kw_only=True)
class DenseCheckpoint:
    """A checkpoint whose numbers DeepSpeed reads by itself."""

    folder: Path
    numbers: DenseNumbers
    state: TrainerState

    @property
    def num_updates(self) -> int:
        """Updates of the optimizer so far."""
        return self.numbers.num_updates

    @property
    def identity(self) -> RunIdentity:
        """What the run must still agree with."""
        return self.numbers.identity

    def digest(self) -> str:
        """A fingerprint of what a resumed run starts from."""
        return repr((sorted(self.numbers.file_digests.items()), self.num_updates))

    @classmethod
    def load(cls, folder: Path) -> DenseCheckpoint:
        """Read all but DeepSpeed's files; a ValueError says what is damaged."""
        if not (folder / DENSE_FILE).is_file():
            raise ValueError(
                f"{folder} is no checkpoint of a method that trains whole parameters: pass the "
                "--method that wrote it, or another folder."
            )
        with told_as_damaged(folder):
            numbers = from_json(DenseNumbers, (folder / DENSE_FILE).read_bytes())
            state = from_json(TrainerState, (folder / STATE_FILE).read_bytes())
            check_file_digests(folder, {STATE_FILE: numbers.file_digests.get(STATE_FILE, "")})
        return cls(folder=folder, numbers=numbers, state=state)

    def check_files(self, rank: int, world_size: int) -> None:
        """Refuse DeepSpeed's files if one is not as it was written; each rank reads its share."""
        with told_as_damaged(self.folder):
            share = sorted(self.numbers.file_digests.items())[rank::world_size]
            check_file_digests(self.folder, dict(share))

    def refuse_other(self, settings: Mapping[str, Any]) -> None:
        """Refuse a run of other settings than the one that wrote the checkpoint."""
        for name, before in self.numbers.settings.items():
            if (now := settings[name]) != before:
                raise ValueError(
                    f"{self.folder} was written with {name} {_told(before)} and this run has "
                    f"{_told(now)}: go on with the former, or start anew in another folder."
                )


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
