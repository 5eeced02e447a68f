"""Every loss against a few lines of its paper, against MONAI, and by its theory."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synthseg.config.pretraining import LossName
from synthseg.training.contrastive import LOSSES, PairTemperature, rows, simplex_frame, to_sphere
from tests.training.contrastive.examples import KINDS, Example, make
from tests.training.contrastive.references import REFERENCES

DETACHED = {"hucl", "hscl", "mochi", "pix_pro"}  # a part of their formula has no gradient
OWN_DIMENSIONS = {"barlow_twins", "equiangular"}  # a rotation of the embeddings changes them


def value(name: str, example: Example, **options: Any) -> torch.Tensor:
    given = {"temperature": 0.4, "beta": 3.0, "labels": example.labels, **options}
    return LOSSES[name](example.embeddings, example.positives, example.weights, **given)


def test_the_family_is_that_of_the_recipes() -> None:
    assert set(LOSSES) == set(get_args(LossName)) == set(REFERENCES)


# labels of one member each have no two views of a point, which is all that Barlow Twins compares
CASES = [(name, kind) for name in LOSSES for kind in KINDS if (name, kind) != ("barlow_twins", "labels")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_values_and_gradients_equal_the_reference(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_CPU", 50)  # three or four anchors at a time
    example = make(kind)
    example.embeddings.mul_(1.3)  # not of unit length
    example.embeddings.requires_grad_()
    expected = REFERENCES[name](example, 0.4, 3.0)
    found = value(name, example)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(2.5 * found, example.embeddings)
    torch.testing.assert_close(gradient, 2.5 * torch.autograd.grad(expected, example.embeddings)[0])
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(set(LOSSES) - DETACHED))
def test_gradients_are_those_of_differences(name: str) -> None:
    example = make("points", views=2, points=3, dimensions=4)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return value(name, Example(z, example.positives, example.weights, example.labels))

    assert torch.autograd.gradcheck(loss, (example.embeddings.requires_grad_(),))


@pytest.mark.parametrize("kind", ["number", "pairs"])
@pytest.mark.parametrize("name", ["info_nce", "sup_con", "decoupled"])
def test_a_temperature_learns(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_CPU", 12)
    example = make("points", views=2, points=3, dimensions=4)
    source = torch.Generator().manual_seed(1)
    leaf = torch.rand((6, 3) if kind == "pairs" else (), generator=source, dtype=torch.float64) + 0.1

    def loss(z: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        temperature = PairTemperature(leaf, 0.5, 0.05, 4.0) if kind == "pairs" else leaf
        return value(name, Example(z, example.positives, example.weights, example.labels), temperature=temperature)

    assert torch.autograd.gradcheck(loss, (example.embeddings.requires_grad_(), leaf.requires_grad_()))


def test_temperatures_of_pairs() -> None:
    example = make("points")
    keys = torch.randn((15, 4), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    at_center = PairTemperature(0 * keys, 0.4, 0.04, 4.0)
    torch.testing.assert_close(value("info_nce", example, temperature=at_center), value("info_nce", example))
    pair = PairTemperature(100 * keys, 0.4, 0.04, 4.0)
    temperatures = pair.between(pair.keys, pair.keys)
    assert float(temperatures.min()) == pytest.approx(0.04, rel=0.01)
    assert float(temperatures.max()) == pytest.approx(4.0, rel=0.01)
    free = PairTemperature(pair.keys, 0.4, 0.04, 4.0, penalty=0.0)
    ratio = 0.4 / temperatures
    penalty = 0.1 * (ratio - ratio.log() - 1).mean()
    assert float(penalty) > 0.1
    difference = value("info_nce", example, temperature=pair) - value("info_nce", example, temperature=free)
    torch.testing.assert_close(difference, penalty)


@pytest.mark.parametrize("name", LOSSES)
def test_levels_are_scored_together(name: str) -> None:
    """The mean of the levels one by one; masks may be shared or not, and a temperature may be each level's own."""
    first, second = make("points"), make("points", seed=1)
    both = torch.stack([first.embeddings, second.embeddings])[:, None]  # (2, 1, N, E)
    parts = [value(name, e, temperature=t) for e, t in ((first, 0.3), (second, 0.7))]
    found = LOSSES[name](
        both,
        first.positives,
        first.weights.expand(2, 1, -1, -1),
        temperature=torch.tensor([[0.3], [0.7]]),
        beta=3.0,
        labels=first.labels,
    )
    torch.testing.assert_close(found, torch.stack(parts).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"dhel", "pix_pro", "barlow_twins"}))
