"""Reading and painting slab by slab give, to the bit, what every point of every voxel gives when read one by one."""

import itertools
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from synthseg.config import GeneratorConfig, parse
from synthseg.generator import anatomy, anomalies, artefacts, deform, hounsfield, reading, texture
from synthseg.generator.contrast import ContrastPlan
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.reading import Reading, read_labels, read_points, rename, subsample_offsets
from synthseg.generator.synthesis import read_anatomy, render
from synthseg.templates import Template

SHAPE = (13, 11, 17)
TURNED = torch.tensor([[0.9, -0.5, 0.2], [0.4, 1.1, -0.3], [0.1, 0.6, 0.8]])


def plain_read(labels: torch.Tensor, coords: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """One point of every voxel, by the indices of its three axes."""
    index = []
    for axis, n in enumerate(labels.shape):
        nearest = torch.floor(coords[axis] + float(offset[axis] + 0.5))
        index.append(nearest.clamp(0, n - 1).long())
    return labels[tuple(index)]


def everywhere(found: Reading) -> torch.Tensor:
    """(P, D, H, W)."""
    return found.at(torch.arange(found.middle.numel())).view(-1, *found.middle.shape)


def test_nothing_is_read_at_no_points(tiny_template: Template) -> None:
    for count in (2, 4, 8):
        found = read_points(tiny_template.labels, torch.zeros(3, 0), subsample_offsets(count))
        assert (found.middle.shape, found.mixed.shape, found.points.shape) == ((0,), (0,), (count, 0))


# ---------------------------------------------------------------- one label


def test_labels_outside_the_template_are_background() -> None:
    labels = torch.from_numpy(np.pad(np.full((3, 4, 5), 7, np.uint8), 1))
    grid = torch.from_numpy(np.indices((5, 6, 7))).float()
    offsets = subsample_offsets(8)
    for axis, shift in itertools.product(range(3), (-100.0, 100.0)):
        moved = grid.clone()
        moved[axis] += shift
        assert not read_labels(labels, moved).any()
        assert not everywhere(read_points(labels, moved, offsets)).any()
        moved = grid.clone()
        moved += shift
        assert not read_labels(labels, moved).any()
        assert not everywhere(read_points(labels, moved, offsets)).any()


def test_nearest_label_is_read(tiny_template: Template) -> None:
    ids = tiny_template.labels
    rng = np.random.default_rng(0)
    coords = rng.uniform(-3, 30, (3, 6, 7, 8)).astype(np.float32)
    offset = np.array([0.3, -0.2, 0.1], np.float32)
    index = np.floor(coords + offset.reshape(3, 1, 1, 1) + 0.5).astype(int)
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, ids.shape, strict=True)], axis=0)
    clipped = tuple(np.clip(i, 0, n - 1) for i, n in zip(index, ids.shape, strict=True))
    expected = np.where(inside, ids.numpy()[clipped], 0)
    got = read_labels(ids, torch.from_numpy(coords), offset.tolist())
    np.testing.assert_array_equal(got.numpy(), expected)
    assert expected.any()


def test_names_are_looked_up(device: torch.device) -> None:
    labels = torch.randint(0, 6, SHAPE, generator=torch.manual_seed(0), dtype=torch.uint8).to(device)
    names = torch.tensor([0, 2, 1, 5, 255, 3], dtype=torch.uint8, device=device)
    out = rename(labels.transpose(0, 2), names)
    assert torch.equal(out, names[labels.transpose(0, 2).int()])
    assert out.dtype == torch.uint8


# ---------------------------------------------------------------- the points of a voxel


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_subsamples_are_balanced_inside_the_voxel(count: int) -> None:
    points = subsample_offsets(count).numpy()
    assert points.shape == (count, 3)
    assert len(np.unique(points, axis=0)) == count
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-7)
    if count > 1:  # half of the points on each side of the voxel's middle, a quarter voxel away, along every axis
        np.testing.assert_allclose(np.abs(points), 0.25)


