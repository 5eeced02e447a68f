"""The file of a trained network: self-contained, free of pickle, whole or not there."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthseg.config import TrainConfig, parse
from synthseg.errors import CheckpointError, OutputError
from synthseg.labels import load_scheme
from synthseg.networks import checkpoint
from synthseg.networks.backbone import SegmentationNetwork
from synthseg.networks.checkpoint import load_model, model_path, read_tensors, save_model, save_tensors

CONFIG = parse(
    TrainConfig,
    {
        "generator": {"shape": [16, 24, 32], "voxel_size_mm": 1.5},
        "network": {"channels": [4, 8, 12], "norm": "batch"},
    },
    "test",
)
LABELS = load_scheme("siam16")


@pytest.fixture
def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    network = SegmentationNetwork(CONFIG.network, len(LABELS))
    network(torch.rand(2, 1, 16, 16, 32))  # so that running statistics are not their defaults
    return network.eval()


@pytest.fixture
def file(network: SegmentationNetwork, tmp_path: Path) -> Path:
    save_model(tmp_path / "mine.safetensors", network, CONFIG, LABELS, {"steps": 77, "templates": ["tiny"]})
    return tmp_path / "mine.safetensors"


def rewrite(file: Path, **changes: Any) -> None:
    """The same tensors with another record."""
    tensors, record = read_tensors(file)
    record |= changes
    save_file(tensors, file, {"record": json.dumps({k: v for k, v in record.items() if v is not None})})


def test_round_trip(network: SegmentationNetwork, file: Path) -> None:
    model = load_model(file)
    assert (model.name, model.voxel_size_mm, model.window, model.multiple) == ("mine", 1.5, (16, 24, 32), 8)
    assert model.labels == LABELS
    assert model.record["steps"] == 77
    assert parse(TrainConfig, model.record["config"], "file") == CONFIG
    assert not model.network.training
    for (name, saved), (_, kept) in zip(model.network.state_dict().items(), network.state_dict().items(), strict=True):
        torch.testing.assert_close(saved, kept, rtol=1e-3, atol=1e-6, msg=name)
    image = torch.rand(1, 1, 16, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.network(image), network(image), rtol=0.02, atol=0.02)


def test_file_is_safetensors_in_half_precision(file: Path) -> None:
    header = int.from_bytes(file.read_bytes()[:8], "little")
    json.loads(file.read_bytes()[8 : 8 + header])
    assert {t.dtype for t in load_file(file).values()} == {torch.float16, torch.int64}
    assert model_path(file) == file


def test_saving_twice_is_the_same_file(network: SegmentationNetwork, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tmp_path / name, network, CONFIG, LABELS, {})
    assert load_file(tmp_path / "a").keys() == load_file(tmp_path / "b").keys()
    assert load_model(tmp_path / "a").sha256 == load_model(tmp_path / "b").sha256


# ---------------------------------------------------------------- files that are not ours


def test_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    plain, torch_file = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain.write_bytes(pickle.dumps(Bomb()))
    torch.save({"weights": Bomb()}, torch_file)
    for file in (plain, torch_file):
        with pytest.raises(CheckpointError, match=file.name):
            load_model(file)
    assert not ran.exists()


@pytest.mark.parametrize("length", [0, 4, 100, -1, -1000])
def test_a_truncated_file_is_refused(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"mine\.safetensors.*damaged"):
        load_model(file)


def test_a_damaged_header_is_refused(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20:60] = b"\xff" * 40
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors"):
        load_model(file)


def test_a_missing_file_names_what_ships(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing.*models that ship"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_tensors(tmp_path / "nothing")
    with pytest.raises(CheckpointError):
        load_model(tmp_path)  # a folder


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        load_model(file)
    for record in ("[]", "3", '"text"', "{"):
        save_file({"a": torch.zeros(2)}, file, {"record": record})
        with pytest.raises(CheckpointError, match=r"other\.safetensors"):
            load_model(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "synthseg-model-0"},
        {"format": None},
        {"config": None},
        {"labels": None},
        {"labels": {"name": "x", "labels": []}},
        {"labels": {"name": "x", "labels": [{"id": 0}]}},
        {"config": {"network": {"channels": [4, 8, 16]}}},
        {"config": {"network": {"channels": [4, 8, 12], "norm": "group"}}},
        {"config": {"unknown_key": 3}},
        {"config": 3},
    ],
)
def test_a_record_that_does_not_fit_is_refused(file: Path, changes: dict[str, Any]) -> None:
    rewrite(file, **changes)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors"):
        load_model(file)


# ---------------------------------------------------------------- writing


def test_nothing_is_left_when_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.safetensors"
    target.write_bytes(b"the one before")

    def fail_late(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", fail_late)
        with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written .No space"):
            save_tensors(target, {"a": torch.zeros(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert target.read_bytes() == b"the one before"
    with pytest.raises(TypeError):
        save_tensors(target, {"a": torch.zeros(3)}, {"not JSON": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert target.read_bytes() == b"the one before"


def test_folders_are_made_and_views_are_saved(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "t.safetensors"
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(target, {"turned": base.T, "part": base[1:], "scalar": torch.tensor(3)}, {"key": [1, 2]})
    tensors, record = read_tensors(target)
    assert torch.equal(tensors["turned"], base.T)
    assert torch.equal(tensors["part"], base[1:])
    assert tensors["scalar"].item() == 3
    assert record == {"key": [1, 2]}
    assert [p.name for p in target.parent.iterdir()] == ["t.safetensors"]


def test_loading_does_not_import_the_compiler() -> None:
    """On the meta device torch draws normal numbers by code that imports torch._dynamo, which takes a second."""
    code = "import sys; from synthseg.networks.checkpoint import load_model; load_model('siam16'); "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
