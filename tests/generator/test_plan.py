"""Chance lives in the Plan: reproducible, one stream per stage, JSON-able; contrasts know every tissue."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from synthseg import rng
from synthseg.config import ContrastConfig, GeneratorConfig, parse
from synthseg.errors import ConfigError
from synthseg.generator.contrast import LOOK_ALIKES, named_contrasts, sample_contrast
from synthseg.generator.draw import Draw, Field3D
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable, load_scheme
from synthseg.templates import Template

SMALL: dict[str, Any] = {"voxel_size_mm": 2.5, "shape": (10, 13, 11)}


def config(**changes: Any) -> GeneratorConfig:
    return parse(GeneratorConfig, SMALL | changes, "test")


def test_plan_is_a_function_of_its_four_arguments(head: LabelTable) -> None:
    first = sample_plan(config(), "t", head, 3, 17)
    torch.manual_seed(99)
    np.random.seed(5)
    sample_plan(config(), "t", head, 3, 18)
    assert sample_plan(config(), "t", head, 3, 17) == first
    assert sample_plan(config(), "t", head, 4, 17) != first
    assert sample_plan(config(), "t", head, 3, 18).deform != first.deform


@pytest.mark.parametrize("index", range(6))
def test_json_renders_the_same_image(tiny_template: Template, index: int) -> None:
    plan = sample_plan(config(), "tiny", tiny_template.table, 8, index)
    again = Plan.model_validate(json.loads(json.dumps(json.loads(plan.model_dump_json()))))
    assert again == plan
    for a, b in zip(render([tiny_template], [plan]), render([tiny_template], [again]), strict=True):
        assert torch.equal(a, b)


def test_field_keeps_every_bit() -> None:
    values = torch.randn((2, 3, 4, 5), generator=torch.manual_seed(0))
    back = Field3D.model_validate_json(Field3D.of(values).model_dump_json())
    assert torch.equal(back.tensor(), values)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("deform", {"rotation_deg": 3.0, "svf_std_mm": 0.0, "flip_probability": 0.0}),
        ("contrast", {"random_weight": 0.0, "named_weights": {"t2": 1.0}, "texture_spacing_mm": (9.0, 9.0)}),
        ("artefacts", {"bias_std": (0.0, 0.0), "lowres_probability": 1.0, "gamma_std": 0.9, "crop_probability": 1.0}),
    ],
)
def test_a_stage_does_not_move_the_draws_of_another(section: str, changes: dict[str, Any], head: LabelTable) -> None:
    for index in range(8):
        before = sample_plan(config(), "t", head, 0, index)
        after = sample_plan(config(**{section: changes}), "t", head, 0, index)
        for name in ("deform", "contrast", "artefacts"):
            same = getattr(before, name) == getattr(after, name)
            assert same == (name != section), (index, name)


def test_every_stage_has_a_stream_of_its_own(head: LabelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    made = rng.generator

    def spy(*key: Any) -> torch.Generator:
        keys.append(key)
        return made(*key)

    monkeypatch.setattr(rng, "generator", spy)
    sample_plan(config(), "t", head, 3, 17)
    assert sorted(keys) == [
        (3, 17, stage) for stage in ("anatomy", "anomalies", "artefacts", "contrast", "deform", "strip")
    ]


def test_fields_of_view_of_any_shape_can_be_drawn(head: LabelTable) -> None:
    plan = sample_plan(config(shape=(1, 2, 300)), "t", head, 0, 0)
    assert plan.shape == (1, 2, 300)


# ---------------------------------------------------------------- contrast


@pytest.mark.parametrize("scheme", ["head", "siam16", "brainweb"])
@pytest.mark.parametrize("contrast", ["t1", "t2", "flair", "pd", "ct"])
def test_every_contrast_has_a_range_for_every_tissue(contrast: str, scheme: str) -> None:
    ranges = named_contrasts()[contrast]
    missing = {label.tissue for label in load_scheme(scheme).labels} - set(ranges)
    assert not missing, f"{contrast} says nothing about {sorted(missing)} of {scheme}"
    assert all(0 <= low <= high <= 1.5 for low, high in ranges.values())


def test_contrasts_have_the_known_order_of_tissues() -> None:
    middle = {name: {t: sum(r) / 2 for t, r in ranges.items()} for name, ranges in named_contrasts().items()}
    assert middle["t1"]["wm"] > middle["t1"]["gm"] > middle["t1"]["csf"]
    assert middle["t2"]["csf"] > middle["t2"]["gm"] > middle["t2"]["wm"]
    assert middle["flair"]["lesion"] > middle["flair"]["gm"] > middle["flair"]["wm"] > middle["flair"]["ventricle"]
    assert middle["pd"]["gm"] > middle["pd"]["wm"]
    # Hounsfield units in a window of -100 to 150: water 0, grey matter 30 to 45, white matter 20 to 35, bone above 150
    to_hu = {tissue: -100 + 250 * value for tissue, value in middle["ct"].items()}
    assert 0 < to_hu["csf"] < 20
    assert 20 < to_hu["wm"] < to_hu["gm"] < 45
    assert to_hu["fat"] < -50
    assert to_hu["bone_cortical"] >= 150


@pytest.mark.parametrize("name", ["t1", "t2", "flair", "pd", "ct"])
def test_drawn_means_lie_in_their_ranges(name: str, head: LabelTable) -> None:
    chosen = ContrastConfig(random_weight=0.0, named_weights={name: 1.0})
    for seed in range(20):
        plan = sample_contrast(chosen, head, (30.0, 40.0, 50.0), Draw(torch.Generator().manual_seed(seed)), False)
        assert plan.name == name
        assert all(plan.visible)
        for label, mean in zip(head.labels, plan.mean, strict=True):
            low, high = named_contrasts()[name][label.tissue]
            assert low <= mean <= high


def test_left_and_right_share_their_contrast(head: LabelTable) -> None:
    for seed in range(10):
        plan = sample_contrast(ContrastConfig(), head, (30.0,) * 3, Draw(torch.Generator().manual_seed(seed)), False)
        for index, label in enumerate(head.labels):
            if label.partner is not None:
                partner = head.index_of[label.partner]
                assert (plan.mean[index], plan.std[index]) == (plan.mean[partner], plan.std[partner])


def test_weights_decide_how_often_a_contrast_is_drawn(head: LabelTable) -> None:
    weights = ContrastConfig(random_weight=2.0, named_weights={"t1": 1.0, "ct": 1.0})
    names = Counter(
        sample_contrast(weights, head, (9.0,) * 3, Draw(torch.Generator().manual_seed(seed)), False).name
        for seed in range(400)
    )
    assert set(names) == {"random", "t1", "ct"}
    assert names["random"] / 400 == pytest.approx(0.5, abs=0.08)
    assert names["ct"] / 400 == pytest.approx(0.25, abs=0.07)


def test_unknown_contrast_names_the_known_ones(head: LabelTable) -> None:
    wrong = ContrastConfig(random_weight=0.0, named_weights={"t9": 1.0})
    with pytest.raises(ConfigError, match=r"t9.*random, t1, t2"):
        sample_contrast(wrong, head, (9.0,) * 3, Draw(torch.Generator()), False)


def test_look_alikes_are_tissues_of_the_schemes() -> None:
    tissues = {label.tissue for name in ("head", "siam16", "brainweb") for label in load_scheme(name).labels}
    assert set(LOOK_ALIKES) | set(LOOK_ALIKES.values()) <= tissues
    assert not set(LOOK_ALIKES) & set(LOOK_ALIKES.values())  # no chains: the order of ties cannot matter


def test_stripped_scans_show_the_brain(head: LabelTable) -> None:
    outside = {"Skin", "Bone-Cortical", "EyeBalls", "Dura", "Mucosa", "Other-Tissues"}
    brain = {"Left-Cerebral-Cortex", "Right-Thalamus", "Brain-Stem", "4th-Ventricle", "Left-Lesion"}
    csf = set()
    for seed in range(40):
        draw = Draw(torch.Generator().manual_seed(seed))
        plan = sample_contrast(ContrastConfig(), head, (9.0,) * 3, draw, True)
        visible = {label.name for label, shown in zip(head.labels, plan.visible, strict=True) if shown}
        assert brain <= visible
        assert not outside & visible
        assert plan.mean[0] == plan.std[0] == 0.0
        csf.add("CSF" in visible)
    assert csf == {True, False}
