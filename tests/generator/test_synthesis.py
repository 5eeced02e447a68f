"""Rendering: the identity, flips, partial volume, stripping and cropping on a head that is known voxel by voxel."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from synthseg.generator.artefacts import ArtefactPlan
from synthseg.generator.contrast import ContrastPlan, paint
from synthseg.generator.deform import DeformPlan
from synthseg.generator.draw import Field3D
from synthseg.generator.plan import Plan
from synthseg.generator.reading import Reading
from synthseg.generator.synthesis import render
from synthseg.labels import Label, LabelTable
from synthseg.templates import Template

FLAT = Field3D(shape=(1, 2, 2, 2), values=(0.0,) * 8)


def plain_plan(template: Template, voxel_size_mm: float, shape: tuple[int, int, int], **changes: Any) -> Plan:
    """No deformation, no artefacts; the mean of label index i is i."""
    n = len(template.table)
    sections: dict[str, dict[str, Any]] = {"deform": {}, "contrast": {}, "artefacts": {}, "": {}}
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        sections[section][name] = value
    deform = DeformPlan(
        matrix=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)), shift_mm=(0.0,) * 3, velocity_mm=None, flip=False
    )
    contrast = ContrastPlan(
        name="random",
        mean=tuple(float(i) for i in range(n)),
        std=(0.0,) * n,
        texture_std=(0.0,) * n,
        texture=FLAT,
        noise_seed=1,
        visible=(True,) * n,
    )
    artefacts = ArtefactPlan(
        log_bias=None,
        gamma=1.0,
        spacing_mm=(voxel_size_mm,) * 3,
        thickness_mm=(0.0,) * 3,
        noise_std=0.0,
        noise_seed=2,
        crop=((0.0, 1.0),) * 3,
    )
    plan = Plan(
        template=template.name,
        scheme=template.table.name,
        seed=0,
        index=0,
        voxel_size_mm=voxel_size_mm,
        shape=shape,
        subsamples=1,
        deform=deform.model_copy(update=sections["deform"]),
        contrast=contrast.model_copy(update=sections["contrast"]),
        artefacts=artefacts.model_copy(update=sections["artefacts"]),
    )
    return plan.model_copy(update=sections[""])


@pytest.fixture(scope="module")
def cubic(tiny_template: Template) -> Template:
    """The tiny head with isotropic voxels of 1.5 mm."""
    return Template("cubic", tiny_template.labels, tiny_template.table, (1.5,) * 3, tiny_template.center, {})


def test_identity_reproduces_the_label_map(cubic: Template) -> None:
    shape = tuple(cubic.labels.shape)
    for subsamples in (1, 8):
        image, labels = render([cubic], [plain_plan(cubic, 1.5, shape, subsamples=subsamples)])  # type: ignore[arg-type]
        assert torch.equal(labels[0], cubic.labels)
        # at its own voxel size no voxel is mixed: one intensity per label, in the order of the means
        values = {int(i): image[0, 0][cubic.labels == i] for i in cubic.labels.unique()}
        assert all(float(v.max() - v.min()) == 0 for v in values.values())
        middle = [float(values[i][0]) for i in sorted(values)]
        assert middle == sorted(middle)
        assert middle[0] == 0.0


def test_anisotropic_template_is_read_at_the_right_places(tiny_template: Template) -> None:
    shape, voxel, shift = (31, 28, 47), 1.0, (0.13, 0.21, 0.34)  # shifted so that no voxel lies between two
    _, labels = render([tiny_template], [plain_plan(tiny_template, voxel, shape, deform__shift_mm=shift)])
    nearest = []
    for n, mm, s, c in zip(shape, shift, tiny_template.spacing_mm, tiny_template.center, strict=True):
        nearest.append(np.rint(((np.arange(n) - (n - 1) / 2) * voxel + mm) / s + c).astype(int) + 2)
    expected = np.pad(tiny_template.labels, 2)[np.ix_(*nearest)]
    np.testing.assert_array_equal(labels[0], expected)


def test_flip_swaps_sides_and_keeps_left_on_the_left(tiny_template: Template) -> None:
    table, shape = tiny_template.table, (32, 28, 47)
    _, straight = render([tiny_template], [plain_plan(tiny_template, 1.0, shape)])
    image, flipped = render([tiny_template], [plain_plan(tiny_template, 1.0, shape, deform__flip=True)])
    for name in ("Cerebral-White-Matter", "Thalamus", "Lateral-Ventricle", "Cerebral-Cortex"):
        index = {side: table.names.index(f"{side}-{name}") for side in ("Left", "Right")}
        for side, other in (("Left", "Right"), ("Right", "Left")):
            here = ndimage.center_of_mass(flipped[0].numpy() == index[side])
            there = ndimage.center_of_mass(straight[0].numpy() == index[other])
            assert here == pytest.approx((31 - there[0], there[1], there[2]), abs=0.6)
            assert (here[0] < 15.5) == (side == "Left")  # RAS+: left is where x is small
    # the vein has no partner: it moves to the other side under its own name
    vein = table.names.index("Vein")
    x = ndimage.center_of_mass(straight[0].numpy() == vein)[0]
    assert x > 18
    assert ndimage.center_of_mass(flipped[0].numpy() == vein)[0] == pytest.approx(31 - x, abs=0.6)
    # the image follows its labels
    for label in flipped.unique():
        inside = image[0, 0][flipped[0] == label]
        assert float(inside.max() - inside.min()) < 1e-6


# ---------------------------------------------------------------- partial volume


@pytest.fixture(scope="module")
def half_space() -> Template:
    """Label 1 from the middle of the first axis on; voxels of 1 mm."""
    table = LabelTable("halves", (Label(0, "Background", tissue="air"), Label(1, "Half", tissue="gm")))
    labels = torch.zeros((12, 10, 11), dtype=torch.uint8)
    labels[6:] = 1
    return Template("halves", labels, table, (1.0, 1.0, 1.0), (5.5, 4.5, 5.0), {})


def painted(template: Template, plan: Plan) -> torch.Tensor:
    """What render paints, before intensities are normalised."""
    from unittest import mock

    kept: list[torch.Tensor] = []

    def spy(reading: Reading, contrast: ContrastPlan) -> torch.Tensor:
        kept.append(paint(reading, contrast))
        return kept[-1]

    with mock.patch("synthseg.generator.contrast.paint", spy):
        render([template], [plan])
    return kept[0]


@pytest.mark.parametrize("subsamples", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_edge_halfway_through_a_voxel_gives_the_mean(half_space: Template, subsamples: int, axis: int) -> None:
    order = [axis, *(a for a in range(3) if a != axis)]
    back = [order.index(a) for a in range(3)]
    turned = Template(
        "turned",
        half_space.labels.permute(*back).contiguous(),
        half_space.table,
        (1.0,) * 3,
        tuple(half_space.center[i] for i in back),  # type: ignore[arg-type]
        {},
    )
    plan = plain_plan(turned, 2.0, (3, 3, 3), subsamples=subsamples, contrast__mean=(10.0, 20.0))
    line = painted(turned, plan).movedim(axis, 0)[:, 1, 1]  # voxels of 2 mm at -2, 0, 2 mm; the edge is at 0
    np.testing.assert_allclose(line, [10, 15, 20])


def test_partial_volume_follows_rotation_and_scale(half_space: Template) -> None:
    # A quarter turn about z: the first axis of the template lies along the second of the image, twice as dense.
    plan = plain_plan(
        half_space,
        1.0,
        (3, 3, 3),
        subsamples=8,
        contrast__mean=(10.0, 20.0),
        deform__matrix=((0.0, 2.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
    )
    np.testing.assert_allclose(painted(half_space, plan)[1, :, 1], [10, 15, 20])
    np.testing.assert_allclose(painted(half_space, plan)[:, 1, 1], [15, 15, 15])


@pytest.mark.parametrize("flip", [False, True])
def test_partial_volume_is_the_mean_of_eight_points(tiny_template: Template, flip: bool) -> None:
    table, ids = tiny_template.table, np.pad(tiny_template.labels, 40)
    shape, voxel, shift = (9, 12, 11), 3.1416, np.array([0.7071, -1.3279, 2.1113])
    matrix = np.array([[0.9, -0.5, 0.2], [0.4, 1.1, -0.3], [0.1, 0.6, 0.8]])
    expected = np.zeros(shape)
    for offset in np.ndindex(2, 2, 2):
        inside = (np.array(offset) - 0.5) / 2  # a quarter voxel to each side
        at = (np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2 + inside) * voxel
        read = at @ matrix.T + shift
        read = read * (-1, 1, 1) if flip else read
        index = np.rint(read / tiny_template.spacing_mm + tiny_template.center).astype(int) + 40
        labels = ids[tuple(np.moveaxis(index, -1, 0))]
        expected += (table.flip[labels] if flip else labels) / 8
    plan = plain_plan(
        tiny_template,
        voxel,
        shape,
        subsamples=8,
        deform__matrix=tuple(map(tuple, matrix.tolist())),
        deform__shift_mm=tuple(shift.tolist()),
        deform__flip=flip,
    )
    off = np.abs(painted(tiny_template, plan).numpy() - expected) > 1e-3
    assert off.mean() < 0.002  # a point may lie on the border of two voxels


def test_target_is_the_label_at_the_centre(half_space: Template) -> None:
    plan = plain_plan(half_space, 2.0, (3, 3, 3), subsamples=8, deform__shift_mm=(0.4, 0.0, 0.0))
    _, labels = render([half_space], [plan])
    assert labels[0, :, 1, 1].tolist() == [0, 1, 1]
    plan = plain_plan(half_space, 2.0, (3, 3, 3), subsamples=8, deform__shift_mm=(-0.4, 0.0, 0.0))
    assert render([half_space], [plan])[1][0, :, 1, 1].tolist() == [0, 0, 1]


# ---------------------------------------------------------------- intensities


def test_noise_and_texture_inside_a_label_have_their_spread() -> None:
    labels = torch.zeros((30, 31, 32), dtype=torch.uint8)
    labels[15:] = 1
    smooth = Field3D.of(torch.randn((1, 6, 7, 5), generator=torch.manual_seed(0)))
    plan = ContrastPlan(
        name="random",
        mean=(0.2, 0.7),
        std=(0.01, 0.05),
        texture_std=(0.0, 0.0),
        texture=smooth,
        noise_seed=3,
        visible=(True, True),
    )
    image = paint(Reading.of([labels]), plan).double().numpy()
    for part, mean, std in ((image[:15], 0.2, 0.01), (image[15:], 0.7, 0.05)):
        assert part.mean() == pytest.approx(mean, abs=0.002)
        assert part.std() == pytest.approx(std, rel=0.03)
        assert abs(np.corrcoef(part[:, :, 1:].ravel(), part[:, :, :-1].ravel())[0, 1]) < 0.05
    textured = plan.model_copy(update={"std": (0.0, 0.0), "texture_std": (0.0, 0.1)})
    rough = paint(Reading.of([labels]), textured).double().numpy()
    assert (rough[:15] == np.float32(0.2)).all()
    assert np.corrcoef(rough[15:, :, 1:].ravel(), rough[15:, :, :-1].ravel())[0, 1] > 0.9
    assert rough[15, 0, 0] != rough[-1, -1, -1]
    corner = float(smooth.tensor()[0, -1, -1, -1])  # corner points are kept in place
    assert rough[-1, -1, -1] == pytest.approx(0.7 + 0.1 * corner, abs=1e-5)


# ---------------------------------------------------------------- what a scan does not show


def test_stripped_tissue_is_air_and_background(cubic: Template) -> None:
    shape = tuple(cubic.labels.shape)
    hidden = {"Skin", "Bone-Cortical", "Other-Tissues", "CSF"}
    visible = tuple(name not in hidden for name in cubic.table.names)
    plan = plain_plan(cubic, 1.5, shape, contrast__visible=visible)  # type: ignore[arg-type]
    image, labels = render([cubic], [plan])
    gone = torch.tensor([name in hidden for name in cubic.table.names])[cubic.labels.int()]
    assert gone.any()
    assert (labels[0][gone] == 0).all()
    assert torch.equal(labels[0][~gone], cubic.labels[~gone])
    assert (image[0, 0][gone] == 0).all()
    assert (image[0, 0][~gone & (cubic.labels > 0)] > 0).all()


def test_hidden_labels_have_no_noise_or_texture() -> None:
    labels = torch.ones((4, 5, 6), dtype=torch.uint8)
    texture = Field3D.of(torch.ones((1, 2, 2, 2)))
    plan = ContrastPlan(
        name="random",
        mean=(0.1, 0.9),
        std=(0.0, 0.3),
        texture_std=(0.0, 0.3),
        texture=texture,
        noise_seed=3,
        visible=(True, False),
    )
    np.testing.assert_allclose(paint(Reading.of([labels]), plan), 0.1, atol=1e-7)


def test_crop_is_zero_in_image_and_target(cubic: Template) -> None:
    shape = tuple(cubic.labels.shape)
    crop = ((0.0, 1.0), (0.5, 1.0), (0.0, 1.0))
    image, labels = render([cubic], [plain_plan(cubic, 1.5, shape, artefacts__crop=crop)])  # type: ignore[arg-type]
    assert not image[0, 0, :, :13].any()
    assert not labels[0, :, :13].any()
    assert torch.equal(labels[0, :, 13:], cubic.labels[:, 13:])
    assert image[0, 0, :, 13:].any()


def test_a_patch_beside_the_head_is_empty(cubic: Template) -> None:
    plan = plain_plan(cubic, 1.5, (5, 6, 7), deform__shift_mm=(500.0, 0.0, 0.0))
    image, labels = render([cubic], [plan])
    assert not labels.any()
    assert not image.any()


def test_images_of_one_batch_may_come_from_different_schemes(cubic: Template, half_space: Template) -> None:
    plans = [plain_plan(cubic, 1.5, (6, 7, 8)), plain_plan(half_space, 1.5, (6, 7, 8))]
    _, labels = render([cubic, half_space], plans)
    assert labels[0].max() > 1
    assert set(labels[1].unique().tolist()) == {0, 1}
