"""Where the losses lead free embeddings: class means at equal angles, or not (Jiang et al., arXiv 2311.05139).

Twenty-four embeddings of six classes in five dimensions, which begin collapsed to two, optimised directly by Adam. In
the unit ball, hard negatives reach the equiangular frame in 100 steps. Without hard negatives the frame is reached too,
but later. Without normalisation it is not reached, with hard negatives or without. So far the paper's claim holds here:
normalisation is what it takes, and hard negatives make it quick. Of twenty classes, all of this holds in the ball after
600 steps.
"""

from collections.abc import Callable

import pytest
import torch

from synthseg.training.contrastive import LOSSES, to_ball, to_sphere

CLASSES, EACH = 6, 4
BETA, BEGIN = 10.0, 2
Step = Callable[[torch.Tensor], torch.Tensor]


def unchanged(embeddings: torch.Tensor) -> torch.Tensor:
    return embeddings


PROJECTIONS: dict[str, Step] = {"sphere": to_sphere, "ball": to_ball, "none": unchanged}


def optimised(
    where: str, beta: float, steps: int, classes: int = CLASSES
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What three runs lead to, (3,) each.

    The mean deviation of the cosines of class means from -1 / (C - 1), the effective rank of the class means, and the
    mean distance of embeddings from the mean of their class.
    """
    project, runs = PROJECTIONS[where], []
    for seed in (0, 1, 2):
        source = torch.Generator().manual_seed(seed)
        shapes = ((classes * EACH, BEGIN), (BEGIN, classes - 1))
        runs.append(torch.randn(shapes[0], generator=source) @ torch.randn(shapes[1], generator=source))
    free = torch.stack(runs).requires_grad_()
    labels = torch.arange(classes).repeat_interleave(EACH)
    same = labels[:, None] == labels
    optimiser = torch.optim.Adam([free], lr=0.1)
    for _ in range(steps):
        loss = LOSSES["hscl"](project(free), same, ~same, temperature=1.0, beta=beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    z = project(free.detach())
    means = z.unflatten(1, (classes, EACH)).mean(2)
    unit = means / means.norm(dim=2, keepdim=True)
    cosines = (unit @ unit.mT)[:, ~torch.eye(classes, dtype=torch.bool)]
    energy = torch.linalg.svdvals(means - means.mean(1, keepdim=True)) ** 2
    share = (energy / energy.sum(1, keepdim=True)).clamp_min(1e-12)
    rank = torch.exp(-(share * share.log()).sum(1))
    return (cosines + 1 / (classes - 1)).abs().mean(1), rank, (z - means[:, labels]).norm(dim=2).mean(1)


def test_hard_negatives_reach_equal_angles() -> None:
    deviation, rank, spread = optimised("ball", BETA, 100)
    assert (deviation < 0.02).all()
    assert (rank > CLASSES - 1.01).all()
    assert (spread < 0.03).all()
    assert (optimised("sphere", BETA, 200)[0] < 0.005).all()


def test_without_hard_negatives_it_takes_longer() -> None:
    early, rank, _ = optimised("ball", 0.0, 100)
    assert (early > 0.03).all()
    assert (rank < CLASSES - 1.02).all()
    late, _, _ = optimised("ball", 0.0, 250)
    assert (late < 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 5.0, 30.0])
def test_twenty_classes_need_hard_negatives_to_arrive_in_time(beta: float) -> None:
    deviation, rank, _ = optimised("ball", beta, 600, classes=20)
    arrived = deviation < 0.0005
    assert arrived.all() if beta else not arrived.any()
    assert (rank > 18.99).all() if beta else (rank < 18.97).all()


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_without_normalisation_the_angles_stay_unequal(beta: float) -> None:
    deviation, rank, spread = optimised("none", beta, 200)
    assert (deviation > 0.2).all()
    assert (rank < CLASSES - 2).all()
    assert (spread > 0.3).all()
