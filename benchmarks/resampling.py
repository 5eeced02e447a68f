"""Labels on a scan finer than the network's grid: nearest neighbour against resampled probabilities, by Dice.

    python benchmarks/resampling.py --templates DIR ... [--model siam16] [--contrasts t1 t2] [--out FILE.json]

Each template is taken on its own grid (BrainWeb: 0.5 mm), undeformed, and painted with the intensities of a contrast,
partial volume and noise. The network works on its own grid (1 mm). Its result goes back to the fine grid in two ways:

nearest          each fine voxel takes the label of the network's nearest voxel (nibabel, order 0), as tools do that
                 write their labels at their own resolution
probabilities    what `synthseg segment` does: probabilities are interpolated, then the most probable label is taken

The truth are the template's labels on the fine grid; labels that its scheme cannot tell apart are scored together.
Templates that the model was trained on are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from nibabel.processing import resample_from_to  # noqa: E402
from scipy import ndimage  # noqa: E402

from synthseg.config import TrainConfig, parse  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.inference import Options, in_scheme, segment  # noqa: E402
from synthseg.labels import LabelTable, load_scheme  # noqa: E402
from synthseg.metrics import Groups, dice_table  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model  # noqa: E402
from synthseg.prediction import winners  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import Volume, write_text_atomically  # noqa: E402

SCHEME = load_scheme("siam16")
PARTIAL_VOLUME_VOXELS = 0.5  # standard deviation of the blur, in voxels of the fine grid


def painted(model: Model, template: Template, contrast: str, number: int) -> Volume:
    """The template on its own grid in one contrast: mean of each label, blurred by half a voxel, with noise."""
    base = parse(TrainConfig, model.record["config"], "checkpoint").generator
    plan = sample_plan(whole_head(base, contrast), template.name, template.table, 6060, number)
    mean = np.array(plan.contrast.mean, dtype=np.float32)
    image = ndimage.gaussian_filter(mean[template.labels.numpy()], PARTIAL_VOLUME_VOXELS)
    noise = float(np.mean(plan.contrast.std))
    rng = np.random.default_rng(number)
    for plane in image:  # in turn, so that the noise is never held as a whole
        plane += noise * rng.standard_normal(plane.shape, dtype=np.float32)
    return Volume(image, np.diag([*template.spacing_mm, 1.0]))


def groups_of(table: LabelTable, present: np.ndarray) -> Groups:
    """Ids of SCHEME and of the template's table, for each set of present labels that the two tell apart."""
    sets: list[tuple[set[int], set[int]]] = []
    for label in table.labels:
        if label.id not in present:
            continue
        ours, theirs = set(label.to[SCHEME.name]), {label.id}
        while shared := [pair for pair in sets if pair[0] & ours]:
            sets.remove(shared[0])
            ours, theirs = ours | shared[0][0], theirs | shared[0][1]
        sets.append((ours, theirs))
    return {" + ".join(SCHEME[i].name for i in sorted(ours)): (ours, theirs) for ours, theirs in sets if 0 not in ours}


def both_ways(model: Model, template: Template, contrast: str, number: int) -> dict[str, Any]:
    volume = painted(model, template, contrast, number)
    result = in_scheme(segment(volume, model, "cpu", Options(quality=False, keep_posteriors=True)), SCHEME)
    posteriors = result.posteriors
    assert posteriors is not None
    coarse = SCHEME.ids.astype(np.uint8)[winners(posteriors.values).numpy()]
    nearest = (
        resample_from_to(nib.Nifti1Image(coarse, posteriors.affine), (volume.data.shape, volume.affine), order=0)
        .get_fdata(dtype=np.float32)
        .astype(np.uint8)
    )
    truth = template.table.ids[template.labels.numpy()]
    groups = groups_of(template.table, np.unique(truth))
    return {
        "template": template.name,
        "contrast": contrast,
        "spacing_mm": [round(float(s), 3) for s in template.spacing_mm],
        "nearest": {k: round(float(v), 4) for k, v in dice_table(nearest, truth, groups).items()},
        "probabilities": {k: round(float(v), 4) for k, v in dice_table(result.labels, truth, groups).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--templates", nargs="+", required=True)
    parser.add_argument("--contrasts", nargs="+", default=["t1", "t2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    trained = set(model.record.get("templates", []))
    rows = []
    for t, folder in enumerate(expand(options.templates)):
        template = load_template(folder)
        if template.name in trained:
            sys.exit(f"{folder}: the model was trained on {template.name}; give templates that it has not seen")
        for c, contrast in enumerate(options.contrasts):
            row = both_ways(model, template, contrast, 100 * t + c)
            rows.append(row)
            print(f"\n{row['template']} {contrast}, {row['spacing_mm']} mm{'':12s} nearest  probabilities")
            for name, value in row["nearest"].items():
                if np.isfinite(value):
                    print(f"  {name[:40]:40s} {value:.3f}  {row['probabilities'][name]:.3f}", flush=True)
    if options.out:
        record = {"model": model.name, "sha256": model.sha256, "voxel_size_mm": model.voxel_size_mm, "rows": rows}
        write_text_atomically(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
