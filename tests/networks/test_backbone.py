"""Every architecture of the configuration keeps one contract: (B, 1, D, H, W) to (B, classes, D, H, W)."""

import itertools
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from synthseg.config import NetworkConfig
from synthseg.errors import ConfigError
from synthseg.labels import Label, LabelTable, load_scheme
from synthseg.networks.backbone import (
    SegmentationNetwork,
    depth_to_space,
    grown_names,
    load_weights,
    same_classes,
    space_to_depth,
    transfer,
    weights_of,
    widened,
    with_classes,
)

CHANNELS = (8, 16, 32)
TINY = NetworkConfig(channels=CHANNELS)
NETWORKS = [
    (architecture, norm, subpixel)
    for architecture, norm, subpixel in itertools.product(
        ("dynunet", "segresnet", "unet"), ("instance", "group", "batch"), (1, 2)
    )
    if (architecture, norm) != ("dynunet", "group") and (architecture, norm, subpixel) != ("unet", "group", 1)
]


def make(architecture: Any = "dynunet", norm: Any = "instance", subpixel: Any = 2, **more: Any) -> SegmentationNetwork:
    torch.manual_seed(0)
    config = NetworkConfig(architecture=architecture, norm=norm, subpixel=subpixel, channels=CHANNELS, **more)
    return SegmentationNetwork(config, n_classes=3)


# ---------------------------------------------------------------- space to depth


def test_space_to_depth_by_hand() -> None:
    image = torch.arange(2 * 4 * 6 * 2.0).reshape(1, 2, 4, 6, 2)
    out = space_to_depth(image, 2)
    assert out.shape == (1, 16, 2, 3, 1)
    for c, i, j, k in itertools.product(range(2), range(2), range(2), range(2)):
        channel = c * 8 + i * 4 + j * 2 + k
        assert torch.equal(out[0, channel], image[0, c, i::2, j::2, k::2])


