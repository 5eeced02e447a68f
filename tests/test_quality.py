"""The judgement of a segmentation without a reference, on a head made of balls: measures, flags, score."""

import importlib.util
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.labels import LabelTable, load_scheme
from synthseg.paths import data_dir
from synthseg.quality import Evidence, assess
from synthseg.quality.calibration import (
    SUFFIX,
    Calibration,
    Line,
    ModeCalibration,
    find_calibration,
    read_calibration,
    save_calibration,
)
from synthseg.quality.fitting import Example, cross_validated, fit
from synthseg.quality.flags import find_flags
from synthseg.quality.intensities import look_at
from synthseg.quality.measures import SCAN, measure
from synthseg.volume import Volume

VOXEL_MM = 2.0
SHAPE = (88, 104, 100)
INTENSITY = {
    "air": 0.02,
    "gm": 0.5,
    "wm": 0.8,
    "csf": 0.15,
    "ventricle": 0.15,
    "cerebellar_gm": 0.5,
    "bone_cortical": 0.1,
}
# Left and right: half distance, anterior, superior of the centre and radius in mm.
NUCLEI = {
    "Thalamus": (13, -12, 0, 11.5), "Putamen": (31, 8, 0, 10.5), "Pallidum": (20, 10, -10, 6.5),
    "Caudate": (14, 20, 14, 9.4), "Accumbens": (10, 26, -8, 4.8), "Amygdala": (26, 6, -26, 6.5),
    "Hippocampus": (32, -20, -14, 9.0),
}  # fmt: skip


@dataclass(frozen=True)
class NamedModel:
    name: str = "test-model"
    sha256: str = "0" * 64
    path: Path | None = None


@pytest.fixture(scope="module")
def table() -> LabelTable:
    return load_scheme("siam16")


def head_labels(table: LabelTable) -> np.ndarray:
    """Indices of an adult's head of plausible volumes, RAS+, in 2 mm voxels."""
    x, y, z = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * VOXEL_MM for n in SHAPE], indexing="ij")

    def ball(a: float, b: float, c: float, *radii: float) -> np.ndarray:
        ra, rb, rc = radii if len(radii) == 3 else radii * 3
        return ((x - a) / ra) ** 2 + ((y - b) / rb) ** 2 + ((z - c) / rc) ** 2 < 1

    labels = np.zeros(SHAPE, dtype=np.uint8)
    index = {name: i for i, name in enumerate(table.names)}
    for name, radii in (("Head", (80, 95, 88)), ("Skull", (73, 88, 80)), ("Dura", (68, 83, 74)), ("CSF", (66, 81, 72))):
        labels[ball(0, 0, 0, *radii)] = index[name]
    labels[ball(0, 0, 0, 62, 77, 67)] = index["GM"]
    labels[ball(0, 0, 0, 51, 66, 56)] = index["WM"]
    labels[ball(0, -45, -40, 42, 28, 20) & (labels != index["Skull"])] = index["Cerebellar-GM"]
    for side in (-1, 1):
        labels[ball(side * 9, 0, 20, 6, 24, 6)] = index["Ventricular-CSF"]
        for name, (a, b, c, radius) in NUCLEI.items():
            labels[ball(side * a, b, c, radius)] = index[name]
        labels[ball(side * 60, 20, -20, 3)] = index["Vessels"]
    return labels


def evidence_of(labels: np.ndarray, table: LabelTable, **changes: Any) -> Evidence:
    """As if a network had found these labels, with the same doubt everywhere."""
    image = np.array([INTENSITY.get(label.tissue, 0.6) for label in table.labels], dtype=np.float32)[labels]
    rng = np.random.default_rng(3)
    image = np.clip(ndimage.gaussian_filter(image, 0.5) + rng.normal(0, 0.02, image.shape), 0, 1).astype(np.float32)
    probabilities = torch.full((len(table), *labels.shape), 0.2 / len(table), dtype=torch.float16)
    probabilities.scatter_(0, torch.from_numpy(labels).long()[None], 0.8 + 0.2 / len(table))
    ml = np.bincount(labels.ravel(), minlength=len(table)) * VOXEL_MM**3 / 1000
    volumes = dict(zip(table.names, ml.tolist(), strict=True))
    evidence = Evidence(
        scan=Volume((1000 * image).astype(np.float32), np.diag([VOXEL_MM] * 3 + [1.0])),
        head=(slice(None), slice(0, labels.shape[1]), slice(None)),
        box=(slice(None), slice(0, labels.shape[1]), slice(None)),
        image=torch.from_numpy(image),
        probabilities=probabilities,
        winner=labels,
        voxel_size_mm=VOXEL_MM,
        table=table,
        hard_ml=volumes,
        soft_ml=volumes,
        removed_voxels=np.zeros(len(table), dtype=np.int64),
    )
    return replace(evidence, **changes)


