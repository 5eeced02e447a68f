"""The page of benchmarks/pretraining.py and its sweeps.

Every figure and every judgement on it is computed from the JSON files; what was not run is marked.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pretraining_conditions import conditions, versions, what_was_compared
from pretraining_findings import bullet, findings, joined, probe_dice, wrapped
from pretraining_table import (
    BEST_SUM,
    NONE,
    NOT_RUN,
    SCRATCH,
    Row,
    Rows,
    cost_table,
    dice_table,
    feature_table,
    of_seeds,
    real,
    spread_of,
    table,
    tuned_mean,
    unseen,
)

from synthseg.errors import InputError
from synthseg.volume import write_text_atomically

Columns = dict[str, tuple[tuple[str, ...], str]]
LIKENESS: Columns = {
    "L1 within": (("intra_subject", "l1"), ".3f"),
    "L1 between": (("inter_subject", "l1"), ".3f"),
    "SSIM within": (("intra_subject", "ssim"), ".3f"),
    "SSIM between": (("inter_subject", "ssim"), ".3f"),
    "MS-SSIM within": (("intra_subject", "ms_ssim"), ".3f"),
    "MS-SSIM between": (("inter_subject", "ms_ssim"), ".3f"),
}
USE: Columns = {
    "matching": (("matching",), ".3f"),
    "probe, unseen maps": (("probe", "unseen_maps", "mean"), ".3f"),
    "probe, Colin27": (("probe", "Colin27", "mean"), ".3f"),
    "probe, OASIS": (("probe", "OASIS", "mean"), ".3f"),
}
COLLAPSE: Columns = {
    "effective rank": (("effective_rank",), ".1f"),
    "of class means": (("effective_rank_means",), ".1f"),
    "equiangularity": (("equiangular_mean",), ".3f"),
    "within-class spread": (("within_class_spread",), ".3f"),
    "uniformity": (("uniformity",), ".2f"),
    "tolerance": (("tolerance",), ".3f"),
}


# ------------------------------------------------------------------------------------------------- sweeps


def peak(rows: list[Row], figure: Callable[[Row], float]) -> tuple[float, float]:
    """Where the mean figure over seeds is highest, by the rows' ``value``, and how far ahead of the next best."""
    means = {}
    for value in sorted({row["value"] for row in rows}):
        means[value] = float(np.mean([figure(row) for row in rows if row["value"] == value]))
    best = max(means, key=lambda value: means[value])
    others = [mean for value, mean in means.items() if value != best]
    return best, means[best] - max(others) if others else float("nan")


def seed_noise(rows: list[Row], figure: Callable[[Row], float]) -> float:
    """Standard deviation over seeds, pooled over all settings; NaN with one seed."""
    settings = {(row["pool"], row["value"]) for row in rows}
    values = [np.array([figure(row) for row in rows if (row["pool"], row["value"]) == one]) for one in settings]
    freedom = sum(len(own) - 1 for own in values)
    squares = sum(float(((own - own.mean()) ** 2).sum()) for own in values)
    return float(np.sqrt(squares / freedom)) if freedom else float("nan")


