"""Each measure against cases whose answer is known, or against a reference of a few lines."""

import itertools
import math

import pytest
import torch

from synthseg import rng
from synthseg.representation import measures
from synthseg.representation.measures import (
    balanced_voxels,
    effective_rank,
    linear_probe,
    matching_accuracy,
    matching_distances,
    neighbour_tolerance,
    neural_collapse,
    robustness,
    spectrum,
    tolerance,
    uniformity,
)

SHAPE = (13, 15, 12)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=rng.generator(seed, 0, "test"))


def half_mask() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[2:11, 3:13, 2:10] = True
    return mask


# ---------------------------------------------------------------------------------------------- robustness


def test_the_same_features_are_perfectly_robust() -> None:
    features = noise(1, 3, *SHAPE).expand(3, -1, -1, -1, -1)
    found = robustness(features, half_mask())
    assert found == pytest.approx({"l1": 0.0, "ssim": 1.0, "ms_ssim": 1.0}, abs=1e-4)


def test_each_channel_is_scaled_by_its_own_range() -> None:
    features = noise(2, 2, *SHAPE)
    scale = torch.tensor([[3.0, 0.1], [10.0, 2.0]])[:, :, None, None, None]
    moved = features * scale + torch.tensor([[-5.0, 7.0], [100.0, 0.0]])[:, :, None, None, None]
    assert robustness(moved, half_mask()) == pytest.approx(robustness(features, half_mask()), abs=1e-4)


def test_l1_by_hand() -> None:
    a, b = torch.zeros(SHAPE), torch.zeros(SHAPE)
    a[6, 7, 6], b[2, 3, 2], b[6, 7, 6] = 4.0, 2.0, 1.0  # scaled: 1 there; 1 and 0.5 there
    features = torch.stack([a, b])[:, None]
    assert robustness(features, half_mask())["l1"] == pytest.approx((0.5 + 1.0) / (9 * 10 * 8), rel=1e-5)


def test_what_lies_outside_the_mask_does_not_count() -> None:
    features, mask = noise(2, 2, *SHAPE), half_mask()
    other = torch.where(mask, features, 50 * noise(2, 2, *SHAPE, seed=1))
    assert robustness(other, mask) == robustness(features, mask)


def test_features_that_follow_the_appearance_are_less_robust() -> None:
    base, strange = noise(1, 4, *SHAPE), noise(3, 4, *SHAPE, seed=1)
    near, far = robustness(base + 0.1 * strange), robustness(base + 2 * strange)
    assert near["l1"] < far["l1"]
    assert near["ssim"] > far["ssim"]
    assert near["ms_ssim"] > far["ms_ssim"]


def test_the_pairs_may_be_chosen() -> None:
    features = noise(3, 2, *SHAPE)
    features[2] = features[0]
    assert robustness(features, pairs=[(0, 2)])["l1"] == pytest.approx(0, abs=1e-6)
    mean = sum(robustness(features, pairs=[pair])["l1"] for pair in ((0, 1), (0, 2), (1, 2))) / 3
    assert robustness(features)["l1"] == pytest.approx(mean, rel=1e-5)