@pytest.mark.parametrize("slab", [100, 2**17])
@pytest.mark.parametrize("voxel_mm", [0.3, 1.0, 2.9, 12.0])  # points a fraction of a template voxel apart, or several
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_point_reads_its_own_label(
    tiny_template: Template,
    count: int,
    voxel_mm: float,
    slab: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "SLAB", slab)
    labels = tiny_template.labels.clone()
    labels[labels == labels.max()] = reading.NEAR_BORDER  # no index is out of bounds
    step = TURNED * voxel_mm / torch.tensor(tiny_template.spacing_mm)[:, None]
    grid = torch.from_numpy(np.indices(SHAPE)).float() - torch.tensor(SHAPE).view(3, 1, 1, 1) / 2
    coords = torch.einsum("ij,jdhw->idhw", step, grid) + torch.tensor(tiny_template.center).view(3, 1, 1, 1)
    coords += 0.01 * torch.randn(coords.shape, generator=torch.manual_seed(0))
    offsets = subsample_offsets(count) @ step.T
    expected = torch.stack([plain_read(labels, coords, offset) for offset in offsets])
    middle = plain_read(labels, coords, torch.zeros(3))

    found = read_points(labels.to(device), coords.to(device), offsets)
    found = Reading(found.middle.cpu(), found.mixed.cpu(), found.points.cpu())
    assert torch.equal(everywhere(found), expected)
    assert torch.equal(found.middle, middle)
    differ = (expected != middle).any(0)
    assert torch.equal(found.mixed, differ.flatten().nonzero()[:, 0])
    assert differ.any() == (count > 1)
    again = Reading.of(list(expected), middle)
    assert all(torch.equal(getattr(again, name), getattr(found, name)) for name in ("middle", "mixed", "points"))


