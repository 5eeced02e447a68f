"""One process or many: devices, nodes and precision by Lightning Fabric."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment
from lightning_fabric.strategies import DDPStrategy

from synthseg.errors import DeviceError

# The other processes wait while the first one validates and saves.
PATIENCE = timedelta(hours=2)


def started_processes() -> int:
    """How many processes torchrun or srun has started for this run."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if SLURMEnvironment.detect() else 1


def make_fabric(device: torch.device | str, devices: int, nodes: int, precision: str) -> Fabric:
    """Fabric for ``devices`` devices of this kind on each of ``nodes`` computers; ``launch`` starts the processes.

    Processes come from torchrun or srun if one of them runs this program, else Fabric starts one for each device of
    this computer. Raises DeviceError if the devices are not there, or the processes are not as many as the devices.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # every process would introduce itself
    where = torch.device(device)
    kind: Any = "bf16-mixed" if precision == "bf16" else "32-true"
    world, started = devices * nodes, started_processes()
    if started > 1 and started != world:
        raise DeviceError(
            f"{started} processes were started, but --devices {devices} and --nodes {nodes} make {world}; "
            "give one process for each device"
        )
    if world == 1:
        own: Any = [where.index or 0] if where.type == "cuda" else 1
        return Fabric(accelerator=where.type, devices=own, precision=kind)
    if where.type not in ("cpu", "cuda"):
        raise DeviceError(f"device '{where}' cannot be used more than once; leave out --devices and --nodes")
    if ":" in str(where):
        raise DeviceError(f"device '{where}' is one device; with --devices {devices} use --device {where.type}")
    if where.type == "cuda" and devices > torch.cuda.device_count():
        raise DeviceError(f"--devices {devices}: there are only {torch.cuda.device_count()} CUDA devices")
    if nodes > 1 and started == 1 and "MASTER_ADDR" not in os.environ:
        raise DeviceError(
            f"--nodes {nodes}: start the command with srun or torchrun, or on each node with MASTER_ADDR, MASTER_PORT "
            "and NODE_RANK set"
        )
    try:
        strategy = DDPStrategy(timeout=PATIENCE, broadcast_buffers=False)
        return Fabric(accelerator=where.type, devices=devices, num_nodes=nodes, strategy=strategy, precision=kind)
    except (ValueError, RuntimeError) as error:
        raise DeviceError(f"--devices {devices} --nodes {nodes}: {' '.join(str(error).split())}") from error


def launch(fabric: Fabric) -> None:
    """Start the other processes of this run, if there are any and nobody else has."""
    try:
        fabric.launch()
    except ValueError as error:
        raise DeviceError(f"the processes cannot be started ({' '.join(str(error).split())})") from error


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """The value of each process, in the order of their ranks."""
    if fabric.world_size == 1:
        return [value]
    found: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, value)
    return found
