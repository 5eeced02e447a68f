"""The layers of this package give what PyTorch's own give, value and gradient, in any memory layout."""

import pytest
import torch

from synthseg.config import NetworkConfig
from synthseg.networks.backbone import SegmentationNetwork, depth_to_space, space_to_depth, weights_of
from synthseg.networks.layers import InstanceNorm, PointwiseConvolution

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def features(layout: torch.memory_format, images: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    values = 3 + 2 * torch.randn(images, 6, 5, 4, 7, dtype=torch.float64)
    return values.contiguous(memory_format=layout).requires_grad_()


def gradients(layer: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    result = layer(image)
    weights = [image, *layer.parameters()]
    found = torch.autograd.grad((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum(), weights)
    return result, list(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 3])
def test_instance_norm_is_that_of_pytorch(layout: torch.memory_format, images: int) -> None:
    plain, ours = torch.nn.InstanceNorm3d(6, affine=True).double(), InstanceNorm(6, affine=True).double()
    with torch.no_grad():
        for layer in (plain, ours):
            layer.weight.copy_(torch.arange(6.0) + 1)
            layer.bias.copy_(torch.arange(6.0) - 2)
    image = features(layout, images)
    for got, expected in zip(gradients(ours, image)[1], gradients(plain, image)[1], strict=True):
        torch.testing.assert_close(got, expected)
    result = ours(image)
    torch.testing.assert_close(result, plain(image))
    assert result.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.eval()(image), result)  # an image is normed by itself, in training or not


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 3])
def test_pointwise_convolution_is_that_of_pytorch(layout: torch.memory_format, images: int) -> None:
    ours = PointwiseConvolution(6, 9, 1).double()
    plain = torch.nn.Conv3d(6, 9, 1).double()
    plain.load_state_dict(ours.state_dict())
    image = features(layout, images)
    expected, of_plain = gradients(plain, image)
    got, of_ours = gradients(ours, image)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    for mine, theirs in zip(of_ours, of_plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    ours.rows = torch.tensor([7, 0, 2])
    torch.testing.assert_close(ours(image), expected[:, [7, 0, 2]])


@pytest.mark.parametrize("architecture", ["dynunet", "segresnet", "unet"])
def test_scored_cells_are_those_of_the_whole(architecture: str) -> None:
    torch.manual_seed(0)
    config = NetworkConfig(architecture=architecture, channels=(8, 16, 32))  # type: ignore[arg-type]
    network = SegmentationNetwork(config, n_classes=3)
    image, cells = torch.rand(2, 1, *[2 * network.multiple] * 3), torch.tensor([6, 1])
    with torch.no_grad():
        whole, some = network(image), network(image, cells=cells)
        expected = space_to_depth(whole, 2).unflatten(1, (3, 8))[:, :, cells]
        torch.testing.assert_close(some, expected)
        torch.testing.assert_close(network(image), whole)  # nothing is left behind of the choice
        torch.testing.assert_close(depth_to_space(space_to_depth(whole, 2), 2), whole)


def test_replaced_layers_keep_their_names_and_are_counted_once() -> None:
    network = SegmentationNetwork(NetworkConfig(channels=(8, 16, 32)), n_classes=3)
    names = list(weights_of(network))
    assert {"body.output_block.conv.conv.weight", "body.input_block.norm1.weight"} <= set(names)
    assert not any(type(module) is torch.nn.InstanceNorm3d for module in network.modules())
    assert isinstance(network.get_submodule("body.output_block.conv.conv"), PointwiseConvolution)
    assert len({id(tensor) for tensor in weights_of(network).values()}) == len(names)
