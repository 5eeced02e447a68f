"""AdamW, or Muon for the convolution kernels with AdamW for the rest, behind one interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from synthseg.config import OptimiserConfig


@torch.no_grad()
def orthogonalise(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of a (rows, columns) matrix by about 1 (quintic Newton-Schulz iteration).

    Every iterate is a polynomial of the Gram matrix times the input, so the iteration runs on the small Gram matrix
    and touches the wide matrix twice instead of ten times.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.float().mT if matrix.shape[0] > matrix.shape[1] else matrix.float()
    gram = wide @ wide.mT
    norm = gram.diagonal().sum().sqrt() + 1e-7
    gram = gram / norm**2
    eye = torch.eye(len(gram), device=gram.device)
    total = eye / norm
    for _ in range(steps):
        factor = a * eye + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    out = total @ wide
    return out.mT if matrix.shape[0] > matrix.shape[1] else out


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per kernel (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    Groups with ``muon=True`` hold convolution kernels, seen as (out, in * k**3) matrices; the other groups get AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(
            groups, {"lr": 1e-3, "muon": False, "weight_decay": 0.0, "momentum": 0.95, "betas": (0.9, 0.99)}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if group["muon"]:
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"])
                    flat = update.flatten(1)
                    direction = orthogonalise(flat).view_as(p)
                    p.add_(direction, alpha=-group["lr"] * max(1.0, flat.shape[0] / flat.shape[1]) ** 0.5)
                else:
                    first = state.setdefault("first", torch.zeros_like(p))
                    second = state.setdefault("second", torch.zeros_like(p))
                    count = state.setdefault("count", torch.zeros(()))
                    count += 1
                    beta1, beta2 = group["betas"]
                    first.lerp_(p.grad, 1 - beta1)
                    second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                    scale = math.sqrt(1 - beta2 ** float(count)) / (1 - beta1 ** float(count))
                    p.addcdiv_(first, second.sqrt().add_(1e-8), value=-group["lr"] * scale)


def make_optimiser(network: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Optimiser whose groups carry ``base_lr`` for the schedule. Biases and norms get no weight decay."""
    kernels = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim <= 1]
    if config.name == "muon":
        groups = [
            {"params": kernels, "muon": True, "lr": config.muon_learning_rate, "weight_decay": config.weight_decay},
            {"params": vectors, "muon": False, "lr": config.learning_rate},
        ]
        optimiser: torch.optim.Optimizer = Muon(groups)
    else:
        optimiser = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
    for group in optimiser.param_groups:
        group["base_lr"] = group["lr"]
    return optimiser


def learning_rate_factor(config: OptimiserConfig, step: int, steps: int) -> float:
    """Linear warm-up, then cosine to 1 % (Loshchilov and Hutter, ICLR 2017) or constant."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
