"""Which voxels are compared: the same anatomy in every view, rare structures, borders, and no false negatives."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from synthseg import rng
from synthseg.config import GeneratorConfig, parse
from synthseg.config.pretraining import LossName, SamplingConfig
from synthseg.generator.deform import coordinates
from synthseg.generator.synthesis import read_anatomy
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import Label, LabelTable, load_scheme
from synthseg.templates import Template
from synthseg.training.contrastive import UNKNOWN, Voxels, join, kind_of, known_classes, midplane, pair_masks
from synthseg.training.contrastive import sample_voxels as sample
from synthseg.training.stream import group_table

SHAPE, SIZE_MM = (16, 24, 20), 2.0
LIKE: list[set[int]] = [{2, 3}, {2, 4}, {3, 4}]


def config(**changes: Any) -> SamplingConfig:
    return parse(SamplingConfig, {"voxels": 60, **changes}, "test")


def boxes(views: int = 2) -> torch.Tensor:
    """A head of label 1 with a border of background, a large 2 inside, and a rare 3 of 2 x 2 x 2."""
    labels = torch.zeros(SHAPE, dtype=torch.uint8)
    labels[2:14, 2:22, 2:18] = 1
    labels[4:12, 4:18, 4:14] = 2
    labels[6:8, 8:10, 14:16] = 3
    return labels.expand(views, *SHAPE).clone()


def draw(labels: torch.Tensor, grid: tuple[int, ...] = SHAPE, index: int = 0, **changes: Any) -> Voxels:
    own = {k: changes.pop(k) for k in ("displacement_mm", "midplane") if k in changes}
    source = rng.generator(3, index, "voxels")
    return sample(labels, grid, config(**changes), source, voxel_size_mm=SIZE_MM, **own)


def test_the_same_points_in_every_view() -> None:
    labels = boxes(3)
    found = draw(labels)
    assert found.index.shape == found.label.shape == found.point.shape == (3, 60)
    assert (found.index == found.index[0]).all()
    assert len(set(found.index[0].tolist())) == 60
    torch.testing.assert_close(labels.flatten(1).gather(1, found.index).long(), found.label)
    assert (found.label > 0).all()
    at = torch.stack(torch.unravel_index(found.index[0], SHAPE), 1)
    torch.testing.assert_close(found.position_mm[0], SIZE_MM * (at - torch.tensor([7.5, 11.5, 9.5])))


def test_a_sample_is_a_function_of_its_generator() -> None:
    first, again, other = draw(boxes()), draw(boxes()), draw(boxes(), index=1)
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.index, other.index)


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_balance(balance: float) -> None:
    labels = boxes()
    counts = torch.bincount(labels[0].flatten().long())[1:].double()
    assert counts[2] == 8
    drawn = torch.zeros(3)
    for index in range(120):
        found = draw(labels, index=index, voxels=9, balance=balance, boundary_fraction=0.0)
        drawn += torch.bincount(found.label[0], minlength=4)[1:] / 9 / 120
    if balance:  # every label the same number, the rare one nearly: its eight voxels run out
        torch.testing.assert_close(drawn, torch.tensor([0.35, 0.35, 0.30]), atol=0.05, rtol=0)
    else:
        torch.testing.assert_close(drawn, (counts / counts.sum()).float(), atol=0.05, rtol=0)


def test_borders() -> None:
    labels = boxes()
    deep = torch.zeros(SHAPE, dtype=torch.bool)
    deep[5:11, 5:17, 5:13] = True  # at least one voxel from any other label
    shares = []
    for fraction in (0.0, 0.5, 1.0):
        found = [draw(labels, index=i, boundary_fraction=fraction, balance=0.0).index[0] for i in range(20)]
        shares.append(float(deep.flatten()[torch.cat(found)].float().mean()))
    everywhere = float(deep.sum() / (labels[0] > 0).sum())
    assert shares[0] == pytest.approx(everywhere, abs=0.03)
    assert shares[1] == pytest.approx(0.6 * everywhere, abs=0.03)  # half of the points, and what borders leave over
    assert shares[2] == 0


@pytest.mark.parametrize("grid", [(8, 12, 10), (4, 12, 20)])
def test_levels_of_coarser_voxels(grid: tuple[int, ...]) -> None:
    """The features of a voxel are those of the block that it stands for, and its label is the block's most frequent."""
    labels = boxes()
    found = draw(labels, grid)
    factors = [n // m for n, m in zip(SHAPE, grid, strict=True)]
    at = torch.stack(torch.unravel_index(found.index[0], grid), 1).tolist()
    for label, corner in zip(found.label[0].tolist(), at, strict=True):
        block = labels[0][tuple(slice(c * f, (c + 1) * f) for c, f in zip(corner, factors, strict=True))]
        counts = torch.bincount(block.flatten().long(), minlength=4)
        assert label > 0
        assert counts[label] == counts[1:].max()
    # a feature that is the position of the block's middle is found where the position says
    axes = [SIZE_MM * f * (torch.arange(m) - (m - 1) / 2) for f, m in zip(factors, grid, strict=True)]
    middles = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    features = middles.expand(2, 3, *grid)
    torch.testing.assert_close(found.gather(features), found.position_mm.flatten(0, 1))


def test_only_what_every_view_shows() -> None:
    labels = boxes(3)
    labels[1][labels[1] == 1] = 0  # one view is stripped
    labels[2][:, 12:] = 0  # one is cropped
    found = draw(labels)
    assert set(found.label.flatten().tolist()) == {2, 3}
    assert (found.position_mm[..., 1] < 2 * (12 - 11.5)).all()


def test_few_voxels_repeat_and_none_is_allowed() -> None:
    labels = boxes()
    labels[labels < 3] = 0
    found = draw(labels)
    assert found.index.shape == (2, 60)
    assert len(set(found.index[0].tolist())) == 8
    positives, weights = pair_masks(found, "points")
    twins = found.index.flatten()[:, None] == found.index.flatten()
    assert not (weights & twins).any()  # what repeats is no negative of itself
    assert (positives.sum(1) == 1).all()  # and each has its own other view
    nothing = draw(torch.zeros_like(labels))
    assert nothing.index.shape == (2, 0)
    assert pair_masks(nothing, "points")[0].shape == (0, 0)


def test_a_grid_that_is_no_level() -> None:
    with pytest.raises(ValueError, match="must divide"):
        draw(boxes(), (8, 12, 9))


# ---------------------------------------------------------------- rendered views


@pytest.fixture
def rendered(tiny_template: Template) -> Callable[..., tuple[Any, GeneratorConfig]]:
    def make(**views: Any) -> tuple[Any, GeneratorConfig]:
        record = {
            "shape": [20, 24, 28],
            "voxel_size_mm": 1.5,
            "views": {"severities": [0.0, 1.0, 1.0], **views},
            "artefacts": {"strip_probability": 0.0, "crop_probability": 0.0},
        }
        generator = parse(GeneratorConfig, record, "test")
        plans = sample_views(generator, tiny_template.name, tiny_template.table, 5, 1)
        return render_views(tiny_template, plans), generator

    return make


def test_displaced_views_show_the_same_anatomy(
    rendered: Callable[..., tuple[Any, GeneratorConfig]], tiny_template: Template
) -> None:
    """The template coordinates of a point's voxels agree in all views, to within half a voxel."""
    views, _ = rendered(perturbation_mm=2.0, perturbation_spacing_mm=[15.0, 20.0])
    assert float(views.displacement_mm[1].abs().max()) > 2
    found = sample(
        views.labels, (20, 24, 28), config(), rng.generator(0, 0, "voxels"), views.displacement_mm, voxel_size_mm=1.5
    )
    assert found.index.shape == (3, 60)
    assert not torch.equal(found.index[0], found.index[1])
    spacing = torch.tensor(tiny_template.spacing_mm)
    places, same_index = [], []
    for v, plan in enumerate(views.plans):
        at = coordinates(plan.deform, plan.shape, 1.5, tiny_template.center, tiny_template.spacing_mm)
        places.append((at.flatten(1)[:, found.index[v]] * spacing[:, None]).T)
        same_index.append((at.flatten(1)[:, found.index[0]] * spacing[:, None]).T)
    stretch = 1.5 * float(torch.tensor(views.plans[0].deform.matrix).norm(dim=0).max())
    for v in (1, 2):
        off = (places[v] - places[0]).norm(dim=1)
        naive = (same_index[v] - places[0]).norm(dim=1)
        assert float(off.max()) < 0.75 * 3**0.5 * stretch  # half the diagonal of a voxel
        assert float(off.mean()) < 0.5 * float(naive.mean())
    # the positions know what the nearest voxel leaves over
    matrix = torch.tensor(views.plans[0].deform.matrix)
    over = (found.position_mm[1] - found.position_mm[0]) @ matrix.T
    rest = places[1] - places[0]
    flipped = torch.tensor([-1.0 if views.plans[0].deform.flip else 1.0, 1.0, 1.0])
    assert float((over * flipped - rest).norm(dim=1).mean()) < 0.6 * float(rest.norm(dim=1).mean())


def test_sides(rendered: Callable[..., tuple[Any, GeneratorConfig]], tiny_template: Template) -> None:
    """The structures of the two sides lie on the two sides of the plane, however the head is turned."""
    views, _ = rendered()
    plan = views.plans[0]
    names = tiny_template.table.names
    target = read_anatomy(tiny_template, plan)[1]
    normal, offset = midplane(plan)
    assert float(normal.norm()) == pytest.approx(1)
    assert (normal - torch.tensor([1.0, 0.0, 0.0])).abs().max() > 0.05
    found = sample(
        target[None], (20, 24, 28), config(voxels=400), rng.generator(0, 0, "v"), voxel_size_mm=1.5,
        midplane=(normal, offset),
    )  # fmt: skip
    side = {"Left": [], "Right": []}
    for label, value in zip(found.label[0].tolist(), found.side[0].tolist(), strict=True):
        word = names[label].split("-")[0]
        if word in side:
            side[word].append(value)
    left, right = (sum(v) / len(v) for v in side.values())
    assert min(len(v) for v in side.values()) > 50
    assert abs(left - right) > 1.7


# ---------------------------------------------------------------- pairs


def voxels(**changes: Any) -> Voxels:
    """Two views of five points on a line. 0 and 1: near each other. 2 and 3: one structure on two sides."""
    x = torch.tensor([0.0, 3.0, -20.0, 20.0, 40.0])
    position = torch.stack([x, 0 * x, 0 * x], 1).expand(2, 5, 3)
    label = torch.tensor([1, 2, 3, 3, UNKNOWN]).expand(2, 5)
    side = torch.tensor([1, 1, -1, 1, 1]).expand(2, 5)
    point = torch.arange(5).expand(2, 5)
    return Voxels(point, position, label, point, side, torch.zeros_like(point), config(**changes))


def pairs(mask: torch.Tensor) -> set[tuple[int, int]]:
    """Pairs of points of which any views are marked; views must agree."""
    views = mask.unflatten(1, (2, 5)).unflatten(0, (2, 5))
    out = views.any(2).any(0)
    return {(i, j) for i, j in out.nonzero().tolist() if i <= j}


def test_positives_of_points() -> None:
    positives, _ = pair_masks(voxels(), "points")
    expected = torch.zeros((10, 10), dtype=torch.bool)
    for i in range(5):
        expected[i, i + 5] = expected[i + 5, i] = True
    assert torch.equal(positives, expected)


def test_false_negatives_of_points_are_left_out() -> None:
    every = {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert pairs(pair_masks(voxels(exclusion_mm=0.0, exclude_mirrored=False), "points")[1]) == every
    assert pairs(pair_masks(voxels(exclusion_mm=3.5, exclude_mirrored=False), "points")[1]) == every - {(0, 1)}
    # the unknown label may be that of 2, which is on the other side
    sides = {(2, 3), (2, 4)}
    assert pairs(pair_masks(voxels(exclusion_mm=0.0), "points")[1]) == every - sides
    assert pairs(pair_masks(voxels(exclusion_mm=3.5), "points")[1]) == every - sides - {(0, 1)}
    assert pairs(pair_masks(voxels(exclusion_mm=1000.0), "points")[1]) == set()


def test_labels_with_sides_are_one_structure() -> None:
    """A left and a right class: 3 and 4 are partners. On the two sides of one head, and in another head."""
    own = voxels(exclusion_mm=0.0)
    own = replace(own, label=torch.tensor([1, 2, 3, 4, 3]).expand(2, 5))
    partners = [0, 1, 2, 4, 3]
    every = {(i, j) for i in range(5) for j in range(i + 1, 5)}
    assert pairs(pair_masks(own, "points")[1]) == every - {(2, 4)}  # the sides are two things to it
    assert pairs(pair_masks(own, "points", partners)[1]) == every - {(2, 4), (2, 3), (3, 4)}
    every_side = replace(own, config=config(exclusion_mm=0.0, exclude_mirrored=False))
    assert pairs(pair_masks(every_side, "points", partners)[1]) == every
    weights = pair_masks(join([own, own]), "points", partners)[1].unflatten(1, (2, 10))[:10, 0]
    assert weights[:5, 5:].tolist() == [[i != j and {i, j} not in LIKE for j in range(5)] for i in range(5)]


def test_labels_as_positives() -> None:
    positives, weights = pair_masks(voxels(exclusion_mm=3.5), "labels")
    assert pairs(positives) == {(0, 0), (1, 1), (2, 2), (2, 3), (3, 3)}
    assert not positives.diagonal().any()
    # neighbours of another label are negatives, the unknown is neither
    assert pairs(weights) == {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)}


@pytest.mark.parametrize("kind", ["points", "labels"])
def test_masks_are_symmetric_and_exclude_each_other(kind: Any) -> None:
    positives, weights = pair_masks(draw(boxes(3)), kind)
    assert positives.dtype == weights.dtype == torch.bool
    for mask in (positives, weights):
        assert torch.equal(mask, mask.T)
        assert mask.any()
        assert not mask.diagonal().any()
    assert not (positives & weights).any()


def test_several_heads_join() -> None:
    one, two = voxels(), voxels()
    both = join([one, two])
    assert both.index.shape == (2, 10)
    assert len(both) == 20
    assert both.point[0].tolist() == list(range(10))
    assert both.anatomy[0].tolist() == [0] * 5 + [1] * 5
    positives, weights = pair_masks(both, "points")
    inside, between = (pair_masks(one, "points")[k] for k in (0, 1))
    order = torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13, 14])
    assert torch.equal(positives[order][:, order], inside)
    assert torch.equal(weights[order][:, order], between)
    across = weights[order][:, order + 5][:5, :5]
    # the place of one head is not that of another: what has the same label may be the same thing
    assert across.tolist() == [
        [False, True, True, True, False],
        [True, False, True, True, False],
        [True, True, False, False, False],
        [True, True, False, False, False],
        [False, False, False, False, False],
    ]
    with pytest.raises(ValueError, match="same number of views"):
        join([one, draw(boxes(3))])