@pytest.fixture(scope="module")
def head(table: LabelTable) -> np.ndarray:
    return head_labels(table)


@pytest.fixture(scope="module")
def good(head: np.ndarray, table: LabelTable) -> Evidence:
    return evidence_of(head, table)


def flags(evidence: Evidence) -> tuple[str, ...]:
    return find_flags(evidence, measure(evidence))


# ---------------------------------------------------------------------------------------------- measures


def test_measures_of_a_bar_are_those_worked_out_by_hand(table: LabelTable) -> None:
    """A bar of GM along the last axis, 2 x 2 x 8 in 4 x 4 x 8 voxels: all 32 of its voxels lie at its border."""
    labels = np.zeros((4, 4, 8), dtype=np.uint8)
    labels[1:3, 1:3] = 1
    p = torch.zeros(len(table), 4, 4, 8)
    p[1] = 0.125  # mass of GM in the 96 voxels around
    p[0] = 0.875
    p[0, 1:3, 1:3], p[1, 1:3, 1:3], p[2, 1:3, 1:3] = 0.0, 0.75, 0.25
    found = measure(evidence_of(labels, table, winner=labels, probabilities=p.half()))
    row = found["GM"]
    mass = 32 * 0.75 + 96 * 0.125
    assert row["expected_dice"] == pytest.approx(2 * 32 * 0.75 / (32 + mass))
    assert row["border_confidence"] == pytest.approx(0.75)
    assert row["border_margin"] == pytest.approx(0.5)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(len(table))
    assert row["border_entropy"] == pytest.approx(entropy, abs=1e-3)
    assert row["border_share"] == 1.0
    assert found[SCAN]["brain_entropy"] == pytest.approx(entropy, abs=1e-3)
    assert all(math.isnan(value) for value in found["Thalamus"].values())


def test_inner_voxels_and_the_border_are_told_apart(table: LabelTable) -> None:
    labels = np.zeros((12, 12, 12), dtype=np.uint8)
    labels[3:9, 3:9, 3:9] = 2
    inner = np.zeros(labels.shape, dtype=bool)
    inner[4:8, 4:8, 4:8] = True
    p = torch.zeros(len(table), 12, 12, 12)
    p[0] = 1.0
    inside, at_edge = torch.from_numpy(inner), torch.from_numpy((labels == 2) & ~inner)
    for where, sure in ((inside, 1.0), (at_edge, 0.5)):
        p[2][where], p[0][where] = sure, 1.0 - sure
    row = measure(evidence_of(labels, table, winner=labels, probabilities=p.half()))["WM"]
    assert (row["inner_confidence"], row["border_confidence"]) == (1.0, 0.5)
    assert (row["inner_margin"], row["border_margin"]) == (1.0, 0.0)
    assert row["border_share"] == pytest.approx(1 - 4**3 / 6**3)