def test_one_axis_at_a_time_is_pixel_unshuffle() -> None:
    # In a volume that is constant over pairs of slices, both sub-slices show the 2D operation of torch.
    image = torch.rand(2, 3, 4, 6, 8)
    for axis in (2, 3, 4):
        flat = image.select(axis, 0)
        thick = flat.unsqueeze(axis).repeat_interleave(2, axis)
        out = space_to_depth(thick, 2).reshape(2, 3, 2, 2, 2, *[n // 2 for n in thick.shape[2:]])
        for part in range(2):
            ours = out.select(axis, part).select(axis + 2, 0)  # (B, C, 2, 2, a, b)
            expected = torch.pixel_unshuffle(flat, 2).reshape(ours.shape)
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_depth_to_space_is_the_inverse(factor: int) -> None:
    image = torch.rand(2, 3, 2 * factor, 3 * factor, 5 * factor)
    assert torch.equal(depth_to_space(space_to_depth(image, factor), factor), image)
    features = torch.rand(2, 4 * factor**3, 2, 3, 5)
    assert torch.equal(space_to_depth(depth_to_space(features, factor), factor), features)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("architecture", "norm", "subpixel"), NETWORKS)
def test_shapes_and_gradients(architecture: str, norm: str, subpixel: int) -> None:
    network = make(architecture, norm, subpixel)
    assert network.multiple == 4 * subpixel
    image = torch.rand(2, 1, 16, 24, 32)
    logits = network(image)
    assert logits.shape == (2, 3, 16, 24, 32)
    assert logits.dtype == torch.float32
    (logits * torch.randn(logits.shape)).sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not silent
    flat = [name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()]
    # a bias before a normalisation, or a slope that met no negative value, may get zeros; kernels may not
    assert not [name for name in flat if name.endswith("weight") and dict(network.named_parameters())[name].ndim > 1]


def test_residual_dynunet() -> None:
    network = make(residual=True)
    assert network(torch.rand(1, 1, 8, 16, 24)).shape == (1, 3, 8, 16, 24)
    plain, other = (sum(p.numel() for p in make(residual=r).parameters()) for r in (False, True))
    assert other > plain  # the shortcuts


def test_some_voxels_of_each_block() -> None:
    network = make().eval()
    image, cells = torch.rand(2, 1, 8, 16, 24), torch.tensor([6, 1])
    with torch.no_grad():
        whole, some = network(image), network(image, cells=cells)
    assert some.shape == (2, 3, 2, 4, 8, 12)
    # cell 6 of a block is (1, 1, 0), cell 1 is (0, 0, 1)
    torch.testing.assert_close(some[:, :, 0], whole[:, :, 1::2, 1::2, 0::2])
    torch.testing.assert_close(some[:, :, 1], whole[:, :, 0::2, 0::2, 1::2])


def test_a_grown_network_keeps_the_old_one_inside() -> None:
    small = make(subpixel=1)
    large = SegmentationNetwork(NetworkConfig(channels=(4, *CHANNELS), subpixel=1), n_classes=3)
    _, fresh = transfer(large, grown_names(weights_of(small)))
    assert fresh
    assert all(
        "input_block" in n or "output_block" in n or "upsamples.2" in n or "downsamples.0.conv1" in n for n in fresh
    )
    a, b = cast(Any, small.body), cast(Any, large.body)
    old = [*a.downsamples, a.bottleneck, *a.upsamples]
    new = [*b.downsamples[1:], b.bottleneck, *b.upsamples[:-1]]
    for was, now in zip(old, new, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(was.parameters(), now.parameters(), strict=True))


@pytest.mark.parametrize(("subpixel", "norm"), [(1, "instance"), (2, "instance"), (2, "batch")])
def test_a_wider_network_computes_the_same_at_first_and_learns_with_all_it_has(subpixel: Any, norm: Any) -> None:
    small = make(subpixel=subpixel, norm=norm)
    small(torch.rand(2, 1, 16, 24, 32))  # batch norm has seen something
    torch.manual_seed(1)
    wide = SegmentationNetwork(NetworkConfig(channels=(12, 16, 40), subpixel=subpixel, norm=norm), n_classes=3)
    weights = widened(weights_of(small), wide)
    assert transfer(wide, weights)[1] == []
    image = torch.rand(2, 1, 16, 24, 32)
    torch.testing.assert_close(wide.eval()(image), small.eval()(image), rtol=1e-4, atol=1e-4)
    wide(image).square().mean().backward()
    last = dict(wide.named_parameters())["body.output_block.conv.conv.weight"]
    assert last.grad is not None
    assert (last.grad.flatten(1).norm(dim=0) > 0).all()  # the new channels too


def test_a_narrower_network_is_not_widened() -> None:
    narrow = SegmentationNetwork(NetworkConfig(channels=(8, 12, 32)), n_classes=3)
    small = weights_of(make())
    weights = widened(small, narrow)
    name = "body.downsamples.0.conv1.conv.weight"
    assert torch.equal(weights[name], small[name])
    assert name in transfer(narrow, weights)[1]


@pytest.mark.parametrize("architecture", ["dynunet", "segresnet", "unet"])
def test_neighbours_in_a_batch_do_not_matter(architecture: str) -> None:
    network = make(architecture).eval()
    images = torch.rand(2, 1, 16, 24, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images)[1:], network(images[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subpixel", [1, 2])
def test_wrong_sides_are_refused(subpixel: int) -> None:
    network = make(subpixel=subpixel)
    side = network.multiple
    for axis in range(3):
        shape = [2 * side] * 3
        shape[axis] += side // 2
        with pytest.raises(ValueError, match=f"divisible by {side}"):
            network(torch.zeros(1, 1, *shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "dynunet", "norm": "group"}, "group"),
        ({"architecture": "segresnet", "channels": (8, 16, 24)}, r"\[8, 16, 32\]"),
        ({"architecture": "dynunet", "channels": (8, 16)}, "3 levels"),
        ({"architecture": "unet", "channels": (8,)}, "network"),
        ({"architecture": "unet", "norm": "group", "channels": (6, 12)}, "network"),
        ({"architecture": "segresnet", "norm": "group", "channels": (6, 12)}, "network"),
    ],
)
def test_networks_that_cannot_be_built_are_config_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SegmentationNetwork(NetworkConfig(**{"channels": CHANNELS, **changes}), 3)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(("architecture", "norm"), [("dynunet", "batch"), ("segresnet", "group"), ("unet", "instance")])
def test_every_tensor_is_held_once(architecture: str, norm: str) -> None:
    network = make(architecture, norm)
    weights = weights_of(network)
    assert len({t.data_ptr() for t in weights.values() if t.numel()}) == len([t for t in weights.values() if t.numel()])
    pointers = {t.data_ptr() for t in network.state_dict().values() if t.numel()}
    assert pointers == {t.data_ptr() for t in weights.values() if t.numel()}


def test_weights_are_copied_not_shared() -> None:
    network, other = make(), make()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    image = torch.rand(1, 1, 8, 8, 16)
    load_weights(network, weights_of(other))
    torch.testing.assert_close(network(image), other(image))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(network.parameters()), next(other.parameters()))


