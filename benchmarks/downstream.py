"""What one layer on voxel features can do: each of the four tasks against what one would do without a network.

    python benchmarks/downstream.py [--templates DIR ...] [--held-out DIR ...] [--features small siam16 FILE ...]
                                    [--tasks TASK ...] [--minutes 5] [--seed 0] [--out FILE.json] [--work DIR]

Every row is a task and the features that its layer stands on: a model that ships or a file, frozen, on a patch of its
own voxel size; or ``small``, a network of four levels at 3 mm that is trained whole from random weights. Each trains
for ``--minutes`` of CPU time of one thread in drawing and training, a layer always anew, on the recipe that ships for
the task (pipelines/downstream_*.yaml). It is measured on templates that it has not seen, each rendered in four
contrasts, beside the baseline: the most frequent class, the best linear map of the intensities, linear interpolation,
a constant field. ``score`` is the mean Dice, or the part of the baseline's error that is gone. Without ``--templates``
and ``--held-out`` the two heads that ship are taken: the phantom to learn from, Colin27 to measure on.

A row that is done is kept in ``--work``, and one that was stopped goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import torch  # noqa: E402

from synthseg.config import FinetuneConfig, parse, read_yaml, set_by_path  # noqa: E402
from synthseg.config.finetuning import TASKS  # noqa: E402
from synthseg.errors import SynthSegError  # noqa: E402
from synthseg.networks.checkpoint import model_path, read_tensors  # noqa: E402
from synthseg.templates import expand  # noqa: E402
from synthseg.training.finetuning import Finetuner  # noqa: E402
from synthseg.volume import write_text_atomically  # noqa: E402

SMALL = "small"
SMALL_NETWORK = {"channels": [16, 32, 64, 96], "subpixel": 1}
SMALL_GRID = ["generator.voxel_size_mm=3", "generator.shape=[48, 64, 48]"]
THICK = ["generator.artefacts.lowres_spacing_mm=9", "generator.artefacts.lowres_isotropic_mm=6"]
PATCH_MM = (96, 112, 96)  # of a trained network; its own window takes several times as long
STATE_EVERY_S = 60.0
CHECKED_EVERY = 10  # drawn ahead before the clock starts, so that what is computed once a template does not count


def recipe(task: str, features: str, options: argparse.Namespace) -> FinetuneConfig:
    """The recipe of a row."""
    record = read_yaml(f"downstream_{task.replace('-', '_')}")
    record |= {"seed": options.seed, "new_head": True, "report": False, "steps": 10**7, "validate_every": 10**7}
    record |= {"templates": options.templates, "validation_templates": options.held_out}
    record["optimiser"] = {**record["optimiser"], "schedule": "constant", "ema_decay": 0.98}
    if features == SMALL:
        record |= {"init": None, "frozen": False, "network": SMALL_NETWORK}
        record["optimiser"]["learning_rate"] = 0.003
        for assignment in [*SMALL_GRID, *(THICK if task == "super-resolution" else [])]:
            set_by_path(record, assignment)
    else:
        trained = read_tensors(model_path(features))[1]["config"]
        record |= {"init": features, "frozen": True, "network": trained["network"]}
        voxel_size_mm, levels = trained["generator"]["voxel_size_mm"], len(trained["network"]["channels"])
        multiple = trained["network"]["subpixel"] * 2 ** (levels - 1)
        shape = [max(multiple, round(mm / voxel_size_mm / multiple) * multiple) for mm in PATCH_MM]
        for assignment in (f"generator.voxel_size_mm={voxel_size_mm}", f"generator.shape={shape}"):
            set_by_path(record, assignment)
    for assignment in options.set:
        set_by_path(record, assignment)
    return parse(FinetuneConfig, record, f"{task}, {features}")


def train(run: Finetuner, cpu_seconds: float) -> None:
    """Train for the CPU time; goes on where an earlier call was stopped. Seconds of the state are CPU time here."""
    if run.state.seconds >= cpu_seconds:
        return
    stream = run.stream()
    for number in range(10**6, 10**6 + CHECKED_EVERY * len(run.templates), CHECKED_EVERY):
        stream.batch(number)
    run.network.train()
    saved = time.monotonic()
    while run.state.seconds < cpu_seconds:
        begun = time.process_time()
        run.step(stream.batch(run.state.step))
        run.state.seconds += time.process_time() - begun
        if time.monotonic() - saved > STATE_EVERY_S:
            run.save_state()
            saved = time.monotonic()
    run.save_state()


def score(task: str, features: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one row and measure it."""
    folder = options.work / name_of(task, features, options)
    config = recipe(task, features, options)
    run = Finetuner(config, folder, resume=(folder / "state.safetensors").exists())
    train(run, 60 * options.minutes)
    mean = run.validate()
    model = run.save_model("finetuned")
    run.write_report()
    learned = sum(p.numel() for p in run.plain.parameters() if p.requires_grad)
    return {
        "task": task,
        "features": features,
        "frozen": config.frozen,
        "weights_trained": learned,
        "voxel_size_mm": config.generator.voxel_size_mm,
        "steps": run.state.step,
        "cpu_seconds": round(run.state.seconds, 1),
        "cpu_seconds_per_step": round(run.state.seconds / max(1, run.state.step), 3),
        "figure": run.task.figure,
        "baseline": run.task.baseline_name,
        "score": round(mean, 4),
        "contrasts": run.state.validation["figures"],
        "model": str(model),
    }


def name_of(task: str, features: str, options: argparse.Namespace) -> str:
    return f"{task}_{Path(features).stem}_{options.seed}_{options.minutes:g}min"


def show(rows: dict[str, dict[str, Any]]) -> None:
    """The table of the finished rows."""
    print(f"{'task':17s} {'features':16s} {'steps':>6s} {'figure':>7s} {'network':>9s} {'baseline':>9s} {'score':>7s}")
    for row in rows.values():
        figure = row["figure"]
        own, without = (
            sum(contrast[key] for contrast in row["contrasts"].values()) / len(row["contrasts"])
            for key in (figure, f"baseline_{figure}")
        )
        print(
            f"{row['task']:17s} {Path(row['features']).stem:16.16s} {row['steps']:6d} {figure:>7s} {own:9.4f} "
            f"{without:9.4f} {row['score']:7.3f}  against: {row['baseline']}"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+", default=["phantom"], help="templates or folders of templates")
    parser.add_argument("--held-out", nargs="+", default=["colin27"], help="never trained on")
    parser.add_argument("--features", nargs="+", default=[SMALL, "siam16"], help="small, models that ship, or files")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of every row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/downstream.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/downstream"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    try:
        options.templates = [str(path) for path in expand(options.templates)]
        options.held_out = [str(path) for path in expand(options.held_out)]
        for features in options.features:
            for task in options.tasks:
                name = name_of(task, features, options)
                kept = options.work / f"{name}.json"
                if not kept.is_file():
                    print(f"{task} on {features}", file=sys.stderr, flush=True)
                    write_text_atomically(kept, json.dumps(score(task, features, options), indent=2) + "\n")
                rows[name] = json.loads(kept.read_text())
                result = {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "minutes": options.minutes,
                    "templates": [Path(path).name for path in options.templates],
                    "held_out": [Path(path).name for path in options.held_out],
                    "rows": rows,
                }
                write_text_atomically(options.out, json.dumps(result, indent=2) + "\n")
    except SynthSegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
