"""Calibrate the quality score of a model, and say how well it predicts Dice without a reference.

    python benchmarks/quality.py --held-out DIR DIR ... [--data DIR] [--model siam16] [--modes default fast]
                                 [--per-map 20] [--out FILE.json]

Maps that no training saw are rendered whole at 1 mm in five contrasts; most renderings are then spoiled
(`degradations.py`), so that segmentations of every quality come about. Each goes through the whole of inference. From
what the network says about them the Dice of each structure is predicted, cross-validated by map: rank correlation
(Spearman), error, and which poor scans are caught. ``--data`` holds ``scans/`` with two labelled real scans, which are
judged intact and spoiled with the calibration of the maps; they are no part of it.

The calibration is written beside the weights (``--calibration`` to choose), for the modes that were run; other modes
of the same weights in the file stay. The work can be stopped and run again: what is done is kept in ``--rows``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accuracy import ASEG, COLIN_AAL, COLIN_TISSUES, CONTRASTS  # noqa: E402
from degradations import COURSE, DEGRADATIONS, INTACT, LabelledScan  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from synthseg.config import TrainConfig, parse  # noqa: E402
from synthseg.errors import LabelError  # noqa: E402
from synthseg.generator.export import grid_affine  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.inference import Options, segment  # noqa: E402
from synthseg.labels import BRAIN_TISSUES, INTRACRANIAL_TISSUES, LabelTable, tissue_mask  # noqa: E402
from synthseg.metrics import Groups, dice_table  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model, model_path  # noqa: E402
from synthseg.quality.calibration import (  # noqa: E402
    SUFFIX,
    Calibration,
    ModeCalibration,
    read_calibration,
    save_calibration,
)
from synthseg.quality.fitting import Example, cross_validated, fit  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.validation import whole_head  # noqa: E402
from synthseg.volume import Volume, canonical, load_volume  # noqa: E402

VERSION = 1  # of the rows: raise it when renderings, degradations or measures change
POOR_FLAG = "the result is probably poor"  # the score's own flag, judged by cross-validation instead
REAL_COURSE = ("intact", "noise", "thick", "cut", "blur", "bias", "saturated", "ghosts", "thick", "noise", "turned")
Row = dict[str, Any]


# --------------------------------------------------------------------------------------------------- rows


class Rows:
    """Segmentations that are done, one a line of a file: what is there is not done again."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.rows = path, list[Row]()
        lines = path.read_text().splitlines() if path.is_file() else []
        if lines and json.loads(lines[0]) != key:
            sys.exit(f"{path}: rows of other weights or another version of this benchmark; remove the file")
        for line in lines[1:]:
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                break  # cut off in the middle of a line
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in (key, *self.rows)))

    def has(self, of: str, number: int, mode: str) -> bool:
        return any((row["of"], row["number"], row["mode"]) == (of, number, mode) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def without_nan(record: dict[str, float]) -> dict[str, float | None]:
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in record.items()}


def with_nan(record: dict[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in record.items()}


def judged(model: Model, scan: LabelledScan, groups: Groups, mode: str) -> Row:
    """Measures, volumes, flags and true Dice of one segmentation."""
    result = segment(Volume(scan.data, scan.affine), model, options=Options(mode=mode))  # type: ignore[arg-type]
    assert result.quality is not None
    dice = dice_table(result.labels, scan.labels, groups)
    return {
        "measures": {name: without_nan(row) for name, row in result.quality.measures.items()},
        "ml": {name: round(ml, 2) for name, ml in result.hard_ml.items()},
        "flags": [flag for flag in result.quality.flags if not flag.startswith(POOR_FLAG)],
        "dice": without_nan(dice),
    }


def exact(template: Template, target: LabelTable) -> tuple[np.ndarray, Groups]:
    """The id of ``target`` for each index of a template (-1: it cannot say), and the groups that can be scored."""
    groups = template.table.groups(target)
    known = groups.sum(1) == 1
    ids = np.where(known, target.ids[groups.argmax(1)], -1).astype(np.int16)
    vague = groups[~known].any(0)
    scored = {x.name: ({x.id}, {x.id}) for x, blurred in zip(target.labels, vague, strict=True) if x.id and not blurred}
    return ids, scored


def run_maps(model: Model, templates: list[Template], modes: Sequence[str], per_map: int, rows: Rows) -> None:
    config = parse(TrainConfig, model.record["config"], "checkpoint").generator
    still = config.deform.model_copy(update={"translation_mm": 5.0})  # the head in view as a whole, unless it is cut
    base = config.model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 1, "deform": still})
    for number in range(per_map):  # all maps first, so that whatever is done is balanced
        for m, template in enumerate(templates):
            ids, groups = exact(template, model.labels)
            brain = tissue_mask(template.table, BRAIN_TISSUES)
            wanted = [mode for mode in modes if not rows.has(template.name, number, mode)]
            if not wanted:
                continue
            contrast = CONTRASTS[(number + m) % len(CONTRASTS)]
            kind = COURSE[number % len(COURSE)]
            plan = sample_plan(whole_head(base, contrast), template.name, template.table, 707, 1000 * m + number)
            image, labels = render([template], [plan])
            index = labels[0].numpy()
            scan = LabelledScan(image[0, 0].numpy(), ids[index], brain[index], grid_affine(plan))
            scan = DEGRADATIONS[kind](scan, np.random.default_rng([m, number]))
            for mode in wanted:
                row = judged(model, scan, groups, mode)
                rows.add({"of": template.name, "number": number, "mode": mode, "kind": kind, **row, "what": contrast})
                values = [value for value in row["dice"].values() if value is not None]
                print(
                    f"  {template.name} {number} {contrast} {kind} {mode}: {np.mean(values):.3f}",
                    file=sys.stderr,
                    flush=True,
                )


