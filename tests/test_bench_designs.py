"""Every kind of design of benchmarks/designs.py trains, and segments at any size of image."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

designs = pytest.importorskip("designs")

SMALL = {"generator": {"shape": [64, 64, 64], "subsamples": 1}}


def small(phase):
    """The phase with narrow layers and a small image of its voxel size."""
    network = phase.settings["network"]
    narrow = {"network": {"channels": [max(4, n // 16) for n in network["channels"]]}}
    return designs.Phase(phase.share, designs.merged(phase.settings, SMALL, narrow), phase.kind, phase.grow)


@pytest.mark.parametrize(
    "name",
    [
        "b: progressive, 4 mm, 2 mm, 1 mm",
        "d: 2 mm network and a light 1 mm refinement",
        "e: c with a spatial prior",
        "f: c, deep supervision",
    ],
)
def test_a_design_trains_and_segments(name, monkeypatch):
    monkeypatch.setattr(designs, "REFINED", 16)
    template = designs.load_template("phantom")
    options = Namespace(templates=["phantom"], seed=0)
    network = None
    for phase in map(small, designs.DESIGNS[name]):
        config = designs.recipe(name, phase, options)
        network = designs.build(phase, config, 17, network)
        before = {k: v.clone() for k, v in designs.weights_of(network).items()}
        budget = designs.Budget(seconds=0.2)
        designs.learn(network, phase, config, [template], budget)
        assert budget.steps >= 1
        moved = {k for k, v in designs.weights_of(network).items() if not torch.equal(v, before[k])}
        assert moved
        if phase.kind == "cascade":
            assert not any(k.startswith("coarse.") for k in moved)  # it is as it was
    with torch.inference_mode():
        logits = network.eval()(torch.rand(1, 1, 64, 64, 96))
    assert logits.shape == (1, 17, 64, 64, 96)
    assert bool(logits.isfinite().all())


def test_growing_keeps_the_network_so_far():
    phases = [small(phase) for phase in designs.DESIGNS["b: progressive, 4 mm, 2 mm, 1 mm"]]
    options = Namespace(templates=["phantom"], seed=0)
    inner = designs.build(phases[0], designs.recipe("x", phases[0], options), 17, None)
    outer = designs.build(phases[1], designs.recipe("x", phases[1], options), 17, inner)
    assert torch.equal(outer.body.bottleneck.conv1.conv.weight, inner.body.bottleneck.conv1.conv.weight)


def test_a_prior_moves_with_the_head():
    name = "e: c with a spatial prior"
    phase = small(designs.DESIGNS[name][0])
    network = designs.build(phase, designs.recipe(name, phase, Namespace(templates=["phantom"], seed=0)), 17, None)
    torch.nn.init.normal_(network.prior)
    head = torch.zeros(1, 64, 64, 64)
    head[:, 10:40, 12:44, 8:44] = 1
    placed = network._placed(head)
    moved = network._placed(head.roll((8, 8, 8), (1, 2, 3)))
    inside = placed[..., 8:20, 8:20, 8:20]
    torch.testing.assert_close(moved[..., 12:24, 12:24, 12:24], inside, atol=1e-4, rtol=0)


def test_the_learning_rate_rises_again_where_layers_are_new():
    def spans(name):
        return [tuple(round(x, 2) for x in span) for _, span in designs.schedules(designs.DESIGNS[name])]

    assert spans("b: progressive, 4 mm, 2 mm, 1 mm") == [(0.0, 0.3), (0.3, 0.65), (0.65, 1.0)]
    assert spans("d: 2 mm network and a light 1 mm refinement") == [(0.0, 0.6), (0.6, 1.0)]
    assert spans("f: c, from mild to severe") == [(0.0, 1.0)] * 3
    assert spans("c: subpixel, 1 mm in and out") == [(0.0, 1.0)]
