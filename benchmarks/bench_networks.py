"""Which MONAI network learns most per CPU hour? Equal CPU seconds for each candidate, then Dice on unseen maps.

    python benchmarks/bench_networks.py --templates DIR --held-out DIR [--cpu-minutes 20] [--out FILE.json]

Every candidate sees the same stream of synthetic images at 2 mm, with the same optimiser and one thread. Finished
candidates are kept in the output file and skipped, so that the command can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import torch  # noqa: E402

from synthseg.config import TrainConfig, parse  # noqa: E402
from synthseg.training.loop import Trainer  # noqa: E402
from synthseg.training.stream import SyntheticStream  # noqa: E402
from synthseg.training.validation import mean_dice  # noqa: E402

CANDIDATES: dict[str, dict[str, Any]] = {
    "DynUNet 32-64-128-192": {"architecture": "dynunet", "channels": [32, 64, 128, 192]},
    "DynUNet residual 32-64-128-192": {"architecture": "dynunet", "channels": [32, 64, 128, 192], "residual": True},
    "SegResNet 32-64-128-256": {"architecture": "segresnet", "channels": [32, 64, 128, 256], "norm": "group"},
    "UNet residual 32-64-128-192": {"architecture": "unet", "channels": [32, 64, 128, 192]},
    "DynUNet 16-32-64-128-192, no subpixel": {
        "architecture": "dynunet",
        "channels": [16, 32, 64, 128, 192],
        "subpixel": 1,
    },
}


def score(name: str, network: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one candidate for the CPU time and validate it."""
    record = {
        "name": name,
        "templates": [options.templates],
        "validation_templates": [options.held_out],
        "network": network,
        "optimiser": {"name": "muon", "warmup_steps": 50, "schedule": "constant", "ema_decay": 0.99},
        "generator": {"subsamples": 4},
    }
    trainer = Trainer(parse(TrainConfig, record, name), Path(options.work) / name.replace(" ", "_"))
    stream = SyntheticStream(trainer.config, trainer.templates, trainer.target)
    trainer.network.train()
    start = time.process_time()
    while time.process_time() - start < 60 * options.cpu_minutes:
        trainer.step(stream.batch(trainer.state.step))
    seconds = time.process_time() - start
    trainer.validate()
    table = trainer.state.validation["dice"]
    return {
        "dice": round(mean_dice(table), 4),
        "steps": trainer.state.step,
        "cpu_seconds_per_step": round(seconds / trainer.state.step, 3),
        "parameters": trainer.manifest()["parameters"],
        "dice_by_contrast": {c: round(sum(row.values()) / len(row), 4) for c, row in table.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--cpu-minutes", type=float, default=20.0)
    parser.add_argument("--work", default="runs/bench_networks")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_networks.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name, network in CANDIDATES.items():
        key = f"{name} @ {options.cpu_minutes:g} min"
        if key not in done:
            done[key] = score(name, network, options)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(done, indent=2) + "\n")
        row = done[key]
        best = max(r["dice"] for r in done.values())
        print(
            f"{key:55s} Dice {row['dice']:.3f} ({row['dice'] / best:.2f} of the best), {row['steps']} steps, "
            f"{row['cpu_seconds_per_step']:.2f} CPU s a step, {row['parameters'] / 1e6:.1f} M parameters",
            flush=True,
        )


if __name__ == "__main__":
    main()
