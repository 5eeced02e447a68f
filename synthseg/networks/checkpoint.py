"""The file of a trained network: weights, config, label table, templates, versions and figures in one safetensors.

Nothing is unpickled, so a weights file cannot run code. Everything that its record says is checked before memory is
asked for on its word: a network is built without memory first, and compared with the tensors of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from synthseg.config import NetworkConfig, TrainConfig, parse
from synthseg.errors import CheckpointError, ConfigError, LabelError, OutputError
from synthseg.labels import LabelTable
from synthseg.networks.backbone import SegmentationNetwork, load_weights, weights_of
from synthseg.paths import data_dir

FORMAT = "synthseg-model-1"
FEATURE_FORMAT = "synthseg-features-1"  # of feature_file.py
MAX_RECORD_BYTES = 32 * 2**20
MAX_CLASSES = 255  # class indices are kept as uint8
MAX_LEVELS = 10
MAX_WINDOW_VOXELS = 320**3
VOXEL_SIZES_MM = (0.1, 16.0)
_FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
DAMAGE = (SafetensorError, OSError, KeyError, ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Model:
    """A trained network and what inference must know of it.

    Attributes
    ----------
    network : (B, 1, D, H, W) intensities in [0, 1] -> logits (B, n_classes, D, H, W).
    voxel_size_mm, window : isotropic voxel size and patch (D, H, W) of its training.
    record : everything else of the file: config, templates, steps, versions, validation figures.
    path : the file it was read from, if it was; its calibration of quality lies beside it.
    """

    network: SegmentationNetwork
    labels: LabelTable
    voxel_size_mm: float
    window: tuple[int, int, int]
    multiple: int
    name: str
    sha256: str
    record: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


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
    with opened(path) as (file, record):
        return {key: file.get_tensor(key) for key in file.keys()}, record  # noqa: SIM118


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and record of a network, for segmentation or of features. Raises CheckpointError on any other file."""
    tensors, record = read_tensors(path)
    if record.get("format") not in (FORMAT, FEATURE_FORMAT):
        raise CheckpointError(
            f"{path}: holds no network (it may be the state of a run); give a model of the run, as "
            "best.safetensors, last.safetensors or pretrained.safetensors"
        )
    try:
        heads = record["heads"].values() if record["format"] == FEATURE_FORMAT else [{**record, "task": "segmentation"}]
        for labels in [head["labels"] for head in heads if head["task"] == "segmentation"]:
            LabelTable.from_dict(labels)
        if not all(isinstance(record["config"][part], dict) for part in ("network", "generator")):
            raise ValueError("its config is not whole")
    except (LabelError, AttributeError, *DAMAGE) as error:
        raise CheckpointError(f"{path}: its record is damaged or of another version ({plain_text(error)})") from None
    return tensors, record


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """An open safetensors file and its record. Whatever is wrong with it inside becomes a CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["record"]
            if len(text) > MAX_RECORD_BYTES:
                raise ValueError(f"its record has {len(text)} characters, expected at most {MAX_RECORD_BYTES}")
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"its record is a {type(record).__name__}")
            yield file, record
    except DAMAGE as error:
        raise CheckpointError(f"{path}: not a synthseg weights file, or damaged ({plain_text(error)})") from None


def plain_text(error: BaseException, most: int = 300) -> str:
    """The text of an error on one line: what it quotes of a file may be long, or hold codes that steer a terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ..."


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


def shipped_models(file_format: str = FORMAT) -> list[str]:
    """Names of the models that ship: those that segment, or with ``FEATURE_FORMAT`` those for other tasks."""
    folder = _weights_folder()
    found = []
    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        with opened(path) as (_, record):
            found += [path.stem] if record.get("format") == file_format else []
    return found


def model_path(name_or_path: str | Path) -> Path:
    """A weights file: a path, or the name of one that ships."""
    path = Path(name_or_path)
    folder = _weights_folder()
    try:
        if path.is_file():
            return path
        if folder and (folder / f"{name_or_path}.safetensors").is_file():
            return folder / f"{name_or_path}.safetensors"
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"{name_or_path}: cannot be read ({error.strerror}); check the path") from None
    known = ", ".join(path.stem for path in sorted(folder.glob("*.safetensors"))) if folder else "none"
    raise CheckpointError(f"{name_or_path}: no such weights file and no such model; models that ship: {known}")


