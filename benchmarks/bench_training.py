"""Steps an hour of the shipped 1 mm recipe, from what the libraries give to what `synthseg train` does.

    python benchmarks/bench_training.py [--template NAME|DIR] [--model siam16] [--threads 2] [--steps 6] [--rounds 2]
                                        [--out FILE.json]

Each row adds one measure to the row above it and runs in a process of its own; the rows are gone through ``--rounds``
times, and the best time of each counts, so that a disturbance of the machine does not. Three steps are not timed. The
last column is the part of a step in which the network waits for its image. The last rows are not taken; each is to be
compared with the last row that is taken: measures that did not help, and steps without a generator, which show what
it costs where its process shares the cores with the network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setup:
    """How a step is taken."""

    malloc: bool = False
    bf16: bool = False
    gathered: bool = False  # loss by gather; else MONAI's Dice loss on one-hots, and PyTorch's cross-entropy
    cells: int = 0
    layers: bool = False
    workers: int = 0
    compiled: bool = False
    repeated: bool = False  # one image for all steps
    optimiser: str = "muon"
    fused: bool = True


TAKEN: dict[str, Setup] = {"as the libraries come": Setup()}
for _name, _change in {
    "malloc keeps its memory": {"malloc": True},
    "bfloat16": {"bf16": True},
    "loss without one-hots": {"gathered": True},
    "two of eight voxels scored": {"cells": 2},
    "channels last, pointwise last layer": {"layers": True},
    "generator in a process of its own": {"workers": 1},
}.items():
    TAKEN[_name] = replace(list(TAKEN.values())[-1], **_change)  # type: ignore[arg-type]
BEST = list(TAKEN.values())[-1]
TRIED: dict[str, Setup] = {
    "torch.compile": replace(BEST, compiled=True),
    "AdamW, fused, for Muon": replace(BEST, optimiser="adamw"),
    "AdamW, not fused, for Muon": replace(BEST, optimiser="adamw", fused=False),
    "one image for all steps, no generator": replace(BEST, repeated=True, workers=0),
}


def measure(setup: Setup, options: argparse.Namespace) -> dict[str, float]:
    """Seconds a step, and the part of them spent waiting for the image, in this process."""
    from synthseg.allocator import tune_allocator

    if setup.malloc:
        tune_allocator()
    import torch
    from torch import nn

    from synthseg.config import TrainConfig, parse
    from synthseg.networks import backbone
    from synthseg.networks.checkpoint import load_model
    from synthseg.training import loop
    from synthseg.training.stream import SyntheticStream, loader

    torch.set_num_threads(options.threads)

    class Plain(backbone.SegmentationNetwork):
        """The same network with PyTorch's own layers and layout; all classes of a block are computed."""

        def forward(self, image: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
            factor = self.config.subpixel
            logits = self.body(backbone.space_to_depth(image, factor))
            if cells is None:
                return backbone.depth_to_space(logits, factor)
            return logits.unflatten(1, (self.n_classes, factor**3)).index_select(2, cells)

    if not setup.gathered:
        from monai.losses import DiceLoss

        soft_dice = DiceLoss(include_background=False, softmax=True, to_onehot_y=True)

        def one_hot_losses(logits: Any, target: Any, groups: Any) -> tuple[Any, Any, Any]:
            """For templates whose labels are classes of the network, one each."""
            classes = groups.float().argmax(1)[target.long()]
            image, truth = logits.float()[None], classes[None]
            flat = (image.flatten(2)[..., None], truth.flatten(1)[:, None, :, None])
            return soft_dice(*flat), nn.functional.cross_entropy(image, truth), torch.zeros(len(groups))

        loop.dice_and_cross_entropy = one_hot_losses  # type: ignore[assignment,attr-defined]
    if not setup.fused:
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda *a, **k: adamw(*a, **{**k, "fused": False, "foreach": False})  # type: ignore
    if not setup.layers:
        backbone.layers.replace = lambda body: None  # type: ignore[assignment]
        loop.SegmentationNetwork = Plain  # type: ignore[misc,attr-defined]
    record = dict(load_model(options.model).record["config"])
    record |= {
        "templates": [options.template],
        "validation_templates": [],
        "validation_scans": [],
        "init": None,
        "precision": "bf16" if setup.bf16 else "fp32",
        "scored_cells": setup.cells,
        "workers": setup.workers,
        "optimiser": {**record["optimiser"], "name": setup.optimiser},
    }
    config = parse(TrainConfig, record, options.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = loop.Trainer(config, Path(folder))
    if setup.compiled:
        trainer.network = torch.compile(trainer.network)  # type: ignore[assignment]
    assert isinstance(trainer.plain, nn.Module)
    stream = SyntheticStream(config, trainer.templates, trainer.target)
    for number in range(10**6, 10**6 + 8):
        stream.batch(number)  # distance maps are made once a template, which a few steps must not be charged for
    batches = loader(stream)
    if setup.repeated:
        batches = itertools.repeat(next(batches))
    trainer.network.train()
    begun, waited, warm_s = 0.0, 0.0, 0.0
    started = time.perf_counter()
    for number in range(3 + options.steps):
        if number == 3:
            begun, waited = time.perf_counter(), 0.0
            warm_s = begun - started
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        trainer.step(batch)
    seconds = time.perf_counter() - begun
    return {"step_s": seconds / options.steps, "waited_s": waited / options.steps, "first_steps_s": warm_s}


def child(name: str, options: argparse.Namespace) -> dict[str, float] | None:
    """``measure`` in a process of its own; None where a measure that is not taken fails, which is said."""
    arguments = [sys.executable, __file__, "--child", name]
    for key in ("template", "model", "threads", "steps"):
        arguments += [f"--{key}", str(getattr(options, key))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    if done.returncode and name in TRIED:
        print(f"  {name}: failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        sys.exit(f"{name}: failed\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(rows: dict[str, dict[str, Any]]) -> None:
    first = next(iter(rows.values()))["step_s"]
    print(f"{'':38s} {'s a step':>9s} {'steps/h':>8s} {'ratio':>6s} {'waiting':>8s}")
    for name, row in rows.items():
        print(
            f"{name:38s} {row['step_s']:9.2f} {3600 / row['step_s']:8.0f} {first / row['step_s']:5.1f}x "
            f"{row['waited_s'] / row['step_s']:8.0%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="colin27")
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of the names of rows; default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setups = {**TAKEN, **TRIED}
    if options.child:
        print(json.dumps(measure(setups[options.child], options)))
        return
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(options.rounds):
        for name in setups:
            if any(part in name for part in options.rows):
                found = child(name, options)
                if found is None:
                    continue
                if name not in rows or found["step_s"] < rows[name]["step_s"]:
                    rows[name] = {key: round(value, 3) for key, value in found.items()}
                print(f"  {name}: {found['step_s']:.2f} s a step", file=sys.stderr, flush=True)
    show(rows)
    if options.out:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads"
        record = {"machine": machine, "template": Path(options.template).name, "model": options.model, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
