"""The contract of every generator stage: (B, C, D, H, W) in and out, dtype and device kept, input not modified,
a batch of n equals n singles, strength 0 is the identity. A new stage is one more line in ``STAGES``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from synthseg.config import GeneratorConfig
from synthseg.generator import artefacts
from synthseg.generator.artefacts import ArtefactPlan
from synthseg.generator.artefacts.kspace import GhostingPlan, KSpacePlan, MotionBlock, MotionPlan, Spike
from synthseg.generator.artefacts.masking import DefacePlan, StripPlan
from synthseg.generator.artefacts.modes import ScenePlan
from synthseg.generator.artefacts.slices import SlicesPlan
from synthseg.generator.artefacts.storage import StoredPlan, WrapPlan
from synthseg.generator.contrast import ContrastPlan, paint
from synthseg.generator.ct_scanner import BeamHardening, Headrest
from synthseg.generator.deform import DeformPlan, coordinates, exponential
from synthseg.generator.draw import Field3D
from synthseg.generator.hounsfield import CTPlan, finish
from synthseg.generator.plan import sample_plan
from synthseg.generator.reading import Reading, read_labels, read_points
from synthseg.generator.synthesis import render
from synthseg.generator.texture import Clusters, Octaves
from synthseg.labels import load_scheme
from synthseg.templates import Template

SHAPE = (7, 9, 11)
VOXEL_MM = 1.5
IDLE = ArtefactPlan(
    log_bias=None,
    gamma=1.0,
    spacing_mm=(VOXEL_MM,) * 3,
    thickness_mm=(0.0,) * 3,
    noise_std=0.0,
    noise_seed=5,
    crop=((0.0, 1.0),) * 3,
)


def bumps(seed: int, std: float, channels: int = 1) -> Field3D:
    return Field3D.of(std * torch.randn((channels, 2, 4, 3), generator=torch.manual_seed(seed)))


@dataclass
class Stage:
    """A stage, the plan fields that make image ``b`` of a batch strong, and those that write strength 0 explicitly."""

    apply: Callable[[torch.Tensor, Sequence[ArtefactPlan]], torch.Tensor]
    strong: Callable[[int], dict[str, Any]]
    zero: dict[str, Any] = field(default_factory=dict)

    def plans(self, n: int) -> list[ArtefactPlan]:
        return [IDLE.model_copy(update=self.strong(b)) for b in range(n)]


def acquire(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    return artefacts.acquire(image, plans, VOXEL_MM)


def seen(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    mask = artefacts.field_of_view(image, plans)
    assert mask.dtype == torch.bool
    return image.masked_fill(~mask, 0)


HEAD = load_scheme("head")


def small_head(device: torch.device) -> torch.Tensor:
    """Label indices (D, H, W): brain behind and above, then CSF, skull and skin towards the front and below."""
    ids = torch.full(SHAPE, 511)
    ids[:, :7, 2:] = 515
    ids[:, :6, 3:] = 24
    ids[:, :5, 4:] = 3
    ids[3, :3, 6:8] = 4
    ids[:, 8] = 0
    return torch.from_numpy(HEAD.to_index(ids.numpy())).to(device)


def scene(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    labels = small_head(image.device).expand(len(image), *SHAPE)
    return artefacts.scene(image, labels, [HEAD] * len(plans), [plan.scene for plan in plans])[0]


def mask(image: torch.Tensor, plans: Sequence[ArtefactPlan]) -> torch.Tensor:
    labels = small_head(image.device).expand(len(image), *SHAPE)
    return artefacts.mask(image, labels, [HEAD] * len(plans), plans, VOXEL_MM)[0]


def moving(b: int, shift_mm: float, degrees: float) -> KSpacePlan:
    blocks = (
        MotionBlock(start=0.0, shift_mm=(shift_mm, 0.0, -shift_mm), degrees=degrees),
        MotionBlock(start=0.4 + 0.1 * b, shift_mm=(0.0, 0.0, 0.0), degrees=0.0),
    )
    return KSpacePlan(motion=MotionPlan(phase_axis=b % 3, turn_axis=2, blocks=blocks))


def ghosts(b: int, strength: float) -> KSpacePlan:
    return KSpacePlan(ghosting=GhostingPlan(axis=1, every=2 + b, strength=strength))


def spikes(b: int, amplitude: float) -> KSpacePlan:
    return KSpacePlan(spikes=(Spike(frequency=(0.1 + 0.1 * b, 0.2, -0.3), amplitude=amplitude, phase=1.0),))


def slabs(b: int, size: float) -> SlicesPlan:
    return SlicesPlan(
        axis=1,
        shift_mm=((size, -size), (0.0, (b + 1) * size)),
        degrees=(10 * size, 0.0, -5 * size),
        across_mm=(0.0, size),
        gain=(1.0, 1.0 + size),
        slope=((0.0, 0.2 * size),),
        exponent=(1.0, 1.0, 1.0 + size),
    )


def deface(by: str, margin_mm: float, noise: float = 0.0) -> DefacePlan:
    normal = (0.0, 0.8, -0.6)
    return DefacePlan.model_validate(
        {"by": by, "normal": normal, "margin_mm": margin_mm, "depth_mm": 6.0, "drop": 0.2, "keep_mm": margin_mm}
        | {"noise": noise, "noise_seed": 4}
    )


def strip(b: int) -> StripPlan:
    return StripPlan(offset_mm=bumps(b, 2.0), leftovers=bumps(b + 9, 1.0), threshold=0.5, reach_mm=6.0)


def strong_interpolation(by: str, b: int) -> dict[str, Any]:
    stored = StoredPlan.model_validate({"by": by, "factor": 2.0 + b})
    return {"spacing_mm": (4.0, 1.5, 3.0), "thickness_mm": (4.0, 0.0, 3.0), "stored": stored, "profile": "gaussian"}


STAGES = {
    "bias_field": Stage(artefacts.bias_field, lambda b: {"log_bias": bumps(b, 0.5)}, {"log_bias": bumps(0, 0.0)}),
    "gamma": Stage(artefacts.gamma, lambda b: {"gamma": 0.5 + b}),
    "local contrast": Stage(
        artefacts.gamma, lambda b: {"log_exponent": bumps(b, 0.7)}, {"log_exponent": bumps(0, 0.0)}
    ),
    "slices": Stage(acquire, lambda b: {"spacing_mm": (4.0 + b, 1.5, 1.5), "thickness_mm": (3.0, 0.0, 0.0)}),
    "isotropic": Stage(acquire, lambda b: {"spacing_mm": (3.0 + b,) * 3, "thickness_mm": (3.0 + b,) * 3}),
    **{
        f"stored by {by}": Stage(
            acquire,
            lambda b, by=by: strong_interpolation(by, b),  # type: ignore[misc]
            {"stored": StoredPlan.model_validate({"by": by, "factor": 2.0})},
        )
        for by in ("linear", "cubic", "nearest", "zero_fill")
    },
    "noise": Stage(acquire, lambda b: {"noise_std": 0.1, "noise_seed": b}),
    "noisy slices": Stage(acquire, lambda b: {"noise_std": 0.1, "noise_seed": b, "spacing_mm": (1.5, 4.0, 1.5)}),
    "uneven noise": Stage(
        acquire,
        lambda b: {"noise_std": 0.1, "noise_seed": b, "log_gfactor": bumps(b, 0.5), "spacing_mm": (1.5, 4.0, 1.5)},
        {"log_gfactor": bumps(0, 0.5)},
    ),
    "gaussian noise": Stage(acquire, lambda b: {"noise_std": 0.1, "noise_seed": b, "noise_kind": "gaussian"}),
    "motion": Stage(acquire, lambda b: {"kspace": moving(b, 2.0, 4.0)}, {"kspace": moving(0, 0.0, 0.0)}),
    "ghosting": Stage(acquire, lambda b: {"kspace": ghosts(b, 0.7)}, {"kspace": ghosts(0, 0.0)}),
    "gibbs": Stage(acquire, lambda b: {"kspace": KSpacePlan(kept=(0.5, 1.0, 0.6 - 0.2 * b))}, {"kspace": KSpacePlan()}),
    "spikes": Stage(acquire, lambda b: {"kspace": spikes(b, 0.2)}, {"kspace": spikes(0, 0.0)}),
    "slice by slice": Stage(acquire, lambda b: {"slices": slabs(b, 1.0)}, {"slices": slabs(0, 0.0)}),
    "fold": Stage(
        artefacts.fold,
        lambda b: {"wrap": WrapPlan(axis=1, start=0.1 * b, stop=0.7, strength=0.8)},
        {"wrap": WrapPlan(axis=1, start=0.0, stop=1.0, strength=0.8)},
    ),
    "field_of_view": Stage(seen, lambda b: {"crop": ((0.0, 1.0), (0.3, 1.0), (0.0, 0.6 - 0.1 * b))}),
    "window": Stage(
        seen,
        lambda b: {"wrap": WrapPlan(axis=1, start=0.1 * b, stop=0.7, strength=1.0)},
        {"wrap": WrapPlan(axis=1, start=0.0, stop=1.0, strength=1.0)},
    ),
    "bad stripping": Stage(mask, lambda b: {"strip": strip(b)}),
    "plane": Stage(mask, lambda b: {"deface": deface("plane", float(b))}, {"deface": deface("plane", 99.0)}),
    "box": Stage(mask, lambda b: {"deface": deface("box", float(b), 0.5)}, {"deface": deface("box", 99.0)}),
    "background": Stage(mask, lambda b: {"background_mm": -6.0 - b}, {"background_mm": 99.0}),
    "ex vivo": Stage(scene, lambda b: {"scene": ScenePlan(mode="exvivo", fluid=bumps(b, 0.5))}),
}


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> Stage:
    return STAGES[request.param]


def batch_of(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand((n, 1, *SHAPE), generator=torch.manual_seed(3)).to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_device_are_kept(stage: Stage, device: torch.device, dtype: torch.dtype) -> None:
    image = batch_of(2, device, dtype)
    out = stage.apply(image, stage.plans(2))
    assert out.shape == image.shape
    assert out.dtype == dtype
    assert out.device.type == device.type
    assert torch.isfinite(out).all()


def test_input_is_not_modified(stage: Stage, device: torch.device) -> None:
    image = batch_of(2, device)
    before = image.clone()
    out = stage.apply(image, stage.plans(2))
    out.fill_(7)  # the result is not a view of the input either
    assert torch.equal(image, before)


def test_batch_equals_singles(stage: Stage, device: torch.device) -> None:
    image = batch_of(3, device)
    plans = stage.plans(3)
    together = stage.apply(image, plans)
    singles = torch.cat([stage.apply(image[b : b + 1], plans[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(together, singles, rtol=1e-6, atol=1e-6)


def test_strength_zero_is_the_identity(stage: Stage, device: torch.device) -> None:
    image = batch_of(2, device) - 0.3  # negative values too: the identity has no favourite range
    assert torch.equal(stage.apply(image, [IDLE, IDLE]), image)
    torch.testing.assert_close(stage.apply(image, [IDLE.model_copy(update=stage.zero)] * 2), image, rtol=0, atol=0)


def test_full_strength_changes_the_image(stage: Stage, device: torch.device) -> None:
    image = batch_of(2, device)
    out = stage.apply(image, stage.plans(2))
    assert ((out - image).abs().amax((1, 2, 3, 4)) > 0.05).all()
    assert not torch.equal(out[0] - image[0], out[1] - image[1])  # each image follows its own plan


def test_one_strong_image_leaves_its_neighbour_alone(stage: Stage, device: torch.device) -> None:
    image = batch_of(2, device)
    out = stage.apply(image, [stage.plans(1)[0], IDLE])
    assert not torch.equal(out[0], image[0])
    assert torch.equal(out[1], image[1])


def test_the_same_plan_twice_is_the_same_image(stage: Stage, device: torch.device) -> None:
    image = batch_of(2, device)
    torch.manual_seed(1)
    first = stage.apply(image, stage.plans(2))
    torch.manual_seed(2)  # the global state plays no part
    assert torch.equal(first, stage.apply(image, stage.plans(2)))


# ---------------------------------------------------------------- stages between labels and image


def contrast_plan(n_labels: int, std: float, texture_std: float, **more: Any) -> ContrastPlan:
    return ContrastPlan(
        name="random",
        mean=tuple(0.1 * i for i in range(n_labels)),
        std=(std,) * n_labels,
        texture_std=(texture_std,) * n_labels,
        texture=bumps(4, 1.0),
        noise_seed=9,
        visible=(True,) * n_labels,
        **more,
    )


def some_labels(device: torch.device) -> torch.Tensor:
    return torch.randint(0, 6, SHAPE, generator=torch.manual_seed(0), dtype=torch.uint8).to(device)


EXTENT_MM = (VOXEL_MM * SHAPE[0], VOXEL_MM * SHAPE[1], VOXEL_MM * SHAPE[2])
CT = CTPlan(window_hu=(0.0, 250.0), extent_mm=EXTENT_MM)  # as wide as one unit of intensity


def patches(std: float) -> Clusters:
    offset = std * torch.randn((4, 6), generator=torch.manual_seed(2))
    return Clusters(fields=bumps(5, 1.0, 2), level=(0.0, 0.1), offset=tuple(map(tuple, offset.tolist())))


def scales(weight: float) -> Octaves:
    return Octaves(extent_mm=EXTENT_MM, spacing_mm=(6.0, 3.0), weight=(weight, weight), seed=3)


# What can be added to an image while it is painted: the plan fields at full strength, and at strength 0.
PAINTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "patches": ({"clusters": patches(0.2)}, {"clusters": patches(0.0)}),
    "octaves": ({"octaves": scales(1.0)}, {"octaves": scales(0.0)}),
    "everything": ({"clusters": patches(0.2), "octaves": scales(1.0)}, {"clusters": patches(0), "octaves": scales(0)}),
}


@pytest.fixture(params=PAINTS)
def paints(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    return PAINTS[request.param]


def test_paint_keeps_shape_and_device_and_does_not_modify(paints: Any, device: torch.device) -> None:
    labels = some_labels(device)
    before = labels.clone()
    torch.manual_seed(1)
    plan = contrast_plan(6, 0.1, 0.1, **paints[0])
    out = paint(Reading.of([labels, labels.flip(0)]), plan)
    assert (out.shape, out.dtype, out.device.type) == (SHAPE, torch.float32, device.type)
    assert torch.equal(labels, before)
    torch.manual_seed(2)  # the global state plays no part
    again = ContrastPlan.model_validate_json(plan.model_dump_json())
    assert torch.equal(paint(Reading.of([labels, labels.flip(0)]), again), out)


def test_paint_of_strength_zero_is_a_lookup(paints: Any, device: torch.device) -> None:
    labels = some_labels(device)
    out = paint(Reading.of([labels]), contrast_plan(6, 0.0, 0.0, **paints[1]))
    np.testing.assert_allclose(out.cpu().numpy(), 0.1 * labels.cpu().numpy(), atol=1e-7)
    assert not torch.equal(out, paint(Reading.of([labels]), contrast_plan(6, 0.1, 0.0)))
    assert not torch.equal(out, paint(Reading.of([labels]), contrast_plan(6, 0.0, 0.1)))
    if paints[0]:
        assert not torch.equal(out, paint(Reading.of([labels]), contrast_plan(6, 0.0, 0.1, **paints[0])))


CT_STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window": ({}, {}),
    "beam_hardening": (
        {"beam_hardening": BeamHardening(strength=0.3, soft_share=0.1)},
        {"beam_hardening": BeamHardening(strength=0.0, soft_share=0.1)},
    ),
    "headrest": (
        {"headrest": Headrest(gap_mm=1, radius_mm=30, thickness_mm=5, half_width_mm=9, shift_mm=0, hu=150)},
        {"headrest": Headrest(gap_mm=1, radius_mm=30, thickness_mm=5, half_width_mm=0, shift_mm=99, hu=150)},
    ),
}


@pytest.mark.parametrize("stage_name", CT_STAGES)
def test_ct_stages_keep_the_contract(stage_name: str, device: torch.device) -> None:
    strong, zero = CT_STAGES[stage_name]
    hu = torch.full(SHAPE, -1000.0, device=device)
    hu[2:5, 5:8] = 40.0
    hu[2:4, 6:7] = 1400.0
    before = hu.clone()
    plain = finish(hu, CT)
    out = finish(hu, CT.model_copy(update=strong))
    assert (out.shape, out.dtype, out.device.type) == (SHAPE, torch.float32, device.type)
    assert torch.equal(hu, before)
    assert torch.equal(finish(hu, CT.model_copy(update=strong)), out)
    assert torch.equal(out, plain) == (stage_name == "window")
    torch.testing.assert_close(finish(hu, CT.model_copy(update=zero)), plain, rtol=0, atol=1e-7)
    assert 0 <= float(out.min()) < float(out.max()) <= 1


def test_coordinates_of_strength_zero_are_the_grid(device: torch.device) -> None:
    rows = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    plan = DeformPlan(matrix=rows, shift_mm=(0.0, 0.0, 0.0), velocity_mm=None, flip=False)
    out = coordinates(plan, SHAPE, 1.0, (3.0, 4.0, 5.0), (1.0, 1.0, 1.0), device)  # the centre of SHAPE
    assert (out.shape, out.dtype, out.device.type) == ((3, *SHAPE), torch.float32, device.type)
    np.testing.assert_allclose(out.cpu().numpy(), np.indices(SHAPE), atol=1e-5)
    still = plan.model_copy(update={"velocity_mm": bumps(0, 0.0, 3)})
    assert torch.equal(coordinates(still, SHAPE, 1.0, (3.0, 4.0, 5.0), (1.0, 1.0, 1.0), device), out)


def test_velocity_and_labels_are_not_modified(device: torch.device) -> None:
    velocity = bumps(1, 2.0, 3).tensor(device)[None]
    labels, coords = some_labels(device), torch.from_numpy(np.indices(SHAPE)).float().to(device) + 0.3
    kept = [x.clone() for x in (velocity, labels, coords)]
    exponential(velocity, (4.0, 5.0, 6.0))
    out = read_labels(labels, coords, (0.1, 0.0, -0.1))
    assert (out.shape, out.dtype, out.device.type) == (SHAPE, torch.uint8, device.type)
    out = read_points(labels, coords, 0.2 * torch.eye(3)).middle
    assert (out.shape, out.dtype, out.device.type) == (SHAPE, torch.uint8, device.type)
    assert all(torch.equal(a, b) for a, b in zip(kept, (velocity, labels, coords), strict=True))


def test_render_keeps_the_contract(tiny_template: Template, device: torch.device) -> None:
    config = GeneratorConfig(voxel_size_mm=2.0, shape=(12, 10, 14), subsamples=2)
    plans = [sample_plan(config, "tiny", tiny_template.table, 3, index) for index in range(4)]
    before = tiny_template.labels.clone()
    images, labels = render([tiny_template] * 4, plans, device)
    assert (images.shape, images.dtype) == ((4, 1, 12, 10, 14), torch.float32)
    assert (labels.shape, labels.dtype) == ((4, 12, 10, 14), torch.uint8)
    assert images.device.type == labels.device.type == device.type
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(tiny_template.labels, before)
    for b, plan in enumerate(plans):
        image, label = render([tiny_template], [plan], device)
        torch.testing.assert_close(image[0], images[b], rtol=1e-5, atol=1e-5)
        assert torch.equal(label[0], labels[b])
    assert len({label.sum().item() for label in labels}) > 1