def test_measures_do_not_depend_on_the_slabs_that_they_are_taken_in(
    good: Evidence, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(good)
    monkeypatch.setattr("synthseg.quality.measures.SLAB_VOXELS", 1)
    for name, row in measure(good).items():
        assert row == pytest.approx(whole[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def test_what_was_removed_and_how_the_members_agree_is_measured(good: Evidence, table: LabelTable) -> None:
    removed = np.zeros(len(table), dtype=np.int64)
    removed[1] = int((good.winner == 1).sum())
    agreement = {name: 0.9 for name in table.names} | {"Thalamus": math.nan}
    found = measure(replace(good, removed_voxels=removed, agreement=agreement))
    assert found["GM"]["removed_share"] == 0.5
    assert 0.1 < found[SCAN]["brain_removed_share"] < 0.5
    assert (found["GM"]["agreement"], found[SCAN]["agreement"]) == pytest.approx((0.9, 0.9))
    assert math.isnan(found["Thalamus"]["agreement"])


# ------------------------------------------------------------------------------------------------- flags


def test_a_good_scan_has_no_flags(good: Evidence) -> None:
    assert flags(good) == ()


def test_a_scan_in_robust_mode_whose_members_agree_has_no_flags(good: Evidence, table: LabelTable) -> None:
    assert flags(replace(good, mode="robust", agreement={name: 0.85 for name in table.names})) == ()
    assert "disagree" in flags(replace(good, mode="robust", agreement={name: 0.4 for name in table.names}))[0]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((slice(None), slice(None), slice(0, 76)), "the vertex is outside the field of view"),
        ((slice(None), slice(None), slice(25, None)), "the skull base is outside the field of view"),
        ((slice(30, None), slice(None), slice(None)), "the left side of the brain is outside"),
        ((slice(0, 58), slice(None), slice(None)), "the right side of the brain is outside"),
        ((slice(None), slice(26, None), slice(None)), "the back of the brain is outside"),
        ((slice(None), slice(0, 78), slice(None)), "the front of the brain is outside"),
    ],
)
def test_a_cut_brain_is_flagged_at_the_side_where_it_is_cut(
    head: np.ndarray, table: LabelTable, box: tuple[slice, slice, slice], words: str
) -> None:
    found = flags(evidence_of(np.ascontiguousarray(head[box]), table))
    assert [flag for flag in found if words in flag], found
    assert sum("outside the field of view" in flag for flag in found) == 1


def test_a_cut_is_seen_where_the_rest_of_the_array_is_empty(head: np.ndarray, table: LabelTable) -> None:
    """A slab that was resampled into a larger array ends long before the array does."""
    cut = head.copy()
    cut[:, :, 76:] = 0
    assert "the vertex is outside" in flags(evidence_of(cut, table))[0]


def test_a_brain_that_is_cut_all_around_is_said_to_be_so_once(head: np.ndarray, table: LabelTable) -> None:
    found = flags(evidence_of(np.ascontiguousarray(head[25:63, 26:78, 26:74]), table))
    assert found[0].startswith("the brain ends at 5 sides as if it were cut"), found  # the front is cut to a remnant
    assert not any("outside the field of view" in flag for flag in found)


def test_a_box_asked_for_by_the_user_is_no_surprise(head: np.ndarray, table: LabelTable) -> None:
    whole, part = evidence_of(head, table), evidence_of(np.ascontiguousarray(head[:, :, 30:76]), table)
    assert flags(replace(part, scan=whole.scan, box=(slice(None), slice(None), slice(30, 76)))) == ()


def test_a_tight_crop_that_only_touches_the_brain_is_no_cut(head: np.ndarray, table: LabelTable) -> None:
    inside = np.argwhere(np.isin(head, (1, 2, 5)))
    first, last = inside.min(0), inside.max(0) + 1
    assert flags(evidence_of(head[first[0] : last[0], first[1] : last[1], first[2] : last[2]].copy(), table)) == ()


def test_ventricles_at_the_border_are_flagged(head: np.ndarray, table: LabelTable) -> None:
    found = flags(evidence_of(np.ascontiguousarray(head[48:]), table))
    assert any("ventricles touch the image border" in flag for flag in found)
    # The same box, but cut out of a larger scan because the rest is air.
    larger = evidence_of(np.ascontiguousarray(head[48:]), table)
    scan = Volume(np.zeros(SHAPE, np.float32), larger.scan.affine)
    box = (slice(48, 88), slice(None), slice(None))
    found = flags(replace(larger, scan=scan, head=box, box=box))
    assert not any("ventricles touch" in flag for flag in found)


def test_noise_is_flagged_and_a_noisy_head_is_not(good: Evidence) -> None:
    rng = np.random.default_rng(0)
    pure = rng.normal(size=SHAPE).astype(np.float32)
    found = flags(replace(good, scan=Volume(pure, good.scan.affine)))
    assert found[0].startswith("the scan is mostly noise")
    noisy = good.scan.data + 50 * pure
    assert flags(replace(good, scan=Volume(noisy, good.scan.affine))) == ()


def test_thick_slices_are_flagged_beyond_what_the_model_knows(good: Evidence) -> None:
    for thickness_mm, expected in ((7.9, 0), (10.0, 1)):
        scan = Volume(good.scan.data[:, :, ::5], np.diag([2.0, 2.0, thickness_mm, 1.0]))
        found = flags(replace(good, scan=scan))
        assert len(found) == expected, found
        assert all("slices are 10 mm thick" in flag for flag in found)


def hounsfield(head: np.ndarray, table: LabelTable, noise_hu: float) -> np.ndarray:
    hu = {
        "air": -1000,
        "gm": 38,
        "wm": 28,
        "csf": 8,
        "ventricle": 8,
        "cerebellar_gm": 38,
        "bone_cortical": 700,
        "soft": 20,
    }
    ideal = np.array([hu.get(label.tissue, 35) for label in table.labels], dtype=np.float32)[head]
    return ndimage.gaussian_filter(ideal, 0.4) + np.random.default_rng(1).normal(0, noise_hu, head.shape)


@pytest.mark.parametrize("noise_hu", [3.0, 20.0])
def test_ct_is_only_flagged_outside_of_hounsfield_units(
    good: Evidence, head: np.ndarray, table: LabelTable, noise_hu: float
) -> None:
    hu = hounsfield(head, table, noise_hu)
    for data, expected in ((hu, False), (hu + 1024, True), ((hu + 1000) / 3000, True), (good.scan.data, False)):
        found = flags(replace(good, scan=Volume(data.astype(np.float32), good.scan.affine)))
        assert any("CT outside the Hounsfield range" in flag for flag in found) == expected


def test_ct_is_told_from_the_whole_head_when_a_part_without_air_is_analysed(
    good: Evidence, head: np.ndarray, table: LabelTable
) -> None:
    box = (slice(25, 63), slice(25, 80), slice(24, 76))  # brain, dura and a part of the skull
    hu = hounsfield(head, table, 3.0)
    assert hu[box].min() > -500
    for data, expected in ((hu, False), (hu + 1024, True)):
        assert look_at(replace(good, scan=Volume(data, good.scan.affine), box=box)).ct_elsewhere == expected


def test_a_scan_of_one_grey_is_flagged(good: Evidence) -> None:
    rng = np.random.default_rng(5)
    flat = torch.from_numpy((0.5 + 0.02 * rng.normal(size=SHAPE)).astype(np.float32))
    assert look_at(good).contrast > 5
    assert any("contrast is very low" in flag for flag in flags(replace(good, image=flat)))


def test_brains_of_impossible_size_and_empty_scans_are_flagged(good: Evidence, table: LabelTable) -> None:
    tiny = {name: ml / 6 for name, ml in good.hard_ml.items()}
    assert "the brain measures" in flags(replace(good, hard_ml=tiny))[0]
    nothing = evidence_of(np.zeros(SHAPE, dtype=np.uint8), table)
    assert any(flag.startswith("no brain was found") for flag in flags(nothing))
    black = replace(nothing, scan=Volume(np.zeros(SHAPE, np.float32), nothing.scan.affine))
    assert flags(black) == ("no brain was found; check the orientation and the content of the scan",)


@pytest.mark.parametrize(("flip", "words"), [((1, 1, -1), "above"), ((1, -1, 1), "in front of")])
def test_a_head_on_its_head_is_flagged(
    head: np.ndarray, table: LabelTable, flip: tuple[int, int, int], words: str
) -> None:
    turned = np.ascontiguousarray(head[:: flip[0], :: flip[1], :: flip[2]])
    assert flags(evidence_of(turned, table)) == (
        f"the cerebellum was found {words} the middle of the brain; "
        "the orientation in the header may be wrong: check it in a viewer",
    )


def test_implausible_volumes_are_named(good: Evidence) -> None:
    volumes = {**good.hard_ml, "Thalamus": 80.0, "Accumbens": 0.0}
    found = flags(replace(good, hard_ml=volumes))
    assert len(found) == 2
    assert found[0].startswith("implausible volume: thalamus 80 ml")
    assert found[1] == "nothing was found of this structure: accumbens"
    assert flags(replace(good, hard_ml=volumes, rescaled=True)) == ()  # an infant is no small adult


def test_sides_that_differ_are_flagged_where_the_model_has_sides(good: Evidence, head: np.ndarray) -> None:
    sided = load_scheme("head45")
    fs = {"Thalamus": (10, 49), "Putamen": (12, 51), "Pallidum": (13, 52), "Caudate": (11, 50), "Accumbens": (26, 58),
          "Amygdala": (18, 54), "Hippocampus": (17, 53), "GM": (3, 42), "WM": (2, 41), "Ventricular-CSF": (4, 43),
          "Cerebellar-GM": (8, 47)}  # fmt: skip
    ids = np.zeros_like(head, dtype=np.int16)
    left = np.arange(SHAPE[0])[:, None, None] < SHAPE[0] / 2
    for index, name in enumerate(good.table.names):
        one, other = fs.get(name, (24, 24) if name == "CSF" else (0, 0))
        ids = np.where(head == index, np.where(left, one, other), ids)
    labels = sided.to_index(ids)
    assert flags(evidence_of(labels, sided)) == ()
    swollen = np.where((ids == 17) & (np.arange(SHAPE[2]) > 41), 2, ids)
    found = flags(evidence_of(sided.to_index(swollen), sided))
    assert len(found) == 1
    assert found[0].startswith("left and right differ much: Left-Hippocampus")


def test_much_that_was_removed_is_flagged(good: Evidence) -> None:
    removed = good.removed_voxels.copy()
    removed[1] = 60_000
    assert "lay apart from it and was removed" in flags(replace(good, removed_voxels=removed))[0]


# ----------------------------------------------------------------------------------------- calibration


def simple_mode(threshold: float = 0.5) -> ModeCalibration:
    line = Line(("expected_dice", "scan.thickness"), (2.0, -0.5), -1.0, (0.6, 0.0), (0.9, 1.0))
    scan = Line(("mean_predicted", "missing_share", "brain_entropy", "brain_removed_share"), (1.0, 0.0, 0.0, 0.0), 0.0,
                (0.0,) * 4, (1.0,) * 4)  # fmt: skip
    return ModeCalibration({"GM": line, "WM": line}, scan, ("GM", "WM"), threshold)


def row_of(expected_dice: float, thickness: float = 0.0) -> dict[str, dict[str, float]]:
    scan = {"thickness": thickness, "brain_entropy": 0.1, "brain_removed_share": 0.0}
    return {"GM": {"expected_dice": expected_dice}, "WM": {"expected_dice": math.nan}, SCAN: scan}


def test_a_line_is_followed_within_the_range_of_its_calibration_only() -> None:
    mode = simple_mode()
    assert mode.structures_of(row_of(0.8))["GM"] == pytest.approx(0.6)
    assert mode.structures_of(row_of(0.8, thickness=0.4))["GM"] == pytest.approx(0.4)
    assert mode.structures_of(row_of(0.99))["GM"] == pytest.approx(0.8)  # as 0.9
    assert mode.structures_of(row_of(0.1, thickness=9.0))["GM"] == 0.0  # as 0.6 and 1, and no Dice is below 0
    assert math.isnan(mode.structures_of(row_of(0.8))["WM"])
    assert mode.scan_of(row_of(0.8), {"GM": 0.6, "WM": math.nan}) == pytest.approx(0.6)
    assert mode.scan_of(row_of(0.8), {"GM": math.nan}) == 0.0


def test_a_calibration_file_comes_back_as_it_was(tmp_path: Path) -> None:
    calibration = Calibration("m", "ab", {"default": simple_mode()})
    save_calibration(tmp_path / "m.quality.json", calibration, {"made_of": "a test"})
    assert read_calibration(tmp_path / "m.quality.json") == calibration
    assert json.loads((tmp_path / "m.quality.json").read_text())["made_of"] == "a test"


def test_only_the_calibration_of_the_very_same_weights_is_used(tmp_path: Path) -> None:
    model = NamedModel(path=tmp_path / "mine.safetensors")
    assert find_calibration(model)[0] is None
    beside = tmp_path / f"mine{SUFFIX}"
    save_calibration(beside, Calibration("mine", model.sha256, {"default": simple_mode()}), {})
    found, why_not = find_calibration(model)
    assert found is not None
    assert why_not == ""
    other, why_not = find_calibration(replace(model, sha256="1" * 64))
    assert other is None
    assert "no calibration of quality for its weights" in why_not
    for damage in ("{", "[]", '{"format": "synthseg-quality-1"}', beside.read_text().replace("0.6", '"x"')):
        beside.write_text(damage)
        nothing, why_not = find_calibration(model)
        assert nothing is None, damage
        assert "is damaged" in why_not


def test_without_a_calibration_there_are_flags_but_no_score(good: Evidence) -> None:
    quality = assess(good, NamedModel())
    assert (quality.scan, quality.structures, quality.flags, quality.passed) == (None, {}, (), True)
    assert "no score" in quality.note
    assert quality.measures["GM"]["expected_dice"] > 0.5


def test_a_calibrated_score_fails_a_scan_below_the_threshold(good: Evidence, tmp_path: Path) -> None:
    model = NamedModel(path=tmp_path / "mine.safetensors")
    expected = simple_mode().structures_of(measure(good))["GM"]
    for threshold, passes in ((expected - 0.3, True), (0.999, False)):
        calibration = Calibration("mine", model.sha256, {"default": simple_mode(threshold)})
        save_calibration(tmp_path / f"mine{SUFFIX}", calibration, {})
        quality = assess(good, model)
        assert quality.structures["GM"] == pytest.approx(expected)
        assert quality.scan is not None
        assert quality.passed is passes
        assert any("probably poor" in flag for flag in quality.flags) is not passes
    robust = assess(replace(good, mode="robust"), model)
    assert robust.scan is None
    assert "calibrated for the mode default only" in robust.note


@pytest.mark.parametrize("path", sorted(data_dir("weights").glob(f"*{SUFFIX}")), ids=lambda p: p.name)
def test_a_calibration_that_ships_belongs_to_the_weights_beside_it(path: Path) -> None:
    from synthseg.networks.checkpoint import load_model

    model = load_model(path.name.removesuffix(SUFFIX))
    calibration, why_not = find_calibration(model)
    assert calibration is not None, why_not
    assert set(calibration.modes["default"].averaged) <= set(model.labels.names)


# ------------------------------------------------------------------------------------------------- fitting


def examples(rng: np.random.Generator, informative: bool) -> list[Example]:
    """Forty segmentations of four maps whose Dice follows the expected Dice (GM) and the border's entropy (WM)."""
    found = []
    for number in range(40):
        rows: dict[str, dict[str, float]] = {}
        for name in ("GM", "WM", "Skull"):
            rows[name] = dict.fromkeys(
                ("expected_dice", "inner_confidence", "border_confidence", "inner_entropy", "border_entropy",
                 "inner_margin", "border_margin", "border_share", "removed_share", "volume_off", "soft_excess"), 0.0
            )  # fmt: skip
            rows[name]["expected_dice"] = rng.uniform(0.5, 0.95)
            rows[name]["border_entropy"] = rng.uniform(0.1, 0.4)
        dice = {
            "GM": 2 * rows["GM"]["expected_dice"] - 1.0,
            "WM": 1.0 - 2 * rows["WM"]["border_entropy"],
            "Skull": math.nan if number % 2 else 0.5,
        }
        if not informative:
            dice = {name: float(rng.uniform(0.2, 0.9)) for name in dice}
        rows[SCAN] = {"brain_entropy": 0.1, "thickness": 0.0, "brain_removed_share": 0.0}
        found.append(Example(rows, dice, f"map{number % 4}", number % 3 == 0))
    return found


def correlation(given: list[Example], name: str) -> float:
    predicted = [structures[name] for structures, _ in cross_validated(given, ("GM", "WM"))]
    return float(np.corrcoef(predicted, [example.dice[name] for example in given])[0, 1])


def test_a_fit_finds_what_dice_follows_and_nothing_where_it_follows_nothing() -> None:
    told = examples(np.random.default_rng(0), informative=True)
    assert correlation(told, "GM") > 0.95
    assert correlation(told, "WM") > 0.8
    assert correlation(examples(np.random.default_rng(1), informative=False), "GM") < 0.4
    mode = fit(told, ("GM", "WM"))
    intact = [example.mean_dice(("GM", "WM")) for example in told if example.intact]
    assert mode.threshold == pytest.approx(0.8 * float(np.median(intact)))
    scores = [mode.scan_of(example.measures, mode.structures_of(example.measures)) for example in told]
    assert np.corrcoef(scores, [example.mean_dice(("GM", "WM")) for example in told])[0, 1] > 0.9


def test_a_map_is_predicted_by_the_other_maps_only() -> None:
    given = examples(np.random.default_rng(2), informative=True)
    others = fit([example for example in given if example.group != "map1"], ("GM", "WM"))
    structures, score = cross_validated(given, ("GM", "WM"))[1]
    assert structures == pytest.approx(others.structures_of(given[1].measures), nan_ok=True)
    assert score == pytest.approx(others.scan_of(given[1].measures, structures))


def test_agreement_is_used_where_every_example_has_it() -> None:
    given = examples(np.random.default_rng(3), informative=True)
    for example in given:
        for row in example.measures.values():
            row["agreement"] = 0.9
    assert "agreement" in fit(given, ("GM", "WM")).structures["GM"].features
    del given[0].measures[SCAN]["agreement"]
    assert "agreement" not in fit(given, ("GM", "WM")).structures["GM"].features


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit(examples(np.random.default_rng(0), True)[:5], ("GM", "WM"))


# --------------------------------------------------------------------------------------------- benchmark


@pytest.fixture(scope="module")
def degradations() -> ModuleType:
    """benchmarks/degradations.py, which is no part of the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "degradations.py"
    spec = importlib.util.spec_from_file_location("degradations", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["degradations"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "kind",
    ["intact", "stripped", "noise", "thick", "cut", "blur", "bias", "saturated", "ghosts", "turned", "rescaled"],
)
def test_spoiled_scans_keep_their_labels_in_place(degradations: ModuleType, kind: str) -> None:
    """A scan whose labels are its x, y and z in turn: what is left must still say where it is."""
    shape = (40, 44, 36)
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    affine = np.array([[1.5, 0, 0, -20], [0, 1.0, 0, -30], [0, 0, 2.0, 5], [0, 0, 0, 1.0]])
    labels = (x * 100 + y) * 100 + z
    brain = (x - 20) ** 2 + (y - 22) ** 2 + (z - 18) ** 2 < 15**2
    scan = degradations.LabelledScan((10.0 + x + y + z).astype(np.float32), labels, brain, affine)
    for seed in range(4):
        found = degradations.DEGRADATIONS[kind](scan, np.random.default_rng(seed))
        assert found.data.shape == found.labels.shape == found.brain.shape
        assert found.data.dtype == np.float32
        assert found.data.size > 0
        seen = found.labels > 0
        was = np.stack([found.labels // 10_000, found.labels // 100 % 100, found.labels % 100], -1)[seen]
        if kind not in ("turned", "rescaled"):  # whose headers lie
            position = np.argwhere(seen) @ found.affine[:3, :3].T + found.affine[:3, 3]
            np.testing.assert_allclose(position, was @ affine[:3, :3].T + affine[:3, 3], atol=1e-9)
        if kind in ("thick", "cut", "turned", "rescaled", "intact"):  # whose intensities stay a ramp
            np.testing.assert_allclose(found.data[seen], 10.0 + was.sum(1), rtol=1e-5)
    assert scan.data[3, 4, 5] == 22.0


def test_a_cut_takes_brain_away_and_stripping_takes_the_rest(degradations: ModuleType, head: np.ndarray) -> None:
    brain = np.isin(head, (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12))
    data = np.ones(SHAPE, dtype=np.float32)
    scan = degradations.LabelledScan(data, head.astype(np.int16), brain, np.diag([2.0, 2.0, 2.0, 1.0]))
    for seed in range(3):
        assert degradations.cut(scan, np.random.default_rng(seed)).brain.sum() < brain.sum()
    stripped = degradations.stripped(scan, np.random.default_rng(0))
    assert (stripped.data[brain] == 1).mean() > 0.99
    assert (stripped.data[head == 16] == 0).mean() > 0.99
    assert not (stripped.labels == 16).any()