def severity_section(rows: list[Row]) -> str:
    """Severity at two amounts of data, and what it says of AdaInf's claim."""
    pools = sorted({row["pool"] for row in rows if row["pool"]})
    if not pools or not any(row["pool"] is None for row in rows):
        return f"Severity at two amounts of data: {NOT_RUN}."
    amounts: list[int | None] = [*pools, None]
    named = {pool: f"{pool} anatomies" if pool else "a new anatomy each step" for pool in amounts}
    header = ["severity of the views, scaled by"]
    for pool in amounts:
        header += [f"probe, {named[pool]}", f"Dice after few steps, {named[pool]}"]
    lines = []
    for value in sorted({row["value"] for row in rows}):
        cells = [f"{value:g}"]
        for pool in amounts:
            own = [row for row in rows if row["value"] == value and row["pool"] == pool]
            cells += [spread_of([probe_dice(row) for row in own]), spread_of([tuned_mean(row) for row in own])]
        lines.append(cells)
    parts = [table(header, lines), ""]
    ways = set()
    for what, figure in (("linear probe", probe_dice), ("Dice after few steps", tuned_mean)):
        peaks = {pool: peak([row for row in rows if row["pool"] == pool], figure) for pool in amounts}
        told = "; ".join(f"{named[pool]}: {at:g} (by {ahead:.3f})" for pool, (at, ahead) in peaks.items())
        fresh, fewest = peaks[None][0], peaks[pools[0]][0]
        ways.add(np.sign(fresh - fewest))
        claim = "the same augmentation: AdaInf's claim is not seen"
        if fresh != fewest:
            way = "weaker augmentation, as" if fresh < fewest else "stronger augmentation, against what"
            claim = f"{way} AdaInf claims"
        deviation = seed_noise(rows, figure)
        sure = (
            "With one seed that is a hint, no more."
            if not np.isfinite(deviation)
            else f"The standard deviation over seeds is {deviation:.3f}."
        )
        text = (
            f"Best severity by {what}, and how far ahead of the next: {told}. By that, more data wants {claim}. {sure}"
        )
        parts.append(bullet(text))
    if len(ways) > 1:
        parts.append(bullet("The two do not agree: these runs do not decide it."))
    return "\n".join(parts)


def similarity_section(rows: list[Row], kind: str) -> str:
    """Uniformity against tolerance over temperatures or over beta."""
    own = [row for row in rows if row["sweep"] == kind]
    if not own:
        return f"Sweep of {kind}: {NOT_RUN}."
    header = [
        kind,
        "uniformity",
        "tolerance, same structure",
        "tolerance, neighbours",
        "effective rank",
        "matching",
        "probe",
    ]
    lines = []
    for value in sorted({row["value"] for row in own}):
        at = [row["features"] for row in own if row["value"] == value]
        cells = [
            spread_of([row[key] for row in at], form)
            for key, form in (
                *(("uniformity", ".2f"), ("tolerance", ".3f"), ("neighbour_tolerance", ".3f")),
                *(("effective_rank", ".1f"), ("matching", ".3f")),
            )
        ]
        lines.append([f"{value:g}", *cells, spread_of([row["probe"]["unseen_maps"]["mean"] for row in at])])
    text = [f"{own[0]['objective']['contrast'][0]['loss']}, over {kind}:", "", table(header, lines)]
    values = [row["value"] for row in own]
    uniform, near = ([row["features"][key] for row in own] for key in ("uniformity", "neighbour_tolerance"))
    if min(len(set(values)), len(set(uniform)), len(set(near))) > 2:
        from scipy.stats import spearmanr

        best, ahead = peak(own, probe_dice)
        text += [
            "",
            wrapped(
                f"Rank correlation of {kind} with uniformity (lower is more uniform) "
                f"{spearmanr(values, uniform).statistic:+.2f}, with tolerance to neighbours "
                f"{spearmanr(values, near).statistic:+.2f}. {against_theory(own, kind)} "
                f"Best probe at {best:g}, {ahead:.3f} ahead of the next."
            ),
        ]
    return "\n".join(text)


def against_theory(rows: list[Row], kind: str) -> str:
    """Which setting should be the most uniform, the lowest temperature or the highest beta, and which one is."""
    means = {}
    for value in {row["value"] for row in rows}:
        means[value] = float(np.mean([row["features"]["uniformity"] for row in rows if row["value"] == value]))
    expected = min(means) if kind == "temperature" else max(means)
    found = min(means, key=lambda value: means[value])
    if found == expected:
        return f"As theory has it, features are the most uniform at {found:g} ({means[found]:.2f})."
    return (
        f"By theory features are the most uniform at {expected:g}; here they are at {found:g} ({means[found]:.2f}, but "
        f"{means[expected]:.2f} at {expected:g}), against theory."
    )


