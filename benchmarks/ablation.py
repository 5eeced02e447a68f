"""What each part of the generator is worth: equal CPU time, or steps, for each variant of a small network, then Dice.

    python benchmarks/ablation.py --templates DIR DIR ... --held-out DIR [--data DIR] [--rows TEXT ...]
                                  [--cpu-minutes 15 | --steps N] [--seed 0] [--out FILE.json]

Every row trains the same small network from random weights at 2 mm on the `siam` preset, less what its name says, with
one thread. The seconds counted are CPU seconds of rendering and training; what is computed once a template (distance
maps) is not counted. The network is then measured on templates that it has not seen, rendered at 1 mm in five
contrasts with the default settings, the same images for every row, and, with ``--data``, on two labelled real scans
(benchmarks/accuracy.py). The first template is that of the rows with one, the first six those of most rows.

A row that is done is kept in the output file, and one that was stopped goes on from its last saved state. ``--rows``
takes names, or parts of names, so that several processes can share the work: every row has a file of its own in
``--work``, and each process writes and prints the table of all that are done.
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
from accuracy import held_out_maps, real_scans  # noqa: E402

from synthseg.config import GeneratorConfig, TrainConfig, parse, preset_file, read_yaml, set_by_path  # noqa: E402
from synthseg.networks.checkpoint import load_model  # noqa: E402
from synthseg.templates import expand  # noqa: E402
from synthseg.training.loop import Trainer  # noqa: E402
from synthseg.training.stream import SyntheticStream  # noqa: E402
from synthseg.volume import write_text_atomically  # noqa: E402

NO_SHAPE = ["anatomy.probability=0", "deform.head_scale=[1, 1]", "deform.plagiocephaly=0"]
NO_CLUSTERS = ["contrast.cluster_probability=0"]
# What is left: bias, gamma, noise, resolution, cropping, stripping along the labels.
NO_ARTEFACTS = [
    *(f"artefacts.kspace.{what}_probability=0" for what in ("motion", "ghosting", "gibbs", "spike", "wrap")),
    "artefacts.storage.interpolation_probability=0",
    *(f"artefacts.masking.{what}_probability=0" for what in ("bad_strip", "deface", "background")),
    *(f"artefacts.modes.{what}_probability=0" for what in ("exvivo", "photo")),
    "artefacts.local_contrast_std=[0, 0]",
    "artefacts.noise_spread=[0, 0]",
]
Row = tuple[int | None, list[str]]
# Name: number of templates (None: all), what is changed of the generator.
ROWS: dict[str, Row] = {
    "siam preset, six templates": (6, []),
    "no shape": (6, NO_SHAPE),
    "no clusters": (6, NO_CLUSTERS),
    "no artefacts": (6, NO_ARTEFACTS),
    "no shape, clusters or artefacts": (6, [*NO_SHAPE, *NO_CLUSTERS, *NO_ARTEFACTS]),
    "one template": (1, []),
    "one template, no shape": (1, NO_SHAPE),
    "nuclei unchanged": (6, ["anatomy.nuclei_probability=0"]),
    "no cortex carved anew": (6, ["anatomy.recarve_probability=0"]),
    "quieter images": (6, ["contrast.std=[0, 0.03]", "artefacts.noise_std=[0, 0.02]"]),
    "twelve templates": (12, []),
    "all templates": (None, []),
}


def recipe(name: str, folders: list[Path], held_out: list[str], seed: int) -> TrainConfig:
    count, changes = ROWS[name]
    generator = read_yaml(preset_file("siam"))
    grid = ["voxel_size_mm=2", "shape=[80, 96, 80]", "subsamples=4", "deform.translation_mm=30"]
    for assignment in [*grid, *changes]:
        set_by_path(generator, assignment)
    record = {
        "name": name,
        "seed": seed,
        "templates": [str(folder) for folder in folders[:count]],
        "validation_templates": held_out,
        "network": {"channels": [24, 48, 96, 128]},
        "optimiser": {"name": "muon", "warmup_steps": 50, "schedule": "constant", "ema_decay": 0.99},
        "generator": generator,
    }
    return parse(TrainConfig, record, name)


def train(config: TrainConfig, folder: Path, cpu_seconds: float, steps: int | None) -> Trainer:
    """Train for the CPU time, or the steps; goes on where an earlier call was stopped. Seconds are CPU time here."""
    trainer = Trainer(config, folder, resume=(folder / "state.safetensors").exists())

    def ended() -> bool:
        return trainer.state.step >= steps if steps else trainer.state.seconds >= cpu_seconds

    if ended():
        return trainer
    stream = SyntheticStream(config, trainer.templates, trainer.target)
    for number in range(10**6, 10**6 + 8 * len(trainer.templates)):
        stream.batch(number)
    trainer.network.train()
    saved = time.monotonic()
    while not ended():
        begun = time.process_time()
        trainer.step(stream.batch(trainer.state.step))
        trainer.state.seconds += time.process_time() - begun
        if time.monotonic() - saved > 120:
            trainer.save_state()
            saved = time.monotonic()
    trainer.save_state()
    return trainer


def score(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row and measure it."""
    folders, held_out = expand(options.templates), [str(path) for path in expand(options.held_out)]
    folder = options.work / f"{name.replace(' ', '_').replace(',', '')}_{options.seed}{'_steps' * bool(options.steps)}"
    trainer = train(recipe(name, folders, held_out, options.seed), folder, 60 * options.cpu_minutes, options.steps)
    model = load_model(str(trainer.save_model("last")))
    maps = held_out_maps(model, [Path(path) for path in held_out], config=GeneratorConfig())  # the same for all rows
    row = {
        "templates": [t.name for t in trainer.templates],
        "steps": trainer.state.step,
        "cpu_seconds_per_step": round(trainer.state.seconds / trainer.state.step, 3),
        "unseen_maps": maps["mean"],
        "unseen_maps_by_contrast": {contrast: table["mean"] for contrast, table in maps["contrasts"].items()},
        "unseen_maps_by_structure": maps["contrasts"],
    }
    if options.data:
        real = real_scans(model, options.data / "scans")
        row |= {key: real[key] for key in ("colin27_tissues", "colin27_aal", "oasis_aseg")}
    return row


