"""Patches and texture inside labels, borders that vanish, inverted contrast: on labels known voxel by voxel."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from synthseg import rng
from synthseg.config import ContrastConfig, GeneratorConfig, parse
from synthseg.errors import ConfigError
from synthseg.generator import reading, texture
from synthseg.generator.contrast import ContrastPlan, named_contrasts, paint, sample_contrast
from synthseg.generator.deform import resize
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.means import TOUCHING
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.reading import Reading
from synthseg.generator.synthesis import render
from synthseg.generator.texture import Clusters, Octaves, octaves, regions
from synthseg.labels import INTRACRANIAL_TISSUES, LabelTable, load_scheme
from synthseg.templates import Template

SHAPE = (40, 44, 36)
EXTENT = (80.0, 88.0, 72.0)
QUIET: dict[str, Any] = {"std": (0.0, 0.0), "texture_std": (0.0, 0.0), "soft_texture_std": (0.0, 0.0)}


def sample(head: LabelTable, seed: int, strip: bool = False, **changes: Any) -> ContrastPlan:
    draw = Draw(rng.generator(seed, 0, "contrast"))
    return sample_contrast(parse(ContrastConfig, changes, "test"), head, EXTENT, draw, strip)


def only(name: str, **changes: Any) -> dict[str, Any]:
    return {"random_weight": 0.0, "named_weights": {name: 1.0}, **changes}


def by_tissue(head: LabelTable, plan: ContrastPlan) -> dict[str, float]:
    return {label.tissue: mean for label, mean in zip(head.labels, plan.mean, strict=True)}


def blocks(n: int = 6) -> torch.Tensor:
    """Labels 0 to n - 1 as slabs along the first axis."""
    slab = (torch.arange(SHAPE[0]) * n // SHAPE[0]).to(torch.uint8)
    return slab[:, None, None].expand(SHAPE).contiguous()


# ---------------------------------------------------------------- what is off draws and paints as before


@pytest.mark.parametrize("strip", [False, True])
def test_new_settings_leave_earlier_draws_alone(head: LabelTable, strip: bool) -> None:
    on = {
        **{"cluster_probability": 1.0, "octave_probability": 1.0, "touching_tie_probability": 0.3},
        **{"invert_probability": 1.0, "bright_air_probability": 1.0},
    }
    for seed in range(12):
        before, after = sample(head, seed, strip), sample(head, seed, strip, **on)
        for name in ("name", "std", "texture_std", "texture", "noise_seed", "visible"):
            assert getattr(before, name) == getattr(after, name), name
        assert before.clusters is before.octaves is before.ct is None
        assert before.settings == {}
        assert after.clusters is not None
        assert after.octaves is not None


def test_the_result_does_not_depend_on_how_many_voxels_are_looked_up_at_once(
    head: LabelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = sample(head, 3, cluster_probability=1.0)
    labels = [torch.randint(0, len(head), SHAPE, generator=torch.manual_seed(i), dtype=torch.uint8) for i in range(4)]
    whole = paint(Reading.of(labels), plan)
    for slab in (1000, 4097, 10**9):
        monkeypatch.setattr(reading, "SLAB", slab)
        assert torch.equal(paint(Reading.of(labels), plan), whole)


# ---------------------------------------------------------------- patches


def patches(n: int, offset: Any, seed: int = 0) -> Clusters:
    fields = Field3D.of(torch.randn((2, 5, 4, 6), generator=torch.manual_seed(seed)))
    return Clusters(fields=fields, level=(0.1, -0.1), offset=offset)


def plain(n: int, **changes: Any) -> ContrastPlan:
    plan = ContrastPlan(
        name="random",
        mean=tuple(0.1 * i for i in range(n)),
        std=(0.0,) * n,
        texture_std=(0.0,) * n,
        texture=Field3D(shape=(1, 2, 2, 2), values=(0.0,) * 8),
        noise_seed=1,
        visible=(True,) * n,
    )
    return plan.model_copy(update=changes)


def test_patches_are_one_lookup_of_label_and_region() -> None:
    table = 0.01 * torch.randn((4, 6), generator=torch.manual_seed(1))
    clusters = patches(6, tuple(map(tuple, table.tolist())))
    labels = [blocks(), blocks().flip(0)]
    image = paint(Reading.of(labels), plain(6, clusters=clusters))
    where = regions(clusters, SHAPE)
    expected = sum(0.1 * x.float() + table[where.long(), x.long()] for x in labels) / 2
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    assert set(where.unique().tolist()) == {0, 1, 2, 3}
    assert (where[1:] == where[:-1]).float().mean() > 0.8  # patches, not noise


def test_regions_are_where_the_fields_pass_their_level() -> None:
    clusters = patches(1, ((0.0,),) * 4)
    first, second = resize(clusters.fields.tensor()[None], SHAPE)[0]
    close = (first - 0.1).abs().minimum((second + 0.1).abs()) < 1e-4
    expected = 2 * (first > 0.1) + (second > -0.1).int()
    assert torch.equal(regions(clusters, SHAPE)[~close], expected[~close])


def test_hidden_labels_have_no_patches() -> None:
    clusters = patches(2, ((0.0, 0.3), (0.0, -0.3), (0.0, 0.2), (0.0, -0.1)))
    hidden = paint(Reading.of([blocks(2)]), plain(2, clusters=clusters, visible=(True, False), mean=(0.2, 0.9)))
    np.testing.assert_allclose(hidden, 0.2, atol=1e-7)
    shown = paint(Reading.of([blocks(2)]), plain(2, clusters=clusters, mean=(0.2, 0.9)))
    assert len(shown[20:].unique()) == 4


def test_drawn_patches_keep_the_mean_and_are_larger_outside_the_brain(head: LabelTable) -> None:
    tissues = [label.tissue for label in head.labels]
    kinds: dict[str, set[int]] = {tissue: set() for tissue in tissues}
    size: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(60):
        clusters = sample(head, seed, cluster_probability=1.0).clusters
        assert clusters is not None
        offset = np.array(clusters.offset)
        np.testing.assert_allclose(offset.mean(0), 0, atol=1e-12)
        for index, tissue in enumerate(tissues):
            kinds[tissue].add(len(set(np.round(offset[:, index], 9))))
            if tissue != "air":
                size[tissue in INTRACRANIAL_TISSUES].append(float(offset[:, index].std()))
        for label in head.labels:
            if label.partner is not None:  # left and right agree
                np.testing.assert_array_equal(
                    offset[:, head.index_of[label.id]], offset[:, head.index_of[label.partner]]
                )
    assert kinds["air"] == {1}
    assert kinds["gm"] == kinds["soft"] == {1, 2, 3, 4}
    assert np.mean(size[False]) > 4 * np.mean(size[True])
    none = sample(head, 0, cluster_probability=1.0, cluster_offset=(0.0, 0.0), soft_cluster_offset=(0.0, 0.0)).clusters
    assert none is not None
    assert not np.any(none.offset)
    one = sample(head, 0, cluster_probability=1.0, max_clusters=1).clusters
    assert one is not None
    assert not np.any(one.offset)


def test_patches_of_soft_tissue_reach_towards_fat_and_muscle(head: LabelTable) -> None:
    """In a T1 the soft tissue of one image may be bright here (fat) and dark there (muscle)."""
    index = [label.tissue for label in head.labels].index("soft")
    spans = []
    for seed in range(60):
        plan = sample(head, seed, **only("t1", cluster_probability=1.0))
        assert plan.clusters is not None
        values = plan.mean[index] + np.array(plan.clusters.offset)[:, index]
        spans.append(values.max() - values.min())
    assert max(spans) > 0.4


# ---------------------------------------------------------------- texture


def correlation(image: torch.Tensor, lag: int) -> float:
    x = image.double().numpy()
    return float(np.corrcoef(x[lag:].ravel(), x[:-lag].ravel())[0, 1])


def test_scales_of_texture_have_their_length() -> None:
    shape, extent = (64, 64, 64), (64.0, 64.0, 64.0)

    def one(spacing_mm: float) -> torch.Tensor:
        return octaves(Octaves(extent_mm=extent, spacing_mm=(spacing_mm,), weight=(1.0,), seed=4), shape)

    fine, middle, coarse = one(2.0), one(8.0), one(32.0)
    for lag in (1, 2, 5):
        assert correlation(fine, lag) < correlation(middle, lag) < correlation(coarse, lag)
    assert abs(correlation(fine, 5)) < 0.05
    assert correlation(coarse, 5) > 0.9
    assert 0.4 < float(fine.std()) < 1.0  # normal on the lattice, less between its points


def test_scales_add_up() -> None:
    shape, extent = (48, 40, 44), (48.0, 40.0, 44.0)
    both = Octaves(extent_mm=extent, spacing_mm=(20.0, 3.0), weight=(0.8, 0.6), seed=6)
    total = octaves(both, shape)
    coarse = octaves(both.model_copy(update={"weight": (0.8, 0.0)}), shape)
    fine = octaves(both.model_copy(update={"weight": (0.0, 0.6)}), shape)
    torch.testing.assert_close(total, coarse + fine, rtol=0, atol=1e-5)
    assert float(coarse.std()) > 0.2
    assert torch.equal(octaves(both, shape), total)
    assert not torch.equal(octaves(both.model_copy(update={"seed": 7}), shape), total)


def test_drawn_weights_have_unit_square_sum(head: LabelTable) -> None:
    ruling = set()
    for seed in range(30):
        plan = sample(head, seed, octave_probability=1.0).octaves
        assert plan is not None
        assert plan.spacing_mm == (40.0, 15.0, 5.0, 2.0)
        assert sum(w * w for w in plan.weight) == pytest.approx(1)
        ruling.add(int(np.argmax(plan.weight)))
    assert ruling == {0, 1, 2, 3}


def test_texture_is_painted_with_the_amplitude_of_the_label() -> None:
    scales = Octaves(extent_mm=EXTENT, spacing_mm=(10.0,), weight=(1.0,), seed=2)
    image = paint(Reading.of([blocks(2)]), plain(2, octaves=scales, texture_std=(0.0, 0.2)))
    assert (image[:20] == 0).all()
    torch.testing.assert_close(image[20:], 0.1 + 0.2 * octaves(scales, SHAPE)[20:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 300), (3, 1, 1), (5, 4, 6)])
def test_images_of_any_size_can_be_painted(head: LabelTable, shape: tuple[int, int, int]) -> None:
    config = parse(ContrastConfig, {"cluster_probability": 1.0, "octave_probability": 1.0}, "test")
    plan = sample_contrast(config, head, tuple(2.0 * n for n in shape), Draw(rng.generator(0, 0, "contrast")), False)
    image = paint(Reading.of([torch.ones(shape, dtype=torch.uint8)]), plan)
    assert image.shape == shape
    assert torch.isfinite(image).all()


# ---------------------------------------------------------------- ties, bright air, inversion


def test_borders_vanish_in_every_contrast(head: LabelTable) -> None:
    for name in ("t1", "t2", "flair"):
        gone = set()
        for seed in range(150):
            means = by_tissue(head, sample(head, seed, **only(name, touching_tie_probability=0.3)))
            gone |= {
                pair for pair in TOUCHING if set(pair) <= set(means) and abs(means[pair[0]] - means[pair[1]]) < 0.005
            }
        assert {("gm", "csf"), ("dura", "bone_cortical"), ("csf", "bone_cortical"), ("muscle", "skin")} <= gone
    apart = [by_tissue(head, sample(head, seed, **only("t1"))) for seed in range(150)]
    assert min(abs(m["gm"] - m["csf"]) for m in apart) > 0.2


def test_touching_tissues_are_tissues_of_the_schemes() -> None:
    known = {label.tissue for name in ("head", "siam16", "brainweb") for label in load_scheme(name).labels}
    assert {tissue for pair in TOUCHING for tissue in pair} <= known
    assert len(set(TOUCHING)) == len(TOUCHING)
    assert all(first != "air" for first, _ in TOUCHING)  # air never takes the mean of a tissue


def test_inverted_contrast_exchanges_bright_and_dark_and_lights_the_air(head: LabelTable) -> None:
    for seed in range(10):
        before = by_tissue(head, sample(head, seed, **only("t1")))
        after = by_tissue(head, sample(head, seed, **only("t1", invert_probability=1.0)))
        assert sorted(before, key=lambda t: before[t]) == sorted(after, key=lambda t: -after[t])
        assert after["air"] > after["csf"] > after["gm"] > after["wm"]
        assert min(after.values()) == pytest.approx(min(before.values()))
    ct = only("ct", invert_probability=1.0)
    assert sample(head, 0, **ct).mean == sample(head, 0, **only("ct")).mean  # a CT is never inverted


def test_air_may_be_bright_but_not_around_a_stripped_brain(head: LabelTable) -> None:
    bright = {"random_weight": 1.0, "named_weights": {}, "bright_air_probability": 1.0}
    air = [sample(head, seed, **bright).mean[0] for seed in range(60)]
    assert np.mean(air) == pytest.approx(0.5, abs=0.12)
    assert all(sample(head, seed, True, **bright).mean[0] == 0 for seed in range(5))
    assert all(sample(head, seed, True, **bright, invert_probability=1.0).mean[0] == 0 for seed in range(5))
    assert max(sample(head, seed, random_weight=1.0, named_weights={}).mean[0] for seed in range(60)) <= 0.15


# ---------------------------------------------------------------- in a rendered image

EVERYTHING: dict[str, Any] = {
    **{"cluster_probability": 1.0, "octave_probability": 1.0, "touching_tie_probability": 0.2},
    **{"invert_probability": 0.5, "bright_air_probability": 0.5, "fat_suppression_probability": 0.5},
    **{"flow_probability": 0.5, "enhanced_probability": 0.5, "ct_other_window_probability": 0.3},
    **{"ct_streak_strength": (0.02, 0.1), "ct_table_probability": 1.0},
}


@pytest.mark.parametrize("kind", ["random", "physics", "hounsfield"])
def test_everything_at_once_renders_and_replays(kind: str, tiny_template: Template, device: torch.device) -> None:
    weights = {"random_weight": 0.0, "named_weights": {}, f"{kind}_weight": 1.0}
    record = {"voxel_size_mm": 2.0, "shape": (20, 26, 22), "subsamples": 4, "contrast": {**weights, **EVERYTHING}}
    generator = parse(GeneratorConfig, record, "test")
    plans = [sample_plan(generator, "tiny", tiny_template.table, 3, index) for index in range(6)]
    assert all(plan.contrast.name.startswith(kind) for plan in plans)
    images, labels = render([tiny_template] * 6, plans, device)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    again = [Plan.model_validate_json(plan.model_dump_json()) for plan in plans]
    assert torch.equal(render([tiny_template] * 6, again, device)[0], images)
    for b, plan in enumerate(plans):
        image, label = render([tiny_template], [plan], device)
        torch.testing.assert_close(image[0], images[b], rtol=1e-5, atol=1e-5)
        assert torch.equal(label[0], labels[b])


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"random_weight": 0, "named_weights": {}}, "give at least one contrast a weight"),
        ({"physics_weight": 1, "physics_sequences": {"flair": 0}}, "physics_sequences are all 0"),
        ({"physics_sequences": {"t7": 1}}, "physics_sequences.*t1_spin_echo"),
        ({"priors_weight": 1}, "synthseg priors estimate"),
        ({"max_clusters": 5}, "max_clusters"),
        ({"octave_spacing_mm": []}, "octave_spacing_mm"),
        ({"ct_streak_strength": (0.5, 0.1)}, "ct_streak_strength"),
    ],
)
def test_settings_that_cannot_work_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ContrastConfig, record, "r.yaml")


def test_scales_of_the_texture_may_come_in_any_order(head: LabelTable) -> None:
    down, up = (
        sample(head, 0, octave_probability=1.0, octave_spacing_mm=spacing).octaves for spacing in ((15.0, 5.0), (5, 15))
    )
    assert down is not None
    assert down == up


@pytest.mark.parametrize("name", ["t9", "random2", "physics"])
def test_names_without_a_contrast_are_refused_whatever_is_drawn(name: str, head: LabelTable) -> None:
    for weight in (0.0, 1e-9):
        with pytest.raises(ConfigError, match=rf"named_weights.*{name}.*random, t1"):
            sample(head, 0, named_weights={"t1": 1.0, name: weight})


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("kind", ["random", "t1", "physics", "hounsfield"])
def test_the_background_is_air_whatever_its_scheme_says(kind: str, strip: bool, head: LabelTable) -> None:
    soft = LabelTable("soft", (replace(head.labels[0], tissue="soft"), *head.labels[1:]))
    config = ContrastConfig().only(kind)
    for seed in range(5):
        plans = [
            sample_contrast(config, table, EXTENT, Draw(rng.generator(seed, 0, "contrast")), strip)
            for table in (head, soft)
        ]
        assert plans[0] == plans[1]


def test_one_contrast_alone_can_be_asked_for(head: LabelTable) -> None:
    full = ContrastConfig(random_weight=1, named_weights={"t1": 1}, physics_weight=1, hounsfield_weight=1)
    for name in ("random", "t1", "flair", "physics", "hounsfield"):
        alone = full.only(name)
        assert [kind for kind, weight in alone.weights().items() if weight > 0] == [name]
        plan = sample_contrast(alone, head, EXTENT, Draw(rng.generator(0, 0, "contrast")), False)
        assert plan.name.startswith(name)


def test_mild_settings_draw_flat_tissue_without_surprises() -> None:
    full = parse(
        ContrastConfig,
        {
            **{"cluster_probability": 1.0, "touching_tie_probability": 0.2, "invert_probability": 0.3},
            **{"bright_air_probability": 0.3, "ct_streak_strength": (0.05, 0.1), "ct_table_probability": 0.8},
        },
        "test",
    )
    mild = full.at_severity(0)
    assert mild.std == (0.0, 0.02)
    assert mild.ct_streak_strength == (0.0, 0.0)
    assert (mild.cluster_probability, mild.touching_tie_probability, mild.tie_probability) == (0, 0, 0)
    assert (mild.invert_probability, mild.bright_air_probability, mild.ct_table_probability) == (0, 0, 0)
    assert full.at_severity(1) == full


def test_named_contrasts_hold_what_their_mixtures_need() -> None:
    assert all({"fat", "muscle"} <= set(ranges) for ranges in named_contrasts().values())
    assert texture.REGIONS == 4


def test_a_plain_image_has_the_means_of_the_same_draw_and_nothing_else(head: LabelTable) -> None:
    for seed in range(4):
        usual, plain = sample(head, seed), sample(head, seed, plain_probability=1.0)
        assert usual.mean == plain.mean
        assert any(usual.std)
        assert any(usual.texture_std)
        assert not any(plain.std)
        assert not any(plain.texture_std)
    assert sample(head, 0, plain_probability=0.0) == sample(head, 0)