def certainty(rows: list[Row], minutes: float) -> str:
    """How far the sweeps can be trusted: seeds, and rows that happen to be the same setting."""
    parts = []
    if len({row["seed"] for row in rows}) == 1:
        parts.append(f"One seed of {minutes:g} CPU minutes decides nothing: not severity, not temperature, not beta.")
    same = defaultdict(list)
    for row in rows:
        scale = row["value"] if row["sweep"] == "severity" else 1.0
        same[json.dumps([row["objective"], row["pool"], scale, row["seed"]])].append(row)
    for twins in (found for found in same.values() if len(found) > 1):
        named = joined([f"*{row['sweep']} {row['value']:g}*" for row in twins])
        probes = joined([f"{probe_dice(row):.3f}" for row in twins])
        steps = joined([str(row["pretraining"]["steps"]) for row in twins])
        parts.append(
            f"{named}{'' if twins[0]['pool'] else ' with a new anatomy each step'} are one setting with one seed, run "
            f"twice: the probe finds {probes}, after {steps} steps. Smaller differences say nothing."
        )
    parts.append(versions(rows))
    if any(row["pool"] and not row.get("version") for row in rows):
        parts.append("The rows of the pool were made after the others, by newer code.")
    return wrapped(" ".join(parts))


def sweeps_section(record: dict[str, Any] | None) -> str:
    if record is None:
        return f"Sweeps of severity, temperature and beta: {NOT_RUN} (`benchmarks/pretraining_sweeps.py`)."
    rows = list(record["rows"].values())
    minutes = record["settings"]["cpu_minutes"]
    return f"""Each row is pretrained for {minutes:g} CPU minutes; the settings are otherwise those of the table.

{certainty(rows, minutes)}

### Severity and the amount of synthetic data

AdaInf (Wang et al., ICLR 2024) found that contrastive learning on more generated data wants weaker augmentation. Here
the data are anatomies, and the augmentation is the appearance that a view draws. A pool holds a fixed number of
anatomies, whose views are drawn anew each time; the severities of the views are scaled from mild to severe.

{severity_section([row for row in rows if row["sweep"] == "severity"])}

### Uniformity against tolerance

A low temperature, or hard negatives, spreads the features evenly and tears apart what is alike (Wang & Liu, CVPR 2021).
Tolerance is the mean cosine of voxels of one structure, and of neighbours inside one structure.

{similarity_section(rows, "temperature")}

{similarity_section(rows, "beta")}"""


# ------------------------------------------------------------------------------------------------ the page


def read(path: Path, what: str) -> dict[str, Any]:
    """The JSON of a benchmark. Raises InputError that says how to make it."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["rows"], dict) or not isinstance(record["settings"], dict):
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the figures of {what} ({error}); run {what} first, or name its file") from None
    return dict(record)


def page(record: dict[str, Any], sweeps: dict[str, Any] | None) -> str:
    """The whole page. Raises InputError if no row was run."""
    rows, settings = record["rows"], record["settings"]
    if not rows:
        raise InputError("no row of the table has been run: run benchmarks/pretraining.py first")
    names, counts = list(record["order"]), [str(count) for count in settings["counts"]]
    missing = [name for name in names if not of_seeds(rows, name)]
    incomplete = f"\n**Incomplete**: not run are {joined([f'*{name}*' for name in missing])}.\n" if missing else ""
    introduction = (
        f"{what_was_compared(record).capitalize()} of the family of [pretraining](pretraining.md), for the same CPU "
        "time on one small network, against training the segmentation from scratch for as long as pretraining and "
        "fine-tuning took together. The losses are those of [contrastive learning](contrastive.md), the measures "
        "those of [features](features.md)."
    )
    most, seen = max(settings["counts"]), settings["pretrain_templates"]
    real_scans = (
        f"""Real scans: mean of Colin27's tissues, Colin27's nuclei (AAL) and the OASIS scan (FreeSurfer), through the
