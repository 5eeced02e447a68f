"""The four tasks: what a pair is made of, how wrong a result is, and what is done without a network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthseg.config import FinetuneConfig, parse
from synthseg.config.finetuning import TASKS as NAMES
from synthseg.errors import ConfigError
from synthseg.generator.artefacts.storage import along, slice_matrices
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import load_scheme
from synthseg.templates import Template, load_template
from synthseg.training.canonical import canonical_image
from synthseg.training.losses import gradient_l1, l1
from synthseg.training.scenes import painted, scan
from synthseg.training.tasks import (
    TASKS,
    Pair,
    Task,
    intensity_map,
    make_task,
    without_artefacts,
)

SIAM = load_scheme("siam16")


def make(task: str, **artefacts: Any) -> Task:
    record = {
        "task": task,
        "generator": {"shape": [16, 26, 22], "voxel_size_mm": 2.0, "subsamples": 2, "artefacts": artefacts},
    }
    return make_task(parse(FinetuneConfig, record, "test"), SIAM)


def plan_for(task: Task, template: Template, index: int = 0) -> Plan:
    generator = task.settings(task.config.generator)
    return sample_plan(generator, template.name, template.table, 5, index)


CLEAN = {
    "gamma_std": 0.0,
    "noise_probability": 0.0,
    "crop_probability": 0.0,
    "strip_probability": 0.0,
    "lowres_probability": 0.0,
}


def test_names_agree() -> None:
    assert tuple(TASKS) == NAMES


@pytest.mark.parametrize("index", range(4))
def test_a_scanned_scene_is_the_rendered_image(index: int, tiny_template: Template) -> None:
    """Cropped, stripped and noisy ones among them."""
    task = make("segmentation", strip_probability=0.5, crop_probability=0.6)
    plan = plan_for(task, tiny_template, index)
    images, labels = render([tiny_template], [plan])
    seen = scan(painted(tiny_template, plan))
    assert torch.equal(seen.image, images[0])
    assert torch.equal(seen.labels, labels[0])


def test_a_pair_is_a_pure_function_of_its_plan(tiny_template: Template) -> None:
    for name in NAMES:
        task = make(name)
        plan = Plan.model_validate_json(plan_for(task, tiny_template, 2).model_dump_json())
        first, second = (task.pair(painted(tiny_template, plan)) for _ in range(2))
        assert torch.equal(first.image, second.image), name
        assert torch.equal(first.target, second.target), name
        assert first.target.isfinite().all(), name


def test_segmentation_targets_and_baseline(tiny_template: Template, template_folders: dict[str, Path]) -> None:
    task = make("segmentation", **CLEAN)
    pair = task.pair(painted(tiny_template, plan_for(task, tiny_template)))
    assert pair.groups is not None
    perfect = 20 * torch.nn.functional.one_hot(pair.target.long(), len(SIAM)).movedim(-1, 0).float()
    assert task.figures(perfect, pair) == {"dice": 1.0}
    assert task.figures(task.baseline(pair), pair) == {"dice": 0.0}
    assert float(task.loss(perfect, pair)) < 0.05 < float(task.loss(task.baseline(pair), pair))
    coarse = load_template(template_folders["coarse"])
    vague = task.pair(painted(coarse, plan_for(task, coarse)))
    assert vague.groups is not None
    assert vague.groups.sum(1).max() > 1
    one_of_each = 20 * vague.groups.float()[vague.target.long()].movedim(-1, 0)
    assert task.figures(one_of_each, vague)["dice"] > 0.99  # any class of a group is right


def test_reconstruction_is_the_canonical_image(tiny_template: Template) -> None:
    task = make("reconstruction", **CLEAN)
    plan = plan_for(task, tiny_template)
    pair = task.pair(painted(tiny_template, plan))
    assert torch.equal(pair.target, canonical_image(tiny_template, plan))
    assert bool(pair.scored.all())
    assert float(task.loss(pair.target, pair)) == 0


def test_what_was_cut_away_is_not_asked_for(tiny_template: Template) -> None:
    task = make("reconstruction", strip_probability=1.0, crop_probability=0.0)
    scene = painted(tiny_template, plan_for(task, tiny_template))
    pair = task.pair(scene)
    lost = scene.head & ~pair.head
    assert float(pair.target[0][lost].mean()) > 0.05
    assert bool(lost.any())
    assert not bool((pair.scored & lost).any())
    task = make("reconstruction", crop_probability=1.0, crop_fraction=0.5, strip_probability=0.0)
    plan = plan_for(task, tiny_template)
    pair = task.pair(painted(tiny_template, plan))
    box = scan(painted(tiny_template, plan)).box
    outside = torch.ones_like(pair.scored)
    outside[box] = False
    assert bool(outside.any())
    assert not bool((pair.scored & outside).any())


def test_the_baseline_of_reconstruction_is_the_best_line(tiny_template: Template) -> None:
    task = make("reconstruction", **CLEAN)
    pair = task.pair(painted(tiny_template, plan_for(task, tiny_template)))
    x, y = pair.image[0][pair.head].double().numpy(), pair.target[0][pair.head].double().numpy()
    slope, offset = np.polyfit(x, y, 1)
    expected = slope * pair.image + offset
    torch.testing.assert_close(task.baseline(pair), expected, rtol=1e-3, atol=1e-4)


def test_thick_slices_come_from_the_target(tiny_template: Template) -> None:
    """Slices cut from the target and read linearly are the image: both have the intensities of one scan."""
    task = make("super-resolution", **{**CLEAN, "bias_std": [0.0, 0.0], "lowres_isotropic_probability": 0.0})
    plan = plan_for(task, tiny_template)
    pair = task.pair(painted(tiny_template, plan))
    artefacts = plan.artefacts
    axis = int(np.argmax(artefacts.spacing_mm))
    assert artefacts.spacing_mm[axis] > 2.0
    down, up = slice_matrices(pair.image.shape[axis + 1], 2.0, artefacts.spacing_mm[axis], artefacts.thickness_mm[axis])
    again = along(along(pair.target, down, axis + 1), up, axis + 1)
    seen = scan(painted(tiny_template, plan))
    gain, offset = intensity_map(seen.raw, seen.image)
    before = scan(painted(tiny_template, plan), artefacts.model_copy(update={"spacing_mm": (2.0,) * 3}))
    unclipped = ((gain * before.raw + offset) == pair.target) | (
        (gain * before.raw + offset - pair.target).abs() < 1e-6
    )
    reach = along(along((~unclipped).float(), down, axis + 1), up, axis + 1) == 0
    inside = reach & (pair.image > 0) & (pair.image < 1)
    assert int(inside.sum()) > 500
    torch.testing.assert_close(again[inside], pair.image[inside], rtol=1e-4, atol=1e-4)
    assert task.baseline(pair) is pair.image
    assert task.figures(pair.target, pair)["l1"] == 0 < task.figures(pair.image, pair)["l1"]


def test_at_full_resolution_there_is_nothing_to_gain(tiny_template: Template) -> None:
    task = make("super-resolution", **CLEAN)
    plan = sample_plan(task.config.generator, tiny_template.name, tiny_template.table, 5, 0)
    pair = task.pair(painted(tiny_template, plan))
    torch.testing.assert_close(pair.target, pair.image, rtol=1e-5, atol=1e-5)


def test_the_bias_target_is_what_the_image_was_multiplied_with(tiny_template: Template) -> None:
    task = make("bias-field", **{**CLEAN, "bias_std": [0.3, 0.5], "bias_spacing_mm": [20.0, 30.0]})
    plan = plan_for(task, tiny_template)
    scene = painted(tiny_template, plan)
    pair = task.pair(scene)
    with_field = scan(scene).raw
    without = scan(scene, plan.artefacts.model_copy(update={"log_bias": None})).raw
    ratio = (with_field / without.clamp_min(1e-6)).clamp_min(1e-6).log()
    bright = pair.head[None] & (without > 0.05)
    difference = (ratio - pair.target)[bright]
    assert float(difference.std()) < 1e-3  # the same but for a constant, which is not asked for
    assert abs(float(pair.target[0][pair.head].mean())) < 1e-5
    assert float(task.loss(pair.target + 7.0, pair)) == pytest.approx(0, abs=1e-5)
    spread = float(pair.target[0][pair.head].abs().mean())
    assert task.figures(task.baseline(pair), pair)["log_l1"] == pytest.approx(spread, rel=1e-4)


def test_what_a_task_cannot_do_without() -> None:
    task = make("bias-field", bias_std=[0.0, 0.0])
    with pytest.raises(ConfigError, match="bias_std is 0"):
        task.settings(task.config.generator)
    task = make("super-resolution", lowres_spacing_mm=2.0, lowres_isotropic_mm=1.0)
    with pytest.raises(ConfigError, match="not above the voxel size"):
        task.settings(task.config.generator)


def test_errors_by_hand() -> None:
    """Two by one by two voxels of which one does not count."""
    result = torch.tensor([[[[1.0, 2.0]], [[4.0, 0.0]]]])
    target = torch.tensor([[[[1.0, 0.0]], [[1.0, 9.0]]]])
    where = torch.tensor([[[True, True]], [[True, False]]])
    assert float(l1(result, target, where)) == pytest.approx((0 + 2 + 3) / 3)
    # errors 0, 2 / 3, x: along the first axis one pair (0, 3), along the second none, along the third (0, 2)
    assert float(gradient_l1(result, target, where)) == pytest.approx(3 + 0 + 2)
    assert float(l1(result, target, torch.zeros_like(where))) == 0


def test_scores() -> None:
    assert make("segmentation").score(0.7, 0.1) == 0.7
    assert make("reconstruction").score(0.05, 0.2) == pytest.approx(0.75)
    assert make("bias-field").score(0.2, 0.1) == pytest.approx(-1.0)


def test_the_intensity_map_is_that_of_the_normalisation() -> None:
    raw = torch.linspace(-3, 9, 50)
    gain, offset = intensity_map(raw, ((raw - 1) / 5).clamp(0, 1))
    assert (gain, offset) == pytest.approx((0.2, -0.2))


def test_without_artefacts_keeps_what_the_task_is_about(tiny_template: Template) -> None:
    for name in NAMES:
        task = make(name)
        bare = without_artefacts(task.config.generator.artefacts, name)
        settings = task.settings(task.config.generator.model_copy(update={"artefacts": bare}))
        plans = [sample_plan(settings, "tiny", tiny_template.table, 0, i).artefacts for i in range(6)]
        assert any(max(plan.spacing_mm) > 2.0 for plan in plans) == (name == "super-resolution")
        assert any(plan.log_bias is not None for plan in plans) == (name == "bias-field")
        assert all(plan.noise_std == 0 and plan.gamma == 1 and plan.crop == ((0.0, 1.0),) * 3 for plan in plans)


def test_a_pair_moves_as_a_whole() -> None:
    pair = Pair(
        *(torch.zeros(1, 2, 2, 2) for _ in range(2)), *(torch.ones(2, 2, 2, dtype=torch.bool) for _ in range(2))
    )
    moved = pair.to("meta")
    assert {moved.image.device.type, moved.target.device.type, moved.scored.device.type} == {"meta"}
