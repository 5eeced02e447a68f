"""Train on several processes, and save what a test needs to compare with one process. See test_devices.py.

python two_devices.py RECIPE.json FOLDER DEVICES [NODES]
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from synthseg.config import TrainConfig
from synthseg.errors import TrainingError
from synthseg.training.loop import Trainer

STEPS = 3


def train(config: TrainConfig, folder: Path, devices: int, nodes: int = 1) -> Trainer:
    """Three steps; the first process leaves the gradients of each in ``folder/gradients.safetensors``."""
    found: dict[str, torch.Tensor] = {}

    class Recorder(Trainer):
        def step(self, batch: Any) -> tuple[float, float]:
            loss, dice = super().step(batch)
            found[f"{self.state.step}.loss"] = torch.tensor([loss, dice])
            return loss, dice

    trainer = Recorder(config, folder, "cpu", devices=devices, nodes=nodes)

    def keep(*_: Any) -> None:
        for name, p in trainer.plain.named_parameters():
            if p.grad is not None:
                found[f"{trainer.state.step + 1}.{name}"] = p.grad.clone()

    trainer.optimiser.register_step_pre_hook(keep)
    trainer.run(until=STEPS)
    if trainer.is_main:
        save_file(found, folder / "gradients.safetensors")
    return trainer


def main(recipe: str, out: str, devices: str, nodes: str = "1") -> None:
    torch.set_num_threads(1)
    config = TrainConfig.model_validate_json(Path(recipe).read_text())
    trainer = train(config, Path(out), int(devices), int(nodes))
    rank, world = trainer.fabric.global_rank, int(devices) * int(nodes)
    from synthseg.training.stream import SyntheticStream

    batch = SyntheticStream(config, trainer.templates, trainer.target, STEPS, rank, world).batch(STEPS)
    if rank == world - 1:
        batch.images.fill_(float("nan"))  # the samples of one process are bad: all stop
    try:
        trainer.step(batch)
    except (TrainingError, SystemExit) as error:
        print(f"rank {rank} of {trainer.fabric.world_size} stopped: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
