"""Does pretraining pay? Eight objectives for the same CPU time on a small network, their features, then few steps of
segmentation, against training from scratch for as long as both took together.

    python benchmarks/pretraining.py --templates DIR DIR ... --held-out DIR [--data DIR] [--rows TEXT ...]
                                     [--cpu-minutes 5] [--jobs 2] [--out FILE.json] [--work DIR]
    python benchmarks/pretraining.py --page docs/pretraining_results.md [--out FILE.json] [--sweeps FILE.json]

Each row is an objective and a seed. It pretrains ``--cpu-minutes`` on views of the first six templates, measures the
features, and then trains the segmentation of 1, 2 and 6 templates, each for a quarter of that time
(``--fine-tune-minutes``), all weights free. *none* does the last part alone, from random weights. *from scratch* trains
the segmentation for the sum of both times. Minutes are CPU time of one thread in drawing and training; loading, what is
computed once a template and measuring are not counted. Every row has the same network, generator, optimiser and rates.

All objectives run with seed 0; *best sum* is the anatomy term and the contrastive row that was best by then. The four
best rows and the two without pretraining then run with seeds 1 and 2 (``--seeds 3``). By default that takes at most
six hours with ``--jobs 2`` on two cores.

A row that is done is kept in a file of its own in ``--work``, with the version of the code and the seconds by the
clock that it took; one that was stopped goes on from its last saved state.
``--rows`` takes parts of names, so that several processes can share the work; every process writes the table of all
that are done.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import torch  # noqa: E402
from pretraining_jobs import check_settings, kept, run_keys, slug, stamped, wall_seconds  # noqa: E402
from pretraining_page import write_page  # noqa: E402
from pretraining_scores import HeldOut, score_features, score_segmentation  # noqa: E402
from pretraining_table import (  # noqa: E402
    BEST_SUM,
    NONE,
    SCRATCH,
    next_rows,
    parse_key,
    row_key,
    show,
    tuned_mean,
)

from synthseg.config import PretrainConfig, TrainConfig, parse  # noqa: E402
from synthseg.errors import SynthSegError  # noqa: E402
from synthseg.networks.feature_file import load_features  # noqa: E402
from synthseg.templates import expand  # noqa: E402
from synthseg.training.loop import Trainer  # noqa: E402
from synthseg.training.pretraining import Pretrainer  # noqa: E402
from synthseg.training.run import Run  # noqa: E402
from synthseg.training.stream import Stream  # noqa: E402
from synthseg.volume import write_text_atomically  # noqa: E402

Terms = dict[str, Any]
# Keys of a pretraining recipe. Temperature and projection are the defaults for all; the sweeps change them.
OBJECTIVES: dict[str, Terms] = {
    "Brain-ID anatomy": {"anatomy_weight": 1.0},
    "InfoNCE": {"contrast": [{"loss": "info_nce"}]},
    "SupCon": {"contrast": [{"loss": "sup_con"}]},
    "HUCL beta 2": {"contrast": [{"loss": "hucl", "beta": 2.0}]},
    "HUCL beta 10": {"contrast": [{"loss": "hucl", "beta": 10.0}]},
    "HSCL beta 2": {"contrast": [{"loss": "hscl", "beta": 2.0}]},
    "HSCL beta 10": {"contrast": [{"loss": "hscl", "beta": 10.0}]},
    "Barlow Twins": {"contrast": [{"loss": "barlow_twins"}]},
}
ROWS = (NONE, SCRATCH, *OBJECTIVES, BEST_SUM)
STATE_EVERY_S = 120.0
DERIVED: dict[str, dict[str, Any]] = {}  # what the generator derived from each template, in this process


# ------------------------------------------------------------------------------------------------ recipes


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table share; a row made otherwise is not comparable."""
    folders = expand(options.templates)
    names, held_out = [folder.name for folder in folders], [folder.name for folder in expand(options.held_out)]
    shared = sorted(set(names) & set(held_out))
    if shared:
        raise SystemExit(f"--held-out: {shared} are also among --templates; give maps that no row is trained on")
    most = max([*options.counts, options.pretrain_templates])
    if len(names) < most:
        raise SystemExit(
            f"--templates: {len(names)} given, but {most} are asked for; give more, or lower --counts and "
            "--pretrain-templates"
        )
    return {
        "cpu_minutes": options.cpu_minutes,
        "fine_tune_minutes": options.fine_tune_minutes or options.cpu_minutes / 4,
        "counts": sorted(options.counts),
        "pretrain_templates": options.pretrain_templates,
        "templates": names[:most],
        "held_out": held_out,
        "voxel_size_mm": options.voxel_size,
        "shape": list(options.shape),
        "channels": list(options.channels),
        "severities": list(options.severities),
        "shift_mm": options.shift,
        "real_scans": options.data is not None,
    }


