"""The segmentation network: a MONAI body between a space-to-depth stem and a subpixel head.

With ``subpixel`` 2, eight input voxels become eight channels, the body works at twice the voxel size and the head
predicts the classes of all eight voxels (sub-pixel convolution: Shi et al., CVPR 2016; the stem is its inverse).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from synthseg.config import NetworkConfig
from synthseg.errors import ConfigError
from synthseg.labels import LabelTable
from synthseg.networks import layers

# What is as wide as the classes: the last layer of DynUNet and of SegResNet; of UNet the outermost upsampling block,
# whose second convolution mixes the classes.
MIXED = "body.model.2."
CLASS_LAYERS = ("body.output_block.", "body.conv_final.2.", MIXED)


def space_to_depth(image: torch.Tensor, factor: int) -> torch.Tensor:
    """(B, C, D, H, W) to (B, C * factor**3, D / factor, H / factor, W / factor)."""
    b, c, d, h, w = image.shape
    f = factor
    blocks = image.reshape(b, c, d // f, f, h // f, f, w // f, f)
    return blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * f**3, d // f, h // f, w // f)


def depth_to_space(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Inverse of ``space_to_depth``."""
    b, c, d, h, w = features.shape
    f = factor
    blocks = features.reshape(b, c // f**3, f, f, f, d, h, w)
    return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // f**3, d * f, h * f, w * f)


def make_body(config: NetworkConfig, in_channels: int, out_channels: int) -> nn.Module:
    from monai.networks.nets import DynUNet, SegResNet, UNet

    channels = list(config.channels)
    levels = len(channels)
    norm: Any = {
        "instance": ("INSTANCE", {"affine": True}),
        "group": ("GROUP", {"num_groups": 8, "affine": True}),
        "batch": ("BATCH", {"affine": True}),
    }[config.norm]
    if config.architecture == "dynunet":
        if levels < 3:
            raise ConfigError(f"network.channels: dynunet needs at least 3 levels, got {channels}")
        if config.norm == "group":
            raise ConfigError("network.norm 'group' needs equal divisors on every level; use 'instance' with dynunet")
        return DynUNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=channels,
            norm_name=norm,
            res_block=config.residual,
        )
    if config.architecture == "unet":
        return UNet(
            spatial_dims=3,
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            strides=[2] * (levels - 1),
            num_res_units=2,
            norm=norm,
        )
    doubled = [channels[0] * 2**i for i in range(levels)]
    if channels != doubled:
        raise ConfigError(f"network.channels of segresnet double at each level: {doubled}, got {channels}")
    return SegResNet(
        init_filters=channels[0],
        in_channels=in_channels,
        out_channels=out_channels,
        norm=norm,
        blocks_down=[1, *[2] * (levels - 1)],
        blocks_up=[1] * (levels - 1),
    )


