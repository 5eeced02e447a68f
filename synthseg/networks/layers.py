"""Layers that compute what PyTorch's own do, in a layout that costs less on a CPU.

oneDNN convolves fastest with the channels last. PyTorch's instance norm brings them first again, and its convolution of
kernel size 1 copies a result of many channels twice; together these copies took more time than the arithmetic.
"""

from __future__ import annotations

import torch
from torch import nn


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm (Ulyanov et al., 2016) that keeps channels last: batch norm of each image by itself."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        images = [
            nn.functional.batch_norm(image, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for image in input.split(1)
        ]
        return images[0] if len(images) == 1 else torch.cat(images)


class PointwiseConvolution(nn.Conv3d):
    """Convolution of kernel size 1 as one matrix product, for all output channels or for those of ``rows``."""

    rows: torch.Tensor | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.flatten(1), self.bias
        assert bias is not None
        if self.rows is not None:
            weight, bias = weight[self.rows], bias[self.rows]
        if input.is_contiguous(memory_format=torch.channels_last_3d):
            columns = input.permute(0, 2, 3, 4, 1).flatten(1, 3).transpose(1, 2)  # a view; flatten(2) would copy
        else:
            columns = input.flatten(2)
        images = len(input)
        result = torch.baddbmm(bias[None, :, None], weight.expand(images, -1, -1), columns)
        return result.unflatten(2, input.shape[2:])


def replace(body: nn.Module) -> PointwiseConvolution | None:
    """Put these layers in the place of PyTorch's; weights and names stay. Returns the last layer if it is pointwise."""
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.InstanceNorm3d:
                setattr(parent, name, _like(child, InstanceNorm(child.num_features, child.eps, affine=child.affine)))
    kinds = (nn.Conv3d, nn.ConvTranspose3d)
    path, last = [(name, module) for name, module in body.named_modules() if isinstance(module, kinds)][-1]
    if type(last) is not nn.Conv3d or last.kernel_size != (1, 1, 1) or last.groups != 1 or last.bias is None:
        return None
    pointwise = PointwiseConvolution(last.in_channels, last.out_channels, 1)
    parent_path, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent_path), name, _like(last, pointwise))
    return pointwise


def _like(old: nn.Module, new: nn.Module) -> nn.Module:
    for key, parameter in old.named_parameters():
        setattr(new, key, parameter)
    return new
