"""A scan without its bias field, and a T1 image of any contrast: what trained heads do on heads they never saw.

    python benchmarks/image_tasks.py --data DIR [--model bias-field] [--out FILE.json]
    python benchmarks/image_tasks.py --data DIR --tasks reconstruction --model FILE [--held-out DIR ...]

reconstruction   Colin27's label map in four contrasts with the default artefacts, each turned into a T1 image by the
                 whole of inference, and compared with the real T1 scan of Colin27 in the head and in the brain (CSF
                 included); ``--held-out`` maps likewise with the T1 image that the generator paints of them. Beside
                 it the linear map of the intensities that is nearest to that very T1 image, which no tool can know
bias-field       the real scans in ``DIR/scans``, each multiplied with smooth fields: standard deviation of the
                 logarithm of what is left of the field in the head, where a method finds in the scan with the field
                 what it finds in the scan without, times the field (so that fields that a scan has itself count for no
                 one). Beside it no correction, and N4 (Tustison et al., IEEE TMI 2010; SimpleITK, on every fourth
                 voxel as its documentation advises, histogram of the head alone), with the seconds of both
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402

from synthseg.config import FinetuneConfig, GeneratorConfig, parse  # noqa: E402
from synthseg.generator.export import grid_affine  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.intensity import foreground  # noqa: E402
from synthseg.labels import load_scheme, tissue_mask  # noqa: E402
from synthseg.networks.feature_file import FeatureModel, load_features  # noqa: E402
from synthseg.paths import data_dir  # noqa: E402
from synthseg.representation.tasks import correct_bias, synthesize_t1  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.scenes import painted  # noqa: E402
from synthseg.training.tasks import Pair, Task, make_task  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import Volume, load_volume, write_text_atomically  # noqa: E402

CONTRASTS = ("t1", "t2", "flair", "ct")
BRAIN = ("gm", "wm", "csf", "ventricle", "thalamus", "pallidum", "putamen", "caudate", "accumbens", "amygdala",
         "hippocampus", "brainstem")  # fmt: skip
SCANS = ("oasis_t1_stripped", "colin27_t1", "t1_conformed", "t2w")
FIELDS = 3  # on each scan: 0.15, 0.3 and 0.45 of the logarithm, nodes 60 to 120 mm apart
N4_SHRINK = 4


def colin27(folder: Path) -> Template:
    """The template that ships, with the T1 scan that it was made from beside it."""
    shutil.copytree(data_dir("templates") / "colin27", folder, dirs_exist_ok=True)
    shutil.copy(data_dir("samples") / "colin27_t1.nii.gz", folder / "t1.nii.gz")
    return load_template(folder)


def reconstruction(model: FeatureModel, templates: list[Template]) -> dict[str, Any]:
    """Error of the T1 image in the head, by map and contrast, and that of the best linear map."""
    record = {
        "task": "reconstruction",
        "templates": ["phantom"],
        "frozen": False,
        "network": model.record["config"]["network"],
    }
    task = make_task(parse(FinetuneConfig, record, "image_tasks"), load_scheme("siam16"))
    base = GeneratorConfig().model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 1})
    rows: dict[str, Any] = {}
    for t, template in enumerate(templates):
        for c, contrast in enumerate(CONTRASTS):
            plan = sample_plan(whole_head(base, contrast), template.name, template.table, 1848, 100 * t + c)
            scene = painted(template, plan)
            pair = task.pair(scene)
            made, _ = synthesize_t1(Volume(pair.image[0].numpy(), grid_affine(plan)), model)
            result, row = torch.from_numpy(made)[None], {}
            for where, labels in (("head", template.table.ids > 0), ("brain", tissue_mask(template.table, BRAIN))):
                part = replace(pair, head=pair.head & torch.from_numpy(labels)[scene.labels.int()])
                row[where] = {
                    "network": compared(task, result, part),
                    "best linear map": compared(task, task.baseline(part), part),
                }
            rows[f"{template.name}, {contrast}"] = row
            print(f"  {template.name} {contrast}: {row}", file=sys.stderr, flush=True)
    return rows


def compared(task: Task, image: torch.Tensor, pair: Pair) -> dict[str, float]:
    """Error of a T1 image (1, D, H, W) where ``pair.head`` says, and its correlation with the target."""
    found = task.figures(image, pair)
    x, y = image[0][pair.head].numpy(), pair.target[0][pair.head].numpy()
    return {name: round(value, 4) for name, value in {**found, "correlation": float(np.corrcoef(x, y)[0, 1])}.items()}


def smooth_field(shape: tuple[int, ...], spacing_mm: np.ndarray, std: float, seed: int) -> np.ndarray:
    """A positive field: the logarithm is cubic between normal numbers on a lattice of 60 to 120 mm."""
    rng = np.random.default_rng(seed)
    step = rng.uniform(60, 120)
    nodes = [max(2, round(n * s / step) + 1) for n, s in zip(shape, spacing_mm, strict=True)]
    at = np.meshgrid(*[np.linspace(0, m - 1, n) for m, n in zip(nodes, shape, strict=True)], indexing="ij")
    log_field = ndimage.map_coordinates(rng.normal(0, std, nodes), at, order=3, mode="nearest")
    return np.exp(log_field - log_field.mean()).astype(np.float32)


def found_by_network(model: FeatureModel, volume: Volume) -> np.ndarray:
    return correct_bias(volume, model).field


def n4(head: np.ndarray, volume: Volume) -> np.ndarray:
    import SimpleITK as sitk

    image, mask = sitk.GetImageFromArray(volume.data.astype(np.float32)), sitk.GetImageFromArray(head.astype(np.uint8))
    for one in (image, mask):
        one.SetSpacing([float(s) for s in volume.spacing_mm[::-1]])
    n4_filter = sitk.N4BiasFieldCorrectionImageFilter()
    n4_filter.Execute(sitk.Shrink(image, [N4_SHRINK] * 3), sitk.Shrink(mask, [N4_SHRINK] * 3))
    return np.exp(sitk.GetArrayFromImage(n4_filter.GetLogBiasFieldAsImage(image)))


def bias(model: FeatureModel, scans: Path) -> dict[str, Any]:
    """What is left of known fields on real scans."""
    rows: dict[str, Any] = {}
    for s, name in enumerate(SCANS):
        scan = load_volume(scans / f"{name}.nii.gz")
        data = np.asarray(scan.data, dtype=np.float32)
        floor, median = foreground(torch.from_numpy(np.ascontiguousarray(data)))
        head = data > floor + 0.3 * (median - floor)
        methods: dict[str, Callable[[Volume], np.ndarray]] = {
            "network": partial(found_by_network, model),
            "N4": partial(n4, head),
        }
        left: dict[str, list[float]] = {"nothing": []}
        seconds: dict[str, list[float]] = {}
        truths = [
            smooth_field(data.shape, np.array(scan.spacing_mm), 0.15 * (k + 1), 10 * s + k) for k in range(FIELDS)
        ]
        for method, run in methods.items():
            own = run(Volume(data, scan.affine))
            for truth in truths:
                begun = time.perf_counter()
                found = run(Volume(data * truth, scan.affine))
                seconds.setdefault(method, []).append(time.perf_counter() - begun)
                left.setdefault(method, []).append(float(np.log(found / own / truth)[head].std()))
        left["nothing"] = [float(np.log(truth)[head].std()) for truth in truths]
        rows[name] = {
            "left": {method: [round(value, 4) for value in values] for method, values in left.items()},
            "seconds": {method: round(float(np.median(values)), 1) for method, values in seconds.items()},
        }
        print(f"  {name}: {rows[name]}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bias-field")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--held-out", nargs="*", default=[])
    parser.add_argument("--tasks", nargs="+", default=["bias-field"], choices=["reconstruction", "bias-field"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_features(options.model)
    result: dict[str, Any] = {"model": model.name, "sha256": model.sha256, "threads": options.threads}
    trained = set(model.record.get("templates", []))
    with tempfile.TemporaryDirectory() as folder:
        if "reconstruction" in options.tasks:
            templates = [colin27(Path(folder) / "colin27"), *map(load_template, expand(options.held_out))]
            if seen := trained & {template.name for template in templates}:
                sys.exit(f"the model was trained on {', '.join(sorted(seen))}; give templates that it has not seen")
            result["reconstruction"] = reconstruction(model, templates)
    if "bias-field" in options.tasks:
        result["bias-field"] = bias(model, options.data / "scans")
    if options.out:
        write_text_atomically(options.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