def generator_record(options: argparse.Namespace) -> dict[str, Any]:
    """The default settings on a small grid that holds the brain: a step must cost little for a row to have many."""
    return {
        "voxel_size_mm": options.voxel_size,
        "shape": list(options.shape),
        "subsamples": 2,
        "deform": {"translation_mm": 10.0},
    }


def shared_record(options: argparse.Namespace, name: str, count: int, seed: int) -> dict[str, Any]:
    """The part of a recipe that pretraining and segmentation have in common."""
    return {
        "name": name,
        "seed": seed,
        "templates": [str(folder) for folder in expand(options.templates)[:count]],
        "network": {"channels": list(options.channels), "subpixel": 1},
        "optimiser": {"name": "muon", "warmup_steps": 50, "schedule": "constant", "ema_decay": 0.99},
        "generator": generator_record(options),
    }


def pretrain_recipe(options: argparse.Namespace, terms: Terms, seed: int) -> PretrainConfig:
    record = shared_record(options, "pretrained", options.pretrain_templates, seed)
    record["generator"]["views"] = {"severities": list(options.severities), "shift_mm": options.shift}
    return parse(PretrainConfig, record | {"anatomy_weight": 0.0} | terms, "the recipe of a row")


def segmentation_recipe(options: argparse.Namespace, count: int, seed: int, init: Path | None) -> TrainConfig:
    record = shared_record(options, f"templates_{count}", count, seed)
    record |= {"validation_templates": [str(folder) for folder in expand(options.held_out)]}
    return parse(TrainConfig, record | ({"init": str(init)} if init else {}), "the recipe of a row")


def best_sum(done: dict[str, dict[str, Any]]) -> Terms:
    """The anatomy term and the best contrastive row, each divided by the loss that its own row ended with."""
    contrastive = [name for name in OBJECTIVES if "contrast" in OBJECTIVES[name]]
    best = max(contrastive, key=lambda name: tuned_mean(done[row_key(name, 0)]))
    anatomy = next(name for name, terms in OBJECTIVES.items() if "anatomy_weight" in terms)
    losses = {name: max(1e-3, done[row_key(name, 0)]["pretraining"]["loss"]) for name in (anatomy, best)}
    term = {**OBJECTIVES[best]["contrast"][0], "weight": round(1 / losses[best], 4)}
    return {"anatomy_weight": round(1 / losses[anatomy], 4), "contrast": [term]}


# ------------------------------------------------------------------------------------------------ work


def warm_up(trainer: Run[Any, Any], stream: Stream[Any]) -> None:
    """Let what the generator computes once a template be computed, or take it over from an earlier run."""
    for template in trainer.templates:
        template.cache.update(DERIVED.get(template.name, {}))
    if any(template.name not in DERIVED for template in trainer.templates):
        for number in range(10**6, 10**6 + 6 * len(trainer.templates)):
            stream.batch(number)
    DERIVED.update({template.name: template.cache for template in trainer.templates})


