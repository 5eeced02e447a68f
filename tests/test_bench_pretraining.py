"""The table of pretraining: what is run when, how rows are compared, the page, and a tiny run of the command."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import synthseg
from synthseg.config import PretrainConfig, parse
from synthseg.errors import InputError
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import read_tensors
from synthseg.templates import Template
from synthseg.volume import Volume

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ["A", "B", "C"]


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[None]:
    """The folder of the benchmarks can be imported from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def table(benchmarks: None) -> ModuleType:
    return importlib.import_module("pretraining_table")


@pytest.fixture(scope="module")
def pages(benchmarks: None) -> ModuleType:
    return importlib.import_module("pretraining_page")


def features(probe: float = 0.3) -> dict[str, Any]:
    likeness = {"l1": 0.1, "ssim": 0.8, "ms_ssim": 0.9}
    return {
        "intra_subject": likeness,
        "inter_subject": {**likeness, "l1": 0.2},
        "matching": 0.4,
        "matching_radius_mm": 3.0,
        "effective_rank": 5.0,
        "effective_rank_means": 3.0,
        "equiangular_mean": 0.3,
        "within_class_spread": 0.5,
        "uniformity": -2.0,
        "tolerance": 0.7,
        "neighbour_tolerance": 0.9,
        "probe": {"unseen_maps": {"GM": probe, "mean": probe}},
    }


def row(name: str, seed: int, dice: tuple[float, ...], counts: tuple[str, ...] = ("1", "2")) -> dict[str, Any]:
    segmentation = {
        count: {"unseen_maps": value, "steps": 10, "cpu_seconds": 1.0}
        for count, value in zip(counts, dice, strict=True)
    }
    pretraining = {"steps": 7, "cpu_seconds": 2.0, "cpu_seconds_per_step": 0.3, "loss": 1.0}
    own = {"pretraining": pretraining, "objective": {}} if name not in ("none", "from scratch") else {}
    return {"name": name, "seed": seed, "segmentation": segmentation, "features": features(), **own}


