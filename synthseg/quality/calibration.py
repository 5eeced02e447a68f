"""From measures to predicted Dice: one line per structure and one for the scan, kept in a JSON file for each model.

The file ``<model>.quality.json`` lies beside the weights and holds the sha256 of the weights it was made for; with any
other weights it is not used. ``benchmarks/quality.py`` writes it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synthseg.paths import data_dir
from synthseg.quality.evidence import Judged
from synthseg.quality.measures import SCAN, Measures
from synthseg.volume import write_text_atomically

FORMAT = "synthseg-quality-1"
SUFFIX = ".quality.json"
_OF_SCAN = f"{SCAN}."  # before the name of a measure of the whole scan
STRUCTURE_FEATURES = (
    *("expected_dice", "inner_confidence", "border_confidence", "inner_entropy", "border_entropy"),
    *("inner_margin", "border_margin", "border_share", "removed_share", "volume_off", "soft_excess"),
    *(f"{_OF_SCAN}brain_entropy", f"{_OF_SCAN}thickness", f"{_OF_SCAN}brain_removed_share"),
)
AGREEMENT_FEATURES = ("agreement", f"{_OF_SCAN}agreement")  # of the robust mode
SCAN_FEATURES = ("mean_predicted", "missing_share", "brain_entropy", "brain_removed_share")


@dataclass(frozen=True)
class Line:
    """Predicted Dice = ``offset`` + sum of ``weights`` x features, each first limited to the range of the calibration,
    so that a scan unlike all of it does not run off the line. The result is limited to [0, 1]."""

    features: tuple[str, ...]
    weights: tuple[float, ...]
    offset: float
    low: tuple[float, ...]
    high: tuple[float, ...]

    def predict(self, values: Sequence[float]) -> float:
        inside = np.clip(np.asarray(values, dtype=np.float64), self.low, self.high)
        return float(np.clip(self.offset + inside @ np.asarray(self.weights), 0.0, 1.0))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Line:
        n = len(record["features"])
        numbers = {key: tuple(float(v) for v in record[key]) for key in ("weights", "low", "high")}
        offset = float(record["offset"])
        if any(len(v) != n for v in numbers.values()) or not all(
            math.isfinite(v) for v in (offset, *(x for v in numbers.values() for x in v))
        ):
            raise ValueError("its numbers do not fit together")
        return cls(tuple(str(name) for name in record["features"]), offset=offset, **numbers)


@dataclass(frozen=True)
class ModeCalibration:
    """How one mode is judged.

    Attributes
    ----------
    structures : a line for each structure, by name.
    scan : the line of the scan, and ``averaged``, the structures whose mean Dice it predicts: those inside the skull,
        so that skull-stripped scans are judged by the same measure.
    threshold : the score below which a scan fails.
    """

    structures: Mapping[str, Line]
    scan: Line
    averaged: tuple[str, ...]
    threshold: float

    def structures_of(self, measures: Measures) -> dict[str, float]:
        """Predicted Dice by structure name; NaN where the structure is not there or was never calibrated."""
        found = {}
        for name in measures:
            if name == SCAN:
                continue
            line = self.structures.get(name)
            values = structure_values(measures, name, line.features) if line else None
            found[name] = math.nan if line is None or values is None else line.predict(values)
        return found

    def scan_of(self, measures: Measures, structures: Mapping[str, float]) -> float:
        """Predicted mean Dice; 0 if nothing was found."""
        values = scan_values(measures, structures, self.averaged)
        return 0.0 if values is None else self.scan.predict(values)


@dataclass(frozen=True)
class Calibration:
    """What a calibration file holds that judging needs."""

    model: str
    sha256: str
    modes: Mapping[str, ModeCalibration]


def structure_values(measures: Measures, name: str, features: Sequence[str]) -> list[float] | None:
    """Features of one structure in order; None if the structure is not there."""
    own, scan = measures[name], measures[SCAN]
    values = [
        scan[feature.removeprefix(_OF_SCAN)] if feature.startswith(_OF_SCAN) else own[feature] for feature in features
    ]
    return values if all(map(math.isfinite, values)) else None


def scan_values(measures: Measures, structures: Mapping[str, float], averaged: Sequence[str]) -> list[float] | None:
    """SCAN_FEATURES in order, from the measures and the structures' predicted Dice; None if there is no prediction."""
    finite = [structures[name] for name in averaged if math.isfinite(structures.get(name, math.nan))]
    if not finite:
        return None
    missing = 1.0 - len(finite) / len(averaged)
    return [float(np.mean(finite)), missing, *(measures[SCAN][feature] for feature in SCAN_FEATURES[2:])]


# ----------------------------------------------------------------------------------------------- the file


def save_calibration(path: Path, calibration: Calibration, extra: Mapping[str, Any]) -> None:
    """Write a calibration with what else should be known of it (how it was made, how well it predicts)."""
    record = {
        "format": FORMAT,
        "model": calibration.model,
        "sha256": calibration.sha256,
        "modes": {name: asdict(mode) for name, mode in calibration.modes.items()},
        **extra,
    }
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")


def read_calibration(path: Path) -> Calibration:
    """A calibration file. Raises ValueError, KeyError, TypeError or OSError if it is not one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    modes = {
        str(name): ModeCalibration(
            {str(structure): Line.from_dict(line) for structure, line in mode["structures"].items()},
            Line.from_dict(mode["scan"]),
            tuple(str(structure) for structure in mode["averaged"]),
            float(mode["threshold"]),
        )
        for name, mode in record["modes"].items()
    }
    return Calibration(str(record["model"]), str(record["sha256"]), modes)


def find_calibration(model: Judged) -> tuple[Calibration | None, str]:
    """The calibration made for exactly these weights, and if there is none, why.

    Looked for beside the weights file, where the model knows it, and among the models that ship.
    """
    damaged = ""
    for path in _candidates(model):
        try:
            calibration = read_calibration(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = f"{path} is damaged ({' '.join(str(error).split())[:100]}); "
            continue
        if calibration.sha256 == model.sha256:
            return calibration, ""
    return None, f"{damaged}model '{model.name}' has no calibration of quality for its weights, so there is no score"


def _candidates(model: Judged) -> list[Path]:
    found: list[Path] = []
    weights = getattr(model, "path", None)
    if weights is not None:
        found.append(Path(weights).with_suffix(SUFFIX))
    with contextlib.suppress(FileNotFoundError):
        found += sorted(data_dir("weights").glob(f"*{SUFFIX}"))
    return [path for path in dict.fromkeys(found) if path.is_file()]
