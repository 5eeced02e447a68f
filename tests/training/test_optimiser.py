"""Muon, AdamW and the schedule."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from synthseg.config import OptimiserConfig
from synthseg.training.optimiser import Muon, learning_rate_factor, make_optimiser, orthogonalise


def newton_schulz(matrix: np.ndarray, steps: int = 5) -> np.ndarray:
    """The iteration as published, on the wide matrix itself, in float64."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("shape", [(8, 8), (16, 54), (54, 16), (1, 27), (27, 1), (32, 864)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = 1e-3 * torch.randn(shape, generator=torch.manual_seed(0))
    out = orthogonalise([matrix])[0]
    assert out.shape == shape
    np.testing.assert_allclose(out, newton_schulz(matrix.double().numpy()), atol=2e-3)
    values = np.linalg.svd(out.numpy(), compute_uv=False)
    before = np.linalg.svd(matrix.numpy(), compute_uv=False)
    large = before > 0.05 * before.max()  # the quintic lifts the smallest ones more slowly
    assert values[large].min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e4])
def test_scale_does_not_matter(scale: float) -> None:
    matrix = torch.randn((6, 20), generator=torch.manual_seed(1))
    if scale > 1e-7:
        torch.testing.assert_close(orthogonalise([scale * matrix]), orthogonalise([matrix]), rtol=1e-2, atol=2e-3)
    assert torch.isfinite(orthogonalise([scale * matrix])[0]).all()


def test_no_gradient_no_direction() -> None:
    assert (orthogonalise([torch.zeros(3, 5)])[0] == 0).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_least_squares_loss_falls(name: Any) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 6)
    inputs = torch.randn(200, 12)
    targets = inputs @ torch.randn(12, 6) + 0.5
    optimiser = make_optimiser(
        layer, OptimiserConfig(name=name, learning_rate=0.05, muon_learning_rate=0.05, weight_decay=0)
    )
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_muon_steps_by_its_rate_whatever_the_gradient() -> None:
    # The step of a square kernel has singular values of about the rate.
    weight = nn.Parameter(torch.zeros(8, 2, 2, 2))  # (8, 8) as a matrix
    optimiser = Muon([{"params": [weight], "muon": True, "lr": 0.1}])
    for factor in (1e-4, 1e3):
        optimiser.state.clear()
        before = weight.detach().clone()
        weight.grad = factor * torch.randn(weight.shape, generator=torch.manual_seed(0))
        optimiser.step()
        moved = (weight.detach() - before).flatten(1)
        expected = -0.1 * newton_schulz(weight.grad.flatten(1).double().numpy())
        np.testing.assert_allclose(moved, expected, atol=1e-3)


def test_the_rest_gets_adamw() -> None:
    grads = [torch.randn(7, generator=torch.manual_seed(i)) for i in range(5)]
    ours, theirs = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    muon = Muon([{"params": [ours], "muon": False, "lr": 0.01, "weight_decay": 0.1}])
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step()
        adamw.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_biases_and_norms_do_not_decay(name: Any) -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.InstanceNorm3d(4, affine=True))
    optimiser = make_optimiser(network, OptimiserConfig(name=name, weight_decay=0.3))
    for group in optimiser.param_groups:
        assert group["base_lr"] == group["lr"]
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim > 1 else 0)
    assert sum(len(g["params"]) for g in optimiser.param_groups) == 4


def test_schedule_by_hand() -> None:
    config = OptimiserConfig(warmup_steps=4)
    factors = [learning_rate_factor(config, step, 104) for step in range(105)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[54] == pytest.approx(0.505)  # halfway down from 1 to 0.01
    assert factors[104] == pytest.approx(0.01)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(config, 500, 104) == pytest.approx(0.01)
    constant = OptimiserConfig(warmup_steps=2, schedule="constant")
    assert [learning_rate_factor(constant, step, 10) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert learning_rate_factor(OptimiserConfig(warmup_steps=0), 0, 10) == 1.0


def test_trapezoid_by_hand() -> None:
    config = OptimiserConfig(warmup_steps=10, schedule="trapezoid")
    factors = [learning_rate_factor(config, step, 100) for step in range(101)]
    assert factors[10:61] == [1.0] * 51
    assert factors[80] == pytest.approx(0.505)  # halfway down from 1 to 0.01
    assert factors[100] == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_kernels_that_go_through_the_iteration_together_are_as_alone() -> None:
    source = torch.manual_seed(3)
    shapes = [(8, 4, 3, 3, 3), (8, 16, 3, 3, 3), (4, 8, 2, 2, 2), (64, 8, 1, 1, 1), (8, 4, 3, 3, 3), (5, 3)]
    updates = [torch.randn(shape, generator=source) for shape in shapes]
    for together, update in zip(orthogonalise(updates), updates, strict=True):
        assert together.shape == update.shape
        torch.testing.assert_close(together, orthogonalise([update])[0], rtol=1e-4, atol=1e-5)
        matrix = update.flatten(1).double().numpy()
        np.testing.assert_allclose(together.flatten(1), newton_schulz(matrix), atol=2e-3)


def test_a_step_of_muon_by_hand() -> None:
    """Nesterov momentum, decoupled decay, and a rate that grows with the shape of a tall kernel."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 12, bias=False)
    before = layer.weight.detach().clone()
    optimiser = make_optimiser(
        layer, OptimiserConfig(name="muon", muon_learning_rate=0.1, weight_decay=0.5, learning_rate=1.0)
    )
    gradient = torch.randn(12, 3)
    layer.weight.grad = gradient.clone()
    optimiser.step()
    momentum = 0.05 * gradient
    direction = newton_schulz(torch.lerp(gradient, momentum, 0.95).double().numpy())
    expected = before.numpy() * (1 - 0.1 * 0.5) - 0.1 * 2.0 * direction
    np.testing.assert_allclose(layer.weight.detach(), expected, atol=1e-3)
