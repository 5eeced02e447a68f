"""Do the synthetic images cover real scans? Contrast, noise and sharpness of scans against those of many images.

    python benchmarks/coverage.py --data DIR --templates DIR DIR ... [--preset siam] [--n 500] [--out FILE.json]
                                  [--figure FILE.png]

Scans and images are measured as the network sees them: at 1 mm, in [0, 1] (``conforming.conform``).

GM/WM, CSF/WM, skull/WM  ratio of the median intensities of tissues without their outermost voxels (skull: all of it);
                         CSF is that of the ventricles, where labels tell them apart
noise                    spread of the differences of neighbouring voxels inside white matter (robust), over sqrt(2)
sharpness                99th percentile of the gradient's length inside the head, per mm

The labels of an image are those it was made from. Those of a scan are its reference labels in ``--data`` (accuracy.py),
else the segmentation of the model that ships. A structure that is not in view has no ratio. The work can be stopped and
run again. Exit status 1 if a measure of a scan lies outside the 1st to 99th percentile of the images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402

from synthseg.config import GeneratorConfig, generator_config  # noqa: E402
from synthseg.conforming import conform, resample  # noqa: E402
from synthseg.generator.anomalies import with_anomalies  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.inference import segment  # noqa: E402
from synthseg.labels import tissue_mask  # noqa: E402
from synthseg.networks.checkpoint import load_model  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.volume import Volume, canonical, load_volume  # noqa: E402

TISSUES = ("gm", "wm", "csf", "skull")
MEASURES = ("GM/WM", "CSF/WM", "skull/WM", "noise", "sharpness")
SIAM16 = {"gm": {1}, "wm": {2}, "csf": {4}, "skull": {15}}
# Labels of the scans that have them: file, ids of each tissue. The tissue map has no ventricles; its CSF holds them.
REFERENCE = {
    "colin27_t1": ("colin27_tissues", {"gm": {4}, "wm": {5}, "csf": {3}, "skull": {2}}),
    "oasis_t1_stripped": ("oasis_t1_stripped_aseg", {"gm": {3, 42}, "wm": {2, 41}, "csf": {4, 43}, "skull": set()}),
}
PROBABILITIES = {"ct_average": {"gm": "ct_average_gm", "wm": "ct_average_wm", "csf": "ct_average_csf"}}
SCANS = ("colin27_t1", "oasis_t1_stripped", "t1_conformed", "t2w", "ct_average")
ENOUGH = 200  # voxels


def measure(image: np.ndarray, masks: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """All measures of an image (D, H, W) at 1 mm in [0, 1]; None for what cannot be measured."""
    level: dict[str, float] = {}
    inner: dict[str, np.ndarray] = {}
    for tissue, mask in masks.items():
        core = mask if tissue == "skull" else ndimage.binary_erosion(mask)
        inner[tissue] = core if core.sum() >= ENOUGH else mask
        if inner[tissue].sum() >= ENOUGH:
            level[tissue] = float(np.median(image[inner[tissue]]))
    out: dict[str, float | None] = dict.fromkeys(MEASURES)
    if level.get("wm", 0.0) > 0:
        for name, tissue in (("GM/WM", "gm"), ("CSF/WM", "csf"), ("skull/WM", "skull")):
            if tissue in level:
                out[name] = level[tissue] / level["wm"]
    if "wm" in level:
        white, differences = inner["wm"], []
        for axis in range(3):
            step = np.diff(image, axis=axis)
            low, high = np.delete(white, -1, axis), np.delete(white, 0, axis)
            differences.append(step[low & high])
        together = np.concatenate(differences)
        if together.size >= ENOUGH:
            out["noise"] = float(1.4826 * np.median(np.abs(together - np.median(together))) / np.sqrt(2))
    head = image > 0.05
    if head.sum() >= ENOUGH:
        length = np.sqrt(sum(g**2 for g in np.gradient(image)))
        out["sharpness"] = float(np.percentile(length[head], 99))
    return out


def scan_measures(name: str, folder: Path) -> dict[str, float | None]:
    scan = load_volume(folder / f"{name}.nii.gz")

    def at_1mm(values: np.ndarray) -> np.ndarray:
        return resample(canonical(Volume(values.astype(np.float32), scan.affine)), 1.0).numpy() > 0.5

    image = conform(canonical(scan), 1.0).numpy()
    masks = {}
    if name in REFERENCE:
        file, groups = REFERENCE[name]
        ids = load_volume(folder / f"{file}.nii.gz").data.astype(np.int32)
    else:
        ids, groups = segment(scan, load_model("siam16")).labels.astype(np.int32), SIAM16
    for tissue in TISSUES:
        masks[tissue] = at_1mm(np.isin(ids, list(groups[tissue])))
    for tissue, file in PROBABILITIES.get(name, {}).items():
        values = load_volume(folder / f"{file}.nii.gz").data
        masks[tissue] = at_1mm(values > 0.7 * values.max())
    return measure(image, masks)


def image_measures(template: Template, config: GeneratorConfig, number: int) -> dict[str, float | None]:
    plan = sample_plan(config, template.name, template.table, 0, number)
    image, labels = render([template], [plan])
    index = labels[0].numpy()
    has_ventricles = tissue_mask(template.table, ("ventricle",)).any()
    tissues = {
        "gm": ("gm",),
        "wm": ("wm",),
        "csf": ("ventricle",) if has_ventricles else ("csf",),
        "skull": ("bone_cortical", "bone_cancellous"),
    }
    return measure(image[0, 0].numpy(), {t: tissue_mask(template.table, names)[index] for t, names in tissues.items()})


def limits(samples: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.percentile([row[name] for row in samples if row[name] is not None], [1, 50, 99])


def report(done: dict[str, Any], figure: Path | None) -> int:
    """Print the table; returns how many measures lie outside the range."""
    samples, scans = done["images"], done["scans"]
    print(f"{len(samples)} images, preset {done['key']['preset']}")
    print(f"{'':10s} {'1 %':>8s} {'50 %':>8s} {'99 %':>8s}  " + "  ".join(f"{name:>17s}" for name in scans))
    outside = 0
    for name in MEASURES:
        low, middle, high = limits(samples, name)
        cells = []
        for row in scans.values():
            value = row[name]
            if value is None:
                cells.append(f"{'-':>17s}")
                continue
            beyond = not low <= value <= high
            outside += beyond
            place = np.mean([s[name] < value for s in samples if s[name] is not None])
            cells.append(f"{value:8.3f} {place:5.0%} {'OUT' if beyond else '   '}".rjust(17))
        print(f"{name:10s} {low:8.3f} {middle:8.3f} {high:8.3f}  " + "  ".join(cells))
    print(f"{outside} outside")
    if figure is not None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        drawn, axes = plt.subplots(1, len(MEASURES), figsize=(3 * len(MEASURES), 2.8))
        for ax, name in zip(axes, MEASURES, strict=True):
            low, _, high = limits(samples, name)
            values = np.array([row[name] for row in samples if row[name] is not None])
            if name == "sharpness":
                bins = np.linspace(0, values.max(), 40)
            else:
                ax.set_xscale("log")
                bins = np.geomspace(max(low, 2e-4) / 2, 2 * high, 40)
            ax.hist(values.clip(bins[0], bins[-1]), bins=bins, color="0.7")
            for edge in (low, high):
                ax.axvline(edge, color="0.3", lw=1, ls=":")
            for number, (scan, row) in enumerate(scans.items()):
                if row[name] is not None:
                    ax.axvline(row[name], color=f"C{number}", lw=1.5, label=scan)
            ax.set_title(name, fontsize=9)
            ax.set_yticks([])
        drawn.tight_layout(rect=(0, 0.12, 1, 1))
        drawn.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=len(scans), fontsize=9)
        figure.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(figure, dpi=75)
    return outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--templates", nargs="+", required=True)
    parser.add_argument("--preset", default="siam")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/coverage.json"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = generator_config(None, ["voxel_size_mm=1"], options.preset)
    templates = [with_anomalies(load_template(path), config.anomalies) for path in expand(options.templates)]
    key = {
        "preset": options.preset,
        "templates": [t.name for t in templates],
        "generator": config.model_dump(mode="json"),
    }
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if done.get("key") != key:
        done = {"key": key, "images": []}
    done["scans"] = {name: scan_measures(name, options.data / "scans") for name in SCANS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    while len(done["images"]) < options.n:
        number = len(done["images"])
        done["images"].append(image_measures(templates[number % len(templates)], config, number))
        if number % 20 == 0 or number == options.n - 1:
            options.out.write_text(json.dumps(done, indent=1) + "\n")
    sys.exit(1 if report(done, options.figure) else 0)


if __name__ == "__main__":
    main()
