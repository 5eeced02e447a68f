"""Losses against a few lines of float64 numpy with one-hots."""

import numpy as np
import pytest
import torch

from synthseg.labels import load_scheme
from synthseg.training.losses import dice_and_cross_entropy, group_log_probabilities
from synthseg.training.stream import group_table

IDENTITY = torch.eye(5, dtype=torch.bool)
DISJOINT = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
OVERLAPPING = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
VAGUE = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
GROUPS = {"identity": IDENTITY, "disjoint": DISJOINT, "overlapping": OVERLAPPING, "vague": VAGUE}
SHAPE = (3, 5, 4)


def reference(
    logits: np.ndarray, target: np.ndarray, groups: np.ndarray, smooth: float = 1.0
) -> tuple[float, float, np.ndarray]:
    """1 - mean soft Dice, cross-entropy and the Dice of each group (NaN where not scored)."""
    z = logits.reshape(len(logits), -1).astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(0)
    p = np.stack([p[np.flatnonzero(row)].sum(0) for row in groups])
    hot = np.stack([target.ravel() == g for g in range(len(groups))]).astype(np.float64)
    entropy = -np.log((p * hot).sum(0)).mean()
    vague = [any((row >= other).all() for k, other in enumerate(groups) if k != g) for g, row in enumerate(groups)]
    told = hot[~np.array(vague)].sum(0)
    scores = np.full(len(groups), np.nan)
    for g, row in enumerate(groups):
        shares = any((row & other).any() for k, other in enumerate(groups) if k != g and not vague[k])
        if hot[g].any() and not shares and not vague[g]:
            scores[g] = (2 * (p[g] * hot[g]).sum() + smooth) / ((p[g] * told).sum() + hot[g].sum() + smooth)
    inner = scores[1:][np.isfinite(scores[1:])]
    return (1 - inner.mean() if len(inner) else 0.0), entropy, scores


