"""Fit a calibration to segmentations whose true Dice is known.

Ridge regression in two steps: one line for all structures together (after each structure's own mean), and for each
structure a correction of it that is held back more, so that few examples of a structure suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from synthseg.quality.calibration import (
    AGREEMENT_FEATURES,
    SCAN_FEATURES,
    STRUCTURE_FEATURES,
    Line,
    ModeCalibration,
    scan_values,
    structure_values,
)
from synthseg.quality.measures import SCAN, Measures

POOLED_PENALTY = 10.0  # in standard deviations of the features; fixed beforehand, not searched
OWN_PENALTY = 30.0
SCAN_PENALTY = 3.0
LEAST_EXAMPLES = 8  # of a structure; else it has no prediction
PASS_PART = 0.8  # of the median Dice of the intact scans: what is below fails


@dataclass(frozen=True)
class Example:
    """One segmentation: its measures, the true Dice of each structure (NaN: not there and not found), the map it came
    from, and whether its scan was intact."""

    measures: Measures
    dice: Mapping[str, float]
    group: str
    intact: bool

    def mean_dice(self, averaged: Sequence[str]) -> float:
        """Over those of the named structures that are there or were found."""
        values = [self.dice[name] for name in averaged if math.isfinite(self.dice.get(name, math.nan))]
        return float(np.mean(values)) if values else 0.0


def fit(examples: Sequence[Example], averaged: Sequence[str]) -> ModeCalibration:
    """Lines for all structures with enough examples, and for the mean Dice of the ``averaged`` ones.

    Raises ValueError if there are too few examples.
    """
    features: tuple[str, ...] = STRUCTURE_FEATURES
    if all("agreement" in example.measures[SCAN] for example in examples):
        features += AGREEMENT_FEATURES
    tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name in sorted({name for example in examples for name in example.dice}):
        rows = []
        for example in examples:
            values = structure_values(example.measures, name, features) if name in example.measures else None
            if values is not None and math.isfinite(example.dice.get(name, math.nan)):
                rows.append([*values, example.dice[name]])
        if len(rows) >= LEAST_EXAMPLES:
            table = np.array(rows)
            tables[name] = table[:, :-1], table[:, -1]
    intact = [example.mean_dice(averaged) for example in examples if example.intact]
    if not tables or not intact or not set(tables) & set(averaged):
        raise ValueError(f"{len(examples)} segmentations are too few to calibrate on; render more")
    lines = _structure_lines(features, tables)
    unfinished = ModeCalibration(
        lines, Line((), (), 0.0, (), ()), tuple(averaged), PASS_PART * float(np.median(intact))
    )
    rows = []
    for example in examples:
        values = scan_values(example.measures, unfinished.structures_of(example.measures), averaged)
        if values is not None:
            rows.append([*values, example.mean_dice(averaged)])
    table = np.array(rows)
    return replace(unfinished, scan=_scan_line(table[:, :-1], table[:, -1]))


def cross_validated(examples: Sequence[Example], averaged: Sequence[str]) -> list[tuple[dict[str, float], float]]:
    """For each example the structures' and the scan's Dice as predicted by a fit to the other groups only."""
    fits = {
        group: fit([example for example in examples if example.group != group], averaged)
        for group in sorted({example.group for example in examples})
    }
    found: list[tuple[dict[str, float], float]] = []
    for example in examples:
        structures = fits[example.group].structures_of(example.measures)
        found.append((structures, fits[example.group].scan_of(example.measures, structures)))
    return found


def _structure_lines(features: tuple[str, ...], tables: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Line]:
    everything = np.concatenate([x for x, _ in tables.values()])
    scale = np.maximum(everything.std(0), 1e-6)
    centred = np.concatenate([(x - x.mean(0)) / scale for x, _ in tables.values()])
    pooled = _ridge(centred, np.concatenate([y - y.mean() for _, y in tables.values()]), POOLED_PENALTY)
    lines = {}
    for name, (x, y) in tables.items():
        z = (x - x.mean(0)) / scale
        weights = (pooled + _ridge(z, y - y.mean() - z @ pooled, OWN_PENALTY)) / scale
        lines[name] = _line(features, weights, float(y.mean() - x.mean(0) @ weights), x)
    return lines


def _scan_line(x: np.ndarray, y: np.ndarray) -> Line:
    scale = np.maximum(x.std(0), 1e-6)
    weights = _ridge((x - x.mean(0)) / scale, y - y.mean(), SCAN_PENALTY) / scale
    return _line(SCAN_FEATURES, weights, float(y.mean() - x.mean(0) @ weights), x)


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """Weights (n_features,) of centred, scaled features (n, n_features) and a centred target (n,)."""
    return np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


def _line(features: tuple[str, ...], weights: np.ndarray, offset: float, x: np.ndarray) -> Line:
    low, high = x.min(0), x.max(0)
    return Line(features, tuple(weights.tolist()), offset, tuple(low.tolist()), tuple(high.tolist()))