class SegmentationNetwork(nn.Module):
    """Normalised intensities (B, 1, D, H, W) to logits (B, n_classes, D, H, W); sides divisible by ``multiple``."""

    def __init__(self, config: NetworkConfig, n_classes: int) -> None:
        super().__init__()
        self.config = config
        self.n_classes = n_classes
        self.multiple = config.multiple
        cells = config.subpixel**3
        try:
            self.body = make_body(config, cells, n_classes * cells)
        except ValueError as error:
            raise ConfigError(
                f"network: {config.architecture} cannot be built with channels {list(config.channels)} and norm "
                f"'{config.norm}' ({' '.join(str(error).split())})"
            ) from None
        self._last = [layers.replace(self.body)]  # in a list, so that its weights are not listed twice

    def forward(self, image: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
        """All voxels; or, with ``cells``, only those at these positions inside the blocks of the subpixel head.

        ``cells`` (K,) indexes the ``subpixel**3`` voxels of a block. The result is then (B, n_classes, K, d, h, w),
        in the order of ``space_to_depth(target, subpixel)[:, cells]``: a training step need not score every voxel.
        """
        if any(n % self.multiple for n in image.shape[2:]):
            raise ValueError(f"sides must be divisible by {self.multiple}, got {tuple(image.shape)}")
        factor, last = self.config.subpixel, self._last[0]
        blocks = image if factor == 1 else space_to_depth(image, factor)
        if image.device.type == "cpu":
            blocks = blocks.contiguous(memory_format=torch.channels_last_3d)
        if cells is None:
            logits = self.body(blocks)
            return logits if factor == 1 else depth_to_space(logits, factor)
        if last is None:
            return self.body(blocks).unflatten(1, (self.n_classes, factor**3)).index_select(2, cells)
        first = torch.arange(self.n_classes, device=cells.device) * factor**3
        last.rows = (first[:, None] + cells).flatten()  # what is not scored is not computed
        try:
            return self.body(blocks).unflatten(1, (self.n_classes, len(cells)))
        finally:
            last.rows = None


def weights_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once (MONAI's DynUNet knows its layers under two names)."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights in place. Raises ValueError if a name is missing or left over, or a shape differs."""
    own = weights_of(network)
    if set(own) != set(weights):
        raise ValueError(
            f"missing {sorted(set(own) - set(weights))[:3]}, unknown {sorted(set(weights) - set(own))[:3]}"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}")
        tensor.copy_(weights[name])


def grown_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a DynUNet under the names that they have in one with a further, finer level outside.

    The old first block becomes the second level, and so on inwards, so that each level keeps its physical scale
    (progressive growing: Karras et al., ICLR 2018). The new outer level starts anew.
    """
    renamed = {}
    for name, tensor in weights.items():
        part, _, rest = name.removeprefix("body.").partition(".")
        if part == "output_block":
            continue
        if part == "input_block":
            renamed[f"body.downsamples.0.{rest}"] = tensor
        elif part == "downsamples":
            level, _, rest = rest.partition(".")
            renamed[f"body.downsamples.{int(level) + 1}.{rest}"] = tensor
        else:
            renamed[name] = tensor
    return renamed


@torch.no_grad()
def widened(weights: Mapping[str, torch.Tensor], network: SegmentationNetwork) -> dict[str, torch.Tensor]:
    """Weights of a DynUNet for one of as many levels and more channels, ``network``, that computes the same at first.

    The new channels start as those of ``network`` do, and nothing old reads them yet (Chen et al., ICLR 2016; there
    the new ones are copies). Tensors that the network does not know, or that are wider than its own, stay as they are.
    """
    wide = dict(weights)
    for name, fresh in weights_of(network).items():
        old = weights.get(name)
        if (
            old is None
            or old.ndim == 0
            or old.ndim != fresh.ndim
            or any(o > n for o, n in zip(old.shape, fresh.shape, strict=True))
        ):
            continue
        new = fresh.detach().clone()
        if old.ndim == 1:
            new[: len(old)] = old
        elif ".transp_conv." in name:  # (in, out, ...)
            new[:, : old.shape[1]] = 0
            new[: old.shape[0], : old.shape[1]] = old
        else:  # (out, in, ...); behind a skip the inputs are two halves: from below, and from the encoder
            halves = 2 if name.startswith("body.upsamples.") and ".conv_block.conv1." in name else 1
            new[: old.shape[0]] = 0
            for half, part in enumerate(old.chunk(halves, 1)):
                start = half * (new.shape[1] // halves)
                new[: old.shape[0], start : start + part.shape[1]] = part
        wide[name] = new
    return wide


def same_classes(one: LabelTable, other: LabelTable) -> bool:
    """Whether the classes of both have the same ids and names, in the same order."""
    return [(label.id, label.name) for label in one.labels] == [(label.id, label.name) for label in other.labels]


@torch.no_grad()
def with_classes(
    weights: Mapping[str, torch.Tensor], source: LabelTable, target: LabelTable
) -> dict[str, torch.Tensor]:
    """Weights whose last layer, for the classes of ``source``, is made one for those of ``target``.

    The same classes keep it. Where the scheme of ``target`` says which class of ``source`` each of its labels is part
    of, the label starts as an equal share of that class: left and right hippocampus as half of the hippocampus each,
    so that the new network says of the old classes exactly what the old one said. Otherwise the last layer is left
    out, to start anew; so is the last block of a UNet, which mixes the classes.
    """
    if same_classes(source, target):
        return dict(weights)
    last = {name: tensor for name, tensor in weights.items() if name.startswith(CLASS_LAYERS)}
    kept = {name: tensor for name, tensor in weights.items() if name not in last}
    mixed = any(name.startswith(MIXED) for name in last)
    if mixed or any(source.name not in label.to or len(label.to[source.name]) != 1 for label in target.labels):
        return kept
    part_of = torch.from_numpy(target.mapping(source))
    share = torch.bincount(part_of, minlength=len(source))[part_of].float().log()
    for name, tensor in last.items():
        classes = tensor.unflatten(0, (len(source), -1))[part_of].float()
        if name.endswith("bias"):
            classes = classes - share[:, None]
        kept[name] = classes.flatten(0, 1)
    return kept


@torch.no_grad()
def transfer(target: nn.Module, weights: Mapping[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Copy every tensor that fits by name and shape; returns how many, and the names that start anew."""
    own = weights_of(target)
    fitting = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
    for name in fitting:
        own[name].copy_(weights[name])
    return len(fitting), sorted(set(own) - set(fitting))
