"""The state of a run: whole at every moment, checked when it is read, and exact when the run goes on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from synthseg.errors import CheckpointError, ConfigError
from synthseg.networks.checkpoint import read_tensors, save_tensors
from synthseg.training import state as state_module
from synthseg.training.loop import Trainer
from synthseg.training.state import RunState, StateFile, checksum

RECORD = {"state": {"step": 7}, "config": {"name": "a"}}


def tensors(fill: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((40, 30), float(fill)), "count": torch.tensor(3), "b": torch.arange(5, dtype=torch.int64)}


def two_states(folder: Path) -> StateFile:
    file = StateFile(folder)
    for step in (1, 2):
        file.save(tensors(step), {"state": {"step": step}, "config": {}})
    return file


def flip_a_bit(path: Path, position: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 4
    path.write_bytes(data)


# ---------------------------------------------------------------- the file


def test_the_newest_state_is_read_and_the_one_before_is_kept(tmp_path: Path) -> None:
    two_states(tmp_path)
    found, record, warning = StateFile(tmp_path).load()
    assert torch.equal(found["a"], tensors(2)["a"])
    assert (record["state"], warning) == ({"step": 2}, "")
    before = read_tensors(tmp_path / "state.previous.safetensors")
    assert torch.equal(before[0]["a"], tensors(1)["a"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.previous.safetensors", "state.safetensors"]


@pytest.mark.parametrize("position", [0.0, 0.003, 0.02, 0.05, 0.2, 0.5, 0.9, 1.0])
def test_a_flipped_bit_is_found_and_the_state_before_is_read(position: float, tmp_path: Path) -> None:
    two_states(tmp_path)
    flip_a_bit(tmp_path / "state.safetensors", position)
    found, record, warning = StateFile(tmp_path).load()
    assert torch.equal(found["a"], tensors(1)["a"])
    assert record["state"]["step"] == 1
    assert "state.safetensors" in warning
    assert "damaged" in warning
    assert "going on from the state before, step 1" in warning


@pytest.mark.parametrize("kept", [0, 4, 60, 3000, -1])
def test_a_cut_off_file_is_found_and_the_state_before_is_read(kept: int, tmp_path: Path) -> None:
    two_states(tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert StateFile(tmp_path).load()[1]["state"]["step"] == 1


def test_a_state_that_is_gone_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    two_states(tmp_path)
    (tmp_path / "state.safetensors").unlink()
    assert StateFile(tmp_path).load()[1]["state"]["step"] == 1


def test_two_damaged_states_are_refused(tmp_path: Path) -> None:
    two_states(tmp_path)
    for path in tmp_path.iterdir():
        flip_a_bit(path, 0.5)
    with pytest.raises(CheckpointError, match=r"state\.safetensors.*state\.previous\.safetensors is damaged as well"):
        StateFile(tmp_path).load()


def test_a_damaged_state_never_replaces_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the process dies between the two renames of the next save."""
    two_states(tmp_path)
    flip_a_bit(tmp_path / "state.safetensors", 0.5)
    file = StateFile(tmp_path)
    file.load()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state_module.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            file._keep_newest()
    file.remove_drafts()
    file.save(tensors(3), {"state": {"step": 3}, "config": {}})
    assert StateFile(tmp_path).load()[1]["state"]["step"] == 3
    assert read_tensors(tmp_path / "state.previous.safetensors")[1]["state"]["step"] == 1


def test_without_links_the_state_before_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(state_module.os, "link", refuse)
    two_states(tmp_path)
    (tmp_path / "state.safetensors").unlink()
    assert StateFile(tmp_path).load()[1]["state"]["step"] == 1


