"""Several processes are one: the same gradients, one set of files, and a run that changes its number of devices."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from synthseg.errors import CheckpointError, ConfigError, DeviceError
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import read_tensors
from synthseg.templates import load_template
from synthseg.training import launch
from synthseg.training.loop import Trainer, check
from synthseg.training.stream import SyntheticStream

SCRIPT = Path(__file__).with_name("two_devices.py")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_devices", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def clean_environment() -> dict[str, str]:
    """Without what a launcher that runs the tests may have set."""
    ours = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("SLURM_", "TORCHELASTIC"))}
    return kept | {"OMP_NUM_THREADS": "1"}


def commands(launcher: str, recipe: Path, folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    """What is to be started for two processes, with its own environment variables: one command on each node."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    ours = [str(SCRIPT), str(recipe), str(folder)]
    elastic = ["-m", "torch.distributed.run", "--nproc-per-node"]
    meeting = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {
        "fabric": [([*ours, "2"], {})],
        "torchrun": [([*elastic, "2", "--standalone", *ours, "2"], {})],
        "torchrun on two nodes": [([*elastic, "1", *meeting, rank, *ours, "1", "2"], {}) for rank in "01"],
        "by hand on two nodes": [([*ours, "1", "2"], address | {"NODE_RANK": rank}) for rank in "01"],
    }[launcher]


def started(launcher: str, recipe: Path, folder: Path) -> str:
    """Run it to its end; returns what all processes have printed."""
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment() | own,
        )
        for command, own in commands(launcher, recipe, folder)
    ]
    try:
        told = [process.communicate(timeout=250) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "".join(errors[-3000:] for _, errors in told)
    return "".join(text for text, _ in told)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["fabric", "torchrun", "torchrun on two nodes", "by hand on two nodes"])
def test_two_processes_are_one_with_twice_the_batch(
    launcher: str, make_config: Any, template_folders: dict[str, Path], tmp_path: Path, one_thread: None
) -> None:
    config = make_config(
        batch_size=2,
        validation_templates=[str(template_folders["other"])],
        validation_contrasts=["t1"],
        report=True,
        optimiser__gradient_clip=1e9,
        optimiser__learning_rate=1e-4,
    )
    (tmp_path / "recipe.json").write_text(config.model_dump_json())
    told = started(launcher, tmp_path / "recipe.json", tmp_path / "two")
    script().train(config, tmp_path / "one", 1)
    one, two = (load_file(tmp_path / name / "gradients.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name in [name for name in one if name.startswith("1.")]:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    for step in (1, 2, 3):
        torch.testing.assert_close(two[f"{step}.loss"], one[f"{step}.loss"], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "two" / "train.json").read_text())["devices"] == 2
    names = [{p.name for p in (tmp_path / n).iterdir() if not p.name.startswith("events")} for n in ("one", "two")]
    assert names[1] == names[0] | {"offending_plan.json"}
    assert len(list((tmp_path / "two").glob("events*"))) == 1
    # both processes stopped at the bad sample of the second, and the first wrote its plan
    # (two processes may write to one line)
    assert sorted(re.findall(r"rank \d of 2(?= stopped)", told)) == ["rank 0 of 2", "rank 1 of 2"]
    assert re.search(r"rank 0 of 2 stopped: the loss is nan at step 3", told)
    assert [plan["index"] for plan in json.loads((tmp_path / "two" / "offending_plan.json").read_text())] == [7]
    # and one process goes on where two have stopped
    second = Trainer(config, tmp_path / "two", resume=True)
    assert second.state.step == 3
    second.run()
    Trainer(config, tmp_path / "one", resume=True).run()
    ends = [read_tensors(tmp_path / name / "state.safetensors")[0] for name in ("one", "two")]
    for name, tensor in ends[0].items():
        if name.startswith("ema."):
            torch.testing.assert_close(ends[1][name], tensor, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- shares of a batch


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_shares_of_all_devices_are_the_batch(world: int, make_config: Any) -> None:
    config = make_config(batch_size=4, generator__shape=[8, 8, 8], generator__subsamples=1)
    templates, target = [load_template(path) for path in config.templates], load_scheme("siam16")
    whole = SyntheticStream(config, templates, target).batch(3)
    for rank in range(world):
        share = SyntheticStream(config, templates, target, rank=rank, world=world).batch(3)
        assert [p.index for p in share.plans] == list(range(12 + rank, 16, world))
        assert share.plans == whole.plans[rank::world]
        assert torch.equal(share.targets, whole.targets[rank::world])
        torch.testing.assert_close(share.images, whole.images[rank::world], rtol=1e-5, atol=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size 3 cannot be shared by 4 devices; try 4"):
        check(make_config(batch_size=3), world=4)
    with pytest.raises(ConfigError, match="try 8"):
        Trainer(make_config(), tmp_path / "run", devices=4, nodes=2)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- devices that are not there


@pytest.mark.parametrize(
    ("device", "devices", "nodes", "message"),
    [
        ("cuda:1", 2, 1, "use --device cuda"),
        ("mps", 2, 1, "cannot be used more than once"),
        ("cuda", 64, 1, "only [0-9]+ CUDA devices"),
        ("cpu", 1, 2, "MASTER_ADDR"),
    ],
)
def test_impossible_devices_are_refused(
    device: str, devices: int, nodes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "started_processes", lambda: 1)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DeviceError, match=message):
        launch.make_fabric(device, devices, nodes, "fp32")


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would train the whole run, in the same folder."""
    monkeypatch.setattr(launch, "started_processes", lambda: 4)
    with pytest.raises(DeviceError, match="4 processes were started, but --devices 1 and --nodes 1 make 1"):
        launch.make_fabric("cpu", 1, 1, "fp32")


def test_processes_of_torchrun_and_srun_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    assert launch.started_processes() == 1
    with monkeypatch.context() as patch:
        for name, value in (("SLURM_NTASKS", "8"), ("SLURM_JOB_NAME", "train"), ("SLURM_STEP_NUM_TASKS", "8")):
            patch.setenv(name, value)
        assert launch.started_processes() == 8
    with monkeypatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "1")
        patch.setenv("WORLD_SIZE", "4")
        assert launch.started_processes() == 4


def test_processes_that_see_other_states_do_not_go_on(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(make_config(), tmp_path).run(until=1)
    monkeypatch.setattr("synthseg.training.run.gather", lambda fabric, value: [value, value + 2])
    with pytest.raises(CheckpointError, match=r"states of steps \[1, 3\]; all nodes must see the same run folder"):
        Trainer(make_config(), tmp_path, resume=True)