def test_robustness_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        robustness(noise(1, 2, *SHAPE))
    with pytest.raises(ValueError, match="empty"):
        robustness(noise(2, 2, *SHAPE), torch.zeros(SHAPE, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------ matching


def test_features_moved_by_a_voxel_are_found_there() -> None:
    a = torch.randn((16, *SHAPE), generator=rng.generator(0, 0, "a"))
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[3:9, 3:10, 3:9] = True
    everywhere = torch.ones_like(mask)
    for axis, spacing in enumerate((1.5, 2.5, 4.0)):
        distances = matching_distances(a, a.roll(1, 1 + axis), everywhere, (1.5, 2.5, 4.0), n=10**6)
        inner = distances.reshape(SHAPE)[mask]
        torch.testing.assert_close(inner, torch.full_like(inner, spacing))
    assert matching_accuracy(a, a, mask, 1.0, within_mm=0) == 1.0


def test_a_match_is_within_two_mm_or_one_voxel() -> None:
    a = torch.randn((16, 1, 1, 40), generator=rng.generator(0, 0, "a"))
    mask = torch.ones(1, 1, 40, dtype=torch.bool)
    moved = torch.zeros_like(a)
    moved[..., 2:] = a[..., :-2]
    by_two = {spacing: matching_accuracy(a, moved, mask, spacing) for spacing in (0.9, 1.1, 3.0)}
    assert by_two[0.9] > 0.9  # 1.8 mm away
    assert by_two[1.1] < 0.1  # 2.2 mm
    assert by_two[3.0] < 0.1  # two voxels
    moved[..., 1:] = a[..., :-1]
    assert matching_accuracy(a, moved, mask, 3.0) > 0.9  # one voxel of 3 mm


def test_matching_in_chunks_and_by_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise(5, *SHAPE), noise(5, *SHAPE, seed=1)
    mask = half_mask()

    def run() -> torch.Tensor:
        return matching_distances(a, b, mask, 1.0, 50, rng.generator(3, 0, "voxels"))

    whole = run()
    assert len(whole) == 50
    monkeypatch.setattr(measures, "CHUNK_VALUES", 7 * int(mask.sum()))
    assert torch.equal(run(), whole)
    assert not torch.equal(matching_distances(a, b, mask, 1.0, 50, rng.generator(4, 0, "voxels")), whole)


def test_collapsed_features_match_nothing() -> None:
    a = torch.ones(4, *SHAPE)
    assert matching_accuracy(a, a, half_mask(), 2.0) < 0.1


# --------------------------------------------------------------------------------------- geometry of classes


def simplex(n_classes: int) -> torch.Tensor:
    """Vertices (C, C) of a simplex on the unit sphere, centred: an equiangular frame."""
    vertices = torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes
    return vertices / vertices.norm(dim=1, keepdim=True)


def test_effective_rank_of_known_spectra() -> None:
    axes = torch.eye(5)
    assert effective_rank(torch.cat([axes, -axes])) == pytest.approx(5)
    assert effective_rank(torch.outer(torch.arange(9.0), torch.tensor([1.0, 2.0, -1.0]))) == pytest.approx(1)
    assert effective_rank(torch.full((6, 3), 0.3)) == 0.0
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # variances 9 to 1
    assert effective_rank(two) == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))
    assert spectrum(two).tolist() == pytest.approx([0.9, 0.1])
    assert effective_rank(torch.randn(4, 50, generator=rng.generator(0, 0, "few"))) <= 3 + 1e-6


def test_a_simplex_is_collapsed() -> None:
    means = simplex(4)
    labels = torch.arange(4).repeat(5)
    found = neural_collapse(means.repeat(5, 1), labels)
    expected = dict.fromkeys(found, 0.0) | {"effective_rank_means": 3.0, "effective_rank": 3.0}
    assert found == pytest.approx(expected, abs=1e-6)


def test_neural_collapse_by_hand() -> None:
    # Two classes at right angles, of length 1 and 3, each of two points 0.5 away from its mean.
    features = torch.tensor([[1, 0, 0.5], [1, 0, -0.5], [0, 3, 0.5], [0, 3, -0.5]])
    found = neural_collapse(features, torch.tensor([7, 7, 2, 2]))
    assert found["mean_norm"] == pytest.approx(math.sqrt(0.5**2 + 1.5**2))
    assert found["norm_deviation"] == pytest.approx(1.0)
    assert found["equiangular_mean"] == found["equiangular_max"] == pytest.approx(1.0)  # cos 0, a frame has -1
    assert found["within_class_spread"] == pytest.approx(0.5)
    assert found["effective_rank_means"] == pytest.approx(1.0)


def test_one_class_cannot_collapse() -> None:
    with pytest.raises(ValueError, match="classes"):
        neural_collapse(noise(4, 3), torch.zeros(4, dtype=torch.int64))