whole of inference, on the scan's own grid.

{dice_table(rows, names, counts, real)}"""
        if settings["real_scans"]
        else f"Real scans: {NOT_RUN} (`--data`)."
    )
    sums = [row for row in rows.values() if row["name"] == BEST_SUM]
    made_of = f"\n*{BEST_SUM}* is {sum_text(sums[0]['objective'])}.\n" if sums else ""
    return f"""<!-- Written by benchmarks/pretraining.py --page: change that, not this. -->

# Does pretraining pay?

{wrapped(introduction)}
{incomplete}
## In short

{findings(rows, counts)}

## What was compared

{conditions(record)}
{made_of}
## Segmentation

Mean Dice of the structures on unseen maps.

{dice_table(rows, names, counts, unseen)}

{real_scans}

## Features

Of the untrained network (*{NONE}*), of the segmentation network of {most} templates (*{SCRATCH}*), and of the
pretrained ones before fine-tuning.

How alike features are *within* a head, between views in different contrasts, and *between* heads (Brain-ID):

{feature_table(rows, names, LIKENESS)}

Matching: share of voxels whose most similar feature in another contrast of the head lies within
{matching_radius(rows):g} mm. Probe: mean Dice of one linear layer on frozen features, fitted on renderings of two
templates.

{feature_table(rows, names, USE)}

Collapse, of features scaled to length 1: effective ranks of all features and of the class means, mean
|cos + 1/(C-1)| of the class means (0 for an equiangular frame), distance to the own class's mean.

{feature_table(rows, names, COLLAPSE)}

## Cost

{cost_table(rows, names, counts)}

## Sweeps

{sweeps_section(sweeps)}

## What this does not show

- The network is small and the runs are short. Nothing follows for days on a GPU.
- Pretraining has seen the anatomy of {seen} templates, also where the segmentation then learns from fewer; training
  from scratch with {most} is the comparison at equal knowledge.
- Fine-tuning has the rates of training from scratch. Lower rates may keep more of what was learned.

## Run it

```
{commands(record, sweeps)}
python benchmarks/pretraining.py --page docs/pretraining_results.md
```
"""


def commands(record: dict[str, Any], sweeps: dict[str, Any] | None) -> str:
    """What makes the figures again."""
    lines = []
    for script, made in (("pretraining.py", record), ("pretraining_sweeps.py", sweeps or record)):
        settings = made["settings"]
        data = " --data DIR" if settings["real_scans"] else ""
        options = f"--templates DIR ... --held-out DIR ...{data} --cpu-minutes {settings['cpu_minutes']:g} --jobs 2"
        lines.append(f"python benchmarks/{script} {options}")
    return "\n".join(lines)


def matching_radius(rows: Rows) -> float:
    return float(next(iter(rows.values()))["features"]["matching_radius_mm"])


def sum_text(terms: dict[str, Any]) -> str:
    """The terms of a sum, with their weights."""
    parts = [f"{terms['anatomy_weight']:g} × anatomy"] if terms.get("anatomy_weight") else []
    for term in terms.get("contrast", []):
        beta = f" (beta {term['beta']:g})" if "beta" in term else ""
        parts.append(f"{term.get('weight', 1.0):g} × {term['loss']}{beta}")
    return f"{' + '.join(parts)}: each term divided by the loss that its own row ended with"


def write_page(path: Path, figures: Path, sweeps: Path | None) -> None:
    """Write the page. ``sweeps`` may not be there yet. Raises InputError if the figures are not."""
    record = read(figures, "benchmarks/pretraining.py")
    swept = read(sweeps, "benchmarks/pretraining_sweeps.py") if sweeps is not None and sweeps.exists() else None
    write_text_atomically(path, page(record, swept))