def example(groups: torch.Tensor, seed: int = 0, absent: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn((groups.shape[1], *SHAPE), generator=source)
    target = torch.randint(len(groups), SHAPE, generator=source, dtype=torch.uint8)
    if absent is not None:
        target[target == absent] = 0
    return logits, target


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("absent", [None, 1, 2])
def test_values_equal_the_reference(name: str, absent: int | None, device: torch.device) -> None:
    groups = GROUPS[name]
    logits, target = example(groups, absent=absent)
    found = dice_and_cross_entropy(logits.to(device), target.to(device), groups)
    dice, entropy, scores = (tensor.cpu() for tensor in found)
    expected = reference(logits.numpy(), target.numpy(), groups.numpy())
    assert float(dice) == pytest.approx(expected[0], abs=1e-5)
    assert float(entropy) == pytest.approx(expected[1], rel=1e-5)
    np.testing.assert_allclose(scores, expected[2], atol=1e-5)


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    groups = GROUPS[name]
    logits, target = example(groups, 1)
    logits = logits[:, :2, :2, :2].contiguous().requires_grad_()
    target = target[:2, :2, :2].contiguous()
    dice, entropy, _ = dice_and_cross_entropy(logits, target, groups)
    (0.7 * dice + 1.3 * entropy).backward()
    assert logits.grad is not None
    base, step = logits.detach().double().numpy(), 1e-5

    def loss(z: np.ndarray) -> float:
        parts = reference(z, target.numpy(), groups.numpy())
        return 0.7 * parts[0] + 1.3 * parts[1]

    numeric = np.zeros_like(base)
    for at in np.ndindex(*base.shape):
        up, down = base.copy(), base.copy()
        up[at] += step
        down[at] -= step
        numeric[at] = (loss(up) - loss(down)) / (2 * step)
    np.testing.assert_allclose(logits.grad, numeric, atol=2e-5)
    assert np.abs(numeric).max() > 1e-2


def test_perfect_and_worst_predictions() -> None:
    _, target = example(IDENTITY)
    perfect = 50 * torch.nn.functional.one_hot(target.long(), 5).movedim(-1, 0).float()
    dice, entropy, scores = dice_and_cross_entropy(perfect, target, IDENTITY)
    assert float(dice) == pytest.approx(0, abs=1e-5)
    assert float(entropy) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(scores, 1, atol=1e-5)
    dice, entropy, _ = dice_and_cross_entropy(-perfect, target, IDENTITY)
    assert float(dice) > 0.9
    assert float(entropy) > 40


def test_probability_may_move_inside_a_group() -> None:
    logits, target = example(OVERLAPPING)
    log_p = torch.log_softmax(logits.double(), 0)
    moved = log_p.exp()
    # classes 1 and 2 are one group, and class 2 is also in the next: move between 1 and 2 where the target is group 1
    here = target == 1
    share = 0.9 * moved[1]
    moved[1] = torch.where(here, moved[1] - share, moved[1])
    moved[2] = torch.where(here, moved[2] + share, moved[2])
    before = dice_and_cross_entropy(logits, target, OVERLAPPING)
    after = dice_and_cross_entropy(moved.log().float(), target, OVERLAPPING)
    assert float(after[1]) == pytest.approx(float(before[1]), abs=1e-5)
    assert float(after[0]) == pytest.approx(float(before[0]), abs=1e-5)
    # while a template that tells the two apart does see it
    fine = torch.where(here, 1, 0).to(torch.uint8)
    change = (
        dice_and_cross_entropy(moved.log().float(), fine, IDENTITY)[1]
        - dice_and_cross_entropy(logits, fine, IDENTITY)[1]
    )
    assert float(change) > 0.3


def test_groups_that_overlap_count_in_the_cross_entropy_alone() -> None:
    logits, target = example(OVERLAPPING)
    _, _, scores = dice_and_cross_entropy(logits, target, OVERLAPPING)
    assert torch.isnan(scores).tolist() == [False, True, True, False]


def test_a_group_that_says_too_little_does_not_count_against_the_others() -> None:
    logits, target = example(VAGUE)
    sure = torch.full_like(logits, -20.0)
    sure[1] = 20.0
    anything = torch.where((target == 3)[None], sure, logits)
    before, after = (dice_and_cross_entropy(x, target, VAGUE) for x in (logits, anything))
    torch.testing.assert_close(before[2], after[2], equal_nan=True)
    assert torch.isnan(before[2]).tolist() == [False, False, False, True]
    assert float(after[1]) < float(before[1])  # but it does say that the voxel is one of these


def test_nothing_but_background() -> None:
    logits = torch.randn((5, *SHAPE), generator=torch.manual_seed(0)).requires_grad_()
    target = torch.zeros(SHAPE, dtype=torch.uint8)
    dice, entropy, scores = dice_and_cross_entropy(logits, target, IDENTITY)
    assert float(dice) == 0
    assert torch.isnan(scores[1:]).all()
    (dice + entropy).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", GROUPS)
def test_extreme_logits_stay_finite(name: str) -> None:
    groups = GROUPS[name]
    logits, target = example(groups)
    logits = (1e4 * logits).requires_grad_()
    dice, entropy, _ = dice_and_cross_entropy(logits, target, groups)
    (dice + entropy).backward()
    assert logits.grad is not None
    assert torch.isfinite(dice + entropy)
    assert torch.isfinite(logits.grad).all()


def test_half_precision_logits_are_scored_in_full() -> None:
    logits, target = example(IDENTITY)
    exact = dice_and_cross_entropy(logits.bfloat16().float(), target, IDENTITY)
    half = dice_and_cross_entropy(logits.bfloat16(), target, IDENTITY)
    assert half[1].dtype == torch.float32
    torch.testing.assert_close(half, exact, equal_nan=True)


def test_probabilities_of_all_groups_of_a_partition_sum_to_one() -> None:
    logits, _ = example(DISJOINT)
    log_p = group_log_probabilities(logits.flatten(1), DISJOINT)
    np.testing.assert_allclose(log_p.exp().sum(0), 1, atol=1e-5)


# ---------------------------------------------------------------- tables of groups


def test_exact_template_keeps_the_classes_of_the_target() -> None:
    head, siam = load_scheme("head"), load_scheme("siam16")
    index, groups = group_table(head, siam)
    assert torch.equal(groups, torch.eye(17, dtype=torch.bool))
    by_name = {label.name: siam.names[index[i]] for i, label in enumerate(head.labels)}
    assert by_name["Left-Thalamus"] == by_name["Right-Thalamus"] == "Thalamus"
    assert by_name["Skin"] == "Head"
    assert by_name["Background"] == "Background"


def test_coarse_template_shares_groups() -> None:
    brainweb, siam = load_scheme("brainweb"), load_scheme("siam16")
    index, groups = group_table(brainweb, siam)
    assert groups[0].nonzero().flatten().tolist() == [0]
    assert index[0] == 0
    by_name = {label.name: int(index[i]) for i, label in enumerate(brainweb.labels)}
    assert len({by_name[n] for n in ("Fat", "Muscle", "Muscle-Skin", "Around-Fat")}) == 1
    assert by_name["Skull"] == by_name["Bone-Marrow"]
    assert [siam.names[c] for c in groups[by_name["CSF"]].nonzero().flatten()] == ["CSF", "Ventricular-CSF"]
    assert [siam.names[c] for c in groups[by_name["GM"]].nonzero().flatten()] == ["GM", "Cerebellar-GM"]
    assert by_name["Deep-GM"] == by_name["Deep-WM"]
    assert len(groups) == len(set(by_name.values())) == 9


def test_a_template_that_can_tell_everything_but_one_thing_apart() -> None:
    siam = load_scheme("siam16")
    index, groups = group_table(siam, siam)
    assert index.tolist() == list(range(17))
    assert torch.equal(groups, torch.eye(17, dtype=torch.bool))
