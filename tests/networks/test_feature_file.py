"""The file of a feature network: round trip, ordinary models as one, and files that are damaged or lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from synthseg.config import PretrainConfig, TrainConfig, parse
from synthseg.errors import CheckpointError
from synthseg.labels import load_scheme
from synthseg.networks.backbone import SegmentationNetwork, load_weights
from synthseg.networks.checkpoint import load_model, read_tensors, read_weights, save_model, save_tensors
from synthseg.networks.feature_file import (
    FeatureModel,
    as_feature_weights,
    as_segmentation_weights,
    load_features,
    save_features,
)
from synthseg.networks.features import FeatureNetwork

RECORD: dict[str, Any] = {
    "generator": {"shape": [16, 24, 32], "voxel_size_mm": 1.5},
    "network": {"channels": [4, 8, 12], "norm": "batch"},
}
CONFIG = parse(PretrainConfig, RECORD, "test")
LABELS = load_scheme("siam16")
HEADS: dict[str, dict[str, Any]] = {
    "anatomy": {"task": "reconstruction"},
    "segmentation": {"task": "segmentation", "labels": LABELS.to_dict()},
}


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(0)
    network = FeatureNetwork(CONFIG.network, {"anatomy": 1, "segmentation": len(LABELS)})
    network(torch.rand(2, 1, 16, 16, 32))  # so that running statistics are not their defaults
    return network.eval()


@pytest.fixture
def file(network: FeatureNetwork, tmp_path: Path) -> Path:
    save_features(tmp_path / "mine.safetensors", network, CONFIG, HEADS, {"steps": 77, "templates": ["tiny"]})
    return tmp_path / "mine.safetensors"


def test_round_trip(network: FeatureNetwork, file: Path) -> None:
    model = load_features(file)
    assert isinstance(model, FeatureModel)
    assert (model.name, model.voxel_size_mm, model.window, model.multiple) == ("mine", 1.5, (16, 24, 32), 8)
    assert model.heads == HEADS
    assert model.record["steps"] == 77
    assert model.path == file
    assert model.labels_of("segmentation") == LABELS
    assert model.head_for("reconstruction") == "anatomy"
    assert not model.network.training
    image = torch.rand(1, 1, 16, 24, 32)
    with torch.no_grad():
        for ours, theirs in zip(model.network(image), network(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
        t1 = model.network.head("anatomy", model.network(image)[-1])
    assert t1.shape == (1, 1, 16, 24, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "holds no network"),
        ({"config": None}, "its record is damaged"),
        ({"config": {"network": RECORD["network"]}}, "its record is damaged"),
        ({"heads": None}, "its record is damaged"),
        ({"heads": {"segmentation": {"task": "segmentation"}}}, "its record is damaged"),
        ({"format": "synthseg-model-1"}, "its record is damaged"),  # which has labels
    ],
)
def test_a_network_to_start_from_has_a_whole_record(changes: dict[str, Any], message: str, file: Path) -> None:
    tensors, record = read_weights(file)
    assert record["heads"] == HEADS
    save_tensors(file, tensors, record | changes)
    with pytest.raises(CheckpointError, match=message):
        read_weights(file)


def test_a_task_without_a_head_is_named(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no head for bias-field .*anatomy \(reconstruction\).*finetune --task"):
        load_features(file).head_for("bias-field")


def test_an_ordinary_model_is_its_body_and_one_head(tmp_path: Path) -> None:
    config = parse(TrainConfig, RECORD, "test")
    plain = SegmentationNetwork(config.network, len(LABELS))
    plain(torch.rand(2, 1, 16, 16, 32))
    save_model(tmp_path / "model.safetensors", plain, config, LABELS, {"steps": 5})
    model = load_features(tmp_path / "model.safetensors")
    assert model.heads == {"segmentation": {"task": "segmentation", "labels": LABELS.to_dict()}}
    image = torch.rand(1, 1, 16, 24, 32)
    with torch.no_grad():
        expected = load_model(tmp_path / "model.safetensors").network(image)
        found = model.network.head("segmentation", model.network(image)[-1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_feature_network_as_a_segmentation_network(network: FeatureNetwork, file: Path) -> None:
    weights, labels = as_segmentation_weights(*read_tensors(file))
    assert labels == LABELS
    plain = SegmentationNetwork(CONFIG.network, len(LABELS))
    load_weights(plain, weights)
    image = torch.rand(1, 1, 16, 24, 32)
    with torch.no_grad():
        expected = network.head("segmentation", network(image)[-1])
        torch.testing.assert_close(plain.eval()(image), expected, rtol=0.02, atol=0.05)
    back, heads = as_feature_weights(*read_tensors(file))
    assert set(heads) == {"anatomy", "segmentation"}
    assert set(back) == set(read_tensors(file)[0])


def test_a_feature_network_without_classes_gives_its_body_alone(tmp_path: Path) -> None:
    network = FeatureNetwork(CONFIG.network, {"anatomy": 1})
    save_features(tmp_path / "f.safetensors", network, CONFIG, {"anatomy": HEADS["anatomy"]}, {})
    weights, labels = as_segmentation_weights(*read_tensors(tmp_path / "f.safetensors"))
    assert labels is None
    assert weights
    assert all(name.startswith("body.") for name in weights)


def test_segmenting_with_features_says_what_to_do(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: holds features.*synthseg train RECIPE --from"):
        load_model(file)


@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"anatomy": HEADS["anatomy"]},
        {**HEADS, "other": {"task": "bias-field"}},
        {**HEADS, "anatomy": {}},
        {**HEADS, "segmentation": {"task": "segmentation", "labels": load_scheme("head").to_dict()}},
    ],
)
def test_heads_that_are_not_those_of_the_network_are_not_saved(
    heads: dict[str, Any], network: FeatureNetwork, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="head"):
        save_features(tmp_path / "f.safetensors", network, CONFIG, heads, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "synthseg-features-0"},
        {"config": None},
        {"config": {"network": {"channels": [4, 8, 16]}, "generator": RECORD["generator"]}},
        {"config": {"network": {"channels": [4] * 40}, "generator": RECORD["generator"]}},
        {"config": {"network": RECORD["network"], "generator": {"shape": [4096, 4096, 4096], "voxel_size_mm": 1.0}}},
        {"config": {"network": RECORD["network"], "generator": {"shape": [16, 24, 32], "voxel_size_mm": 1e9}}},
        {"config": {"network": RECORD["network"], "generator": {"shape": [16, 24, 32]}}},
        {"heads": None},
        {"heads": {}},
        {"heads": []},
        {"heads": {**HEADS, "anatomy": 3}},
        {"heads": {**HEADS, "segmentation": {"task": "segmentation"}}},
        {"heads": {**HEADS, "segmentation": {"task": "segmentation", "labels": {"name": "x", "labels": []}}}},
    ],
)
def test_a_record_that_does_not_fit_is_refused(file: Path, changes: dict[str, Any]) -> None:
    tensors, record = read_tensors(file)
    record |= changes
    save_file(tensors, file, {"record": json.dumps({k: v for k, v in record.items() if v is not None})})
    with pytest.raises(CheckpointError, match=r"mine\.safetensors"):
        load_features(file)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("heads.anatomy.weight", torch.zeros(5, 4, 1, 1, 1)),  # not a number of blocks
        ("heads.anatomy.weight", torch.zeros(8, 9, 1, 1, 1)),
        ("heads.keys.weight", torch.zeros(8, 4, 1, 1, 1)),
        ("heads.a.b.weight", torch.zeros(8, 4, 1, 1, 1)),
        ("body.more", torch.zeros(3)),
        ("heads.anatomy.bias", torch.full((8,), float("nan"))),
    ],
)
def test_weights_that_do_not_fit_are_refused(file: Path, name: str, tensor: torch.Tensor) -> None:
    tensors, record = read_tensors(file)
    save_tensors(file, tensors | {name: tensor}, record)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors: its weights do not fit"):
        load_features(file)


def test_a_truncated_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"mine\.safetensors.*damaged"):
        load_features(file)


def test_a_model_of_another_body_has_no_features(tmp_path: Path) -> None:
    config = parse(TrainConfig, {**RECORD, "network": {"architecture": "unet", "channels": [4, 8]}}, "test")
    plain = SegmentationNetwork(config.network, len(LABELS))
    save_model(tmp_path / "unet.safetensors", plain, config, LABELS, {})
    with pytest.raises(CheckpointError, match="features are read from the decoder of a dynunet, got unet"):
        load_features(tmp_path / "unet.safetensors")