def rows(*given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{one['name']}, seed {one['seed']}": one for one in given}


# ---------------------------------------------------------------------------------------------- what runs when


def test_all_objectives_run_once_before_the_sum_and_further_seeds(table: ModuleType) -> None:
    first = ["none, seed 0", "from scratch, seed 0", "A, seed 0", "B, seed 0", "C, seed 0"]
    assert table.next_rows({}, NAMES, [""], 3, 2)[0] == first
    done = rows(*(row(key.rpartition(",")[0], 0, (0.1, 0.1)) for key in first[:-1]))
    keys, waits = table.next_rows(done, NAMES, [""], 3, 2)
    assert keys == ["C, seed 0"]
    keys, waits = table.next_rows(done, NAMES, ["best sum"], 3, 2)
    assert keys == []
    assert "wait for: C, seed 0" in waits


def test_the_best_rows_and_those_without_pretraining_run_with_all_seeds(table: ModuleType) -> None:
    done = rows(
        *(row(name, 0, (0.1, 0.1)) for name in ("none", "from scratch", "A")),
        row("B", 0, (0.1, 0.4)),
        row("C", 0, (0.2, 0.2)),
    )
    without = [f"{name}, seed {seed}" for seed in (1, 2) for name in ("none", "from scratch")]
    assert table.next_rows(done, NAMES, [""], 3, 2)[0] == ["best sum, seed 0", *without]
    done |= rows(row("best sum", 0, (0.3, 0.3)))  # mean 0.3, then B with 0.25
    keys, waits = table.next_rows(done, NAMES, [""], 3, 2)
    assert keys == [*without, *(f"{name}, seed {seed}" for seed in (1, 2) for name in ("best sum", "B"))]
    assert waits == ""
    assert table.next_rows(done, NAMES, [""], 1, 2) == ([], "")
    assert table.parse_key("HSCL beta 10, seed 2") == ("HSCL beta 10", 2)


# ------------------------------------------------------------------------------------------------ comparisons


def first_dice(one: dict[str, Any]) -> float:
    return float(one["segmentation"]["1"]["unseen_maps"])


def test_rows_are_compared_seed_by_seed(table: ModuleType) -> None:
    """By hand: differences 0.10, 0.12, 0.14; mean 0.12, standard deviation 0.02; a t-test with 2 degrees of freedom
    at 5 % asks for 4.303 standard errors, 0.05."""
    scratch = [row("from scratch", seed, (0.2 + 0.1 * seed, 0)) for seed in range(3)]
    ahead = [row("A", seed, (0.3 + 0.12 * seed, 0)) for seed in range(3)]
    found = table.difference(rows(*scratch, *ahead), "A", first_dice)
    assert found.mean == pytest.approx(0.12)
    assert found.spread == pytest.approx(0.02)
    assert (found.seeds, found.verdict) == (3, "better")
    mixed = [row("A", seed, (0.2 + 0.1 * seed + (0.1, 0.1, -0.01)[seed], 0)) for seed in range(3)]
    assert table.difference(rows(*scratch, *mixed), "A", first_dice).verdict == "not told apart"
    behind = [row("A", seed, (0.1 + 0.1 * seed - 0.01 * seed, 0)) for seed in range(3)]
    assert table.difference(rows(*scratch, *behind), "A", first_dice).verdict == "worse"
    assert table.difference(rows(*scratch), "A", first_dice) is None


def test_one_seed_is_judged_by_the_noise_of_the_rows_with_several(table: ModuleType) -> None:
    """B differs from scratch by 0, 0.01, 0.02: noise 0.01 with 2 degrees of freedom. For two objectives 2.5 % each, so
    6.205 times 0.01 for one seed."""
    scratch = [row("from scratch", seed, (0.2, 0)) for seed in range(3)]
    other = [row("B", seed, (0.2 + 0.01 * seed, 0)) for seed in range(3)]
    assert table.noise(rows(*scratch, *other), first_dice, "from scratch") == (pytest.approx(0.01), 2)
    for dice, verdict in ((0.263, "better"), (0.261, "not told apart"), (0.137, "worse")):
        given = rows(*scratch, *other, row("A", 0, (dice, 0)))
        assert table.difference(given, "A", first_dice).verdict == verdict
    assert table.difference(rows(scratch[0], row("A", 0, (0.9, 0))), "A", first_dice).verdict == "not told apart"


def test_chance_alone_tells_no_row_apart(table: ModuleType) -> None:
    """Nine objectives that are worth the same, four of them with three seeds: in 40 such tables at most 7 name a winner
    or loser (5 % each; more than 7 of 40 has a chance of 1 in 1,000)."""
    chance, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        given = [row("from scratch", seed, (chance.normal(0.3, 0.02), 0)) for seed in range(3)]
        for number in range(9):
            seeds = range(3 if number < 4 else 1)
            given += [row(f"objective {number}", seed, (chance.normal(0.3, 0.02), 0)) for seed in seeds]
        found = [table.difference(rows(*given), f"objective {number}", first_dice) for number in range(9)]
        wrong += any(one.verdict != "not told apart" for one in found)
    assert wrong <= 7


def test_the_figure_of_real_scans_weighs_the_three_references_alike(table: ModuleType) -> None:
    one = row("A", 0, (0.1, 0.1))
    one["segmentation"]["1"] |= {
        "colin27_tissues": {"GM": 0.2, "WM": 0.4},
        "colin27_aal": {"Thalamus": 0.6},
        "oasis_aseg": {"GM": 0.8, "WM": 1.0, "mean": 0.0},
    }
    assert table.real(one, "1") == pytest.approx((0.3 + 0.6 + 0.9) / 3)
    assert np.isnan(table.real(one, "2"))


def test_a_table_has_a_cell_for_each_heading(table: ModuleType) -> None:
    assert table.table(["a", "b"], [["1", "2"]]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    with pytest.raises(ValueError, match=r"2 headings, but a row of 3 cells: \['1', '2', '3'\]"):
        table.table(["a", "b"], [["1", "2"], ["1", "2", "3"]])


def test_the_table_of_costs_names_every_figure(table: ModuleType) -> None:
    given = rows(row("none", 0, (0.1, 0.1)), row("A", 0, (0.1, 0.1)))
    lines = [line.split(" | ") for line in table.cost_table(given, ["none", "A", "B"], ["1", "2"]).splitlines()]
    assert lines[0][1:3] == ["steps of pretraining", "CPU seconds a step of pretraining"]
    assert lines[2] == ["| none", "", "", "10", "10 |"]
    assert lines[3] == ["| A", "7", "0.30", "10", "10 |"]
    assert lines[4] == ["| B", "not run", "not run", "not run", "not run |"]
    assert {len(line) for line in lines} == {5}


# ---------------------------------------------------------------------------------------------------- page


def record(given: dict[str, dict[str, Any]], **settings: Any) -> dict[str, Any]:
    known = {
        "cpu_minutes": 3.0,
        "fine_tune_minutes": 0.75,
        "counts": [1, 2],
        "pretrain_templates": 6,
        "held_out": ["m1", "m2"],
        "voxel_size_mm": 3.0,
        "shape": [64, 80, 64],
        "channels": [16, 32],
        "severities": [0.0, 1.0],
        "shift_mm": 20.0,
        "real_scans": False,
    }
    return {"settings": known | settings, "order": ["none", "from scratch", *NAMES, "best sum"], "rows": given}


def test_the_page_says_where_pretraining_pays(pages: ModuleType) -> None:
    """A is 0.10 ahead with one template in both seeds, and behind with two."""
    given = rows(
        *(row("none", seed, (0.05, 0.1)) for seed in range(2)),
        *(row("from scratch", seed, (0.2 + 0.004 * seed, 0.3)) for seed in range(2)),
        *(row("A", seed, (0.3, 0.25 + 0.004 * seed)) for seed in range(2)),
        row("B", 0, (0.1, 0.1)),
    )
    text = " ".join(pages.page(record(given), None).split())
    assert "**Pretraining pays with 1 template, not with 2** of labelled heads" in text
    best = "best objective *A* +0.098 ± 0.003 (better, 2 seeds; +0.096 on those it was not chosen by)."
    assert f"With 1 template: from scratch 0.202 ± 0.003; {best}" in text
    assert "Of 2 objectives 1 are better than training from scratch, 1 worse, 0 not told apart." in text
    assert "| A | 2 | 0.300 ± 0.000 | **+0.098 ± 0.003** | 0.252 ± 0.003 | **-0.048 ± 0.003** |" in text
    assert "**Incomplete**: not run are *C* and *best sum*." in text
    assert "| C | not run | not run | not run | not run | not run |" in text
    assert "Real scans: not run (`--data`)" in text
    assert "Sweeps of severity, temperature and beta: not run" in text


def test_the_page_says_plainly_that_pretraining_does_not_pay(pages: ModuleType) -> None:
    given = rows(
        *(row("from scratch", seed, (0.3, 0.3 + 0.001 * seed)) for seed in range(2)),
        *(row("A", seed, (0.29 + 0.03 * seed, 0.2)) for seed in range(2)),
    )
    text = " ".join(pages.page(record(given), None).split())
    assert "**Pretraining does not pay here.**" in text
    assert "(not told apart, 2 seeds; +0.020 on those it was not chosen by)" in text


def test_without_training_from_scratch_nothing_is_judged(pages: ModuleType) -> None:
    assert "Not judged: it takes the row *from scratch*" in pages.page(record(rows(row("A", 0, (0.9, 0.9)))), None)
    with pytest.raises(InputError, match="no row of the table has been run"):
        pages.page(record({}), None)


def test_figures_that_are_not_there_are_refused(pages: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: not the figures of benchmarks/pretraining\.py"):
        pages.write_page(tmp_path / "page.md", tmp_path / "none.json", None)
    assert list(tmp_path.iterdir()) == []


def test_the_page_says_what_all_rows_had_in_common(pages: ModuleType) -> None:
    """Barlow Twins on the sphere; labels by hand: SupCon takes its positives by them, InfoNCE mirrored voxels."""
    given = rows(
        row("from scratch", 0, (0.2, 0.2)),
        row("A", 0, (0.1, 0.1)) | {"objective": {"contrast": [{"loss": "sup_con"}]}},
        row("B", 0, (0.1, 0.1)) | {"objective": {"contrast": [{"loss": "info_nce"}]}},
        row("C", 0, (0.1, 0.1)) | {"objective": {"contrast": [{"loss": "barlow_twins"}]}},
        row("best sum", 0, (0.1, 0.1)) | {"objective": {"anatomy_weight": 2.0, "contrast": [{"loss": "hscl"}]}},
    )
    text = " ".join(pages.page(record(given), None).split())
    assert "Three objectives and one sum of the family of [pretraining]" in text
    settings = (
        "temperature 0.33, projection `sphere` with 128 dimensions, 512 points of each head in every view, levels -1"
    )
    assert f"Contrastive terms: {settings} of the decoder" in text
    assert "*C* had that projection too, though `none` fits the loss better: a handicap." in text
    assert "They say what is alike in *A* and *best sum*. *B* goes by the place instead, but by label" in text
    assert "The T1 image of *best sum* is painted from them" in text
    given["B, seed 0"]["objective"]["contrast"][0]["sampling"] = {"exclude_mirrored": False}
    given["C, seed 0"]["objective"]["contrast"][0]["projection"] = "none"
    text = " ".join(pages.page(record(given), None).split())
    assert "projection `sphere` and `none`" in text
    assert "handicap" not in text
    assert "goes by the place instead" not in text


def test_the_page_says_how_long_it_took_and_by_which_code(pages: ModuleType) -> None:
    """By hand: two rows, 2 s of pretraining and 1 s for each of two segmentations: 8 s of training, here times 900."""
    given = rows(row("A", 0, (0.1, 0.1)), row("B", 0, (0.1, 0.1)))
    for one in given.values():
        for part in (one["pretraining"], *one["segmentation"].values()):
            part["cpu_seconds"] *= 900
    text = " ".join(pages.page(record(given), None).split())
    assert "Training took 2.0 CPU hours. - No row says which version of the code made it" in text
    took = record(given) | {"wall_seconds": 4980.0, "jobs": 2}
    given["A, seed 0"] |= {"wall_seconds": 600.0, "version": {"synthseg": "1.0", "commit": "a" * 40}}
    text = " ".join(pages.page(took, None).split())
    assert "Training took 2.0 CPU hours, all of it 1 h 23 min by the clock on two cores" in text
    assert "A row took 10 to 10 minutes, measuring included. - 1 of 2 rows do not say which version" in text
    given["B, seed 0"] |= {"wall_seconds": None, "version": {"synthseg": "1.0", "commit": "b" * 40}}
    assert "Two versions of the code made these rows" in " ".join(pages.page(took, None).split())
    given["B, seed 0"]["version"] = {"synthseg": "1.0", "commit": "a" * 40}
    assert f"All rows were made by synthseg 1.0, commit {'a' * 12}." in pages.page(took, None)


def test_the_commands_on_the_page_make_its_figures(pages: ModuleType) -> None:
    given = record(rows(row("A", 0, (0.1, 0.1))), real_scans=True)
    sweeps = {"settings": {"cpu_minutes": 2.5, "real_scans": False}, "rows": {}}
    text = pages.commands(given, sweeps)
    assert text.splitlines() == [
        "python benchmarks/pretraining.py --templates DIR ... --held-out DIR ... --data DIR --cpu-minutes 3 --jobs 2",
        "python benchmarks/pretraining_sweeps.py --templates DIR ... --held-out DIR ... --cpu-minutes 2.5 --jobs 2",
    ]


def test_one_setting_that_was_swept_twice_tells_the_noise(pages: ModuleType) -> None:
    objective = {"contrast": [{"loss": "hucl", "beta": 2.0}]}
    common = row("", 0, (0.1, 0.1)) | {"objective": objective, "pool": None}
    swept = [
        common | {"sweep": "severity", "value": 1.0, "features": features(0.4)},
        common | {"sweep": "severity", "value": 1.0, "pool": 16},
        common | {"sweep": "severity", "value": 0.5},
        common | {"sweep": "beta", "value": 2.0, "features": features(0.35)},
    ]
    text = " ".join(pages.certainty(swept, 2.5).split())
    assert text.startswith("One seed of 2.5 CPU minutes decides nothing: not severity, not temperature, not beta.")
    assert "*severity 1* and *beta 2* with a new anatomy each step are one setting with one seed" in text
    assert "the probe finds 0.400 and 0.350, after 7 and 7 steps" in text
    assert text.count("run twice") == 1
    swept[3]["seed"] = 1
    text = pages.certainty(swept, 2.5)
    assert "One seed" not in text
    assert "run twice" not in " ".join(text.split())


@pytest.mark.parametrize(
    ("fresh_best", "claim"),
    [
        (0.25, "more data wants weaker augmentation, as AdaInf claims."),
        (0.5, "more data wants the same augmentation: AdaInf's claim is not seen."),
        (1.0, "more data wants stronger augmentation, against what AdaInf claims."),
    ],
)
def test_the_sweep_of_severity_is_read(pages: ModuleType, fresh_best: float, claim: str) -> None:
    """The pool is best at 0.5, by 0.1."""
    swept = {}
    for pool, best in ((16, 0.5), (None, fresh_best)):
        for value in (0.25, 0.5, 1.0):
            one = {**row("", 0, (0.1, 0.1)), "sweep": "severity", "value": value, "pool": pool}
            one["features"] = features(0.4 if value == best else 0.3)
            swept[f"{pool} {value}"] = one
    text = " ".join(pages.sweeps_section({"settings": {"cpu_minutes": 2}, "rows": swept}).split())
    assert f"16 anatomies: 0.5 (by 0.100); a new anatomy each step: {fresh_best:g} (by 0.100). By that, {claim}" in text
    assert ("The two do not agree" in text) == (fresh_best != 0.5)  # the Dice is the same everywhere
    assert "Sweep of temperature: not run." in text


def test_the_sweep_of_temperature_is_read(pages: ModuleType) -> None:
    swept = {}
    for value in (0.1, 0.3, 1.0):
        objective = {"contrast": [{"loss": "info_nce", "temperature": value}]}
        one = row("", 0, (0.1, 0.1)) | {"sweep": "temperature", "value": value, "pool": None, "objective": objective}
        one["features"] = features() | {"uniformity": -3 + value, "neighbour_tolerance": value}
        swept[str(value)] = one
    text = " ".join(pages.similarity_section(list(swept.values()), "temperature").split())
    assert "| 0.3 | -2.70 | 0.700 | 0.300 | 5.0 | 0.400 | 0.300 |" in text
    assert "with uniformity (lower is more uniform) +1.00, with tolerance to neighbours +1.00" in text
    assert "As theory has it, features are the most uniform at 0.1 (-2.90)." in text
    swept["0.3"]["features"]["uniformity"] = -3.5
    text = " ".join(pages.similarity_section(list(swept.values()), "temperature").split())
    assert "most uniform at 0.1; here they are at 0.3 (-3.50, but -2.90 at 0.1), against theory." in text
    for one in swept.values():
        one["sweep"] = "beta"
    text = " ".join(pages.similarity_section(list(swept.values()), "beta").split())
    assert "most uniform at 1; here they are at 0.3 (-3.50, but -2.00 at 1), against theory." in text


# ------------------------------------------------------------------------------------------------- measures


def test_labels_are_read_at_the_voxel_centres_of_the_conformed_grid(benchmarks: None) -> None:
    """By hand: 8 voxels of 1 mm become 3 of 3 mm (9 mm, half a mm over on both sides), with centres at 0.5, 3.5, 6.5:
    rounded half to even 0, 4, 6. Along the other axes 2 mm become 3 mm: 3 voxels become 2, centres at 0.25, 1.75."""
    scores = importlib.import_module("pretraining_scores")
    x, y, z = np.meshgrid(np.arange(8), np.arange(3), np.arange(3), indexing="ij")
    volume = Volume((100 * x + 10 * y + z).astype(np.float32), np.diag([1.0, 2.0, 2.0, 1.0]))
    found = scores.at_centres(volume, (3, 2, 2), 3.0)
    assert found[:, 0, 0].tolist() == [0, 400, 600]
    assert found[1].tolist() == [[400, 402], [420, 422]]


def test_a_pool_repeats_its_anatomies_in_new_appearances(benchmarks: None, tiny_template: Template) -> None:
    sweeps = importlib.import_module("pretraining_sweeps")
    given = {
        "anatomy_weight": 0.0,
        "contrast": [{"loss": "info_nce"}],
        "generator": {"shape": [16, 16, 16], "voxel_size_mm": 3, "views": {"severities": [0, 1], "shift_mm": 10.0}},
    }
    config = parse(PretrainConfig, given, "test")
    stream = sweeps.PooledStream(config, [tiny_template], load_scheme("siam16"))
    stream.pool = 2
    batches = [stream.batch(number) for number in range(6)]
    shapes = [batch.plans[0].deform.model_dump_json() for batch in batches]
    assert len(set(shapes)) == 2
    assert len({batch.plans[0].contrast.model_dump_json() for batch in batches}) == 6
    twin = shapes.index(shapes[0], 1)
    assert not torch.equal(batches[0].images, batches[twin].images)


def test_views_of_a_pool_are_moved_against_each_other_and_it_is_known(
    benchmarks: None, tiny_template: Template
) -> None:
    """Else a network tells voxels by their place in the image, and learns nothing of anatomy."""
    sweeps = importlib.import_module("pretraining_sweeps")
    given = {
        "anatomy_weight": 0.0,
        "contrast": [{"loss": "info_nce"}],
        "generator": {"shape": [16, 16, 16], "voxel_size_mm": 3, "views": {"severities": [0, 1], "shift_mm": 10.0}},
    }
    stream = sweeps.PooledStream(parse(PretrainConfig, given, "test"), [tiny_template], load_scheme("siam16"))
    found = [stream.batch(number) for number in range(3)]
    for batch in found:
        assert batch.displacement_mm is not None
        first, second = batch.displacement_mm
        assert not bool(first.any())
        assert float(second.abs().amax()) > 0.5
        own = [plan.deform.model_copy(update={"perturbation_mm": None}) for plan in batch.plans]
        assert own[0] == own[1]
    assert len({float(batch.displacement_mm[1].mean()) for batch in found}) == 3  # drawn anew, though pool is 1


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def program(benchmarks: None) -> Iterator[ModuleType]:
    """benchmarks/pretraining.py; threads as before afterwards."""
    threads = torch.get_num_threads()
    yield importlib.import_module("pretraining")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(template_folders: dict[str, Path]) -> list[str]:
    """Options of a table that takes seconds."""
    return [
        *("--templates", str(template_folders["head"]), "--held-out", str(template_folders["other"])),
        *("--counts", "1", "--pretrain-templates", "1", "--shape", "16", "16", "16", "--channels", "4", "4", "8"),
    ]


@pytest.fixture(scope="module")
def finished(program: ModuleType, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with two finished rows of a tiny table, and the words that made them."""
    folder = tmp_path_factory.mktemp("table")
    words = [*tiny, "--rows", "none", "InfoNCE", "--cpu-minutes", "0.001"]
    words += ["--work", str(folder / "work"), "--out", str(folder / "table.json")]
    program.main(words)
    return folder, words


def test_the_command_trains_measures_and_keeps_rows(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    found = json.loads((folder / "table.json").read_text())["rows"]
    assert list(found) == ["none, seed 0", "InfoNCE, seed 0"]
    pretrained = found["InfoNCE, seed 0"]
    assert pretrained["pretraining"]["steps"] >= 1
    assert pretrained["segmentation"]["1"]["steps"] >= 1
    assert 0 <= pretrained["segmentation"]["1"]["unseen_maps"] <= 1
    assert 0 <= pretrained["features"]["matching"] <= 1
    assert pretrained["features"]["inter_subject"] is None  # there is one map only
    assert pretrained["features"] != found["none, seed 0"]["features"]
    assert pretrained["version"]["synthseg"] == synthseg.__version__
    assert pretrained["wall_seconds"] > pretrained["pretraining"]["cpu_seconds"] >= 0
    assert json.loads((folder / "table.json").read_text())["jobs"] == 1
    assert (folder / "work" / "InfoNCE_seed_0" / "pretrained" / "pretrained.safetensors").is_file()


def test_the_command_goes_on_where_it_was_stopped(program: ModuleType, finished: tuple[Path, list[str]]) -> None:
    """A row whose last part is missing is finished from the parts that are there. Its time is then not known."""
    folder, words = finished
    before = json.loads((folder / "table.json").read_text())
    before["rows"]["InfoNCE, seed 0"]["wall_seconds"] = None
    (folder / "work" / "row_InfoNCE_seed_0.json").unlink()
    (folder / "work" / "InfoNCE_seed_0" / "features.json").unlink()
    program.main(words)
    after = json.loads((folder / "table.json").read_text())
    assert after.pop("wall_seconds") > before.pop("wall_seconds") > 0
    assert after == before
    with pytest.raises(SystemExit, match=r"cpu_minutes was 0\.001, is 9\.0"):
        program.main([*words, "--cpu-minutes", "9"])
    page = folder / "page.md"
    program.main(["--page", str(page), "--out", str(folder / "table.json"), "--sweeps", str(folder / "none")])
    assert "**Incomplete**: not run are *from scratch*, *Brain-ID anatomy*" in page.read_text()


def test_a_row_says_by_which_code_it_was_made(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was begun by other code, or before rows said so, does not."""
    jobs = importlib.import_module("pretraining_jobs")
    now = jobs.code_version()
    assert now["commit"] is None or re.fullmatch("[0-9a-f]{40}", now["commit"])
    made = jobs.stamped(tmp_path / "row", lambda: {"name": "A"})
    assert made == {"name": "A", "version": now, "wall_seconds": made["wall_seconds"]}
    assert 0 <= made["wall_seconds"] < 60
    again = jobs.stamped(tmp_path / "row", lambda: {"name": "A"})
    assert again == {"name": "A", "version": now, "wall_seconds": None}
    monkeypatch.setattr(jobs, "code_version", lambda: {"synthseg": "0", "commit": None})
    assert jobs.stamped(tmp_path / "row", dict) == {"version": None, "wall_seconds": None}
    (tmp_path / "older").mkdir()
    assert jobs.stamped(tmp_path / "older", dict) == {"version": None, "wall_seconds": None}


def test_the_best_sum_divides_each_term_by_its_loss(program: ModuleType) -> None:
    """Losses by hand: 0.2 of the anatomy row, 4 of the best contrastive row; the anatomy row is the best of all."""
    done = rows(*(row(name, 0, (0.1, 0.1)) for name in program.OBJECTIVES))
    done["Brain-ID anatomy, seed 0"]["pretraining"]["loss"] = 0.2
    done["Brain-ID anatomy, seed 0"]["segmentation"]["1"]["unseen_maps"] = 0.9
    done["HSCL beta 2, seed 0"]["pretraining"]["loss"] = 4.0
    done["HSCL beta 2, seed 0"]["segmentation"]["1"]["unseen_maps"] = 0.8
    term = {"loss": "hscl", "beta": 2.0, "weight": 0.25}
    assert program.best_sum(done) == {"anatomy_weight": 5.0, "contrast": [term]}


def test_every_objective_is_a_recipe(program: ModuleType, tiny: list[str]) -> None:
    parser = argparse.ArgumentParser()
    program.add_shared_options(parser)
    options = parser.parse_args(["--templates", "phantom"])
    found = {name: program.pretrain_recipe(options, terms, 0) for name, terms in program.OBJECTIVES.items()}
    assert [name for name, config in found.items() if config.anatomy_weight > 0] == ["Brain-ID anatomy"]
    assert [(c.contrast[0].loss, c.contrast[0].beta) for name, c in found.items() if "beta" in name] == [
        *(("hucl", 2.0), ("hucl", 10.0), ("hscl", 2.0), ("hscl", 10.0))
    ]
    assert all(config.generator.views.severities == [0.0, 1.0] for config in found.values())


def test_rows_are_made_several_at_a_time(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, which gets the same words and its key; one that fails stops no other."""
    script = tmp_path / "script.py"
    script.write_text("import sys; from pathlib import Path; Path(sys.argv[1], sys.argv[-1]).touch(exist_ok=False)")
    (tmp_path / "b, seed 0").touch()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    keys, written = ["a, seed 0", "b, seed 0", "c, seed 0"], []
    program.run_keys(keys, argparse.Namespace(jobs=2), None, lambda: written.append(1))
    assert all((tmp_path / key).exists() for key in keys)
    assert len(written) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--held-out", "phantom"], r"\['phantom'\] are also among --templates"),
        (["--held-out", "nowhere"], "nowhere"),
        (["--held-out", "nowhere", "--shape", "18", "16", "16"], "sides must be divisible by 8"),
        (["--held-out", "nowhere", "--cpu-minutes", "0"], "must be positive"),
        ([], "--templates and --held-out are needed"),
    ],
)
def test_what_cannot_run_is_refused(
    words: list[str], message: str, program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "table.json")]
    with pytest.raises(SystemExit) as caught:
        program.main(["--templates", "phantom", "--pretrain-templates", "1", "--counts", "1", *words, *places])
    assert re.search(message, str(caught.value) + capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_sweeps_train_and_measure(program: ModuleType, tiny: list[str], tmp_path: Path) -> None:
    sweeps = importlib.import_module("pretraining_sweeps")
    words = [*tiny, "--rows", "severity 0.25, pool", "beta 30", "--pool", "2", "--cpu-minutes", "0.001"]
    sweeps.main([*words, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "sweeps.json")])
    found = json.loads((tmp_path / "sweeps.json").read_text())["rows"]
    assert list(found) == ["severity 0.25, pool 2, seed 0", "beta 30, seed 0"]
    assert list(found["severity 0.25, pool 2, seed 0"]["segmentation"]) == ["1"]
    assert found["beta 30, seed 0"]["segmentation"] == {}
    assert found["beta 30, seed 0"]["version"]["synthseg"] == synthseg.__version__
    assert found["beta 30, seed 0"]["wall_seconds"] > 0
    assert 0 <= found["beta 30, seed 0"]["features"]["probe"]["unseen_maps"]["mean"] <= 1
    _, recipe = read_tensors(
        tmp_path / "work" / "severity_0.25_pool_2_seed_0" / "pretrained" / "pretrained.safetensors"
    )
    assert recipe["config"]["generator"]["views"]["severities"] == [0.0, 0.25]
