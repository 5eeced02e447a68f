"""The body of a segmentation network as a maker of voxel features, with heads of one layer each.

A segmentation network is such a body with one head: its last layer. Brain-ID (Liu et al., ECCV 2024) serves every task
by one layer on the features of one body.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from synthseg.config import NetworkConfig
from synthseg.errors import ConfigError
from synthseg.networks import layers
from synthseg.networks.backbone import depth_to_space, make_body, space_to_depth

LAST = "body.output_block.conv.conv."  # the last layer of a segmentation network with this body


class FeatureNetwork(nn.Module):
    """Intensities (B, 1, D, H, W) in [0, 1] to features of each decoder level, and heads on the finest of them.

    Parameters
    ----------
    config : its body, a DynUNet.
    heads : name and output channels of each head. More are added by `add_head`.

    Attributes
    ----------
    channels : channels of each level of the decoder, coarsest (the bottleneck) first; the last are the features.
    multiple : sides of the image must be divisible by this.

    Raises ConfigError if the body is of another architecture.
    """

    def __init__(self, config: NetworkConfig, heads: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if config.architecture != "dynunet":
            raise ConfigError(
                f"network.architecture: features are read from the decoder of a dynunet, got {config.architecture}"
            )
        self.config = config
        self.multiple = config.multiple
        self.channels = tuple(reversed(config.channels))
        self.body = make_body(config, config.subpixel**3, 1)
        self.body.output_block = nn.Identity()
        layers.replace(self.body)
        self.heads = nn.ModuleDict()
        for name, count in (heads or {}).items():
            self.add_head(name, count)

    def add_head(self, name: str, channels: int) -> None:
        """A new head of one layer: a pointwise convolution to ``channels`` values for each voxel of the image."""
        self.heads[name] = layers.PointwiseConvolution(self.channels[-1], channels * self.config.subpixel**3, 1)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Features (B, C_l, d_l, h_l, w_l) of each level, coarsest first.

        The finest have sides 1 / ``subpixel`` of those of the image; each level before has half the sides of the next.
        """
        if any(n % self.multiple for n in image.shape[2:]):
            raise ValueError(f"sides must be divisible by {self.multiple}, got {tuple(image.shape)}")
        factor = self.config.subpixel
        blocks = image if factor == 1 else space_to_depth(image, factor)
        if image.device.type == "cpu":
            blocks = blocks.contiguous(memory_format=torch.channels_last_3d)
        found: list[torch.Tensor] = []
        decoder: list[nn.Module] = [self.body.bottleneck, *self.body.upsamples]  # type: ignore[list-item, misc]
        hooks = [part.register_forward_hook(lambda _m, _i, output: found.append(output)) for part in decoder]
        try:
            self.body(blocks)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def head(self, name: str, features: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
        """Values (B, n, D, H, W) of a head for all voxels, from the finest features.

        With ``cells`` (K,), (B, n, K, d, h, w): only the voxels at these positions of the subpixel blocks, in the
        order of ``space_to_depth(target, subpixel)[:, cells]``.
        """
        layer, factor = self.heads[name], self.config.subpixel
        assert isinstance(layer, layers.PointwiseConvolution)
        if cells is None:
            values = layer(features)
            return values if factor == 1 else depth_to_space(values, factor)
        count = layer.out_channels // factor**3
        first = torch.arange(count, device=cells.device) * factor**3
        layer.rows = (first[:, None] + cells).flatten()
        try:
            return layer(features).unflatten(1, (count, len(cells)))
        finally:
            layer.rows = None


def feature_weights(weights: Mapping[str, torch.Tensor], head: str = "segmentation") -> dict[str, torch.Tensor]:
    """Weights of a segmentation network under the names that they have in a FeatureNetwork: the last is a head."""
    return {
        f"heads.{head}.{name.removeprefix(LAST)}" if name.startswith(LAST) else name: tensor
        for name, tensor in weights.items()
    }


def segmentation_weights(weights: Mapping[str, torch.Tensor], head: str = "segmentation") -> dict[str, torch.Tensor]:
    """Inverse of `feature_weights`: body and one head as a segmentation network; other heads are left out."""
    own = f"heads.{head}."
    return {
        LAST + name.removeprefix(own) if name.startswith(own) else name: tensor
        for name, tensor in weights.items()
        if name.startswith(("body.", own))
    }


def heads_of(weights: Mapping[str, torch.Tensor], cells: int) -> dict[str, int]:
    """Name and output channels of the heads among the weights of a FeatureNetwork with ``cells`` voxels a block."""
    return {
        name.split(".")[1]: tensor.shape[0] // cells
        for name, tensor in weights.items()
        if name.startswith("heads.") and name.endswith(".weight")
    }