def test_two_readings_are_merged_point_by_point() -> None:
    def points(seed: int) -> list[torch.Tensor]:
        coarse = torch.rand((3, 4, 5), generator=torch.manual_seed(seed))
        smooth = deform.resize(coarse[None, None], SHAPE)[0, 0]
        return [(4 * smooth + shift).clamp(0, 5).to(torch.uint8) for shift in (0.0, 0.3, 0.6)]

    def rule(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # changes nothing but 2 and 3
        return torch.where((b > 2) & ((a == 2) | (a == 3)), b, a)

    a, b = points(0), points(1)
    reading = Reading.of(a, a[1])
    chosen = torch.zeros(256, dtype=torch.bool)
    chosen[2:4] = True
    positions = reading.holding(chosen)
    expected = torch.stack([(sample == 2) | (sample == 3) for sample in [a[1], *a]]).any(0)
    assert torch.equal(positions, expected.flatten().nonzero()[:, 0])
    assert 0 < len(positions) < reading.middle.numel()
    part = [sample.flatten()[positions] for sample in b]
    merged = reading.over(Reading.of(part, part[1]), positions, rule)
    assert torch.equal(everywhere(merged), torch.stack([rule(x, y) for x, y in zip(a, b, strict=True)]))
    assert torch.equal(merged.middle, rule(a[1], b[1]))
    assert torch.equal(everywhere(reading), torch.stack(a))  # the input is left as it was


# ---------------------------------------------------------------- whole images


def plain_anatomy(template: Template, plan: Plan) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every point of every voxel in turn; left and right change places after reading."""
    truth, displacements = template.labels, [None]
    if plan.anatomy is not None:
        truth = anatomy.change_labels(template, plan.anatomy)
        assert anatomy.moves_brain(plan.anatomy)
        displacements = [
            partial(anatomy.displacement, template, plan.anatomy, brain=brain)  # type: ignore[misc]
            for brain in (False, True)
        ]
    painted = truth
    if plan.anomalies is not None:
        painted = anomalies.paint_anomalies(template, truth, plan.anomalies)
        assert plan.anomalies.label is None
        assert not torch.equal(painted, truth)
    step = torch.tensor(plan.deform.matrix) * plan.voxel_size_mm / torch.tensor(template.spacing_mm)[:, None]
    if plan.deform.flip:
        step[0] = -step[0]
    layers = []
    for displacement in displacements:
        coords = deform.coordinates(
            plan.deform,
            plan.shape,
            plan.voxel_size_mm,
            template.center,
            template.spacing_mm,
            displacement=displacement,
        )
        points = [plain_read(painted, coords, offset) for offset in subsample_offsets(plan.subsamples) @ step.T]
        layers.append([*points, plain_read(truth, coords, torch.zeros(3))])
    found = layers[0]
    if len(layers) == 2:
        found = [anatomy.MovedBrain(template.table).over(a, b) for a, b in zip(*layers, strict=True)]
    if plan.deform.flip:
        swap = torch.from_numpy(template.table.flip).to(torch.uint8)
        found = [swap[labels.int()] for labels in found]
    return found[:-1], found[-1]


def plain_paint(samples: list[torch.Tensor], plan: ContrastPlan) -> torch.Tensor:
    """Sums over the points, each with the tables of ``plan``."""
    shape, visible = samples[0].shape, torch.tensor(plan.visible).float()
    region = torch.zeros(shape, dtype=torch.long)
    mean = torch.tensor(plan.mean) * visible + plan.mean[0] * (1 - visible)
    tables = [mean[None], (torch.tensor(plan.std) * visible)[None], (torch.tensor(plan.texture_std) * visible)[None]]
    if plan.clusters is not None:
        region = texture.regions(plan.clusters, shape).long()
        tables = [table.repeat(texture.REGIONS, 1) for table in tables]
        tables[0] = mean + torch.tensor(plan.clusters.offset) * visible
    total = torch.zeros((3, *shape))
    for sample in samples:
        for channel, table in enumerate(tables):
            total[channel].add_(table[region, sample.long()], alpha=1 / len(samples))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(plan.noise_seed))
    rise = deform.resize(plan.texture.tensor()[None], shape)[0, 0]
    if plan.octaves is not None:
        rise = texture.octaves(plan.octaves, shape)
    image = total[0].addcmul(total[1], noise).addcmul(total[2], rise)
    return image if plan.ct is None else hounsfield.finish(image, plan.ct)


def plain_normalise(values: torch.Tensor) -> torch.Tensor:
    """Of fewer voxels than are sampled."""
    assert values.numel() < 200_000
    floor = torch.quantile(values, 0.01)
    inside = values[values > floor + 0.1 * (values.mean() - floor)]
    if inside.numel() < 2:
        low, high = values.min(), values.max()
        return torch.zeros_like(values) if high <= low else (values - low) / (high - low)
    ceiling = torch.quantile(inside, 0.99)
    return torch.zeros_like(values) if ceiling <= floor else ((values - floor) / (ceiling - floor)).clamp(0, 1)


def plain_render(template: Template, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    samples, middle = plain_anatomy(template, plan)
    hidden = ~torch.tensor(plan.contrast.visible)
    target = middle.masked_fill(hidden[middle.int()], 0)
    image = plain_paint(samples, plan.contrast).clamp_min(0)[None, None]
    image, _, _ = artefacts.corrupt(image, target[None], [template.table], [plan.artefacts], plan.voxel_size_mm)
    seen = artefacts.field_of_view(image, [plan.artefacts])
    target = target.masked_fill(~seen[0, 0], 0)
    if hidden.any():
        image = image.masked_fill(target == 0, 0)
    out = torch.zeros_like(image)
    out[seen] = plain_normalise(image[seen])
    return out, target[None]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stripped and cropped": {"artefacts": {"strip_probability": 1.0, "crop_probability": 1.0, "crop_fraction": 0.4}},
    "patches and octaves": {"contrast": {"cluster_probability": 1.0, "octave_probability": 1.0}},
    "ct": {"contrast": {"random_weight": 0, "named_weights": {}, "hounsfield_weight": 1, "cluster_probability": 1.0}},
    "brain moves": {"anatomy": {"probability": 1.0, "skull_probability": 1.0}},
    "anomalies": {"anomalies": {"probability": 1.0, "lesion_probability": 1.0, "tumour_probability": 1.0}},
}
KINDS["everything"] = {section: value for kind in KINDS.values() for section, value in kind.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [1, 2, 4, 8])
def test_images_are_those_of_every_point_read_and_summed(tiny_template: Template, kind: str, points: int) -> None:
    record = {"voxel_size_mm": 1.5, "shape": (26, 22, 30), "subsamples": points, **KINDS[kind]}
    config = parse(GeneratorConfig, record, "test")
    template = anomalies.with_anomalies(tiny_template, config.anomalies)
    flips, hidden, other = set(), False, False
    with mock.patch.object(reading, "SLAB", 5000):
        for index in range(5):
            plan = sample_plan(config, template.name, template.table, 4, index)
            image, target = render([template], [plan])
            expected, labels = plain_render(template, plan)
            assert torch.equal(image, expected)
            assert torch.equal(target, labels)
            flips.add(plan.deform.flip)
            hidden = hidden or not all(plan.contrast.visible)
            found, middle = read_anatomy(template, plan)
            other = other or not torch.equal(found.middle, middle)
    assert flips == {False, True}
    assert hidden or kind not in {"stripped and cropped", "everything"}
    assert other == (kind in {"anomalies", "everything"})


def test_a_batch_is_rendered_like_its_images(tiny_template: Template) -> None:
    config = parse(GeneratorConfig, {"voxel_size_mm": 2.0, "shape": (20, 24, 18), **KINDS["stripped and cropped"]}, "")
    plans = [sample_plan(config, "tiny", tiny_template.table, 0, index) for index in range(3)]
    before = tiny_template.labels.clone()
    images, labels = render([tiny_template] * 3, plans)
    for b, plan in enumerate(plans):
        image, target = render([tiny_template], [plan])
        assert torch.equal(image[0], images[b])
        assert torch.equal(target[0], labels[b])
        image.fill_(7)
        target.fill_(7)  # what is handed out belongs to the caller
    assert torch.equal(tiny_template.labels, before)
