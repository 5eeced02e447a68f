"""The file of a feature network: body, heads and what each head says, in one safetensors.

The same kind of file as that of a segmentation network (`checkpoint`), with the same checks before memory is asked for.
An ordinary segmentation network is read as well: its last layer is the head "segmentation".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from synthseg.config import NetworkConfig, RunConfig, parse
from synthseg.config.base import Length, Section, Triple
from synthseg.errors import CheckpointError, ConfigError, LabelError
from synthseg.labels import LabelTable
from synthseg.networks.backbone import load_weights, weights_of
from synthseg.networks.checkpoint import (
    DAMAGE,
    FEATURE_FORMAT,
    FORMAT,
    MAX_CLASSES,
    check_fit,
    check_limits,
    check_values,
    model_path,
    opened,
    plain_text,
    save_tensors,
    sha256_of,
    shapes_alone,
)
from synthseg.networks.features import FeatureNetwork, feature_weights, segmentation_weights

MAX_HEADS = 64
MAX_HEAD_CHANNELS = 4096
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class FeatureModel:
    """A network of features and what inference must know of it.

    Attributes
    ----------
    network : (B, 1, D, H, W) intensities in [0, 1] -> features of each level (`FeatureNetwork`), with its heads.
    voxel_size_mm, window : isotropic voxel size and patch (D, H, W) of its training.
    heads : for each head ``task`` ("segmentation", "reconstruction", "super-resolution", "bias-field", ...), for a
        segmentation the ``labels`` (a label table as a dict), and whatever else was saved of it.
    record : everything else of the file: config, templates, steps, versions, validation figures.
    """

    network: FeatureNetwork
    voxel_size_mm: float
    window: tuple[int, int, int]
    multiple: int
    heads: dict[str, dict[str, Any]]
    name: str
    sha256: str
    record: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def head_for(self, task: str) -> str:
        """The name of the head for a task. Raises CheckpointError if there is none, or several."""
        found = [name for name, head in self.heads.items() if head["task"] == task]
        if len(found) == 1:
            return found[0]
        has = ", ".join(f"{name} ({head['task']})" for name, head in self.heads.items()) or "none"
        what = f"{len(found)} heads" if found else "no head"
        raise CheckpointError(
            f"{self.path or self.name}: has {what} for {task} (its heads: {has}); make a file with one: "
            f"synthseg finetune --task {task} --init {self.path or self.name}"
        )

    def labels_of(self, head: str) -> LabelTable:
        """The classes of a segmentation head."""
        return LabelTable.from_dict(self.heads[head]["labels"])


class _Grid(Section):
    voxel_size_mm: Length
    shape: Triple


def save_features(
    path: Path,
    network: FeatureNetwork,
    config: RunConfig,
    heads: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Any],
) -> None:
    """Save weights as float16 with all that inference needs; ``heads`` says of each head its task, and its labels.

    Raises ValueError unless ``heads`` names the heads of the network, each with a task.
    """
    described = {name: dict(head) for name, head in heads.items()}
    _check_heads(described, {name: _channels(network, name) for name in network.heads})
    record = {"format": FEATURE_FORMAT, "config": config.model_dump(mode="json"), "heads": described, **extra}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights_of(network).items()}
    save_tensors(path, weights, record)


def load_features(name_or_path: str | Path, device: torch.device | str = "cpu") -> FeatureModel:
    """Load a feature network, or an ordinary segmentation network as one, in evaluation mode.

    Raises CheckpointError if the file is missing, damaged, of another format, or of a body without such features.
    """
    path = model_path(name_or_path)
    with opened(path) as (file, record):
        network_config, grid = _description(path, record)
        try:
            with shapes_alone():
                FeatureNetwork(network_config)  # says so if this body has no such features
            stored = feature_weights({key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118
            channels = _stored_heads(stored, network_config.subpixel**3)
            heads = _heads(record)
            _check_heads(heads, channels)
            with shapes_alone():
                network = FeatureNetwork(network_config, channels)
            check_fit(weights_of(network), stored)
            network = network.to_empty(device="cpu")
            load_weights(network, feature_weights({key: file.get_tensor(key) for key in file.keys()}))  # noqa: SIM118
            check_values(weights_of(network))
        except (ConfigError, LabelError, RuntimeError, AttributeError, ZeroDivisionError, *DAMAGE) as error:
            raise CheckpointError(
                f"{path}: its weights do not fit its record, or are damaged ({plain_text(error)})"
            ) from None
    return FeatureModel(
        network=network.to(device).eval(),
        voxel_size_mm=grid.voxel_size_mm,
        window=grid.shape,
        multiple=network.multiple,
        heads=heads,
        name=path.stem,
        sha256=sha256_of(path),
        record=record,
        path=path,
    )


def is_features(record: Mapping[str, Any]) -> bool:
    """Whether the record of a weights file is that of a feature network."""
    return record.get("format") == FEATURE_FORMAT


def as_feature_weights(
    weights: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Weights of any of our files under the names of a FeatureNetwork, and what its heads are."""
    return (dict(weights) if is_features(record) else feature_weights(weights)), _heads(record)


