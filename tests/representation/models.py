"""Small models for tests of features."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.config import GeneratorConfig, NetworkConfig, TrainConfig
from synthseg.labels import load_scheme
from synthseg.networks.feature_file import save_features
from synthseg.networks.features import FeatureNetwork
from synthseg.volume import Volume

TINY = NetworkConfig(channels=(6, 5, 4), subpixel=2)


class Means(torch.nn.Module):
    """Features that are what the image is there: mean of each block, and -2 times that, at three levels."""

    channels = (2, 2, 2)
    multiple = 8
    config = SimpleNamespace(subpixel=2)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([F.avg_pool3d(image, cell), -2 * F.avg_pool3d(image, cell)], 1) for cell in (8, 4, 2)]


@dataclass(frozen=True)
class MeansModel:
    network: Means = field(default_factory=Means)
    voxel_size_mm: float = 1.0
    window: tuple[int, int, int] = (16, 24, 16)
    multiple: int = 8


def tiny_network(seed: int = 0, heads: dict[str, int] | None = None) -> FeatureNetwork:
    torch.manual_seed(seed)
    return FeatureNetwork(TINY, heads or {"segmentation": 17}).eval()


def write_model(path: Path, shape: tuple[int, int, int] = (32, 40, 32), voxel_size_mm: float = 4.0) -> Path:
    """A file of a network that was never trained."""
    config = TrainConfig(network=TINY, generator=GeneratorConfig(shape=shape, voxel_size_mm=voxel_size_mm))
    heads = {"segmentation": {"task": "segmentation", "labels": load_scheme("siam16").to_dict()}}
    save_features(path, tiny_network(), config, heads, {})
    return path


def oblique(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], origin_mm: np.ndarray) -> np.ndarray:
    """An affine of an (L, S, A) scan that is turned by 12 degrees."""
    c, s = np.cos(np.radians(12)), np.sin(np.radians(12))
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])
    order = np.array([[-1, 0, 0], [0, 0, 1], [0, 1, 0.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ order @ np.diag(spacing_mm)
    affine[:3, 3] = origin_mm - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def ball(
    affine: np.ndarray, shape: tuple[int, int, int], centre_mm: np.ndarray, radius_mm: float, edge_mm: float = 1.5
) -> Volume:
    """A bright ball with a soft edge at a place in mm, on black."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    place = index @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(place - centre_mm, axis=-1)
    return Volume((100 / (1 + np.exp((distance - radius_mm) / edge_mm))).astype(np.float32), affine)
