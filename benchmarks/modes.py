"""What each mode of `synthseg segment` gains and costs: Dice, seconds and memory; writes a JSON file, prints tables.

    python benchmarks/modes.py --data DIR --held-out DIR DIR ... [--model siam16] [--members] [--out FILE.json]

adult    maps that no training saw, rendered whole at 1 mm in several contrasts, in the default, fast and robust mode,
         and cut to a box
infant   the same heads at 0.72 of their size (that of three months), scanned at 1 mm: as they are, and with the voxel
         size that brings them back to an adult's. Only the size is an infant's, not the anatomy or the contrast.
real     Colin27 against a tissue map, and a stripped T1 of OASIS against its FreeSurfer labels (``--data``)
cost     the command in a fresh process in each mode: seconds and peak memory
members  with ``--members``: every candidate for the robust mode alone, and the mode's mean without and with it, on the
         network's grid and without clean-up

Each result is kept as it comes: a second call with the same ``--out`` goes on where the first one ended. A change of
the model or of the modes begins anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accuracy import ASEG, COLIN_TISSUES  # noqa: E402
from bench_segment import measured, padded  # noqa: E402

from synthseg import modes  # noqa: E402
from synthseg.config import TrainConfig, parse  # noqa: E402
from synthseg.conforming import conform, crop, head_box  # noqa: E402
from synthseg.generator.export import grid_affine  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.inference import Options, in_scheme, segment  # noqa: E402
from synthseg.labels import load_scheme  # noqa: E402
from synthseg.metrics import Groups, dice_table  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model  # noqa: E402
from synthseg.paths import data_dir  # noqa: E402
from synthseg.posteriors import Grid, Posteriors, scan_grid  # noqa: E402
from synthseg.prediction import Member, predict  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import (  # noqa: E402
    Volume,
    apply_separable,
    canonical,
    centred_matrix,
    load_volume,
    write_text_atomically,
)

INFANT_SIZE = 0.72  # head circumference at three months, 40.5 cm (WHO, median of boys), over that of an adult, 56 cm
CROP_MM = (160.0, 200.0, 160.0)
SCHEME = load_scheme("siam16")
ALL_LABELS: Groups = {x.name: ({x.id}, {x.id}) for x in SCHEME.labels if x.id > 0}

VARIANTS: dict[str, dict[str, Options]] = {
    "adult": {
        "default": Options(quality=False),
        "fast": Options(mode="fast", quality=False),
        "robust": Options(mode="robust", quality=False),
        "crop": Options(crop_mm=CROP_MM, quality=False),
        "voxels of 1.5 mm": Options(voxel_size_mm=1.5, quality=False),
    },
    "infant": {
        "default": Options(quality=False),
        "robust": Options(mode="robust", quality=False),
        "voxel size": Options(voxel_size_mm=INFANT_SIZE, quality=False),
        "voxel size, robust": Options(voxel_size_mm=INFANT_SIZE, mode="robust", quality=False),
    },
}
VARIANTS["real"] = VARIANTS["adult"]

CANDIDATES = {
    "plain": Member(),
    "mirrored": Member(mirrored=True),
    "shifted": Member(shift=(5, 3, 7)),
    "inverted": Member(inverted=True),
    "zoom 0.8": Member(zoom=0.8),
    "zoom 0.9": Member(zoom=0.9),
    "zoom 1.1": Member(zoom=1.1),
    "zoom 1.2": Member(zoom=1.2),
}


@dataclass
class Case:
    """A scan, and what is known of it: labels on a grid, and which ids to compare."""

    name: str
    kind: str
    volume: Volume
    truth: np.ndarray
    grid: Grid
    groups: Groups


def rendered(model: Model, template: Template, contrast: str, number: int) -> tuple[Volume, np.ndarray]:
    config = parse(TrainConfig, model.record["config"], "checkpoint").generator
    base = config.model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 1})
    plan = sample_plan(whole_head(base, contrast), template.name, template.table, 5150, number)
    image, labels = render([template], [plan])
    to_scheme = SCHEME.ids[template.table.mapping(SCHEME)]
    return Volume(image[0, 0].numpy(), grid_affine(plan)), to_scheme[labels[0].numpy()]


def smaller(volume: Volume, factor: float) -> tuple[Volume, Grid]:
    """The same head at ``factor`` of its size, scanned with voxels of 1 mm; and the grid that its labels now have."""
    affine = volume.affine @ np.diag([factor, factor, factor, 1.0])
    shape = [int(np.ceil(n * factor)) for n in volume.data.shape]
    matrices = [centred_matrix(n, m, factor, 1.0) for n, m in zip(volume.data.shape, shape, strict=True)]
    data = apply_separable(torch.from_numpy(volume.data)[None], matrices)[0].numpy()
    fine = scan_grid(Volume(volume.data, affine))
    coarse = affine.copy()
    coarse[:3, :3] /= factor
    centre_mm = affine[:3, :3] @ (np.array(volume.data.shape) - 1) / 2 + affine[:3, 3]
    coarse[:3, 3] = centre_mm - coarse[:3, :3] @ (np.array(shape) - 1) / 2
    return Volume(data, coarse), fine


def cases(model: Model, options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], Case]]]:
    """Name, kind and maker of each case; a maker is only called where a result is missing."""
    scans = options.data / "scans"

    def real(name: str, image: str, labels: str, groups: Groups) -> Case:
        volume = load_volume(scans / image)
        return Case(name, "real", volume, load_volume(scans / labels).data, scan_grid(volume), groups)

    yield "oasis", "real", lambda: real("oasis", "oasis_t1_stripped.nii.gz", "oasis_t1_stripped_aseg.nii.gz", ASEG)
    yield "colin27", "real", lambda: real("colin27", "colin27_t1.nii.gz", "colin27_tissues.nii.gz", COLIN_TISSUES)
    trained = set(model.record.get("templates", []))
    for m, folder in enumerate(expand(options.held_out)):
        template = load_template(folder)
        if template.name in trained:
            sys.exit(f"{folder}: the model was trained on {template.name}; give templates that it has not seen")
        for c, contrast in enumerate(options.contrasts):

            def adult(
                template: Template = template, contrast: str = contrast, number: int = 100 * m + c
            ) -> tuple[Volume, np.ndarray]:
                return rendered(model, template, contrast, number)

            def as_adult(make: Callable[[], tuple[Volume, np.ndarray]] = adult) -> Case:
                volume, truth = make()
                return Case("", "adult", volume, truth, scan_grid(volume), ALL_LABELS)

            def as_infant(make: Callable[[], tuple[Volume, np.ndarray]] = adult) -> Case:
                volume, truth = make()
                small, grid = smaller(volume, INFANT_SIZE)
                return Case("", "infant", small, truth, grid, ALL_LABELS)

            yield f"{template.name} {contrast}", "adult", as_adult
            yield f"{template.name} {contrast}", "infant", as_infant


def scored(case: Case, model: Model, options: Options) -> dict[str, Any]:
    """Dice of each structure and its mean, wall seconds without reading and writing."""
    start = time.perf_counter()
    result = segment(case.volume, model, "cpu", Options(**{**asdict(options), "keep_posteriors": True}))
    seconds = time.perf_counter() - start
    result = in_scheme(result, SCHEME)
    assert result.posteriors is not None
    dice = dice_table(result.posteriors.labels_on(case.grid).labels, case.truth, case.groups)
    return {
        "mean": round(float(np.nanmean(list(dice.values()))), 4),
        "seconds": round(seconds, 2),
        "dice": {name: round(float(value), 4) for name, value in dice.items()},
    }


# ------------------------------------------------------------------------------------------------- members


def members(case: Case, model: Model) -> dict[str, float]:
    """Mean Dice of each candidate alone, of the robust mode, and of it without or with each candidate.

    Probabilities are kept as whole numbers of one byte, so that a dozen members fit into memory.
    """
    ras = canonical(case.volume)
    part = crop(ras, head_box(ras))
    robust = dict.fromkeys(modes.MEMBERS["robust"])
    names = {member: name for name, member in CANDIDATES.items()}
    everyone = dict(CANDIDATES)
    everyone.update({f"member {i}": member for i, member in enumerate(robust) if member not in names})
    kept: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        image = conform(part, model.voxel_size_mm)
        for name, member in everyone.items():
            values = predict(image, model, torch.device("cpu"), members=(member,))
            kept[name] = torch.stack([(one * 255).round().to(torch.uint8) for one in values])
            del values
        chosen = [name for name, member in everyone.items() if member in robust]

        def mean_dice(of: Sequence[str]) -> float:
            values = torch.zeros(kept[of[0]].shape, dtype=torch.float16)
            for name in of:
                values += kept[name] / torch.tensor(255 * len(of), dtype=torch.float16)
            posteriors = Posteriors.covering(values, model.labels, part, model.voxel_size_mm).merged(SCHEME)
            found = dice_table(posteriors.labels_on(case.grid).labels, case.truth, case.groups)
            return round(float(np.nanmean(list(found.values()))), 4)

        scores = {f"only {name}": mean_dice([name]) for name in everyone}
        scores["robust"] = mean_dice(chosen)
        for name in everyone:
            others = [n for n in chosen if n != name]
            scores[f"robust without {name}" if name in chosen else f"robust with {name}"] = mean_dice(
                others if name in chosen else [*chosen, name]
            )
    return scores


# ---------------------------------------------------------------------------------------------------- cost


def cost(model: str, threads: int) -> dict[str, dict[str, float]]:
    """Seconds and peak GB of the whole command, in each mode, for a head of 256 x 256 x 256 voxels of 1 mm."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        scan = padded(data_dir("samples") / "colin27_t1.nii.gz", Path(folder) / "colin27_256.nii.gz")
        for mode, flags in {"default": [], "fast": ["--fast"], "robust": ["--robust"]}.items():
            command = [sys.executable, "-m", "synthseg", "segment", str(scan), "-o", f"{folder}/seg.nii.gz", *flags]
            command += ["--overwrite", "--threads", str(threads), "--model", model, "--device", "cpu"]
            seconds, peak_gb = measured(command)
            rows[mode] = {"seconds": round(seconds, 1), "peak_gb": round(peak_gb, 2)}
            print(f"cost: {mode}: {seconds:.1f} s, {peak_gb:.2f} GB", flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------- main


class Record:
    """The results so far, written after each."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.data = path, {**key, "cases": {}}
        if path is not None and path.is_file():
            found = json.loads(path.read_text())
            if {name: found.get(name) for name in key} == key:
                self.data = found

    def save(self) -> None:
        if self.path is not None:
            write_text_atomically(self.path, json.dumps(self.data, indent=2) + "\n")


def print_tables(cases: dict[str, Any]) -> None:
    for kind, variants in VARIANTS.items():
        found = [row["variants"] for row in cases.values() if row["kind"] == kind and len(row["variants"])]
        if not found:
            continue
        print(f"\n{kind}, {len(found)} scans: mean Dice, gain over default, time over default")
        for name in variants:
            pairs = [(row[name], row["default"]) for row in found if name in row and "default" in row]
            if not pairs:
                continue
            gain = np.array([a["mean"] - b["mean"] for a, b in pairs])
            times = np.median([a["seconds"] / b["seconds"] for a, b in pairs])
            print(
                f"  {name:20s} {np.mean([a['mean'] for a, _ in pairs]):.3f}  {gain.mean():+.3f} "
                f"({gain.min():+.3f} to {gain.max():+.3f})  {times:.2f}"
            )
    tables = [row["members"] for row in cases.values() if row.get("members")]
    if tables:
        print(f"\nmembers of the robust mode, {len(tables)} scans: mean Dice")
        for name in tables[0]:
            print(f"  {name:28s} {np.mean([table[name] for table in tables]):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", nargs="*", default=[])
    parser.add_argument("--contrasts", nargs="*", default=["t1", "t2", "ct", "random"])
    parser.add_argument("--only", default="", help="cases whose kind and name hold this text")
    parser.add_argument("--members", action="store_true")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    key = {
        "model": model.name,
        "sha256": model.sha256,
        "threads": options.threads,
        "fast_factor": modes.FAST_FACTOR,
        "robust": [json.loads(json.dumps(asdict(member))) for member in modes.MEMBERS["robust"]],
        "infant_size": INFANT_SIZE,
        "crop_mm": list(CROP_MM),
    }
    record = Record(options.out, key)
    for name, kind, make in cases(model, options):
        title = f"{kind} {name}"
        if options.only not in title:
            continue
        row = record.data["cases"].setdefault(title, {"kind": kind, "variants": {}})
        missing = [variant for variant in VARIANTS[kind] if variant not in row["variants"]]
        wants_members = options.members and kind != "infant" and "members" not in row
        if not missing and not wants_members:
            continue
        case = make()
        for variant in missing:
            row["variants"][variant] = scored(case, model, VARIANTS[kind][variant])
            record.save()
            print(f"{title}: {variant}: {row['variants'][variant]['mean']:.3f}", file=sys.stderr, flush=True)
        if wants_members:
            row["members"] = members(case, model)
            record.save()
            print(f"{title}: members", file=sys.stderr, flush=True)
    if not options.no_cost and "cost" not in record.data:
        record.data["cost"] = cost(options.model, options.threads)
        record.save()
    print_tables(record.data["cases"])


if __name__ == "__main__":
    main()
