"""Where features lie: a landmark in mm, the network's own answer, tiles, levels; and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from synthseg import prediction
from synthseg.errors import CheckpointError, ConfigError, InputError
from synthseg.labels import load_scheme
from synthseg.networks.backbone import SegmentationNetwork, load_weights, weights_of
from synthseg.networks.features import segmentation_weights
from synthseg.representation import extraction
from synthseg.representation.extraction import Features, check_levels, extract, extract_image, head_mask
from synthseg.volume import Volume
from tests.representation.models import TINY, MeansModel, ball, oblique, tiny_network

SHAPE = (45, 37, 41)
SPACING_MM = (1.5, 2.0, 1.2)
CENTRE_MM = np.array([7.3, -21.6, 33.1])


def centre_of_mass_mm(values: torch.Tensor, affine: np.ndarray) -> np.ndarray:
    weight = values.double().clamp(min=0)
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in values.shape), indexing="ij"))
    centre = (index * weight).flatten(1).sum(1) / weight.sum()
    return affine[:3, :3] @ centre.numpy() + affine[:3, 3]


# ----------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("levels", [(-1,), (-2,), (-3,), (-3, -1), (-2, -3)])
def test_a_landmark_keeps_its_place(levels: tuple[int, ...]) -> None:
    affine = oblique(SHAPE, SPACING_MM, CENTRE_MM + np.array([3.1, -2.2, 1.4]))
    found = extract(ball(affine, SHAPE, CENTRE_MM, 16), MeansModel(), levels=levels)
    assert found.values.dtype == torch.float16
    assert found.levels == levels
    assert found.channels == (2,) * len(levels)
    assert found.values.shape == (2 * len(levels), *found.head.shape)
    cell = 2.0 * 2 ** (-1 - max(levels))
    assert found.spacing_mm == pytest.approx((cell,) * 3)
    np.testing.assert_allclose(np.sign(np.diag(found.affine)[:3]), 1)  # RAS+
    for channel in range(0, 2 * len(levels), 2):
        np.testing.assert_allclose(centre_of_mass_mm(found.values[channel], found.affine), CENTRE_MM, atol=0.2)
    np.testing.assert_allclose(centre_of_mass_mm(found.image, found.affine), CENTRE_MM, atol=0.2)


def test_features_and_head_are_the_segmentation_networks_answer() -> None:
    # Same padding, same voxels: the head on the features, cut to the image, is what `segment` computes.
    network = tiny_network()
    with torch.no_grad():
        network.heads["segmentation"].bias.normal_(generator=torch.Generator().manual_seed(0))
    whole = SegmentationNetwork(TINY, 17)
    load_weights(whole, segmentation_weights(weights_of(network)))
    grid = {"voxel_size_mm": 3.0, "window": (16, 16, 24), "multiple": network.multiple}
    model = _Model(network=network, **grid)
    image = torch.rand((19, 13, 30), generator=torch.Generator().manual_seed(1))
    at = np.array([[3.0, 0, 0, 11], [0, 3, 0, -7], [0, 0, 3, 5], [0, 0, 0, 1]])
    found = extract_image(image, model, affine=at)
    with torch.inference_mode():
        values = network.head("segmentation", found.values[None].float())[0].softmax(0)
        expected = prediction.predict(
            image,
            _Model(network=whole.eval(), labels=load_scheme("siam16"), **grid),
            torch.device("cpu"),
            mixed_precision=False,
        )
    corner_mm = found.affine[:3, 3] - 1.5  # the centre of the first voxel of the first block of two
    start = np.rint((at[:3, 3] - corner_mm) / 3).astype(int)
    np.testing.assert_allclose(corner_mm + 3 * start, at[:3, 3], atol=1e-9)
    cut = tuple(slice(s, s + n) for s, n in zip(start.tolist(), image.shape, strict=True))
    torch.testing.assert_close(values[(slice(None), *cut)], expected.float(), atol=4e-3, rtol=0)
    assert float((values[(slice(None), *cut)] - expected.float().flip(1)).abs().max()) > 0.02


@dataclasses.dataclass(frozen=True)
class _Model:
    network: torch.nn.Module
    voxel_size_mm: float
    window: tuple[int, int, int]
    multiple: int
    labels: object = None


def test_an_image_of_the_networks_size_is_its_blocks() -> None:
    image = torch.rand(16, 24, 16)
    found = extract_image(image, MeansModel())
    blocks = torch.nn.functional.avg_pool3d(image[None, None], 2)[0, 0]
    torch.testing.assert_close(found.values[0], blocks.half())
    torch.testing.assert_close(found.image, blocks)
    np.testing.assert_allclose(found.affine, [[2, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5], [0, 0, 0, 1]])


@pytest.mark.parametrize("levels", [(-1,), (-3, -1)])
def test_tiles_join_without_seams(monkeypatch: pytest.MonkeyPatch, levels: tuple[int, ...]) -> None:
    image = torch.rand((41, 50, 16), generator=torch.Generator().manual_seed(0))
    whole = extract_image(image, MeansModel(), levels=levels)
    calls: list[tuple[int, ...]] = []
    model = MeansModel()
    model.network.register_forward_hook(lambda _m, given, _o: calls.append(tuple(given[0].shape)))
    monkeypatch.setattr(extraction, "WHOLE_RUN_VOXELS", 1000)
    tiled = extract_image(image, model, levels=levels)
    assert set(calls) == {(1, 1, 16, 24, 16)}
    assert len(calls) > 6
    torch.testing.assert_close(tiled.values, whole.values, atol=2e-3, rtol=0)
    np.testing.assert_array_equal(tiled.affine, whole.affine)


def test_the_input_is_left_as_it_is_and_the_result_repeats() -> None:
    volume = ball(oblique(SHAPE, SPACING_MM, CENTRE_MM), SHAPE, CENTRE_MM, 16)
    before = volume.data.copy()
    first, second = (extract(volume, MeansModel()) for _ in range(2))
    np.testing.assert_array_equal(volume.data, before)
    assert torch.equal(first.values, second.values)


@pytest.mark.parametrize("shape", [(1, 30, 30), (3, 2, 40)])
def test_thin_fields_of_view(shape: tuple[int, int, int]) -> None:
    data = np.random.default_rng(0).normal(100, 5, shape).astype(np.float32)
    found = extract(Volume(data, np.diag([1.0, 1.0, 1.0, 1.0])), MeansModel())
    assert all(n >= 1 for n in found.values.shape[1:])
    np.testing.assert_array_less((np.array(shape) - 1) / 2 - 2, _last_mm(found))


def _last_mm(found: Features) -> np.ndarray:
    return found.affine[:3, :3] @ (np.array(found.head.shape) - 1) + found.affine[:3, 3]


def test_the_head_is_one_filled_piece() -> None:
    volume = ball(np.eye(4), (30, 34, 32), np.array([15, 17, 16]), 11, edge_mm=0.3)
    image = torch.from_numpy(volume.data / 100)
    solid = image > 0.5
    image[12:19, 14:20, 13:19] = 0  # a ventricle
    image[1, 1, 1] = 1  # a speck
    head = head_mask(image)
    assert bool(head[solid].all())
    assert not bool(head[0:3, 0:3, 0:3].any())
    assert int(head.sum()) < 1.2 * int(solid.sum())
    assert bool(head_mask(torch.zeros(4, 4, 4)).all())


# ------------------------------------------------------------------------------------------------- refusals


def test_levels_that_there_are_not() -> None:
    network = MeansModel().network
    assert check_levels(network, [-3, -1]) == (-3, -1)
    for wrong, words in (((-4,), "no level -4"), ((0,), "no level 0"), ((), "none"), ((-1, -1), "twice")):
        with pytest.raises(ConfigError, match=words):
            check_levels(network, wrong)


def test_a_field_of_view_of_a_whole_body(monkeypatch: pytest.MonkeyPatch) -> None:
    bright = np.full((40, 40, 40), 100, np.float32) + np.random.default_rng(0).normal(0, 1, (40, 40, 40))
    volume = Volume(bright.astype(np.float32), np.diag([50.0, 50, 50, 1]))
    with pytest.raises(InputError, match="too large"):
        extract(volume, MeansModel())
    monkeypatch.setattr(extraction, "MAX_VALUES", 1000)
    with pytest.raises(InputError, match="coarser or fewer levels"):
        extract(Volume(bright.astype(np.float32), np.eye(4)), MeansModel())


def test_a_network_that_gives_no_numbers() -> None:
    model = MeansModel()
    model.network.register_forward_hook(lambda _m, _i, output: [part * torch.nan for part in output])
    with pytest.raises(CheckpointError, match="no numbers"):
        extract_image(torch.rand(16, 24, 16), model)
