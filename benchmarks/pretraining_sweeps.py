"""Sweeps of pretraining: severity of the views at two amounts of synthetic data, temperature, and beta.

    python benchmarks/pretraining_sweeps.py --templates DIR ... --held-out DIR ... [--rows TEXT ...]
                                            [--cpu-minutes 6] [--pool 16] [--jobs 2] [--out FILE.json] [--work DIR]

Severity: the views' severities are scaled from mild to severe, with a pool of ``--pool`` anatomies and with a new
anatomy each step; the appearance of the views is drawn anew in both. AdaInf (Wang et al., ICLR 2024) claims that more
generated data wants weaker augmentation. The features are measured, and the segmentation of two templates after few
steps. Temperature (InfoNCE) and beta (HUCL): uniformity against tolerance (Wang & Liu, CVPR 2021).

Network, generator and measures are those of benchmarks/pretraining.py, which writes the page of both. A row that is
done is kept in ``--work``; one that was stopped goes on from its last saved state.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pretraining as table
import torch
from pretraining_jobs import check_settings, kept, run_keys, slug, stamped

from synthseg import rng
from synthseg.errors import SynthSegError
from synthseg.generator.plan import Plan
from synthseg.templates import Template
from synthseg.training.pretraining import Pretrainer
from synthseg.training.view_stream import ViewStream
from synthseg.volume import write_text_atomically

SCALES = (0.25, 0.5, 0.75, 1.0)
TEMPERATURES = (0.05, 0.15, 0.33, 0.7, 1.5)
BETAS = (0.0, 2.0, 5.0, 10.0, 30.0)
SEVERITY_TERMS: table.Terms = {"contrast": [{"loss": "hucl", "beta": 2.0}]}


class PooledStream(ViewStream):
    """Views of a fixed number of anatomies. What is drawn anew for each batch: appearance, and where the views lie."""

    pool = 1

    def anatomy_of(self, index: int) -> int:
        """The sample whose template and shape this one has."""
        return int(torch.randint(self.pool, (), generator=rng.generator(self.config.seed, index, "pool")))

    def template_of(self, index: int) -> int:
        return super().template_of(self.anatomy_of(index))

    def plans(self, template: Template, seed: int, index: int) -> list[Plan]:
        shape = super().plans(template, seed, self.anatomy_of(index))[0]
        held = []
        for plan in super().plans(template, seed, index):
            deform = shape.deform.model_copy(update={"perturbation_mm": plan.deform.perturbation_mm})
            update = {"anatomy": shape.anatomy, "anomalies": shape.anomalies, "deform": deform}
            held.append(plan.model_copy(update=update))
        return held


def pooled(pool: int) -> type[Pretrainer]:
    """Pretraining that sees this many anatomies."""

    class Pooled(Pretrainer):
        def stream(self, rank: int = 0, world: int = 1) -> ViewStream:
            stream = PooledStream(self.config, self.templates, self.target, self.state.step, rank, world)
            stream.pool = pool
            return stream

    return Pooled


def sweep_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row does, by its key: the sweep, its value, the pool (None: a new anatomy each step), the terms."""
    rows: dict[str, dict[str, Any]] = {}
    for seed in range(options.seeds):
        for pool in (options.pool, None):
            for scale in SCALES:
                key = f"severity {scale:g}, {f'pool {pool}' if pool else 'fresh'}, seed {seed}"
                rows[key] = {"sweep": "severity", "value": scale, "pool": pool, "objective": SEVERITY_TERMS}
        for temperature in TEMPERATURES:
            terms = {"contrast": [{"loss": "info_nce", "temperature": temperature}]}
            key = f"temperature {temperature:g}, seed {seed}"
            rows[key] = {"sweep": "temperature", "value": temperature, "pool": None, "objective": terms}
        for beta in BETAS:
            terms = {"contrast": [{"loss": "hucl", "beta": beta}]}
            rows[f"beta {beta:g}, seed {seed}"] = {"sweep": "beta", "value": beta, "pool": None, "objective": terms}
        for key, row in rows.items():
            row.setdefault("seed", int(key.rpartition("seed ")[2]))
    return rows


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return table.settings_of(options) | {"pool": options.pool}


def file_of(key: str, options: argparse.Namespace) -> Path:
    return Path(options.work / f"row_{slug(key)}.json")


def make_row(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one row."""
    row = sweep_rows(options)[key]
    severe = row["sweep"] == "severity"
    seed, scale = row["seed"], row["value"] if severe else 1.0
    options = argparse.Namespace(**vars(options))
    options.severities = [scale * severity for severity in options.severities]
    folder = options.work / slug(key)
    kind = pooled(row["pool"]) if row["pool"] else Pretrainer
    trained = partial(table.pretrain, options, row["objective"], seed, folder / "pretrained", kind)
    row["pretraining"] = kept(folder / "pretraining.json", trained)
    init = folder / "pretrained" / "pretrained.safetensors"
    minutes = settings_of(options)["fine_tune_minutes"]
    row["segmentation"] = table.segmentations(options, seed, folder, minutes, init) if severe else {}
    table.measure(row, folder, init, options)
    return row


def run_one(key: str, options: argparse.Namespace) -> None:
    """Make a row in this process and keep it."""
    row = stamped(options.work / slug(key), partial(make_row, key, options))
    write_text_atomically(file_of(key, options), json.dumps(row, indent=2) + "\n")


def write_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Write and print the rows that are done, and return them."""
    files = {key: file_of(key, options) for key in sweep_rows(options)}
    done = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(options.out, json.dumps({"settings": settings_of(options), "rows": done}, indent=2) + "\n")
    print(f"{'row':34s} {'steps':>6s} {'uniform':>8s} {'tolerance':>9s} {'near':>6s} {'rank':>5s} {'probe':>6s} Dice")
    for key, row in done.items():
        features = row["features"]
        dice = " ".join(f"{scores['unseen_maps']:.3f}" for scores in row["segmentation"].values())
        print(
            f"{key:34s} {row['pretraining']['steps']:6d} {features['uniformity']:8.3f} {features['tolerance']:9.3f} "
            f"{features['neighbour_tolerance']:6.3f} {features['effective_rank']:5.1f} "
            f"{features['probe']['unseen_maps']['mean']:6.3f} {dice}",
            flush=True,
        )
    return done


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table.add_shared_options(parser)
    parser.add_argument("--cpu-minutes", type=float, default=6.0, help="of each pretraining")
    parser.add_argument("--counts", type=int, nargs="+", default=[2], help="templates of each segmentation")
    parser.add_argument("--pool", type=int, default=16, help="anatomies of the smaller amount of data")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/pretraining_sweeps"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretraining_sweeps.json"))
    options = parser.parse_args(words)
    table.require_templates(parser, options)
    if options.pool < 1 or options.seeds < 1:
        parser.error("--pool and --seeds must be positive")
    torch.set_num_threads(1)
    try:
        check_settings(options.work, settings_of(options))
        if options.only:
            run_one(options.only, options)
            return
        done = write_rows(options)
        wanted = [key for key in sweep_rows(options) if any(part in key for part in options.rows)]
        run_keys([key for key in wanted if key not in done], options, run_one, lambda: write_rows(options))
        if set(wanted) - set(write_rows(options)):
            sys.exit(1)
    except SynthSegError as error:
        sys.exit(f"{options.only + ': ' if options.only else ''}{error}")


if __name__ == "__main__":
    main()
