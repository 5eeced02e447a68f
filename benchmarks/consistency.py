"""Is a volume the same in every contrast and in a second scan, and does it follow a known atrophy?

    python benchmarks/consistency.py --held-out DIR DIR ... [--model siam16] [--out FILE.json]

Heads that no training saw are rendered whole at 1 mm, with the default settings of the generator.

contrast   one head in five contrasts: spread of the volume of each structure over them (standard deviation over mean),
           and mean Dice of each pair of segmentations
retest     one head twice in one contrast, with other noise, bias field and resolution, turned by 5 degrees and shifted
           by 3.3 mm along each axis: coefficient of variation of the volumes, and Dice of the two segmentations
atrophy    T1 images of one head whose cortex has lost 0, 1, 2, 5 and 10 %: change of the volume of grey matter that is
           measured, against the one that was made; slope of a line through 0, and spread about it
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.linalg import expm  # noqa: E402
from scipy.ndimage import affine_transform  # noqa: E402

from synthseg.config import AnatomyConfig, GeneratorConfig  # noqa: E402
from synthseg.generator.draw import Field3D  # noqa: E402
from synthseg.generator.export import grid_affine  # noqa: E402
from synthseg.generator.plan import Plan, sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.inference import Segmentation, segment  # noqa: E402
from synthseg.metrics import dice_table  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import Volume  # noqa: E402

CONTRASTS = ("t1", "t2", "flair", "pd", "ct")
ATROPHY = (0.0, 0.01, 0.02, 0.05, 0.10)
TURN_DEG, SHIFT_MM = 5.0, 3.3


def plan_for(base: GeneratorConfig, template: Template, contrast: str, number: int, atrophy: float = 0.0) -> Plan:
    config = whole_head(base, contrast)
    if atrophy > 0:
        config = config.model_copy(update={"anatomy": AnatomyConfig(atrophy=atrophy)})
    return sample_plan(config, template.name, template.table, 4242, number)


def segmented(model: Model, template: Template, plan: Plan) -> tuple[Segmentation, np.ndarray]:
    """The segmentation, and the true labels as indices of the template's table."""
    image, labels = render([template], [plan])
    return segment(Volume(image[0, 0].numpy(), grid_affine(plan)), model), labels[0].numpy()


def over_contrasts(model: Model, base: GeneratorConfig, templates: list[Template]) -> dict[str, Any]:
    names = [x.name for x in model.labels.labels if x.id > 0]
    groups = {x.name: ({x.id}, {x.id}) for x in model.labels.labels if x.id > 0}
    spread: dict[str, list[float]] = {name: [] for name in names}
    dice: dict[str, list[float]] = {name: [] for name in names}
    for number, template in enumerate(templates):
        first = plan_for(base, template, CONTRASTS[0], number)
        found = []
        for contrast in CONTRASTS:
            plan = plan_for(base, template, contrast, number).model_copy(update={"deform": first.deform})
            found.append(segmented(model, template, plan)[0])
            print(f"  {template.name} {contrast}", file=sys.stderr, flush=True)
        for name in names:
            ml = np.array([one.soft_ml[name] for one in found])
            spread[name].append(float(ml.std(ddof=1) / max(ml.mean(), 1e-6)))
        for a, b in combinations(found, 2):
            for name, value in dice_table(a.labels, b.labels, groups).items():
                dice[name].append(value)
    return {
        "volume_spread": {name: round(float(np.mean(values)), 4) for name, values in spread.items()},
        "dice_of_pairs": {name: round(float(np.nanmean(values)), 4) for name, values in dice.items()},
    }


def turned(plan: Plan, degrees: float, shift_mm: float) -> tuple[Plan, np.ndarray]:
    """The plan with the head turned about (1, 1, 1) and shifted; and (4, 4), from its voxels to those before."""
    around = np.cross(np.eye(3), np.full(3, 1 / np.sqrt(3)))
    turn = expm(np.deg2rad(degrees) * around)
    half = (np.array(plan.shape) - 1) * plan.voxel_size_mm / 2
    corners = np.stack(np.meshgrid(*[[-side, side] for side in half], indexing="ij"))
    moved = np.einsum("ij,jdhw->idhw", turn - np.eye(3), corners) + shift_mm
    field = Field3D.of(torch.from_numpy(moved).float())
    deform = plan.deform.model_copy(update={"perturbation_mm": field})
    voxels = np.eye(4)
    voxels[:3, :3] = turn
    middle = half / plan.voxel_size_mm
    voxels[:3, 3] = middle + shift_mm / plan.voxel_size_mm - turn @ middle
    return plan.model_copy(update={"deform": deform}), voxels