def train(trainer: Run[Any, Any], cpu_seconds: float) -> dict[str, Any]:
    """Train for this CPU time, or go on until it is used up, and say what was done. Saves the state on the way."""
    state, stream = trainer.state, trainer.stream()
    if state.seconds < cpu_seconds:
        warm_up(trainer, stream)
    trainer.network.train()
    saved = time.monotonic()
    while state.seconds < cpu_seconds:
        begun = time.process_time()
        loss, _ = trainer.step(stream.batch(state.step))
        state.seconds += time.process_time() - begun
        state.loss += (loss - state.loss) / min(state.step, 50)
        if time.monotonic() - saved > STATE_EVERY_S:
            trainer.save_state()
            saved = time.monotonic()
    trainer.save_state()
    return {
        "steps": state.step,
        "cpu_seconds": round(state.seconds, 1),
        "cpu_seconds_per_step": round(state.seconds / max(1, state.step), 3),
        "loss": round(state.loss, 4),
    }


def resumable(folder: Path) -> bool:
    return (folder / "state.safetensors").exists()


def pretrain(
    options: argparse.Namespace, terms: Terms, seed: int, folder: Path, kind: type[Pretrainer] = Pretrainer
) -> dict[str, Any]:
    """Pretrain one objective; the features are then in ``folder/pretrained.safetensors``."""
    trainer = kind(pretrain_recipe(options, terms, seed), folder, resume=resumable(folder))
    done = train(trainer, 60 * options.cpu_minutes)
    trainer.save_model("pretrained")
    return done


def segment_from(
    options: argparse.Namespace, count: int, seed: int, folder: Path, minutes: float, init: Path | None
) -> dict[str, Any]:
    """Train the segmentation of the first ``count`` templates; the model is then ``folder/last.safetensors``."""
    trainer = Trainer(segmentation_recipe(options, count, seed, init), folder, resume=resumable(folder))
    done = train(trainer, 60 * minutes)
    trainer.save_model("last")
    return done


def segmentations(
    options: argparse.Namespace, seed: int, folder: Path, minutes: float, init: Path | None
) -> dict[str, dict[str, Any]]:
    """Train the segmentation of each number of templates."""
    return {
        str(count): kept(
            folder / f"segmentation_{count}.json",
            partial(segment_from, options, count, seed, folder / f"templates_{count}", minutes, init),
        )
        for count in sorted(options.counts)
    }


def measure(row: dict[str, Any], folder: Path, features: Path, options: argparse.Namespace) -> None:
    """Add to a row the Dice of its segmentations, and what its features are worth."""
    DERIVED.clear()  # memory that measuring needs
    held_out = HeldOut(options.templates, options.held_out, options.voxel_size, tuple(options.shape), options.data)
    for count, trained in row["segmentation"].items():
        model = folder / f"templates_{count}" / "last.safetensors"
        trained.update(kept(folder / f"dice_{count}.json", partial(score_segmentation, model, held_out)))
    row["features"] = kept(folder / "features.json", lambda: score_features(load_features(features), held_out))