def test_everything_is_in_the_checksum() -> None:
    reference = checksum(tensors(1), RECORD)
    assert checksum(tensors(1), json.loads(json.dumps(RECORD))) == reference
    others = [tensors(1) | {"a": tensors(1)["a"].reshape(30, 40)}, tensors(1) | {"count": torch.tensor(3).int()}]
    others.append({("c" if name == "b" else name): tensor for name, tensor in tensors(1).items()})
    changed = tensors(1)
    changed["a"][39, 29] += 1e-7
    assert reference not in [checksum(other, RECORD) for other in [*others, changed]]
    assert checksum(tensors(1), {"state": {"step": 8}, "config": {"name": "a"}}) != reference


def test_states_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They have no checksum, and their state knows less (and perhaps more)."""
    save_tensors(tmp_path / "state.safetensors", tensors(5), RECORD)
    _, record, _ = StateFile(tmp_path).load()
    assert RunState.from_record(record["state"] | {"mood": "good"}) == RunState(step=7)
    save_tensors(tmp_path / "state.safetensors", tensors(5), {"format": "synthseg-model-1", "config": {}})
    with pytest.raises(CheckpointError, match="not the state of a run"):
        StateFile(tmp_path).load()


# ---------------------------------------------------------------- runs


def test_a_run_goes_on_from_the_state_before(
    make_config: Any, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    Trainer(config, tmp_path / "whole").run()
    trainer = Trainer(config, tmp_path / "run")
    trainer.run(until=2)
    trainer.run(until=4)
    flip_a_bit(tmp_path / "run" / "state.safetensors", 0.7)
    second = Trainer(config, tmp_path / "run", resume=True)
    assert second.state.step == 2
    assert "warning" in capsys.readouterr().err
    second.run()
    whole, parts = (read_tensors(tmp_path / name / "state.safetensors")[0] for name in ("whole", "run"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_other_scans_to_validate_on_are_another_run(make_config: Any, tmp_path: Path) -> None:
    Trainer(make_config(), tmp_path).run(until=1)
    scan = {"image": "a.nii.gz", "labels": "b.nii.gz"}
    saved = read_tensors(tmp_path / "state.safetensors")[1]
    del saved["config"]["validation_scans"]  # a state from before there were any
    state_module.check_same_run(make_config(), saved, tmp_path)
    with pytest.raises(ConfigError, match="validation_scans"):
        state_module.check_same_run(make_config(validation_scans=[scan]), saved, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, 5), (1, 2)])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(
    workers: int, kills: int, make_config: Any, template_folders: dict[str, Path], tmp_path: Path
) -> None:
    """With a worker too; one that outlived its run would keep the output open, and the test would run out of time."""
    config = make_config(
        workers=workers,
        steps=30,
        validate_every=7,
        validation_templates=[str(template_folders["other"])],
        validation_contrasts=["t1"],
        checkpoint_every_s=1e-3,
        optimiser__name="muon",
    )
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(tmp_path / "recipe.json"), str(tmp_path), str(kills), "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > kills / 2, done.stdout  # killed before the end
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = dict(line.split() for line in (whole / "losses.txt").read_text().splitlines())
    taken = [line.split() for line in (killed / "losses.txt").read_text().splitlines()]
    assert len(expected) == 30
    assert {step for step, _ in taken} == set(expected)
    assert all(loss == expected[step] for step, loss in taken)  # all digits
    for name in ("state", "best", "last", "early"):
        a, b = (read_tensors(folder / f"{name}.safetensors") for folder in (whole, killed))
        assert all(torch.equal(tensor, b[0][key]) for key, tensor in a[0].items()), name
    a, b = (read_tensors(folder / "state.safetensors")[1]["state"] for folder in (whole, killed))
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}

    def without_seconds(folder: Path) -> list[str]:
        lines = (folder / "log.csv").read_text().splitlines()
        return [line if line.startswith("#") else ",".join(line.split(",")[::2]) for line in lines]

    assert without_seconds(whole) == without_seconds(killed)
    assert not [p for p in killed.iterdir() if p.name.startswith(".") or "new" in p.name]  # drafts
