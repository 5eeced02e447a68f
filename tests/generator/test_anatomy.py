"""Borders move by the amount asked for, sheets stay whole, and what pushes leaves its neighbours in place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.config import AnatomyConfig, GeneratorConfig
from synthseg.errors import ConfigError
from synthseg.generator import anatomy
from synthseg.generator.anatomy import AnatomyPlan, Shift, change_labels, sample_anatomy
from synthseg.generator.borders import REACH_VOXELS, borders_of, find_borders
from synthseg.generator.deform import DeformPlan
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.export import generate
from synthseg.generator.morph import morph_of
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import read_anatomy, render
from synthseg.labels import LabelTable
from synthseg.templates import Template

NAMES = {
    "skin": 511, "soft": 507, "bone": 515, "dura": 540, "csf": 24, "gm": 3, "wm": 2, "ventricle": 4, "thalamus": 10,
    "putamen": 12, "vein": 514, "diploe": 516,
}  # fmt: skip
STILL = Field3D.of(torch.zeros(2, 2, 2, 2))


def shift(mean_mm: float, variation_mm: float = 0.0) -> Shift:
    return Shift(mean_mm=mean_mm, variation_mm=(variation_mm, 0.0))


def plan(**changes: Any) -> AnatomyPlan:
    idle = {
        "shifts": {},
        "volume_ratio": {},
        "recarve": None,
        "ventricle_ratio": 1.0,
        "layers": None,
        "atrophy": 0.0,
        "variation": STILL,
    }
    return AnatomyPlan(**{**idle, **changes})


def template_of(ids: np.ndarray, table: LabelTable, spacing_mm: float = 1.0) -> Template:
    ids = np.pad(ids, 1)
    center = tuple((n - 1) / 2 for n in ids.shape)
    return Template("made", torch.from_numpy(table.to_index(ids)), table, (spacing_mm,) * 3, center, {})  # type: ignore[arg-type]


def ball_head() -> np.ndarray:
    """A round head of 1 mm voxels, from skin to white matter, with a sulcus, two nuclei, a ventricle and a vein."""
    x, y, z = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in (92, 96, 90)], indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    ids = np.zeros(r.shape, np.int32)
    shells = [(44, "skin"), (42, "soft"), (38, "bone"), (36, "diploe"), (34, "bone"), (32, "dura"), (31, "csf"),
              (28, "gm"), (25, "wm")]  # fmt: skip
    for radius, name in shells:
        ids[r < radius] = NAMES[name]
    ids[(np.abs(z) < 0.6) & (r < 30) & (r > 19)] = NAMES["csf"]  # a sulcus of one or two voxels between banks of cortex
    ids[(np.abs(z) >= 0.6) & (np.abs(z) < 3) & (r < 28) & (r > 17)] = NAMES["gm"]
    ids[np.sqrt((x - 9) ** 2 + y**2 + (z - 9) ** 2) < 6.2] = NAMES["thalamus"]
    ids[np.sqrt((x - 9) ** 2 + (y - 12) ** 2 + (z + 11) ** 2) < 5.1] = NAMES["putamen"]
    ids[((x + 8) / 5) ** 2 + (y / 9) ** 2 + ((z - 10) / 4) ** 2 < 1] = NAMES["ventricle"]
    ids[(np.abs(x) < 1) & (np.abs(y) < 1) & (z < -25) & (r < 31)] = NAMES["vein"]
    return ids


@pytest.fixture(scope="module")
def template(head: LabelTable) -> Template:
    return template_of(ball_head(), head)


def index(template: Template, name: str) -> int:
    return template.table.index_of[NAMES[name]]


def volume(labels: torch.Tensor, template: Template, name: str) -> int:
    return int((labels == index(template, name)).sum())


def read(template: Template, anatomy_plan: AnatomyPlan | None) -> torch.Tensor:
    """The changed anatomy on the template's own grid."""
    still = DeformPlan(matrix=((1, 0, 0), (0, 1, 0), (0, 0, 1)), shift_mm=(0, 0, 0), velocity_mm=None, flip=False)
    config = GeneratorConfig(voxel_size_mm=1.0, shape=tuple(template.labels.shape), subsamples=1)
    made = sample_plan(config, template.name, template.table, 0, 0)
    made = made.model_copy(update={"anatomy": anatomy_plan, "deform": still})
    return read_anatomy(template, made)[1]


# ---------------------------------------------------------------- borders


