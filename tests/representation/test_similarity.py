"""SSIM and MS-SSIM of volumes against MONAI's."""

import pytest
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs

from synthseg import rng
from synthseg.representation.similarity import SCALE_WEIGHTS, similarity


def maps(*shape: int) -> torch.Tensor:
    coarse = torch.rand((3, 1, *(n // 3 + 1 for n in shape)), generator=rng.generator(0, 0, "maps"))
    smooth = torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[:, 0]
    mixed = smooth[0] + 0.3 * smooth
    return mixed / mixed.amax((1, 2, 3), keepdim=True)


def test_ssim_is_that_of_monai() -> None:
    shown = maps(15, 13, 18)
    everywhere = torch.ones(shown.shape[1:], dtype=torch.bool)
    a, b = shown[:1, None], shown[2:, None]
    reference, _ = compute_ssim_and_cs(a, b, 3, (11, 11, 11), (1.5, 1.5, 1.5))
    found = similarity(shown, everywhere, [(0, 2)])
    assert found.ssim == pytest.approx(float(reference.mean()), abs=1e-4)
    assert found.l1 == pytest.approx(float((a - b).abs().mean()), rel=1e-5)
    mask = everywhere.clone()
    mask[:, :, 9:] = False  # windows lie inside the volume: the first one is centred on index 5
    inside = reference[0, 0, :, :, :4]
    assert similarity(shown, mask, [(0, 2)]).ssim == pytest.approx(float(inside.mean()), abs=1e-4)


def test_ms_ssim_is_that_of_monai_at_two_scales() -> None:
    shown = maps(24, 22, 25)  # a third scale would not hold a window
    everywhere = torch.ones(shown.shape[1:], dtype=torch.bool)
    weights = [weight / sum(SCALE_WEIGHTS[:2]) for weight in SCALE_WEIGHTS[:2]]
    reference = compute_ms_ssim(shown[:1, None], shown[1:2, None], 3, weights=weights)
    assert similarity(shown, everywhere, [(0, 1)]).ms_ssim == pytest.approx(float(reference), abs=1e-4)


def test_a_volume_smaller_than_the_window() -> None:
    shown = maps(4, 1, 6)
    everywhere = torch.ones(shown.shape[1:], dtype=torch.bool)
    found = similarity(torch.stack([shown[0], shown[0]]), everywhere, [(0, 1)])
    assert found == pytest.approx((0.0, 1.0, 1.0), abs=1e-5)
    assert similarity(shown, everywhere, [(0, 1)]).ssim < 1
