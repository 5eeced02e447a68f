"""AdamW, or Muon for the convolution kernels with AdamW for the rest, behind one interface."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from synthseg.config import OptimiserConfig

FALL = 0.4  # of the steps: in the last of them the rate of a trapezoid falls


def _inverse_roots(gram: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """For Gram matrices (..., R, R) the factors that bring the singular values of what they are of near 1.

    The quintic Newton-Schulz iteration of Muon. Every iterate is a polynomial of the Gram matrix times the input, so
    it runs on the small Gram matrix and touches the wide matrix twice instead of ten times.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].sqrt() + 1e-7
    gram = gram / norm**2
    eye = torch.eye(gram.shape[-1], device=gram.device)
    total = eye / norm
    for _ in range(steps):
        factor = a * eye + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    return total


def _wide(update: torch.Tensor) -> torch.Tensor:
    """A kernel (out, in, ...) as the matrix (out, in * k**3), or its transpose if that has fewer rows."""
    flat = update.flatten(1)
    return flat.mT if flat.shape[0] > flat.shape[1] else flat


@torch.no_grad()
def orthogonalise(updates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Replace the singular values of kernels (out, in, ...), as matrices (out, in * k**3), by about 1.

    Kernels whose Gram matrices have one size go through the iteration together.
    """
    wide = [_wide(update).float() for update in updates]
    grams = [matrix @ matrix.mT for matrix in wide]
    alike: dict[int, list[int]] = defaultdict(list)
    for number, gram in enumerate(grams):
        alike[len(gram)].append(number)
    result = list(updates)
    for numbers in alike.values():
        factors = _inverse_roots(torch.stack([grams[number] for number in numbers]))
        for number, factor in zip(numbers, factors, strict=True):
            flat = factor @ wide[number]
            tall = wide[number].shape != updates[number].flatten(1).shape
            result[number] = (flat.mT if tall else flat).reshape(updates[number].shape)
    return result


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
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adamw)(group, params, [p.grad for p in params])

    def _kept(self, params: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        return [self.state[p].setdefault(name, torch.zeros_like(p)) for p in params]

    def _muon(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        momenta = self._kept(params, "momentum")
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        directions = orthogonalise(torch._foreach_lerp(grads, momenta, group["momentum"]))
        rates = [-group["lr"] * max(1.0, len(p) / p[0].numel()) ** 0.5 for p in params]
        torch._foreach_mul_(directions, rates)
        torch._foreach_add_(params, directions)

    def _adamw(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        firsts, seconds = self._kept(params, "first"), self._kept(params, "second")
        beta1, beta2 = group["betas"]
        scales = []
        for p in params:
            # on the CPU, also after a resume has brought it to the device of the weight: reading it waits for nothing
            count = self.state[p]["count"] = self.state[p].get("count", torch.zeros(())).cpu() + 1
            scales.append(-group["lr"] * math.sqrt(1 - beta2 ** float(count)) / (1 - beta1 ** float(count)))
        torch._foreach_lerp_(firsts, grads, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(params, firsts, roots, scales)


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
    """Linear warm-up, then cosine to 1 % (Loshchilov and Hutter, ICLR 2017), constant, or a trapezoid.

    The trapezoid is constant, then linear to 1 % over the last ``FALL`` of the steps (Hägele et al., NeurIPS 2024).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "trapezoid":
        return min(1.0, 0.01 + 0.99 * max(0.0, 1 - step / steps) / FALL)
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
