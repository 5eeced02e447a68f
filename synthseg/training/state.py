"""What a run carries from step to step, and its file: written whole, checked when read, with the one before kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from synthseg.config import RunConfig
from synthseg.errors import CheckpointError, ConfigError, OutputError
from synthseg.networks.checkpoint import read_tensors, save_tensors

# What a resumed run may not change: its figures and its history would be false.
FIXED_BY_THE_START = (
    *("scheme", "templates", "validation_templates", "validation_contrasts", "validation_scans"),
    *("seed", "batch_size", "init", "grow", "network", "optimiser.name", "generator.voxel_size_mm", "generator.shape"),
)
Tensors = dict[str, torch.Tensor]


@dataclass
class RunState:
    """What a run carries from step to step besides the weights.

    Attributes
    ----------
    seconds : spent on steps.
    best : the highest validation figure so far; -1 before the first.
    validation, validations : the last one, and all with their step.
    loss, dice : running means over about 50 steps. level : the lowest of the loss so far, 0 before it is looked at.
    above : steps in a row that the loss has been far above its level.
    to_validate : the validation after the last step is due, and not done.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    validation: dict[str, Any] = field(default_factory=dict)
    validations: list[dict[str, Any]] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 0.0
    dice: float = 0.0
    level: float = 0.0
    above: int = 0
    to_validate: bool = False

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RunState:
        """From a saved record; what an older or newer version knows otherwise has its default."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


def checksum(tensors: Tensors, record: dict[str, Any]) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors on the CPU, and of a record."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class StateFile:
    """``state.safetensors`` of a run folder, and ``state.previous.safetensors``, the one before.

    A new state is written in full and brought to the disk before it takes the place of the old one, so that there is
    a good one whenever the process is killed or the power fails. One that was damaged later is found out by its
    checksum, and the one before is read instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest = folder / "state.safetensors"
        self.previous = folder / "state.previous.safetensors"
        self._fresh = folder / "state.new.safetensors"
        self._newest_is_good = True

    def save(self, tensors: Tensors, record: dict[str, Any]) -> None:
        """Write a state; the newest so far becomes the one before, unless it was found damaged."""
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        save_tensors(self._fresh, tensors, record | {"checksum": checksum(tensors, record)})
        try:
            if self._newest_is_good and self.newest.is_file():
                self._keep_newest()
            os.replace(self._fresh, self.newest)
            _sync_folder(self.folder)
        except OSError as error:
            raise OutputError(
                f"{self.newest}: cannot be written ({error.strerror}); free space or choose another place"
            ) from error
        self._newest_is_good = True

    def _keep_newest(self) -> None:
        """Give the newest a second name, so that neither is missing at any moment."""
        draft = self.folder / f".synthseg-{self.previous.name}"
        draft.unlink(missing_ok=True)
        try:
            os.link(self.newest, draft)
        except OSError:  # a file system without links
            shutil.copyfile(self.newest, draft)
            with open(draft, "rb") as written:
                os.fsync(written.fileno())
        os.replace(draft, self.previous)

    def load(self) -> tuple[Tensors, dict[str, Any], str]:
        """Tensors, record, and a warning if the newest state is damaged and the one before was read instead."""
        try:
            return *_checked(self.newest), ""
        except CheckpointError as error:
            if not self.previous.is_file():
                raise
            try:
                tensors, record = _checked(self.previous)
            except CheckpointError:
                raise CheckpointError(
                    f"{error}; {self.previous.name} is damaged as well: start anew, with init: last.safetensors"
                ) from None
            self._newest_is_good = False
            return tensors, record, f"{error}; going on from the state before, step {record['state']['step']}"

    def remove_drafts(self) -> None:
        """Remove what a killed process has left half-written in the folder."""
        for pattern in (".*.safetensors-*", ".synthseg-*", self._fresh.name):
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    path.unlink()


def _checked(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and record of a state. Raises CheckpointError if a bit of it has changed since it was written."""
    tensors, record = read_tensors(path)
    written = record.pop("checksum", None)  # states of earlier versions have none
    if written is not None and written != checksum(tensors, record):
        raise CheckpointError(f"{path}: damaged: its content does not agree with its checksum")
    if not isinstance(record.get("state"), dict) or not isinstance(record.get("config"), dict):
        raise CheckpointError(f"{path}: not the state of a run; give the folder of a run")
    return tensors, record


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def check_same_run(config: RunConfig, record: dict[str, Any], path: Path, also: tuple[str, ...] = ()) -> None:
    """Raise ConfigError if a run would go on with what only a new run may have; ``also`` names further such keys."""
    now, default = (json.loads(some.model_dump_json()) for some in (config, type(config)()))
    known = [key for key in (*FIXED_BY_THE_START, *also) if key.partition(".")[0] in now]
    values = {key: (_setting(record["config"], key, _setting(default, key)), _setting(now, key)) for key in known}
    changed = {key: values[key] for key in known if values[key][0] != values[key][1]}
    if changed:
        first, (then, new) = next(iter(changed.items()))
        raise ConfigError(
            f"{path}: the run was started with other {', '.join(changed)} ({first}: {then}, now {new}); "
            "resume with the recipe of the run, or begin a new one with init"
        )


def _setting(record: dict[str, Any], key: str, missing: Any = None) -> Any:
    """The value at a path with dots, or ``missing`` where a record of an earlier version has none."""
    section, _, rest = key.partition(".")
    if section not in record:
        return missing
    return _setting(record[section], rest, missing) if rest else record[section]


def history_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a model file says of the run that made it."""
    config = record.get("config", {})
    return {
        "steps": record.get("steps", 0),
        "batch_size": config.get("batch_size", 1),
        "train_seconds": record.get("train_seconds", 0.0),
        **({"device": record["device"]} if "device" in record else {}),
        "voxel_size_mm": config.get("generator", {}).get("voxel_size_mm"),
        "templates": record.get("templates", []),
    }
