"""One basis for several scans: directions, signs, colours."""

import pytest
import torch

from synthseg import rng
from synthseg.errors import ConfigError
from synthseg.representation.pca import SAMPLE_VOXELS, fit_pca, sample

AXES = torch.linalg.qr(torch.randn(5, 5, generator=rng.generator(0, 0, "axes")))[0].T


def scan(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Features (n, 5) with standard deviations 4, 2, 1, 0.2 and 0.1 along AXES."""
    draws = torch.randn(n, 5, generator=rng.generator(seed, 0, "scan"))
    return draws * torch.tensor([4, 2, 1, 0.2, 0.1]) @ AXES + shift


def test_the_directions_are_found() -> None:
    basis = fit_pca([scan(4000, 0), scan(4000, 1)], 3)
    torch.testing.assert_close((basis.components @ AXES.T).abs()[:, :3], torch.eye(3), atol=0.05, rtol=0)
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(3), atol=1e-5, rtol=0)
    assert basis.explained.tolist() == pytest.approx([16 / 21.05, 4 / 21.05, 1 / 21.05], rel=0.1)


def test_the_sign_is_that_of_the_largest_entry() -> None:
    basis = fit_pca([scan(500, 0)], 5)
    largest = basis.components.gather(1, basis.components.abs().max(1, keepdim=True).indices)
    assert bool((largest > 0).all())
    mirrored = fit_pca([-scan(500, 0)], 5)
    torch.testing.assert_close(mirrored.components, basis.components)


def test_each_scan_counts_the_same() -> None:
    few, many = scan(200, 0), scan(4000, 1, shift=3.0)
    basis = fit_pca([few, many], 2)
    torch.testing.assert_close(basis.mean, (few.mean(0) + many.mean(0)) / 2, atol=1e-5, rtol=0)
    torch.testing.assert_close(fit_pca([many, few], 2).components, basis.components)
    torch.testing.assert_close(fit_pca([few, many, many], 2).mean, (few.mean(0) + 2 * many.mean(0)) / 3)


def test_projection_of_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    values = scan(4 * 5 * 6, 2).T.reshape(5, 4, 5, 6).half()
    basis = fit_pca([scan(1000, 0)], 3)
    found = basis.project(values)
    expected = (values.float().permute(1, 2, 3, 0) - basis.mean) @ basis.components.T
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float().permute(1, 2, 3, 0), expected, atol=1e-2, rtol=1e-2)
    monkeypatch.setattr("synthseg.representation.pca.SLAB_VOXELS", 7)
    torch.testing.assert_close(basis.project(values), found)  # slab by slab
    torch.testing.assert_close(basis.first(2).project(values), found[:2])
    with pytest.raises(ValueError, match="5 channels"):
        basis.project(values[:4])


def test_colours_are_percentiles_of_all_scans() -> None:
    samples = [scan(2000, 0), scan(2000, 1)]
    basis = fit_pca(samples, 3)
    dark, bright = basis.mean + basis.low @ basis.components, basis.mean + basis.high @ basis.components
    values = torch.stack([dark, bright, basis.mean], 1).reshape(5, 3, 1, 1)
    colors = basis.colors(values)
    assert colors.shape == (3, 1, 1, 3)
    assert abs(colors[0].astype(int)).max() <= 1
    assert colors[1].min() >= 254
    assert fit_pca([one[:, :2] for one in samples], 2).colors(values[:2])[..., 2].max() == 0


def test_voxels_of_the_head_are_sampled() -> None:
    values = torch.arange(2 * 60.0).reshape(2, 3, 4, 5).half()
    head = torch.zeros(3, 4, 5, dtype=torch.bool)
    head[1] = True
    assert torch.equal(sample(values, head), values[:, 1].flatten(1).T.float())
    assert len(sample(values, torch.zeros_like(head))) == 60
    large = torch.zeros(1, 100, 100, 10)
    assert len(sample(large, torch.ones(100, 100, 10, dtype=torch.bool))) == SAMPLE_VOXELS


def test_more_components_than_channels() -> None:
    with pytest.raises(ConfigError, match="6 principal components"):
        fit_pca([scan(10, 0)], 6)