def test_uniformity_against_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    features = noise(40, 6) - 0.5
    unit = torch.nn.functional.normalize(features, dim=1)
    reference = float(torch.pdist(unit).square().mul(-2).exp().mean().log())
    assert uniformity(features) == pytest.approx(reference, abs=1e-5)
    monkeypatch.setattr(measures, "CHUNK_VALUES", 7 * 40)
    assert uniformity(features) == pytest.approx(reference, abs=1e-5)
    assert uniformity(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-8, abs=1e-5)
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-5)


def test_tolerance_against_all_pairs() -> None:
    features, labels = noise(12, 4) - 0.5, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 0, 1])
    unit = torch.nn.functional.normalize(features, dim=1)
    alike = [float(unit[i] @ unit[j]) for i, j in itertools.permutations(range(12), 2) if labels[i] == labels[j]]
    assert tolerance(features, labels) == pytest.approx(sum(alike) / len(alike), abs=1e-5)
    assert math.isnan(tolerance(features[:3], torch.arange(3)))


def test_tolerance_of_neighbours_by_hand() -> None:
    features = torch.zeros(2, 1, 2, 3)
    features[0] = 1.0
    features[:, 0, 1, 2] = torch.tensor([0.0, 5.0])  # at right angles with its two neighbours
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    assert neighbour_tolerance(features, mask) == pytest.approx(5 / 7)  # seven pairs of neighbours
    labels = torch.zeros(1, 2, 3, dtype=torch.int64)
    labels[0, 1, 2] = 1
    assert neighbour_tolerance(features, mask, labels) == pytest.approx(1.0)
    mask[0, 1, 2] = False
    assert neighbour_tolerance(features, mask) == pytest.approx(1.0)
    assert math.isnan(neighbour_tolerance(features, torch.zeros_like(mask)))


# --------------------------------------------------------------------------------------------- linear probe


def blobs(n: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 0, 100, 5], [4, 0, 100, 5], [0, 4, 100, 5]])
    return centres[labels] + spread * torch.randn(n, 4, generator=rng.generator(seed, 0, "blobs")), labels


def test_the_probe_reads_what_is_linear() -> None:
    train, test = blobs(300, 0.3, 0), blobs(150, 0.3, 1)
    with torch.inference_mode():  # as in a validation
        found = linear_probe(*train, *test)
    assert found == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})
    moved = linear_probe(train[0] * 50 - 3, train[1], test[0] * 50 - 3, test[1])
    assert moved == pytest.approx(found, abs=1e-6)


def test_the_probe_reads_nothing_from_noise() -> None:
    features, labels = noise(600, 4), torch.arange(600) % 3
    found = linear_probe(features[:300], labels[:300], features[300:], labels[300:])
    assert max(found.values()) < 0.55


def test_a_label_that_only_one_side_has_counts_as_missed() -> None:
    features, labels = blobs(90, 0.1, 0)
    known = labels != 2
    found = linear_probe(features[known], labels[known], features, labels)
    assert found[2] == 0.0
    assert found[0] < 1.0


def test_balanced_voxels() -> None:
    labels = torch.tensor([0] * 50 + [3] * 4 + [1] * 20)
    for generator in (None, rng.generator(0, 0, "balance")):
        chosen = balanced_voxels(labels, 10, generator)
        assert torch.equal(chosen, chosen.unique())
        assert torch.bincount(labels[chosen], minlength=4).tolist() == [10, 10, 0, 4]


def test_the_geometry_does_not_depend_on_the_axes_or_the_order() -> None:
    features, labels = noise(60, 5) - 0.4, torch.arange(60) % 4
    turn = torch.linalg.qr(noise(5, 5, seed=2))[0]
    order = torch.randperm(60, generator=rng.generator(0, 0, "order"))
    turned, moved = (features @ turn)[order], labels[order]
    assert neural_collapse(turned, moved) == pytest.approx(neural_collapse(features, labels), abs=1e-5)
    assert uniformity(turned) == pytest.approx(uniformity(features), abs=1e-5)
    assert tolerance(turned, moved) == pytest.approx(tolerance(features, labels), abs=1e-5)
    assert uniformity(3 * features) == pytest.approx(uniformity(features), abs=1e-5)
