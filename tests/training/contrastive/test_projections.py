"""Projection heads: shapes, lengths, and temperatures of their own."""

import pytest
import torch

from synthseg.config import parse
from synthseg.config.pretraining import ContrastConfig
from synthseg.training.contrastive import LOSSES, PairTemperature, Projection, to_ball, to_sphere


def projection(in_channels: int = 5, **changes: object) -> Projection:
    torch.manual_seed(0)
    record = {"hidden": 7, "dimensions": 6, **changes}
    return Projection(in_channels, parse(ContrastConfig, record, "test"))


def test_lengths() -> None:
    z = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(to_sphere(z), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(to_ball(z), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("where", ["sphere", "ball", "none"])
def test_embeddings_of_every_head(where: str) -> None:
    head = projection(heads=3, projection=where)
    features = 20 * torch.randn((2, 11, 5), generator=torch.Generator().manual_seed(1))
    found = head(features)
    assert found.shape == (3, 2, 11, 6)
    lengths = found.norm(dim=-1)
    if where == "sphere":
        torch.testing.assert_close(lengths, torch.ones(3, 2, 11))
    elif where == "ball":
        assert lengths.max() <= 1 + 1e-6
        assert lengths.min() < 0.99
    else:
        assert (lengths - 1).abs().max() > 0.1
    assert (found[0] - found[1]).abs().max() > 0.1  # the heads differ


def test_an_embedding_depends_on_its_voxel_alone() -> None:
    head = projection()
    features = torch.randn((9, 5), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(features)[:, 2:4], head(features[2:4]))


def test_a_configured_temperature() -> None:
    head = projection(temperature=0.2)
    assert head.temperature(head(torch.ones(3, 5))) == 0.2


@pytest.mark.parametrize("loss", ["info_nce", "multi_view_info_nce"])
def test_adaptive_temperatures_learn_with_their_heads(loss: str) -> None:
    head = projection(heads=2, temperature=0.5, adaptive_temperature=True)
    features = torch.randn((8, 5), generator=torch.Generator().manual_seed(1))
    embeddings = head(features)
    temperature = head.temperature(embeddings)
    assert isinstance(temperature, PairTemperature)
    assert temperature.keys.shape == (2, 8, 16)
    found = temperature.between(temperature.keys[0], temperature.keys[0]).detach()
    assert 0.05 < float(found.min()) < float(found.max()) < 5
    positives = (torch.arange(8) % 4)[:, None] == torch.arange(8) % 4
    value = LOSSES[loss](embeddings, positives, ~positives, temperature=temperature)
    value.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
