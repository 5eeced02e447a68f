"""Random draws, and the records that keep what was drawn."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Field3D(Record):
    """A coarse random field: shape (C, D, H, W) and its values, flattened."""

    shape: tuple[int, int, int, int]
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Field3D:
        return cls(shape=tuple(tensor.shape), values=tuple(tensor.flatten().tolist()))

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=device).reshape(self.shape)


class Draw:
    """Scalar draws from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def normal(self, std: float) -> float:
        return std * float(torch.randn((), generator=self.generator, dtype=torch.float64))

    def chance(self, probability: float) -> bool:
        return self.uniform(0.0, 1.0) < probability

    def seed(self) -> int:
        return int(torch.randint(2**62, (), generator=self.generator))

    def pick(self, weights: dict[str, float]) -> str:
        at = self.uniform(0.0, sum(weights.values()))
        for name, weight in weights.items():
            at -= weight
            if at < 0:
                return name
        return list(weights)[-1]

    def field(self, channels: int, extent_mm: tuple[float, ...], spacing_mm: float, std: float) -> Field3D:
        """Normal values on a lattice whose points are about ``spacing_mm`` apart."""
        lattice = [max(2, math.ceil(extent / spacing_mm) + 1) for extent in extent_mm]
        return Field3D.of(std * torch.randn((channels, *lattice), generator=self.generator))