def real_scans(data: Path) -> Iterator[tuple[str, LabelledScan, Groups]]:
    """Two labelled scans, in RAS+ order. Colin27 has two label maps: they become one, AAL's nuclei above 100."""
    scans = data / "scans"
    for name, references in (
        ("oasis_t1_stripped", ("oasis_t1_stripped_aseg",)),
        ("colin27_t1", ("colin27_tissues", "colin27_aal")),
    ):
        volume = canonical(load_volume(scans / f"{name}.nii.gz"))
        maps = [canonical(load_volume(scans / f"{r}.nii.gz")).data.astype(np.int32) for r in references]
        groups: Groups = ASEG
        labels, brain = maps[0], maps[0] > 0
        if name == "colin27_t1":
            brain = (labels == 4) | (labels == 5)
            labels = labels + 100 * maps[1]  # both in one number, so that degradations treat them alike
            tissue, region = np.arange(11_700) % 100, np.arange(11_700) // 100
            groups = {k: (a, set(np.flatnonzero(np.isin(tissue, list(b))))) for k, (a, b) in COLIN_TISSUES.items()}
            groups |= {k: (a, set(np.flatnonzero(np.isin(region, list(b))))) for k, (a, b) in COLIN_AAL.items()}
        yield name, LabelledScan(np.asarray(volume.data, dtype=np.float32), labels, brain, volume.affine), groups


def run_real(model: Model, data: Path, modes: Sequence[str], rows: Rows) -> None:
    for s, (name, scan, groups) in enumerate(real_scans(data)):
        for number, kind in enumerate(REAL_COURSE):
            wanted = [mode for mode in modes if not rows.has(name, number, mode)]
            spoiled = DEGRADATIONS[kind](scan, np.random.default_rng([90 + s, number])) if wanted else scan
            for mode in wanted:
                row = judged(model, spoiled, groups, mode)
                rows.add({"of": name, "number": number, "mode": mode, "kind": kind, **row, "what": "real"})
                print(
                    f"  {name} {kind} {mode}: {np.nanmean(list(with_nan(row['dice']).values())):.3f}", file=sys.stderr
                )


# ------------------------------------------------------------------------------------------------ figures


def figures(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float | int | None]:
    """Rank correlation and mean error of predictions, where both numbers are there."""
    table = np.array([(p, t) for p, t in zip(predicted, true, strict=True) if math.isfinite(p) and math.isfinite(t)])
    if len(table) < 5:
        return {"n": len(table), "spearman": None, "error": None}
    p, t = table.T
    rho = float(spearmanr(p, t).statistic) if np.ptp(p) > 0 and np.ptp(t) > 0 else math.nan
    return {
        "n": len(table),
        "spearman": round(rho, 3) if math.isfinite(rho) else None,
        "error": round(float(np.abs(p - t).mean()), 3),
    }


def share(values: Sequence[bool]) -> float | None:
    return round(float(np.mean(values)), 3) if len(values) else None