def test_margins_are_distances_to_the_border(head: LabelTable) -> None:
    ids = np.full((24, 24, 24), NAMES["wm"])
    tilted = np.add.outer(np.add.outer(np.arange(24) * 0.9, np.arange(24) * 0.4), np.zeros(24)) - 15.3
    distance = tilted / np.hypot(0.9, 0.4)
    ids[distance > 0] = NAMES["gm"]
    borders = find_borders(torch.from_numpy(head.to_index(ids)), head, (1.0, 1.0, 1.0))
    place = np.unravel_index(borders.position.numpy(), ids.shape)
    interior = np.all([(p > 3) & (p < 20) for p in place], axis=0)
    truth = np.abs(distance)[place][interior]
    found = borders.margin_mm.numpy()[interior]
    assert len(found) > 1000
    near = truth < 1.5
    assert np.abs(found - truth)[near].mean() < 0.12
    assert np.corrcoef(found[near], truth[near])[0, 1] > 0.95


@pytest.mark.parametrize("ratio", [0.6, 0.8, 0.9999, 1.0001, 1.2, 1.5])
def test_a_nucleus_gets_the_volume_asked_for(template: Template, ratio: float) -> None:
    changed = change_labels(template, plan(volume_ratio={NAMES["thalamus"]: ratio}))
    before = volume(template.labels, template, "thalamus")
    assert volume(changed, template, "thalamus") / before == pytest.approx(ratio, abs=0.02)
    assert volume(changed, template, "putamen") == volume(template.labels, template, "putamen")
    islands = ndimage.label((changed == index(template, "thalamus")).numpy())[1]
    assert islands == 1


def test_a_shift_acts_by_fractions_of_a_voxel(template: Template) -> None:
    volumes = [
        volume(change_labels(template, plan(shifts={"cortex_inner": shift(mm)})), template, "gm")
        for mm in (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)
    ]
    steps = np.diff(volumes)
    assert (steps > 0).all()
    assert steps.max() < 6 * steps.min()


@pytest.mark.parametrize("part", [0.01, 0.02, 0.05, 0.1])
def test_atrophy_is_a_known_amount(template: Template, part: float) -> None:
    before = volume(template.labels, template, "gm")
    after = volume(change_labels(template, plan(atrophy=part)), template, "gm")
    assert 1 - after / before == pytest.approx(part, abs=1e-4)


def test_atrophy_that_the_cortex_cannot_lose_is_refused(template: Template, white_template: Template) -> None:
    with pytest.raises(ConfigError, match=r"atrophy is 0\.5, but .*template .* at most (0\.\d+) can") as error:
        change_labels(template, plan(atrophy=0.5))
    most = float(str(error.value).split("at most ")[1].split()[0])
    before = volume(template.labels, template, "gm")
    for part in (most - 0.01, most):
        after = volume(change_labels(template, plan(atrophy=part)), template, "gm")
        assert 1 - after / before == pytest.approx(part, abs=1e-3)
    with pytest.raises(ConfigError, match="at most"):
        change_labels(template, plan(atrophy=most + 0.01))
    with pytest.raises(ConfigError, match="none can become CSF"):
        change_labels(white_template, plan(atrophy=0.1))


def test_atrophy_is_refused_before_a_sample_is_written(
    template: Template, white_template: Template, tmp_path: Path
) -> None:
    config = GeneratorConfig(voxel_size_mm=5.0, shape=(18, 20, 16), subsamples=1, anatomy=AnatomyConfig(atrophy=0.1))
    for pair in ((template, white_template), (white_template, template)):
        with pytest.raises(ConfigError, match="none can become CSF"):
            generate(config, pair, 8, 0, tmp_path / "samples")
    assert not (tmp_path / "samples").exists()


def test_a_cortex_that_loses_a_known_part_is_not_carved_anew(template: Template) -> None:
    config = {"probability": 1.0, "cortex_probability": 1.0, "recarve_probability": 1.0}
    for seed in range(3):
        with_, without = (
            sample_anatomy(
                AnatomyConfig(**config, atrophy=part), template.table, Draw(torch.Generator().manual_seed(seed))
            )
            for part in (0.1, 0.0)
        )
        assert with_ is not None
        assert without is not None
        assert without.recarve is not None
        assert with_ == without.model_copy(update={"atrophy": 0.1, "recarve": None})  # the rest is drawn as before
        lost = change_labels(template, with_.model_copy(update={"volume_ratio": {}}))
        before = volume(template.labels, template, "gm")
        assert 1 - volume(lost, template, "gm") / before == pytest.approx(0.1, abs=0.01)