def test_the_order_of_embeddings_does_not_matter(name: str, kind: str) -> None:
    example = make(kind)
    order = torch.randperm(len(example.labels), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(value(name, example.permuted(order)), value(name, example))


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_points_does_not_matter(name: str) -> None:
    example = make("points")
    order = torch.tensor([3, 0, 4, 1, 2])
    order = torch.cat([order + 5 * view for view in range(3)])
    torch.testing.assert_close(value(name, example.permuted(order)), value(name, example))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - OWN_DIMENSIONS))
def test_rotations_do_not_matter(name: str) -> None:
    example = make("points")
    turn = torch.linalg.qr(torch.randn((6, 6), generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    turned = Example(example.embeddings @ turn, example.positives, example.weights, example.labels)
    torch.testing.assert_close(value(name, turned), value(name, example))


@pytest.mark.parametrize("name", LOSSES)
def test_aligned_views_score_better_than_random_ones(name: str) -> None:
    example = make("points", points=8, dimensions=16)
    perfect = simplex_frame(8, 16)[torch.arange(24) % 8]
    labels = torch.arange(24) % 8
    aligned = Example(perfect, example.positives, example.weights, labels)
    if name == "equiangular":
        assert float(value(name, aligned, classes=8)) < float(value(name, example, classes=8))
    else:
        assert float(value(name, aligned)) < float(value(name, example))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_and_extremes(name: str, dtype: torch.dtype) -> None:
    """Scores in float32 at least, finite however long the embeddings are, and under autocast."""
    example = make("weighted")
    z = (100 * example.embeddings).to(dtype).requires_grad_()
    long = Example(z, example.positives, example.weights.float(), example.labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = value(name, long)
    assert found.dtype == torch.float32
    exact = value(name, Example(long.embeddings.detach().double(), long.positives, long.weights, long.labels))
    assert float(found.detach()) == pytest.approx(float(exact), rel=1e-3)
    (gradient,) = torch.autograd.grad(found, long.embeddings)
    assert torch.isfinite(gradient).all()
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [0, 1, 4])
def test_nothing_to_compare(name: str, n: int) -> None:
    z = torch.randn((2, n, 3), generator=torch.Generator().manual_seed(0), requires_grad=True)
    nobody = torch.zeros((n, n), dtype=torch.bool)
    found = LOSSES[name](z, nobody, nobody, labels=torch.full((n,), 255))
    assert float(found.detach()) == 0
    (gradient,) = torch.autograd.grad(found, z)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("n", [0, 4])
def test_nothing_to_compare_with_temperatures_of_pairs(name: str, n: int) -> None:
    z, keys = (torch.randn((2, n, 3), generator=torch.Generator().manual_seed(k), requires_grad=True) for k in (0, 1))
    nobody = torch.zeros((n, n), dtype=torch.bool)
    temperature = PairTemperature(keys, 0.4, 0.04, 4.0)
    found = LOSSES[name](z, nobody, nobody, temperature=temperature, labels=torch.full((n,), 255))
    assert float(found.detach()) == 0
    for gradient in torch.autograd.grad(found, (z, keys), allow_unused=True):
        assert gradient is None or (gradient == 0).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"pix_pro", "barlow_twins"}))
def test_without_negatives(name: str) -> None:
    """Positives alone: no loss is infinite."""
    example = make("points", points=1)
    example.embeddings.requires_grad_()
    found = value(name, example)
    (gradient,) = torch.autograd.grad(found, example.embeddings)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_is_made_where_none_is_asked_for(name: str) -> None:
    example = make("points")
    assert not value(name, example).requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_masks_of_another_size_are_refused(name: str) -> None:
    example = make("points")
    with pytest.raises(ValueError, match="weights must broadcast"):
        LOSSES[name](example.embeddings, example.positives, example.weights[:3, :3], labels=example.labels)
    with pytest.raises(ValueError, match="positives must be bool"):
        LOSSES[name](example.embeddings, example.positives.float(), example.weights, labels=example.labels)


# ---------------------------------------------------------------- against MONAI


def test_two_views_are_simclr_as_monai_has_it() -> None:
    from monai.losses import ContrastiveLoss

    example = make("points", views=2, points=9)
    one, two = example.embeddings.chunk(2)
    expected = ContrastiveLoss(temperature=0.4)(one, two)
    for name in ("info_nce", "sup_con"):
        assert float(value(name, example)) == pytest.approx(float(expected), rel=1e-6)


def test_two_views_of_barlow_twins_are_monais() -> None:
    from monai.losses import BarlowTwinsLoss

    example = make("points", views=2, points=9)
    expected = BarlowTwinsLoss()(*example.embeddings.chunk(2))
    torch.testing.assert_close(value("barlow_twins", example), expected)