def on_maps(rows: list[Row], examples: list[Example], averaged: list[str], threshold: float) -> dict[str, Any]:
    """Cross-validated figures on the maps."""
    predictions = cross_validated(examples, averaged)
    names = sorted({name for example in examples for name in example.dice})
    nan = math.nan
    structures = {
        name: {
            **figures([p.get(name, nan) for p, _ in predictions], [e.dice.get(name, nan) for e in examples]),
            "spearman_of_expected_dice": figures(
                [e.measures[name]["expected_dice"] for e in examples], [e.dice.get(name, nan) for e in examples]
            )["spearman"],
        }
        for name in names
    }
    everything = [(p.get(name, nan), e.dice.get(name, nan)) for (p, _), e in zip(predictions, examples, strict=True)
                  for name in names]  # fmt: skip
    true = [e.mean_dice(averaged) for e in examples]
    scores = [score for _, score in predictions]
    failed = [score < threshold or bool(row["flags"]) for score, row in zip(scores, rows, strict=True)]
    poor = [value < threshold for value in true]
    kinds = sorted({row["kind"] for row in rows})
    return {
        "renderings": len(rows),
        "threshold": round(threshold, 3),
        "structures": structures,
        "all_structures": figures([p for p, _ in everything], [t for _, t in everything]),
        "scan": figures(scores, true),
        "scan_intact": figures(
            [s for s, e in zip(scores, examples, strict=True) if e.intact],
            [t for t, e in zip(true, examples, strict=True) if e.intact],
        ),
        "poor": sum(poor),
        "poor_caught": share([f for f, p in zip(failed, poor, strict=True) if p]),
        "poor_caught_by_score": share([s < threshold for s, p in zip(scores, poor, strict=True) if p]),
        "good_passed": share([not f for f, p in zip(failed, poor, strict=True) if not p]),
        "flags_by_kind": {
            kind: {
                "n": sum(row["kind"] == kind for row in rows),
                "dice": round(float(np.mean([t for t, row in zip(true, rows, strict=True) if row["kind"] == kind])), 3),
                "flagged": share([bool(row["flags"]) for row in rows if row["kind"] == kind]),
                "failed": share([f for f, row in zip(failed, rows, strict=True) if row["kind"] == kind]),
            }
            for kind in kinds
        },
    }


def on_real_scans(rows: list[Row], calibration: ModeCalibration, table: LabelTable) -> dict[str, Any]:
    """Figures on real scans. A reference that joins several labels is compared with their mean by volume."""
    references = {"oasis_t1_stripped": ASEG, "colin27_t1": {**COLIN_TISSUES, **COLIN_AAL}}
    by_scan: dict[str, Any] = {}
    pooled: list[tuple[float, float]] = []
    means: list[tuple[float, float]] = []
    names = {x.id: x.name for x in table.labels}
    for of, groups in references.items():
        mine = [row for row in rows if row["of"] == of]
        pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
        listed = []
        for row in mine:
            measures = {name: with_nan(values) for name, values in row["measures"].items()}
            predicted = calibration.structures_of(measures)
            score = calibration.scan_of(measures, predicted)
            for group, (ids, _) in groups.items():
                parts = [(predicted[names[i]], row["ml"][names[i]]) for i in ids if math.isfinite(predicted[names[i]])]
                weight = sum(ml for _, ml in parts)
                if row["dice"][group] is not None and weight > 0:
                    pairs[group].append((sum(p * ml for p, ml in parts) / weight, row["dice"][group]))
                    pooled.append(pairs[group][-1])
            true = float(np.mean([value for value in row["dice"].values() if value is not None]))
            means.append((score, true))
            failed = score < calibration.threshold or bool(row["flags"])
            listed.append({"kind": row["kind"], "predicted": round(score, 3), "true": round(true, 3),
                           "failed": failed, "flags": row["flags"]})  # fmt: skip
        by_scan[of] = {
            "structures": {name: figures([p for p, _ in one], [t for _, t in one]) for name, one in pairs.items()},
            "scan": figures([one["predicted"] for one in listed], [one["true"] for one in listed]),
            "scans": listed,
        }  # fmt: skip
    return {
        **by_scan,
        "all_structures": figures([p for p, _ in pooled], [t for _, t in pooled]),
        "scan": figures([p for p, _ in means], [t for _, t in means]),
    }