def test_a_sulcus_stays_open_and_a_thin_vessel_whole(template: Template) -> None:
    grown = change_labels(template, plan(shifts={"cortex_outer": shift(2.0), "vessel": shift(-2.0)}))
    assert volume(grown, template, "gm") > 1.1 * volume(template.labels, template, "gm")
    fluid = (grown == index(template, "csf")).numpy()
    i, j, k = (n // 2 for n in fluid.shape)
    assert fluid[i + 23, j, k - 1 : k + 2].any()
    assert fluid[i, j + 21, k - 1 : k + 2].any()
    before, after = ((x == index(template, "vein")).numpy() for x in (template.labels, grown))
    assert after.sum() > 0
    assert after.any((0, 1)).sum() == before.any((0, 1)).sum()  # as long as it was


def test_white_matter_stays_one_piece_and_grey_matter_in_the_brain(template: Template) -> None:
    outside = ~np.isin(template.labels.numpy(), [index(template, n) for n in ("gm", "csf", "wm")])
    for seed in range(4):
        config = AnatomyConfig(probability=1.0, cortex_probability=1.0)
        made = sample_anatomy(config, template.table, Draw(torch.Generator().manual_seed(seed)))
        assert made is not None
        changed = change_labels(template, made.model_copy(update={"volume_ratio": {}}))
        grey = (changed == index(template, "gm")).numpy()
        assert not (grey & outside).any()
        white = (changed == index(template, "wm")).numpy()
        components, _ = ndimage.label(white)
        assert np.bincount(components[white]).max() / white.sum() > 0.995


def test_a_carved_cortex_has_the_thickness_asked_for(template: Template) -> None:
    for thickness in (1.5, 2.5):
        changed = change_labels(template, plan(recarve=shift(thickness)))
        profile = changed[:, changed.shape[1] // 2, changed.shape[2] // 2 + 12]
        depth = int((profile[: len(profile) // 2] == index(template, "gm")).sum())
        assert abs(depth - thickness) <= 1.0
    thin, thick = (volume(change_labels(template, plan(recarve=shift(mm))), template, "gm") for mm in (1.5, 2.5))
    assert thin < 0.8 * thick


def test_variation_differs_over_space(template: Template) -> None:
    ramp = torch.linspace(-1, 1, 5).view(1, 5, 1, 1).expand(2, 5, 2, 2)
    changed = change_labels(
        template, plan(shifts={"cortex_inner": shift(0.0, 4.0)}, variation=Field3D.of(ramp.contiguous()))
    )
    middle = changed.shape[0] // 2
    before = template.labels == index(template, "gm")
    gained = (changed == index(template, "gm")).int() - before.int()
    assert gained[middle + 5 :].sum() > 100
    assert gained[: middle - 5].sum() < -100


# ---------------------------------------------------------------- displacement


@pytest.mark.parametrize("ratio", [0.5, 2.0, 3.0])
def test_ventricles_get_the_volume_asked_for(template: Template, ratio: float) -> None:
    changed = read(template, plan(ventricle_ratio=ratio))
    before = volume(template.labels, template, "ventricle")
    assert volume(changed, template, "ventricle") / before == pytest.approx(ratio, rel=0.15)
    assert volume(changed, template, "thalamus") > 0.6 * volume(template.labels, template, "thalamus")


def thickness(labels: torch.Tensor, template: Template, names: tuple[str, ...]) -> float:
    """Voxels of these tissues on the ray from the centre to the left."""
    ray = labels[: labels.shape[0] // 2, labels.shape[1] // 2, labels.shape[2] // 2 + 10]
    return sum(int((ray == index(template, name)).sum()) for name in names)


@pytest.mark.parametrize(("layer", "names"), [(1, ("bone", "diploe")), (2, ("soft", "skin"))], ids=["skull", "scalp"])
def test_layers_become_thicker_and_thinner(template: Template, layer: int, names: tuple[str, ...]) -> None:
    found = []
    for mm in (-2.0, 0.0, 2.0):
        layers = [shift(0.0)] * 3
        layers[layer] = shift(mm)
        found.append(thickness(read(template, plan(layers=tuple(layers))), template, names))
    assert found[0] < found[1] < found[2]
    assert found[2] - found[0] >= 2
    brain = volume(read(template, plan(layers=tuple(layers))), template, "wm")
    assert brain == pytest.approx(volume(template.labels, template, "wm"), rel=0.03)


def test_the_brain_moves_within_the_skull(template: Template) -> None:
    def with_gap(mm: float) -> torch.Tensor:
        return read(template, plan(layers=(shift(mm), shift(0.0), shift(0.0))))

    more, less = with_gap(2.0), with_gap(-0.8)
    fluid = volume(template.labels, template, "csf")
    assert volume(more, template, "csf") > 1.4 * fluid
    assert volume(less, template, "csf") < 0.9 * fluid
    for name in ("skin", "bone", "dura"):  # what lies around the brain stays, voxel for voxel
        for changed in (more, less):
            assert ((changed == index(template, name)) == (template.labels == index(template, name))).all()


@pytest.mark.parametrize("points", [2, 8])
def test_layers_change_in_a_view_without_brain_and_in_a_table_without_csf(points: int, template: Template) -> None:
    changes = AnatomyConfig(probability=1.0, skull_probability=1.0)
    config = GeneratorConfig(voxel_size_mm=5.0, shape=(18, 20, 16), subsamples=points, anatomy=changes)
    made = sample_plan(config, template.name, template.table, 0, 0)
    aside = made.model_copy(update={"deform": made.deform.model_copy(update={"shift_mm": (300.0, 0.0, 0.0)})})
    assert not render([template], [aside])[1].any()
    fluid = index(template, "csf")
    table = LabelTable("dry", tuple(x for x in template.table.labels if x.tissue != "csf"))
    ids = np.where(template.labels == fluid, 0, template.table.ids[template.labels.int()])
    dry = template_of(ids[1:-1, 1:-1, 1:-1], table)
    labels = render([dry], [sample_plan(config, dry.name, table, 0, 0)])[1]
    assert {table.index_of[NAMES[name]] for name in ("skin", "bone", "wm")} <= set(labels.unique().tolist())


# ---------------------------------------------------------------- contract


def test_nothing_to_do_is_the_template(template: Template) -> None:
    assert torch.equal(change_labels(template, plan()), template.labels)
    assert torch.equal(read(template, plan()), read(template, None))
    silent = plan(shifts={"cortex_outer": shift(0.0)}, volume_ratio={NAMES["thalamus"]: 1.0})
    assert torch.equal(change_labels(template, silent), template.labels)


def test_the_template_is_left_as_it_is(template: Template) -> None:
    before = template.labels.clone()
    change_labels(template, plan(shifts={"cortex_outer": shift(1.0)}, recarve=shift(2.0), atrophy=0.1))
    assert torch.equal(template.labels, before)


def everything() -> GeneratorConfig:
    return GeneratorConfig(voxel_size_mm=2.0, shape=(40, 44, 36), subsamples=2, anatomy=AnatomyConfig(probability=1.0))


def test_the_same_plan_is_the_same_image_and_survives_json(template: Template) -> None:
    made = [sample_plan(everything(), template.name, template.table, 3, i) for i in range(3)]
    again = [Plan.model_validate_json(p.model_dump_json()) for p in made]
    assert again == made
    image, labels = render([template] * 3, made)
    image_again, labels_again = render([template] * 3, again)
    assert torch.equal(image, image_again)
    assert torch.equal(labels, labels_again)
    for b in range(3):
        single, _ = render([template], made[b : b + 1])
        torch.testing.assert_close(single[0], image[b], rtol=1e-6, atol=1e-6)


def test_off_by_default_and_by_its_chance(template: Template) -> None:
    assert sample_plan(GeneratorConfig(), template.name, template.table, 0, 0).anatomy is None
    half = AnatomyConfig(probability=0.5)
    found = [sample_anatomy(half, template.table, Draw(torch.Generator().manual_seed(s))) for s in range(40)]
    assert 8 < sum(f is not None for f in found) < 32


def test_known_atrophy_alone_draws_nothing_else(template: Template) -> None:
    made = sample_anatomy(AnatomyConfig(atrophy=0.05), template.table, Draw(torch.Generator().manual_seed(0)))
    assert made is not None
    assert (made.shifts, made.volume_ratio, made.ventricle_ratio, made.layers) == ({}, {}, 1.0, None)


def test_atrophy_leaves_the_chance_of_other_changes_as_it_is(template: Template) -> None:
    config = AnatomyConfig(probability=0.5, atrophy=0.05, nuclei_probability=1.0)
    found = [sample_anatomy(config, template.table, Draw(torch.Generator().manual_seed(s))) for s in range(40)]
    assert all(made is not None and made.atrophy == 0.05 for made in found)
    assert 8 < sum(bool(made and made.volume_ratio) for made in found) < 32


def test_ranges_are_kept(template: Template) -> None:
    config = AnatomyConfig(probability=1.0, nuclei_ratio=(0.7, 1.3), ventricle_ratio=(0.5, 2.0), skull_mm=1.0)
    for seed in range(30):
        made = sample_anatomy(config, template.table, Draw(torch.Generator().manual_seed(seed)))
        assert made is not None
        assert all(0.7 <= r <= 1.3 for r in made.volume_ratio.values())
        assert 0.5 <= made.ventricle_ratio <= 2.0
        assert made.layers is None or abs(made.layers[1].mean_mm) <= 1.0


def test_distances_are_computed_once(template: Template) -> None:
    assert borders_of(template) is borders_of(template)
    assert morph_of(template) is morph_of(template)
    assert borders_of(template).margin_mm.max() <= REACH_VOXELS + 1.0


def test_a_table_without_deep_nuclei_is_not_carved(coarse_template: Template) -> None:
    changed = change_labels(coarse_template, plan(recarve=shift(1.0)))
    assert torch.equal(changed, coarse_template.labels)
    assert anatomy.displacement(coarse_template, plan(ventricle_ratio=2.0), torch.zeros(3, 2, 2, 2)).abs().max() == 0


@pytest.fixture(scope="module")
def coarse_template() -> Template:
    from synthseg.labels import load_scheme

    table = load_scheme("brainweb")
    r = np.sqrt(sum((np.indices((40, 42, 44)) - 20.5) ** 2))
    ids = np.select([r < 10, r < 13, r < 15, r < 17, r < 19], [3, 2, 1, 7, 6], 0)
    return template_of(ids, table)


@pytest.fixture(scope="module")
def white_template(coarse_template: Template) -> Template:
    """Without cortex or CSF."""
    labels = tuple(replace(label, tissue="wm") for label in coarse_template.table.labels)
    return replace(coarse_template, table=LabelTable("white", labels), cache={})


def test_what_a_shrinking_nucleus_leaves_behind_goes_to_its_surroundings(head: LabelTable) -> None:
    ids = np.full((40, 40, 40), NAMES["wm"], np.int32)
    ids[:, 30:] = NAMES["csf"]
    ids[4:20, 4:20, 4:20] = NAMES["putamen"]
    made = template_of(ids, head)
    labels = made.labels.clone()
    island = index(made, "putamen")
    labels[22:25, 6:9, 6:9] = island  # with a core that has no other neighbour; outside the body, in its box
    labels[22, 20, 20] = island
    labels[23, 15:17, 15] = island
    labels[20, 20, 10] = island  # it touches the body by an edge, and comes apart where the head is read between voxels
    anatomy._drop_islands(labels, made)
    assert torch.equal(labels, made.labels)
    labels[22:25, 4:20, 4:20] = island  # a fifth of the body: not an island
    kept = labels.clone()
    anatomy._drop_islands(labels, made)
    assert torch.equal(labels, kept)


def test_a_ventricle_between_the_points_that_measure_it_stays_as_it_is(head: LabelTable) -> None:
    ids = np.full((40, 40, 40), NAMES["wm"], np.int32)
    ids[24, 24, 24] = NAMES[
        "ventricle"
    ]  # 25 with the border of the template: one of every fifth voxel, and not of every second
    made = template_of(ids, head, spacing_mm=0.4)
    assert morph_of(made).ventricle_volume is None
    assert torch.equal(read(made, plan(ventricle_ratio=2.0)), read(made, None))


def test_a_slit_of_a_ventricle_widens_less_than_its_wide_part(head: LabelTable) -> None:
    """And what touches its wall moves with it, whole."""
    ids = np.full((90, 90, 90), NAMES["wm"], np.int32)
    x, y, z = np.meshgrid(*[np.arange(90.0) - 44.5] * 3, indexing="ij")
    ids[(x + 15) ** 2 + y**2 + z**2 < 9**2] = NAMES["ventricle"]
    ids[(x > -15) & (x < 30) & (np.abs(y) < 1) & (np.abs(z) < 8)] = NAMES["ventricle"]
    ids[(x + 15) ** 2 + (y - 12) ** 2 + z**2 < 3**2] = NAMES["thalamus"]
    made = template_of(ids, head)
    before, after = read(made, None), read(made, plan(ventricle_ratio=2.0))

    def width(labels: torch.Tensor, at: int) -> int:
        return int((labels[at, :, 46] == index(made, "ventricle")).sum())

    wide, slit = 15 + 15, 45 + 15
    assert width(after, wide) - width(before, wide) >= 4
    assert 0 <= width(after, slit) - width(before, slit) <= 2
    assert volume(after, made, "thalamus") / volume(before, made, "thalamus") > 0.75
