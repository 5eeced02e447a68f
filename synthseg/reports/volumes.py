"""Volumes of a scan in millilitres, and their table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from synthseg.inference import Segmentation
from synthseg.labels import INTRACRANIAL_TISSUES, PARENCHYMA_TISSUES, LabelTable, tissue_mask
from synthseg.volume import write_text_atomically


def volume_row(scan: str, segmentation: Segmentation, table: LabelTable) -> dict[str, str | float]:
    """One row of the table of volumes.

    ``intracranial`` is brain, ventricles and CSF; ``brain`` is grey and white matter with deep nuclei,
    cerebellum and brain stem, without ventricles. ``_ml`` counts voxels, ``_soft_ml`` sums probabilities. If the
    quality was judged, ``predicted_dice`` (NaN where the model has no calibration) and ``passed`` (yes or no) follow.
    """
    row: dict[str, str | float] = {"scan": scan}
    soft_totals_ml = totals_ml(segmentation.soft_ml, table)
    for name, hard_ml in totals_ml(segmentation.hard_ml, table).items():
        row[f"{name}_ml"] = hard_ml
        row[f"{name}_soft_ml"] = soft_totals_ml[name]
    for name in table.names[1:]:
        row[f"{name}_ml"] = segmentation.hard_ml[name]
        row[f"{name}_soft_ml"] = segmentation.soft_ml[name]
    quality = segmentation.quality
    if quality is not None:
        row["predicted_dice"] = math.nan if quality.scan is None else quality.scan
        row["passed"] = "yes" if quality.passed else "no"
    return row


def totals_ml(volumes_ml: Mapping[str, float], table: LabelTable) -> dict[str, float]:
    """``intracranial`` and ``brain`` from the volumes of the labels by name; see `volume_row`."""
    groups = (("intracranial", INTRACRANIAL_TISSUES), ("brain", PARENCHYMA_TISSUES))
    return {
        name: sum(volumes_ml[table.names[index]] for index in np.flatnonzero(tissue_mask(table, tissues)))
        for name, tissues in groups
    }


def counted_ml(labels: np.ndarray, table: LabelTable, voxel_ml: float) -> dict[str, float]:
    """The ``_ml`` columns of a row, counted in a label map."""
    ids, counts = np.unique(labels, return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    hard_ml = {label.name: found.get(label.id, 0) * voxel_ml for label in table.labels}
    named = {**totals_ml(hard_ml, table), **{name: hard_ml[name] for name in table.names[1:]}}
    return {f"{name}_ml": value for name, value in named.items()}


def write_volumes_csv(path: str | Path, rows: Sequence[Mapping[str, str | float]]) -> None:
    """Write rows of one structure each, volumes with three decimals (0.001 ml = 1 mm³).

    A name that ends in .tsv makes a table with tabs, any other one with commas. What is not known is ``n/a``, as in
    BIDS; pandas reads it as missing.
    """
    text = io.StringIO()
    delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(rows[0].keys() if rows else ["scan"])
    for row in rows:
        writer.writerow([_field(value) for value in row.values()])
    write_text_atomically(path, text.getvalue())


def _field(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if math.isfinite(value) else "n/a"