def load_model(name_or_path: str | Path, device: torch.device | str = "cpu") -> Model:
    """Load a network for inference. Raises CheckpointError if the file is missing, damaged or of another format."""
    path = model_path(name_or_path)
    with opened(path) as (file, record):
        config, labels = _description(path, record)
        network = _network(path, config, labels, file)
    return Model(
        network=network.to(device).eval(),
        labels=labels,
        voxel_size_mm=config.generator.voxel_size_mm,
        window=config.generator.shape,
        multiple=network.multiple,
        name=path.stem,
        sha256=sha256_of(path),
        path=path,
        record=record,
    )


def _description(path: Path, record: dict[str, Any]) -> tuple[TrainConfig, LabelTable]:
    """Config and label table of a record, within the limits of what can be run."""
    if record.get("format") == FEATURE_FORMAT:
        raise CheckpointError(
            f"{path}: holds features, not a segmentation; models that segment: {', '.join(shipped_models()) or 'none'};"
            f" to train one on these features: synthseg train RECIPE --from {path}"
        )
    if record.get("format") != FORMAT:
        got = plain_text(ValueError(repr(record.get("format"))), 60)
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {got}; update synthseg or the file")
    try:
        config = parse(TrainConfig, record["config"], "its config")
        labels = LabelTable.from_dict(record["labels"])
        _check_limits(config, labels)
    except (ConfigError, LabelError, AttributeError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path}: its record is damaged or of another version ({plain_text(error)}); update synthseg or the file"
        ) from None
    return config, labels


def _check_limits(config: TrainConfig, labels: LabelTable) -> None:
    """Raise ValueError where the record asks for more than any scan could be segmented with."""
    if not 2 <= len(labels) <= MAX_CLASSES:
        raise ValueError(f"it has {len(labels)} labels, expected 2 to {MAX_CLASSES}")
    check_limits(config.network, config.generator.shape, config.generator.voxel_size_mm)


def check_limits(network: NetworkConfig, window: tuple[int, ...], voxel_size_mm: float) -> None:
    """Raise ValueError where a record asks for a network or a patch that no computer could run."""
    if len(network.channels) > MAX_LEVELS:
        raise ValueError(f"its network has {len(network.channels)} levels, expected at most {MAX_LEVELS}")
    if math.prod(window) > MAX_WINDOW_VOXELS:
        raise ValueError(f"its window is {' x '.join(map(str, window))}, expected at most {MAX_WINDOW_VOXELS} voxels")
    if not VOXEL_SIZES_MM[0] <= voxel_size_mm <= VOXEL_SIZES_MM[1]:
        raise ValueError(f"its voxel size is {voxel_size_mm:g} mm, expected {VOXEL_SIZES_MM[0]} to {VOXEL_SIZES_MM[1]}")


class _Untouched(TorchFunctionMode):
    """Random first values are not drawn. On the meta device, drawing them would import torch's compiler: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Networks made inside have shapes and no memory, until `to_empty` and the weights of a file."""
    with torch.device("meta"), _Untouched():
        yield


def _network(path: Path, config: TrainConfig, labels: LabelTable, file: Any) -> SegmentationNetwork:
    """The network of a config with the weights of an open file, on the CPU."""
    try:
        with shapes_alone():
            network = SegmentationNetwork(config.network, len(labels))
        check_fit(weights_of(network), {key: file.get_slice(key) for key in file.keys()})  # noqa: SIM118
        network = network.to_empty(device="cpu")
        load_weights(network, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        check_values(weights_of(network))
    except (ConfigError, RuntimeError, AttributeError, ZeroDivisionError, *DAMAGE) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit its config, or are damaged ({plain_text(error)})"
        ) from None
    return network


def check_fit(own: dict[str, torch.Tensor], stored: dict[str, Any]) -> None:
    """Raise ValueError unless names, shapes and kinds of number of the stored tensors are those of the network."""
    if set(own) != set(stored):
        missing, unknown = sorted(set(own) - set(stored))[:3], sorted(set(stored) - set(own))[:3]
        raise ValueError(f"missing {missing}, unknown {unknown}")
    for name, tensor in own.items():
        shape, dtype = tuple(stored[name].get_shape()), str(stored[name].get_dtype())
        if shape != tuple(tensor.shape):
            raise ValueError(f"{name} has shape {shape}, expected {tuple(tensor.shape)}")
        if (dtype in _FLOATS) != tensor.is_floating_point():
            raise ValueError(f"{name} is stored as {dtype}, which is not how a weights file holds it")


def check_values(weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError on weights with which a network computes nothing, without a word."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ValueError(f"{name} is a variance and below zero")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