def retest(model: Model, base: GeneratorConfig, templates: list[Template]) -> dict[str, Any]:
    """One head as T1 twice: other noise, bias field and resolution, turned and moved.

    The labels of the first are brought to the second by nearest neighbour; ``truth`` is what that costs.
    """
    names = [x.name for x in model.labels.labels if x.id > 0]
    groups = {x.name: ({x.id}, {x.id}) for x in model.labels.labels if x.id > 0}
    cv: dict[str, list[float]] = {name: [] for name in names}
    dice: dict[str, list[float]] = {name: [] for name in names}
    truth: dict[str, list[float]] = {name: [] for name in names}
    for number, template in enumerate(templates):
        first, second = (plan_for(base, template, "t1", number + 1000 * again) for again in (0, 1))
        again, voxels = turned(second.model_copy(update={"deform": first.deform}), TURN_DEG, SHIFT_MM)
        (a, true_a), (b, true_b) = (segmented(model, template, plan) for plan in (first, again))
        to_model = model.labels.ids[template.table.mapping(model.labels)]
        print(f"  {template.name} retest", file=sys.stderr, flush=True)
        for found, before, after in ((dice, a.labels, b.labels), (truth, to_model[true_a], to_model[true_b])):
            brought = affine_transform(before, voxels, order=0)
            for name, value in dice_table(after, brought, groups).items():
                found[name].append(value)
        for name in names:
            pair = np.array([a.soft_ml[name], b.soft_ml[name]])
            cv[name].append(float(pair.std(ddof=1) / max(pair.mean(), 1e-6)))
    return {
        "turn_deg": TURN_DEG,
        "shift_mm": SHIFT_MM,
        "cv": {name: round(float(np.mean(values)), 4) for name, values in cv.items()},
        "dice": {name: round(float(np.nanmean(values)), 4) for name, values in dice.items()},
        "dice_of_truth": {name: round(float(np.nanmean(values)), 4) for name, values in truth.items()},
    }


def atrophy(model: Model, base: GeneratorConfig, templates: list[Template]) -> dict[str, Any]:
    points: list[tuple[float, float, float]] = []
    for number, template in enumerate(templates):
        grey = np.array([label.tissue == "gm" for label in template.table.labels])
        names = [label.name for label in model.labels.labels if label.tissue == "gm"]
        made, hard, soft = [], [], []
        for part in ATROPHY:
            found, truth = segmented(model, template, plan_for(base, template, "t1", number, part))
            made.append(float(grey[truth].sum()))
            hard.append(sum(found.hard_ml[name] for name in names))
            soft.append(sum(found.soft_ml[name] for name in names))
            print(f"  {template.name} atrophy {part:.0%}", file=sys.stderr, flush=True)
        for i in range(1, len(ATROPHY)):
            points.append((made[i] / made[0] - 1, hard[i] / hard[0] - 1, soft[i] / soft[0] - 1))
    table = np.array(points)
    result: dict[str, Any] = {"points": [[round(v, 4) for v in row] for row in table.tolist()]}
    for column, kind in ((1, "hard"), (2, "soft")):
        slope = float((table[:, 0] * table[:, column]).sum() / (table[:, 0] ** 2).sum())
        rest = table[:, column] - slope * table[:, 0]
        result[kind] = {"slope": round(slope, 3), "scatter": round(float(rest.std(ddof=1)), 4)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    base = GeneratorConfig().model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 8})
    templates = [load_template(path) for path in expand(options.held_out)]
    seen = {t.name for t in templates} & set(model.record.get("templates", []))
    if seen:
        sys.exit(f"{model.name} was trained on {sorted(seen)}; give templates that it has not seen")
    result: dict[str, Any] = {
        "model": model.name,
        "sha256": model.sha256,
        "maps": [t.name for t in templates],
        "contrast": over_contrasts(model, base, templates),
        "retest": retest(model, base, templates),
        "atrophy": atrophy(model, base, templates),
    }
    print(
        f"{'':28s} {'spread over contrasts':>22s} {'Dice of pairs':>14s} {'retest CV':>10s} {'Dice':>6s} {'truth':>6s}"
    )
    again = result["retest"]
    for name, spread in result["contrast"]["volume_spread"].items():
        print(
            f"{name:28s} {spread:22.1%} {result['contrast']['dice_of_pairs'][name]:14.3f} {again['cv'][name]:10.1%} "
            f"{again['dice'][name]:6.3f} {again['dice_of_truth'][name]:6.3f}"
        )
    for kind in ("hard", "soft"):
        found = result["atrophy"][kind]
        print(f"atrophy, {kind} volumes: slope {found['slope']:.2f}, scatter {found['scatter']:.2%} of the grey matter")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