def as_segmentation_weights(
    weights: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], LabelTable | None]:
    """Weights of any of our files under the names of a SegmentationNetwork, and its classes.

    Of a feature network, body and segmentation head; without such a head, the body alone and None.
    """
    if not is_features(record):
        return dict(weights), LabelTable.from_dict(record["labels"])
    heads = _heads(record)
    name = next((name for name, head in heads.items() if head["task"] == "segmentation"), None)
    labels = None if name is None else LabelTable.from_dict(heads[name]["labels"])
    return segmentation_weights(weights, name or ""), labels


def _channels(network: FeatureNetwork, name: str) -> int:
    return int(network.get_parameter(f"heads.{name}.weight").shape[0]) // network.config.subpixel**3


def _stored_heads(stored: Mapping[str, Any], cells: int) -> dict[str, int]:
    """Name and channels of the heads among stored tensors. Raises ValueError on names and numbers that no head has."""
    found = {}
    for name, tensor in stored.items():
        if name.startswith("heads.") and name.endswith(".weight"):
            head, channels = name.removeprefix("heads.").removesuffix(".weight"), tensor.get_shape()[0]
            if channels % cells or not 0 < channels // cells <= MAX_HEAD_CHANNELS:
                raise ValueError(f"head {head} has {channels} channels for blocks of {cells} voxels")
            found[head] = channels // cells
    return found


def _description(path: Path, record: dict[str, Any]) -> tuple[NetworkConfig, _Grid]:
    """Network and grid of a record, within the limits of what can be run."""
    if record.get("format") not in (FORMAT, FEATURE_FORMAT):
        got = plain_text(ValueError(repr(record.get("format"))), 60)
        raise CheckpointError(f"{path}: expected format {FEATURE_FORMAT} or {FORMAT}, got {got}; update synthseg")
    try:
        config = record["config"]
        network = parse(NetworkConfig, config["network"], "its network")
        grid = parse(_Grid, {key: config["generator"][key] for key in _Grid.model_fields}, "its generator")
        check_limits(network, grid.shape, grid.voxel_size_mm)
    except (ConfigError, AttributeError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path}: its record is damaged or of another version ({plain_text(error)}); update synthseg or the file"
        ) from None
    return network, grid


def _heads(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the heads of a file are."""
    if not is_features(record):
        return {"segmentation": {"task": "segmentation", "labels": record["labels"]}}
    return {name: dict(head) for name, head in record["heads"].items()}


def _check_heads(heads: Mapping[str, Mapping[str, Any]], channels: Mapping[str, int]) -> None:
    """Raise ValueError unless every head that has weights is described, well, and no other one."""
    if set(heads) != set(channels):
        raise ValueError(f"it describes the heads {sorted(heads)}, and has {sorted(channels)}")
    if len(heads) > MAX_HEADS:
        raise ValueError(f"it has {len(heads)} heads, expected at most {MAX_HEADS}")
    for name, head in heads.items():
        if not _NAME.fullmatch(name) or name in dir(torch.nn.ModuleDict):
            raise ValueError(f"a head cannot be called {name!r}")
        if not isinstance(head.get("task"), str):
            raise ValueError(f"head {name} has no task")
        if head["task"] != "segmentation":
            continue
        labels = LabelTable.from_dict(head["labels"])
        if not 2 <= len(labels) <= MAX_CLASSES or len(labels) != channels[name]:
            raise ValueError(f"head {name} has {channels[name]} channels for {len(labels)} labels")