def test_weights_that_do_not_fit_are_named() -> None:
    network = make()
    weights = {k: v.clone() for k, v in weights_of(network).items()}
    name = next(iter(weights))
    with pytest.raises(ValueError, match="missing"):
        load_weights(network, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match="extra"):
        load_weights(network, weights | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        load_weights(network, weights | {name: torch.zeros(1, 2, 3)})


def test_transfer_keeps_what_fits() -> None:
    source, target = make(), SegmentationNetwork(NetworkConfig(channels=CHANNELS), n_classes=5)
    before = {k: v.clone() for k, v in weights_of(target).items()}
    count, fresh = transfer(target, weights_of(source))
    assert 0 < len(fresh) < 6  # the last layer alone knows the number of classes
    assert count == len(before) - len(fresh)
    for name, tensor in weights_of(target).items():
        assert torch.equal(tensor, before[name] if name in fresh else weights_of(source)[name])


@pytest.mark.parametrize("architecture", ["dynunet", "segresnet"])
def test_finer_classes_start_as_equal_shares_of_the_old_ones(architecture: Any) -> None:
    coarse, fine = load_scheme("siam16"), load_scheme("head45")
    config = TINY.model_copy(update={"architecture": architecture})
    old, new = SegmentationNetwork(config, len(coarse)), SegmentationNetwork(config, len(fine))
    _, fresh = transfer(new, with_classes(weights_of(old), coarse, fine))
    assert fresh == []
    image = torch.rand(1, 1, *[2 * TINY.multiple] * 3)
    with torch.inference_mode():
        before, after = old.eval()(image).softmax(1), new.eval()(image).softmax(1)
    folded = torch.einsum("bcdhw,ck->bkdhw", after, torch.from_numpy(fine.groups(coarse)).float())
    torch.testing.assert_close(folded, before, rtol=0, atol=1e-5)
    left, right = fine.index_of[17], fine.index_of[53]
    torch.testing.assert_close(after[:, left], before[:, 12] / 2, rtol=0, atol=1e-5)
    torch.testing.assert_close(after[:, left], after[:, right])


def renamed(table: LabelTable, *, related: bool = False) -> LabelTable:
    """A table with the same ids in the same order, of other things."""
    to = {table.name: (0,)} if related else {}
    return LabelTable("other", tuple(replace(x, name=f"Part-{x.id}", to=to) for x in table.labels))


@pytest.mark.parametrize(("architecture", "norm", "subpixel"), NETWORKS)
def test_all_that_is_as_wide_as_the_classes_starts_anew_for_others(architecture: Any, norm: Any, subpixel: Any) -> None:
    """Also where the number of classes stays, so that the shapes fit."""
    three, five = (LabelTable("three", tuple(Label(i, f"L{i}") for i in range(n))) for n in (3, 5))
    weights = weights_of(make(architecture, norm, subpixel))
    config = NetworkConfig(architecture=architecture, norm=norm, subpixel=subpixel, channels=CHANNELS)
    wider = weights_of(SegmentationNetwork(config, len(five)))
    as_wide = {name for name, tensor in weights.items() if wider[name].shape != tensor.shape}
    left_out = set(weights) - set(with_classes(weights, three, renamed(three)))
    assert as_wide <= left_out
    # with the block of UNet go the slope of its activation and the counter of its norm
    assert all(weights[name].numel() == 1 for name in left_out - as_wide)
    assert architecture == "unet" or left_out == as_wide
    shares = set(weights) - set(with_classes(weights, three, renamed(three, related=True)))
    assert shares == (left_out if architecture == "unet" else set())


def test_the_same_classes_keep_the_last_layer() -> None:
    siam = load_scheme("siam16")
    weights = weights_of(SegmentationNetwork(TINY, len(siam)))
    recoloured = LabelTable("mine", tuple(replace(x, color=(1, 2, 3), to={}) for x in siam.labels))
    assert same_classes(siam, recoloured)
    kept = with_classes(weights, siam, recoloured)
    assert set(kept) == set(weights)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.items())
    assert not same_classes(siam, renamed(siam))
    assert not same_classes(siam, LabelTable("mine", (*siam.labels[:2], siam.labels[3], siam.labels[2])))


def test_classes_that_do_not_relate_start_anew() -> None:
    coarse, fine = load_scheme("siam16"), load_scheme("head45")
    weights = weights_of(SegmentationNetwork(TINY, len(fine)))
    kept = with_classes(weights, fine, coarse)  # a class of siam16 is several of head45: nothing to start from
    assert set(weights) - set(kept) == {name for name in weights if "output_block" in name} != set()
