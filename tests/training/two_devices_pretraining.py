"""Pretrain on several processes; the first leaves losses and gradients. See test_pretraining_devices.py.

python two_devices_pretraining.py RECIPE.json FOLDER DEVICES
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from synthseg.config import PretrainConfig
from synthseg.training.pretraining import Pretrainer


def train(config: PretrainConfig, folder: Path, devices: int) -> None:
    """Leaves ``folder/gradients.safetensors``."""
    found: dict[str, torch.Tensor] = {}

    class Recorder(Pretrainer):
        def step(self, batch: Any) -> tuple[float, float]:
            loss, figure = super().step(batch)
            found[f"{self.state.step}.loss"] = torch.tensor([loss, figure])
            return loss, figure

    run = Recorder(config, folder, "cpu", devices=devices)

    def keep(*_: Any) -> None:
        for name, p in run.plain.named_parameters():
            if p.grad is not None:
                found[f"{run.state.step + 1}.{name}"] = p.grad.clone()

    run.optimiser.register_step_pre_hook(keep)
    run.run()
    if run.is_main:
        save_file(found, folder / "gradients.safetensors")


def main(recipe: str, out: str, devices: str) -> None:
    torch.set_num_threads(1)
    train(PretrainConfig.model_validate_json(Path(recipe).read_text()), Path(out), int(devices))


if __name__ == "__main__":
    main(*sys.argv[1:])