# ---------------------------------------------------------------- theory of hard negatives (arXiv 2311.05139)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    betas=st.tuples(st.floats(0, 10), st.floats(0, 20)),
    temperature=st.floats(0.1, 2),
    length=st.floats(0.1, 3),
)
def test_harder_negatives_never_lower_the_loss(
    seed: int, kind: str, betas: tuple[float, float], temperature: float, length: float
) -> None:
    """HSCL >= SCL and HUCL >= UCL for any embeddings, of any length, and the loss rises with beta (Harris)."""
    example = make(kind, seed=seed)
    example.embeddings.mul_(length)
    for soft, hard in (("ucl", "hucl"), ("scl", "hscl")):
        lowest = float(value(soft, example, temperature=temperature))
        less = float(value(hard, example, temperature=temperature, beta=betas[0]))
        more = float(value(hard, example, temperature=temperature, beta=sum(betas)))
        assert lowest <= less + 1e-9
        assert less <= more + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_beta_0_is_the_plain_loss(kind: str) -> None:
    example = make(kind)
    for soft, hard in (("ucl", "hucl"), ("scl", "hscl")):
        torch.testing.assert_close(value(hard, example, beta=0.0), value(soft, example))
        assert float(value(hard, example, beta=5.0)) > float(value(soft, example)) + 0.01


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), spread=st.floats(0, 2))
def test_nothing_scores_better_than_neural_collapse(seed: int, classes: int, spread: float) -> None:
    """On the sphere, the lowest SCL and HSCL are those of class means at equal angles without spread."""
    labels = torch.arange(classes).repeat(3)
    same = labels[:, None] == labels
    frame = simplex_frame(classes, 6)[labels]
    noise = torch.randn(frame.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lowest = math.log1p(math.exp((-1 / (classes - 1) - 1) / 0.4))
    for name in ("scl", "hscl"):
        best = LOSSES[name](frame, same, ~same, temperature=0.4)
        assert float(best) == pytest.approx(lowest, rel=1e-9)
        assert float(LOSSES[name](to_sphere(frame + spread * noise), same, ~same, temperature=0.4)) >= lowest - 1e-9


# ---------------------------------------------------------------- single losses


def test_one_positive_each_makes_losses_meet() -> None:
    """InfoNCE, SupCon: the same. DCL: without the positive in the denominator. UCL: the mean instead of the sum."""
    example = make("points", views=2)
    z = example.embeddings
    torch.testing.assert_close(value("info_nce", example), value("sup_con", example))
    negatives = int(example.weights[0].sum())
    equal = value("info_nce", Example(z, example.positives, example.weights / negatives, example.labels))
    torch.testing.assert_close(value("ucl", example), equal)
    assert float(value("decoupled", example)) < float(value("info_nce", example))


def test_mixed_negatives_are_harder() -> None:
    """Mixtures with the anchor are nearer to it than what they are mixed of: the loss rises."""
    example = make("points")
    assert float(value("mochi", example)) > float(value("info_nce", example)) + 0.5


def test_fixed_vectors() -> None:
    frame = simplex_frame(5, 7)
    cosines = frame @ frame.T
    torch.testing.assert_close(cosines, torch.full((5, 5), -0.25).double() + 1.25 * torch.eye(5).double())
    assert (frame[:, 4:] == 0).all()
    labels = torch.tensor([4, 0, 2])
    nobody = torch.zeros((3, 3), dtype=torch.bool)
    z = frame[labels]
    # by hand: four others at cosine -1/4
    expected = math.log1p(4 * math.exp(-1.25 / 0.4))
    given: dict[str, Any] = {"labels": labels, "classes": 5, "temperature": 0.4}
    found = LOSSES["equiangular"](z, nobody, nobody, **given)
    assert float(found) == pytest.approx(expected)
    z = torch.cat([z, -z[:1]])
    nobody = torch.zeros((4, 4), dtype=torch.bool)
    found = LOSSES["equiangular"](z, nobody, nobody, **{**given, "labels": torch.tensor([4, 0, 2, 255])})
    assert float(found) == pytest.approx(expected)  # an unknown label says nothing


def test_fixed_vectors_need_labels_and_room() -> None:
    example = make("points")
    with pytest.raises(ValueError, match="pass labels="):
        value("equiangular", example, labels=None)
    with pytest.raises(ValueError, match=r"labels must lie in 0 \.\.\. 6"):
        value("equiangular", example, labels=example.labels + 6)
    with pytest.raises(ValueError, match="6 dimensions hold 2 to 7 vectors"):
        value("equiangular", example, classes=8)