def example_of(row: Row) -> Example:
    measures = {name: with_nan(values) for name, values in row["measures"].items()}
    return Example(measures, with_nan(row["dice"]), row["of"], row["kind"] in INTACT)


def print_figures(mode: str, result: dict[str, Any]) -> None:
    maps = result["maps"]
    print(f"\nmode {mode}: {maps['renderings']} renderings, cross-validated by map")
    print(f"{'':24s} {'Spearman':>9s} {'error':>7s} {'expected Dice alone':>20s}")
    lines = {**maps["structures"], "all structures": maps["all_structures"], "scan": maps["scan"],
             "scan, intact": maps["scan_intact"]}  # fmt: skip
    for name, row in lines.items():
        values = [row["spearman"], row["error"], row.get("spearman_of_expected_dice")]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        print(f"{name:24s} {cells[0]:>9s} {cells[1]:>7s} {cells[2]:>20s}")
    print(f"{maps['poor']} poor scans (below {maps['threshold']}): caught {maps['poor_caught']}, "
          f"by the score alone {maps['poor_caught_by_score']}; good ones passed {maps['good_passed']}")  # fmt: skip
    for kind, row in maps["flags_by_kind"].items():
        print(f"  {kind:12s} n {row['n']:3d}  Dice {row['dice']:.3f}  flagged {row['flagged']}  failed {row['failed']}")
    if "real" in result:
        real = result["real"]
        print(f"real scans: all structures {real['all_structures']}, scan {real['scan']}")
        for of in ("oasis_t1_stripped", "colin27_t1"):
            for one in real[of]["scans"]:
                print(
                    f"  {of} {one['kind']:10s} predicted {one['predicted']:.3f} true {one['true']:.3f} {one['flags']}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--modes", nargs="+", default=["default", "fast"], choices=["default", "fast", "robust"])
    parser.add_argument("--per-map", type=int, default=len(COURSE))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="what is done (default: beside --out, else runs/quality)")
    parser.add_argument("--calibration", type=Path, help="where it goes (default: beside the weights)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.model)
    templates = [load_template(path) for path in expand(options.held_out)]
    seen = {t.name for t in templates} & set(model.record.get("templates", []))
    if seen:
        sys.exit(f"{model.name} was trained on {sorted(seen)}; give templates that it has not seen")
    if len(templates) < 2:
        sys.exit("cross-validation by map needs two maps or more")
    kept = options.rows or (options.out.with_suffix(".rows.jsonl") if options.out else Path("runs/quality/rows.jsonl"))
    rows = Rows(kept, {"sha256": model.sha256, "version": VERSION})
    try:
        run_maps(model, templates, options.modes, options.per_map, rows)
    except LabelError as error:
        sys.exit(f"{error}")
    if options.data:
        run_real(model, options.data, options.modes, rows)
    averaged = [x.name for x, inside in zip(model.labels.labels, tissue_mask(model.labels, INTRACRANIAL_TISSUES),
                                            strict=True) if inside]  # fmt: skip
    names = {t.name for t in templates}
    modes: dict[str, ModeCalibration] = {}
    result: dict[str, Any] = {"model": model.name, "sha256": model.sha256, "maps": sorted(names), "modes": {}}
    for mode in options.modes:
        mine = [row for row in rows.rows if row["mode"] == mode and row["of"] in names]
        examples = [example_of(row) for row in mine]
        try:
            modes[mode] = fit(examples, averaged)
            maps = on_maps(mine, examples, averaged, modes[mode].threshold)
        except ValueError as error:
            sys.exit(f"mode {mode}: {error}")
        result["modes"][mode] = {"maps": maps}
        real = [row for row in rows.rows if row["mode"] == mode and row["what"] == "real"]
        if real:
            result["modes"][mode]["real"] = on_real_scans(real, modes[mode], model.labels)
        print_figures(mode, result["modes"][mode])
    target = options.calibration or model_path(options.model).with_suffix(SUFFIX)
    made_of = {
        mode: {"maps": sorted(names), "examples": r["maps"]["renderings"]} for mode, r in result["modes"].items()
    }
    if target.is_file():
        before = read_calibration(target)
        if before.sha256 == model.sha256:
            modes = {**before.modes, **modes}
            made_of = {**json.loads(target.read_text()).get("made_of", {}), **made_of}
    save_calibration(target, Calibration(model.name, model.sha256, modes), {"made_of": made_of})
    print(f"\n{target}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