def make_row(name: str, seed: int, options: argparse.Namespace, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Train and measure one row."""
    folder = options.work / slug(row_key(name, seed))
    minutes = settings_of(options)["fine_tune_minutes"] + (options.cpu_minutes if name == SCRATCH else 0.0)
    row: dict[str, Any] = {"name": name, "seed": seed}
    init: Path | None = None
    if name in OBJECTIVES or name == BEST_SUM:
        row["objective"] = OBJECTIVES.get(name) or best_sum(done)
        init = folder / "pretrained" / "pretrained.safetensors"
        trained = partial(pretrain, options, row["objective"], seed, folder / "pretrained")
        row["pretraining"] = kept(folder / "pretraining.json", trained)
    row["segmentation"] = segmentations(options, seed, folder, minutes, init)
    most = max(options.counts)
    features = init or folder / f"templates_{most}" / "last.safetensors"
    if name == NONE:
        features = Trainer(segmentation_recipe(options, most, seed, None), folder / "random").save_model("last")
    measure(row, folder, features, options)
    return row


# ------------------------------------------------------------------------------------------------ the command


def read_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows that are done, in the order of the table."""
    done = {}
    for file in sorted(options.work.glob("row_*.json")):
        row = json.loads(file.read_text())
        done[row_key(row["name"], row["seed"])] = row
    order = [row_key(name, seed) for seed in range(options.seeds) for name in ROWS]
    return {key: done[key] for key in order if key in done}


def run_one(key: str, options: argparse.Namespace) -> None:
    """Make a row in this process and keep it."""
    name, seed = parse_key(key)
    row = stamped(options.work / slug(key), partial(make_row, name, seed, options, read_rows(options)))
    write_text_atomically(options.work / f"row_{slug(key)}.json", json.dumps(row, indent=2) + "\n")


def write_table(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Write and print the table of the rows that are done, and return them."""
    done = read_rows(options)
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    record = {
        "settings": settings_of(options),
        "machine": machine,
        "jobs": options.jobs,
        "wall_seconds": wall_seconds(options.work),
        "order": list(ROWS),
        "rows": done,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.out, json.dumps(record, indent=2) + "\n")
    show(done)
    return done


def run_all(options: argparse.Namespace) -> bool:
    """All rows that are asked for; whether all were made."""
    failed: set[str] = set()
    done = write_table(options)
    while True:
        keys, waits = next_rows(done, OBJECTIVES, options.rows, options.seeds, options.repeat)
        keys = [key for key in keys if key not in failed]
        if not keys:
            if waits:
                print(waits, file=sys.stderr)
            return not failed
        run_keys(keys, options, run_one, lambda: write_table(options))
        done = read_rows(options)
        failed |= set(keys) - set(done)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What the table and its sweeps have in common."""
    parser.add_argument("--templates", nargs="+", default=[], help="folders of templates to train on")
    parser.add_argument("--held-out", nargs="+", default=[], help="folders of templates that nothing is trained on")
    parser.add_argument("--data", type=Path, help="folder with scans/ (benchmarks/accuracy.py)")
    parser.add_argument(
        "--fine-tune-minutes", type=float, help="of each segmentation; default: a quarter of the others"
    )
    parser.add_argument("--pretrain-templates", type=int, default=6, help="the first so many are pretrained on")
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of the names of rows; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in a process of its own")
    parser.add_argument("--voxel-size", type=float, default=3.0)
    parser.add_argument("--shape", type=int, nargs=3, default=[48, 64, 48])
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 96])
    parser.add_argument("--severities", type=float, nargs="+", default=[0.0, 1.0], help="of the views")
    parser.add_argument(
        "--shift", type=float, default=20.0, help="mm by which views are moved; 0: the place in the image says it all"
    )
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one row, by its key: what a process of --jobs does


def require_templates(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot run before anything is trained."""
    if not options.templates or not options.held_out:
        parser.error("--templates and --held-out are needed, folders of imported templates")
    if options.cpu_minutes <= 0 or (options.fine_tune_minutes or 1) <= 0 or options.jobs < 1:
        parser.error("minutes and --jobs must be positive")
    if any(n % 2 ** (len(options.channels) - 1) for n in options.shape):
        parser.error(f"--shape: sides must be divisible by {2 ** (len(options.channels) - 1)}, got {options.shape}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser)
    parser.add_argument("--cpu-minutes", type=float, default=5.0, help="of each pretraining")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 6], help="templates of each segmentation")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the best rows")
    parser.add_argument("--repeat", type=int, default=4, help="how many of the best rows run with all seeds")
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretraining.json"))
    parser.add_argument("--page", type=Path, help="write this page from --out and --sweeps, and run nothing")
    parser.add_argument("--sweeps", type=Path, default=Path("benchmarks/results/pretraining_sweeps.json"))
    options = parser.parse_args(words)
    if options.page:
        try:
            write_page(options.page, options.out, options.sweeps)
        except SynthSegError as error:
            sys.exit(str(error))
        return
    require_templates(parser, options)
    torch.set_num_threads(1)
    try:
        check_settings(options.work, settings_of(options))
        if options.only:
            run_one(options.only, options)
        elif not run_all(options):
            sys.exit(1)
    except SynthSegError as error:
        sys.exit(f"{options.only + ': ' if options.only else ''}{error}")


if __name__ == "__main__":
    main()
