"""Batches of views: the same for any number of devices, and what is asked of each image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthseg.config import PretrainConfig, parse
from synthseg.generator.synthesis import read_anatomy
from synthseg.labels import LabelTable, load_scheme
from synthseg.templates import Template, load_template
from synthseg.training.canonical import canonical_image
from synthseg.training.view_pictures import colours
from synthseg.training.view_stream import ViewBatch, ViewStream


def make(folder: Path, **generator: Any) -> tuple[PretrainConfig, list[Template]]:
    record = {
        "templates": [str(folder)],
        "batch_size": 2,
        "generator": {
            "shape": [14, 18, 16],
            "voxel_size_mm": 2.5,
            "subsamples": 2,
            "views": {"severities": [0.0, 1.0]},
            **generator,
        },
    }
    return parse(PretrainConfig, record, "test"), [load_template(folder)]


def stream(folder: Path, rank: int = 0, world: int = 1, **generator: Any) -> ViewStream:
    config, templates = make(folder, **generator)
    return ViewStream(config, templates, load_scheme("siam16"), rank=rank, world=world)


def test_a_batch_holds_the_views_of_each_anatomy_together(template_folders: dict[str, Path]) -> None:
    batch = stream(template_folders["head"]).batch(3)
    assert batch.images.shape == (4, 1, 14, 18, 16)
    assert batch.labels.shape == (4, 14, 18, 16)
    assert batch.labels.dtype == torch.uint8
    assert batch.views == 2
    assert [(p.index, p.view) for p in batch.plans] == [(6, 0), (6, 1), (7, 0), (7, 1)]
    assert batch.plans[0].deform == batch.plans[1].deform != batch.plans[2].deform
    assert batch.plans[0].contrast != batch.plans[1].contrast
    assert batch.canonical is not None
    assert batch.canonical.shape == (2, 1, 14, 18, 16)
    assert batch.displacement_mm is None
    again = stream(template_folders["head"]).batch(3)
    assert torch.equal(batch.images, again.images)
    assert not torch.equal(batch.images, stream(template_folders["head"]).batch(4).images)


def test_the_shares_of_all_devices_are_the_batch(template_folders: dict[str, Path]) -> None:
    whole = stream(template_folders["head"]).batch(2)
    for rank in range(2):
        share = stream(template_folders["head"], rank, 2).batch(2)
        own = slice(2 * rank, 2 * rank + 2)
        assert share.plans == whole.plans[own]
        assert torch.equal(share.images, whole.images[own])
        assert whole.canonical is not None
        assert share.canonical is not None
        assert torch.equal(share.canonical[0], whole.canonical[rank])


def test_nothing_is_asked_where_an_image_shows_nothing(template_folders: dict[str, Path]) -> None:
    """A stripped image shows the brain: of skull and skin it says nothing, of the air around the head it does."""
    parts = {"strip_probability": 1.0, "crop_probability": 0.0}
    batch = stream(template_folders["head"], artefacts=parts).batch(0)
    wanted, shown = batch.targets()
    assert batch.canonical is not None
    assert torch.equal(wanted[:2], batch.canonical[:1].expand(2, -1, -1, -1, -1))
    template = load_template(template_folders["head"])
    labels = read_anatomy(template, batch.plans[0])[1]
    visible = torch.tensor(batch.plans[1].contrast.visible)[labels.long()]
    hidden = (labels > 0) & ~visible
    assert int(hidden.sum()) > 50
    assert torch.equal(shown[1, 0], ~hidden)
    whole = stream(template_folders["head"], artefacts={"strip_probability": 0.0, "crop_probability": 0.0}).batch(0)
    assert bool(whole.targets()[1].all())


def test_what_has_no_class_is_asked_for_as_well(template_folders: dict[str, Path]) -> None:
    """A scheme of the brain alone: skull and skin are background to it, and are in the T1 image all the same."""
    siam = load_scheme("siam16")
    config, templates = make(template_folders["head"], artefacts={"strip_probability": 0.0, "crop_probability": 0.0})
    brain = LabelTable("brain", (siam.labels[0], replace(siam.labels[1], name="Brain")))
    head = templates[0].table
    named = {"WM", "GM"}
    labels = tuple(
        replace(x, to={**x.to, "brain": (brain.labels[1].id if siam.names[k] in named else 0,)})
        for x, k in zip(head.labels, head.mapping(siam), strict=True)
    )
    template = replace(templates[0], table=replace(head, labels=labels))
    batch = ViewStream(config, [template], brain).batch(0)
    whole = read_anatomy(template, batch.plans[0])[1] > 0
    assert int((whole & (batch.labels[0] == 0)).sum()) > 50
    assert bool(batch.targets()[1].all())


def test_the_target_of_a_displaced_image_is_displaced(template_folders: dict[str, Path]) -> None:
    views = {"severities": [0.0, 1.0], "perturbation_mm": 2.5}
    batch = stream(
        template_folders["head"], views=views, artefacts={"strip_probability": 0.0, "crop_probability": 0.0}
    ).batch(0)
    assert batch.displacement_mm is not None
    assert float(batch.displacement_mm[0].abs().max()) == 0
    assert float(batch.displacement_mm[1].abs().max()) > 2
    wanted, shown = batch.targets()
    template = load_template(template_folders["head"])
    assert torch.equal(wanted[1], canonical_image(template, batch.plans[1]))
    assert not torch.equal(wanted[0], wanted[1])
    assert bool(shown.all())


def test_a_recipe_without_an_anatomy_term_draws_no_target(template_folders: dict[str, Path]) -> None:
    config, templates = make(template_folders["head"])
    config = config.model_copy(update={"anatomy_weight": 0.0})
    batch = ViewStream(config, templates, load_scheme("siam16")).batch(0)
    assert isinstance(batch, ViewBatch)
    assert batch.canonical is None
    assert batch.shown is None


def test_colours_are_those_of_the_strongest_components() -> None:
    """One direction in the features: red follows it, in the head alone; the order of the channels does not matter."""
    ramp = torch.linspace(0, 1, 8).reshape(1, 1, 8, 1, 1).expand(1, 1, 8, 6, 4)
    features = torch.cat([3 * ramp, -ramp, 0.1 * torch.rand(1, 1, 8, 6, 4)], 1)
    head = torch.ones(1, 8, 6, 4, dtype=torch.bool)
    head[:, :, :2] = False
    found = colours(features, head)
    assert found.shape == (1, 8, 6, 4, 3)
    assert found[0, :, :2].max() == 0
    red = torch.from_numpy(found[0, :, 3, 2, 0])
    assert bool((red.diff() > -1e-3).all())
    assert float(red[-1] - red[0]) == pytest.approx(1, abs=0.1)
    turned = colours(features.flip(1), head)
    assert torch.allclose(torch.from_numpy(turned[..., 0]), torch.from_numpy(found[..., 0]), atol=1e-4)