def mean(table: dict[str, float], without: str = "mean") -> float:
    values = [value for name, value in table.items() if name != without]
    return sum(values) / len(values)


def show(done: dict[str, dict[str, Any]]) -> None:
    """The table of the finished rows, and their distance to the first."""
    print(f"{'row':42s} {'steps':>5s} {'unseen maps':>13s} {'Colin27 tissues':>16s} {'nuclei':>14s} {'OASIS':>13s}")
    first: dict[str, float] = {}
    for name, row in done.items():
        figures = {"maps": row["unseen_maps"]}
        if "oasis_aseg" in row:
            figures |= {key: mean(row[key]) for key in ("colin27_tissues", "colin27_aal", "oasis_aseg")}
        first = first or figures
        cells = " ".join(f"{value:7.3f} {value - first[key]:+.3f}" for key, value in figures.items())
        print(f"{name:42s} {row['steps']:5d} {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of the names of rows; default: all")
    parser.add_argument("--cpu-minutes", type=float, default=15.0)
    parser.add_argument("--steps", type=int, help="train for so many steps, whatever they cost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=Path("runs/ablation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    length = f"{options.steps}steps" if options.steps else f"{options.cpu_minutes:g}"
    for name in ROWS:
        key = f"{name}, seed {options.seed}"
        file = options.work / f"{key.replace(' ', '_').replace(',', '')}_{length}.json"
        wanted = any(part == name if part in ROWS else part in name for part in options.rows)
        if wanted and not file.exists():
            write_text_atomically(file, json.dumps({key: score(name, options)}, indent=2) + "\n")
        found = [json.loads(path.read_text()) for path in sorted(options.work.glob(f"*_{length}.json"))]
        done = {k: row for record in found for k, row in record.items()}
        keys = [f"{name}, seed {seed}" for seed in range(100) for name in ROWS]
        done = {key: done[key] for key in keys if key in done}
        write_text_atomically(options.out, json.dumps(done, indent=2) + "\n")
        show(done)


if __name__ == "__main__":
    main()
