"""The file of a trained network: weights, config, label table, templates, versions and figures in one safetensors.

Nothing is unpickled, so a weights file cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from synthseg.config import TrainConfig, parse
from synthseg.errors import CheckpointError, ConfigError, LabelError, OutputError
from synthseg.labels import LabelTable
from synthseg.networks.backbone import SegmentationNetwork, load_weights, weights_of
from synthseg.paths import data_dir

FORMAT = "synthseg-model-1"


@dataclass(frozen=True)
class Model:
    """A trained network and what inference must know of it.

    Attributes
    ----------
    network : (B, 1, D, H, W) intensities in [0, 1] -> logits (B, n_classes, D, H, W).
    voxel_size_mm, window : isotropic voxel size and patch (D, H, W) of its training.
    record : everything else of the file: config, templates, steps, versions, validation figures.
    """

    network: SegmentationNetwork
    labels: LabelTable
    voxel_size_mm: float
    window: tuple[int, int, int]
    multiple: int
    name: str
    sha256: str
    record: dict[str, Any] = field(default_factory=dict)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a JSON record beside the target, then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, draft, {"record": json.dumps(record)})
        os.chmod(draft, 0o644)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written ({error}); free space or choose another place") from error
    finally:
        Path(draft).unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and record of a file. Raises CheckpointError if it is not one of ours."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(metadata["record"])
        if not isinstance(record, dict):
            raise ValueError(f"its record is a {type(record).__name__}")
        return tensors, record
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a synthseg weights file, or damaged ({' '.join(str(error).split())})"
        ) from None


def save_model(
    path: Path, network: SegmentationNetwork, config: TrainConfig, labels: LabelTable, extra: dict[str, Any]
) -> None:
    """Save weights as float16 with all that inference needs."""
    record = {"format": FORMAT, "config": config.model_dump(mode="json"), "labels": labels.to_dict(), **extra}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights_of(network).items()}
    save_tensors(path, weights, record)


def _weights_folder() -> Path | None:
    try:
        return data_dir("weights")
    except FileNotFoundError:
        return None


def shipped_models() -> list[str]:
    """Names of the models that ship."""
    folder = _weights_folder()
    return sorted(p.stem for p in folder.glob("*.safetensors")) if folder else []


def model_path(name_or_path: str | Path) -> Path:
    """A weights file: a path, or the name of one that ships."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    folder = _weights_folder()
    if folder and (folder / f"{name_or_path}.safetensors").is_file():
        return folder / f"{name_or_path}.safetensors"
    known = ", ".join(shipped_models()) or "none"
    raise CheckpointError(f"{name_or_path}: no such weights file and no such model; models that ship: {known}")


def load_model(name_or_path: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a network for inference. Raises CheckpointError if the file is missing, damaged or of another format."""
    path = model_path(name_or_path)
    tensors, record = read_tensors(path)
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, got {record.get('format')!r}; update synthseg or the file"
        )
    try:
        config = parse(TrainConfig, record["config"], "its config")
        labels = LabelTable.from_dict(record["labels"])
        network = SegmentationNetwork(config.network, len(labels))
    except (ConfigError, LabelError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its record is damaged or of another version ({' '.join(str(error).split())}); "
            "update synthseg or the file"
        ) from None
    try:
        load_weights(network, tensors)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its weights do not fit its config ({' '.join(str(error).split())[:200]})"
        ) from None
    return Model(
        network=network.to(device).eval(),
        labels=labels,
        voxel_size_mm=config.generator.voxel_size_mm,
        window=config.generator.shape,
        multiple=network.multiple,
        name=path.stem,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        record=record,
    )