def test_classes_of_groups() -> None:
    siam = load_scheme("siam16")
    assert known_classes(group_table(siam, siam)[1]).tolist() == list(range(17))
    index, groups = group_table(load_scheme("brainweb"), siam)
    classes = known_classes(groups)
    by_name = {label.name: int(classes[int(index[i])]) for i, label in enumerate(load_scheme("brainweb").labels)}
    assert siam.names[by_name["Skull"]] == "Skull"
    assert by_name["GM"] == by_name["CSF"] == UNKNOWN


def test_a_background_that_may_be_several_classes_is_outside() -> None:
    """As in a map of the brain alone, where skull and skin are background: what a view has lost is that as well."""
    siam = load_scheme("siam16")
    parts = [("none", [0, 13, 14, 15, 16]), ("grey", [1, 5]), ("white", [2])]
    table = LabelTable("brain", tuple(Label(i, name, to={"siam16": tuple(to)}) for i, (name, to) in enumerate(parts)))
    index, groups = group_table(table, siam)
    classes = known_classes(groups)[index.int()]
    assert classes.tolist() == [0, UNKNOWN, 2]
    labels = boxes(3)
    labels[labels == 3] = 0
    labels[1][labels[1] == 1] = 0  # one view is stripped
    labels[2][:, 12:] = 0  # one is cropped
    still = torch.zeros(3, 3, *SHAPE)
    still[1:] = 1e-3
    for displacement_mm in (None, still):
        found = draw(classes[labels.int()], displacement_mm=displacement_mm)
        assert set(found.label.flatten().tolist()) == {2}
        assert (labels.flatten(1).gather(1, found.index) == 2).all()


def test_kinds() -> None:
    from typing import get_args

    kinds = {name: kind_of(name) for name in get_args(LossName)}
    assert {name for name, kind in kinds.items() if kind == "labels"} == {"sup_con", "scl", "hscl", "equiangular"}
