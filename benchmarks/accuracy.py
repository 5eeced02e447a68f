"""Accuracy of a model on anatomy that it was not trained on; writes a JSON file and prints tables.

    python benchmarks/accuracy.py --data DIR --held-out DIR [--model siam16] [--out FILE.json]

``--data`` holds ``scans/`` with colin27_t1, colin27_tissues, colin27_aal (MNI; github fangq/mcx; AAL),
oasis_t1_stripped and its FreeSurfer aseg (github voxelmorph). ``--held-out`` holds imported templates that no
training saw; each is rendered at 1 mm in five contrasts with random artefacts, and in four as scanners make them
(T1 and CT of 1 mm, T2 and FLAIR of 5 mm slices), and goes through the whole of inference.

The labels of a model with more classes are also compared as those of siam16, and on the OASIS scan side by side.
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

import numpy as np  # noqa: E402
import torch  # noqa: E402

from synthseg.config import GeneratorConfig  # noqa: E402
from synthseg.generator.export import grid_affine  # noqa: E402
from synthseg.generator.plan import Plan, sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.inference import segment  # noqa: E402
from synthseg.labels import LabelTable, load_scheme  # noqa: E402
from synthseg.metrics import dice_table  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model  # noqa: E402
from synthseg.templates import expand, load_template  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import Volume, load_volume  # noqa: E402

DEEP = {6, 7, 8, 9, 10, 11, 12}

# (siam16 ids, reference ids). Cerebellum and deep nuclei are grey matter in the tissue map.
COLIN_TISSUES = {
    "GM (deep and cerebellar included)": ({1, 5} | DEEP, {4}),
    "WM": ({2}, {5}),
    "CSF (ventricles included)": ({3, 4}, {3}),
    "Skull": ({15}, {2}),
    "Scalp (head)": ({16}, {1}),
}
# Above it the tissue map and the templates mean the same by skull and scalp; below lie skull base, face and neck.
COLIN_VAULT_MM = -15.0
COLIN_VAULT = ("Skull", "Scalp (head)")
COLIN_AAL = {
    "Hippocampus": ({12}, {37, 38}),
    "Caudate": ({9}, {71, 72}),
    "Putamen": ({8}, {73, 74}),
    "Thalamus": ({6}, {77, 78}),
}
ASEG = {
    "GM": ({1}, {3, 42}),
    "WM": ({2}, {2, 41, 7, 46, 16, 28, 60, 77, 80, 85, 251, 252, 253, 254, 255}),
    "Ventricular-CSF": ({4}, {4, 43, 5, 44, 14, 15, 31, 63, 72}),
    "Cerebellar-GM": ({5}, {8, 47}),
    "Thalamus": ({6}, {10, 49}),
    "Pallidum": ({7}, {13, 52}),
    "Putamen": ({8}, {12, 51}),
    "Caudate": ({9}, {11, 50}),
    "Accumbens": ({10}, {26, 58}),
    "Amygdala": ({11}, {18, 54}),
    "Hippocampus": ({12}, {17, 53}),
}
# FreeSurfer's ids of one structure that the scheme head45 keeps in one class, and ids that have no side.
ASEG_SAME = {31: 4, 63: 43, 72: 14}
ASEG_UNSIDED = (24, 30, 62, 77, 80, 85, 251, 252, 253, 254, 255)
CONTRASTS = ("t1", "t2", "flair", "ct", "random")
# As scanned: contrast, spacing of the axial slices in mm.
SCANNED = {"t1, 1 mm": ("t1", 1.0), "t2, 5 mm": ("t2", 5.0), "flair, 5 mm": ("flair", 5.0), "ct, 1 mm": ("ct", 1.0)}


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in scores.items()}


def real_scans(model: Model, scans: Path) -> dict[str, Any]:
    """Dice on Colin27 and on the OASIS scan."""
    colin_t1 = load_volume(scans / "colin27_t1.nii.gz")
    colin = segment(colin_t1, model)
    oasis = segment(load_volume(scans / "oasis_t1_stripped.nii.gz"), model)

    def ids(name: str) -> np.ndarray:
        return load_volume(scans / name).data.astype(np.int32)

    reference = ids("oasis_t1_stripped_aseg.nii.gz")
    head, brain = as_siam16(colin.labels, model.labels), as_siam16(oasis.labels, model.labels)
    by_others = ids("colin27_tissues.nii.gz")
    tissues = dice_table(head, by_others, COLIN_TISSUES)
    above = heights_mm(colin_t1) > COLIN_VAULT_MM
    vault = dice_table(head[above], by_others[above], {name: COLIN_TISSUES[name] for name in COLIN_VAULT})
    nuclei = dice_table(head, ids("colin27_aal.nii.gz"), COLIN_AAL)
    aseg = dice_table(brain, reference, ASEG)
    sides = side_by_side(oasis.labels, reference, model.labels)
    return {
        "colin27_tissues": rounded(tissues),
        "colin27_vault": rounded(vault),
        "colin27_aal": rounded(nuclei),
        "oasis_aseg": rounded({**aseg, "mean": float(np.mean(list(aseg.values())))}),
        **({"oasis_sides": rounded({**sides, "mean": float(np.mean(list(sides.values())))})} if sides else {}),
        "timings_s": {"colin27": rounded(colin.timings_s), "oasis": rounded(oasis.timings_s)},
    }


def heights_mm(volume: Volume) -> np.ndarray:
    """Height of each voxel, the third coordinate of RAS+ mm, (D, H, W)."""
    i, j, k = np.ogrid[tuple(slice(n) for n in volume.data.shape)]
    x, y, z, origin = volume.affine[2]
    return np.asarray(x * i + y * j + z * k + origin)


def as_siam16(labels: np.ndarray, table: LabelTable) -> np.ndarray:
    """Ids of siam16 for a label map of a scheme that it is part of."""
    siam16 = load_scheme("siam16")
    return siam16.ids[table.mapping(siam16)][table.to_index(labels)]


def side_by_side(labels: np.ndarray, reference: np.ndarray, table: LabelTable) -> dict[str, float]:
    """Dice of each FreeSurfer id that the model has; empty if it knows no sides. Voxels without a side are left out."""
    if not any(label.partner for label in table.labels):
        return {}
    told = ~np.isin(reference, ASEG_UNSIDED)
    merged = reference.copy()
    for label_id, same in ASEG_SAME.items():
        merged[reference == label_id] = same
    groups = {label.name: ({label.id}, {label.id}) for label in table.labels[1:] if (merged == label.id)[told].any()}
    return dice_table(labels[told], merged[told], groups)


def scanned(plan: Plan, slices_mm: float) -> Plan:
    """The plan with axial slices of this spacing, each as thick, and nothing cropped."""
    mm = plan.voxel_size_mm
    grid = {"spacing_mm": (mm, mm, slices_mm), "thickness_mm": (0.0, 0.0, slices_mm if slices_mm > mm else 0.0)}
    return plan.model_copy(update={"artefacts": plan.artefacts.model_copy(update=grid)})


def held_out_maps(
    model: Model, folders: list[Path], contrasts: tuple[str, ...] = CONTRASTS, config: GeneratorConfig | None = None
) -> dict[str, Any]:
    """Mean Dice over maps, per contrast and structure, of 1 mm renderings with whole heads in view.

    They are rendered with the default settings, the same for every model, or with those given.
    """
    config = config or GeneratorConfig()
    base = config.model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 1})
    trained = set(model.record.get("templates", []))
    images: dict[str, tuple[str, float | None]] = {contrast: (contrast, None) for contrast in contrasts}
    images |= SCANNED if contrasts == CONTRASTS else {}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in images}
    for m, folder in enumerate(folders):
        template = load_template(folder)
        if template.name in trained:
            sys.exit(f"{folder}: the model was trained on {template.name}; give templates that it has not seen")
        to_target = model.labels.ids[template.table.mapping(model.labels)]
        for c, (image_name, (contrast, slices_mm)) in enumerate(images.items()):
            plan = sample_plan(whole_head(base, contrast), template.name, template.table, 2026, 100 * m + c)
            plan = scanned(plan, slices_mm) if slices_mm else plan
            image, labels = render([template], [plan])
            result = segment(Volume(image[0, 0].numpy(), grid_affine(plan)), model)
            groups = {x.name: ({x.id}, {x.id}) for x in model.labels.labels if x.id > 0}
            scores = dice_table(result.labels, to_target[labels[0].numpy()], groups)
            rows[image_name].append(scores)
            print(
                f"  {template.name} {image_name}: {np.nanmean(list(scores.values())):.3f}", file=sys.stderr, flush=True
            )
    names = [x.name for x in model.labels.labels if x.id > 0]
    table = {
        contrast: rounded({name: float(np.nanmean([scores[name] for scores in found])) for name in names})
        for contrast, found in rows.items()
    }
    for row in table.values():
        row["mean"] = round(float(np.nanmean(list(row.values()))), 4)
    mean = round(float(np.mean([table[contrast]["mean"] for contrast in contrasts])), 4)
    as_scanned = {name: table.pop(name) for name in SCANNED if name in table}
    return {"maps": [f.name for f in folders], "contrasts": table, "mean": mean, "scanned": as_scanned}


def print_table(title: str, rows: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:36s} {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    start = time.perf_counter()
    result: dict[str, Any] = {
        "model": model.name,
        "sha256": model.sha256,
        "steps": model.record.get("steps"),
        "train_seconds": model.record.get("train_seconds"),
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        **real_scans(model, options.data / "scans"),
    }
    for key in ("colin27_tissues", "colin27_vault", "colin27_aal", "oasis_aseg", "oasis_sides"):
        if key in result:
            print_table(key, result[key])
    if options.held_out:
        result["held_out"] = held_out_maps(model, expand(options.held_out))
        print_table(
            "held-out maps, mean per contrast", {c: r["mean"] for c, r in result["held_out"]["contrasts"].items()}
        )
        print(f"  mean {result['held_out']['mean']:.3f}")
        print_table("held-out maps as scanned", {c: r["mean"] for c, r in result["held_out"]["scanned"].items()})
    result["seconds"] = round(time.perf_counter() - start, 1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
