"""Do the changes of anatomy span what they promise? Many anatomies of one template, measured.

    python benchmarks/anatomy_ranges.py [--template DIR] [--preset siam] [--n 200] [--out FILE.json] [--figure FILE.png]

Each anatomy is read at 1 mm on the template's own grid, undeformed, so that nothing but its change is measured:
volumes against the template's, cortical thickness as 2 x volume / surface, skull thickness as volume / inner surface
of the calvaria (upper half of the brain). Also counted: white matter outside its largest piece; grey matter that lies
further from where brain or CSF was than 2 mm and what the brain was moved by; islands of the deep nuclei, read at
0.5 mm, since points 1 mm apart miss the thin places of an anatomy that is whole (those are listed too). The work can
be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402

from synthseg.config import GeneratorConfig, generator_config  # noqa: E402
from synthseg.generator.anatomy import displacement, moves  # noqa: E402
from synthseg.generator.borders import NUCLEI  # noqa: E402
from synthseg.generator.deform import DeformPlan  # noqa: E402
from synthseg.generator.plan import Plan, sample_plan  # noqa: E402
from synthseg.generator.synthesis import read_anatomy  # noqa: E402
from synthseg.labels import BRAIN_TISSUES, INTRACRANIAL_TISSUES, tissue_mask  # noqa: E402
from synthseg.templates import Template, load_template  # noqa: E402

# A quarter of a voxel from the template's grid: halfway between voxels rounding would decide which one is read.
STILL = DeformPlan(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)), shift_mm=(0.25, 0.25, 0.25), velocity_mm=None, flip=False)
FINE_MM, AROUND_MM = 0.5, 10.0
BONE = ("bone_cortical", "bone_cancellous")


def faces(mask: np.ndarray, other: np.ndarray) -> float:
    """Area of the border between two masks, mm²: faces of voxels times 2/3, the mean over directions of a surface."""
    count = 0
    for axis in range(3):
        a, b = np.moveaxis(mask, axis, 0), np.moveaxis(other, axis, 0)
        count += int((a[1:] & b[:-1]).sum()) + int((a[:-1] & b[1:]).sum())
    return 2 / 3 * count


def measure(labels: np.ndarray, template: Template) -> dict[str, float]:
    """Volumes in ml and thicknesses in mm."""

    def of(*tissues: str) -> np.ndarray:
        return tissue_mask(template.table, tissues)[labels]

    found = {f"{name}_ml": of(name).sum() / 1000 for name in ("ventricle", "csf", "dura", *NUCLEI)}
    grey = of("gm")
    found["cortex_mm"] = 2 * grey.sum() / faces(grey, ~grey)
    cerebellar = of("cerebellar_gm")
    found["cerebellar_gm_ml"] = cerebellar.sum() / 1000
    inside, bone = of(*INTRACRANIAL_TISSUES, "dura"), of(*BONE)
    half = int(np.mean(np.nonzero(of(*BRAIN_TISSUES))[2]))
    found["skull_mm"] = bone[:, :, half:].sum() / faces(inside[:, :, half:], bone[:, :, half:])
    scalp = of("soft", "skin", "fat", "muscle")
    found["scalp_mm"] = scalp[:, :, half:].sum() / faces(bone[:, :, half:], scalp[:, :, half:])
    white = of("wm", "brainstem")  # through the brain stem the cerebellum's is one with the cerebrum's
    pieces, _ = ndimage.label(white, np.ones((3, 3, 3)))
    found["white_matter_apart"] = 1 - np.bincount(pieces[white]).max() / white.sum()
    return {name: float(value) for name, value in found.items()}


def islands(labels: np.ndarray, template: Template) -> float:
    """Voxels of the deep nuclei outside the largest piece of each."""
    found = 0
    for label in template.table.labels:
        if label.tissue in NUCLEI:
            mask = labels == template.table.index_of[label.id]
            pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
            if count > 1:
                found += int(mask.sum() - np.bincount(pieces[mask]).max())
    return float(found)


def plan_of(template: Template, config: GeneratorConfig, number: int | None) -> Plan:
    """The plan of anatomy ``number`` of the template, undeformed; None: of the template as it is."""
    plan = sample_plan(config, template.name, template.table, 0, number or 0)
    return plan.model_copy(update={"deform": STILL} | ({"anatomy": None} if number is None else {}))


def read(template: Template, plan: Plan) -> np.ndarray:
    """The labels of the anatomy."""
    return read_anatomy(template, plan)[1].numpy()


def fine(template: Template, plan: Plan) -> Plan:
    """The same anatomy, read at ``FINE_MM`` where the deep nuclei are."""
    nuclei = tissue_mask(template.table, NUCLEI)[template.labels.numpy()]
    shape = []
    for axis, box in enumerate(ndimage.find_objects(nuclei.astype(np.uint8))[0]):
        centre, spacing = template.center[axis], template.spacing_mm[axis]
        half = max(abs(box.start - centre), abs(box.stop - 1 - centre)) * spacing + AROUND_MM
        shape.append(2 * int(np.ceil(half / FINE_MM)))
    return plan.model_copy(update={"shape": tuple(shape), "voxel_size_mm": FINE_MM})


def moved_mm(template: Template, plan: Plan) -> float:
    """The longest way by which a place of the brain was moved."""
    if plan.anatomy is None or not moves(plan.anatomy):
        return 0.0
    half = [(n - 1) / 2 * s for n, s in zip(template.labels.shape, template.spacing_mm, strict=True)]
    axes = [torch.arange(-h, h, 3.0) for h in half]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return float(displacement(template, plan.anatomy, position, brain=True).norm(dim=0).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="phantom")
    parser.add_argument("--preset", default="siam")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/anatomy_ranges.json"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    template = load_template(options.template)
    size = [int(n * s) for n, s in zip(template.labels.shape, template.spacing_mm, strict=True)]
    config = generator_config(None, ["anomalies.probability=0", "subsamples=1", "voxel_size_mm=1"], options.preset)
    grid = {"shape": tuple(size), "anatomy": config.anatomy.model_copy(update={"probability": 1.0})}
    config = config.model_copy(update=grid)
    key = {"template": template.name, "anatomy": config.anatomy.model_dump(mode="json")}
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    still = plan_of(template, config, None)
    original = read(template, still)
    if done.get("key") != key:
        own = measure(original, template) | {"islands_at_1_mm": islands(original, template)}
        own["islands"] = islands(read(template, fine(template, still)), template)
        done = {"key": key, "template": own, "samples": []}
    head = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in ndimage.find_objects((original > 0).astype(int))[0])
    original = original[head]
    from_brain_mm = ndimage.distance_transform_edt(~tissue_mask(template.table, (*BRAIN_TISSUES, "csf"))[original])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    while len(done["samples"]) < options.n:
        plan = plan_of(template, config, len(done["samples"]))
        labels = read(template, plan)[head]
        row = measure(labels, template)
        row["islands"] = islands(read(template, fine(template, plan)), template)
        row["islands_at_1_mm"] = islands(labels, template)
        grey = tissue_mask(template.table, ("gm",))[labels]
        row["grey_outside"] = float((grey & (from_brain_mm > 2 + moved_mm(template, plan))).sum())
        done["samples"].append(row)
        options.out.write_text(json.dumps(done) + "\n")
    report(done, options.figure)


def report(done: dict[str, Any], figure: Path | None) -> None:
    """Print the table: the template's value, and percentiles of the anatomies' as a ratio to it."""
    samples, own = done["samples"], done["template"]
    print(f"{len(samples)} anatomies of {done['key']['template']}")
    print(f"{'':22s} {'template':>9s} {'1 %':>7s} {'25 %':>7s} {'50 %':>7s} {'75 %':>7s} {'99 %':>7s}")
    names = [name for name in own if name.endswith(("_ml", "_mm")) and own[name] > 0]
    ratios = {name: np.array([row[name] for row in samples]) / own[name] for name in names}
    for name in names:
        parts = " ".join(f"{value:7.2f}" for value in np.percentile(ratios[name], [1, 25, 50, 75, 99]))
        print(f"{name:22s} {own[name]:9.2f} {parts}")
    apart = np.array([row["white_matter_apart"] for row in samples])
    print(f"white matter outside its largest piece: template {own['white_matter_apart']:.4f}, worst {apart.max():.4f}")
    for key, what in (("islands", f"read at {FINE_MM} mm"), ("islands_at_1_mm", "read at 1 mm")):
        counts = [row[key] for row in samples]
        print(
            f"islands of nuclei, {what}: template {own[key]:.0f}, worst {max(counts):.0f}, mean {np.mean(counts):.2f}"
        )
    print(f"grey matter outside brain and CSF: worst {max(row['grey_outside'] for row in samples):.0f} voxels")
    if figure is not None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        fig, axes = plt.subplots(3, 5, figsize=(15, 7))
        for ax, name in zip(axes.flat, names, strict=False):
            ax.hist(ratios[name], bins=30, color="0.4")
            ax.axvline(1.0, color="tab:red", lw=1)
            ax.set_title(name.replace("_", " "), fontsize=9)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        fig.suptitle("Ratio to the template")
        fig.tight_layout()
        fig.savefig(figure, dpi=70)


if __name__ == "__main__":
    main()
