"""The random part of all artefacts of one image, and how it is drawn."""

from __future__ import annotations

import math
from typing import Any

from synthseg.config import ArtefactConfig
from synthseg.generator.artefacts.kspace import KSpacePlan, sample_kspace
from synthseg.generator.artefacts.masking import MaskingPlan, sample_masking
from synthseg.generator.artefacts.modes import SLAB_AXIS, ScenePlan, sample_scene, sample_slabs
from synthseg.generator.artefacts.scanner import ScannerPlan
from synthseg.generator.artefacts.slices import SlicesPlan, sample_slice_motion
from synthseg.generator.artefacts.storage import StoragePlan, StoredPlan, WrapPlan
from synthseg.generator.draw import Draw

CT_CONTRASTS = frozenset({"ct", "hounsfield"})


class ArtefactPlan(ScannerPlan, StoragePlan, MaskingPlan):
    slices: SlicesPlan | None = None
    kspace: KSpacePlan | None = None
    scene: ScenePlan | None = None


def sample_artefacts(
    config: ArtefactConfig,
    voxel_size_mm: float,
    extent_mm: tuple[float, ...],
    draw: Draw,
    contrast: str = "random",
    stripped: bool = False,
) -> ArtefactPlan:
    """``contrast`` is the name of the image's contrast; ``stripped`` images show the brain alone already."""
    bias_std = draw.uniform(*config.bias_std)
    bias = draw.field(1, extent_mm, draw.uniform(*config.bias_spacing_mm), bias_std) if bias_std > 0 else None
    spacing = [voxel_size_mm] * 3
    thickness = [0.0] * 3
    if draw.chance(config.lowres_probability):
        if draw.chance(config.lowres_isotropic_probability):
            size = draw.uniform(voxel_size_mm, max(config.lowres_isotropic_mm, voxel_size_mm))
            spacing, thickness = [size] * 3, [size] * 3
        else:
            axis = int(draw.uniform(0, 3))
            spacing[axis] = draw.uniform(voxel_size_mm, max(config.lowres_spacing_mm, voxel_size_mm))
            thickness[axis] = spacing[axis] * draw.uniform(*config.storage.slice_thickness)
    crop = [(0.0, 1.0)] * 3
    if draw.chance(config.crop_probability):
        axis = int(draw.uniform(0, 3))
        lost = draw.uniform(0.0, config.crop_fraction)
        crop[axis] = (lost, 1.0) if draw.chance(0.5) else (0.0, 1.0 - lost)
    plan = ArtefactPlan(
        log_bias=bias,
        gamma=math.exp(draw.normal(config.gamma_std)),
        spacing_mm=(spacing[0], spacing[1], spacing[2]),
        thickness_mm=(thickness[0], thickness[1], thickness[2]),
        noise_std=draw.uniform(*config.noise_std) if draw.chance(config.noise_probability) else 0.0,
        noise_seed=draw.seed(),
        crop=tuple(crop),
    )
    # What is drawn from here on came later: the draws above stay what they were.
    changes = _storage(config, plan, voxel_size_mm, draw)
    plan = plan.model_copy(update=changes)
    scene = sample_scene(config.modes, extent_mm, draw)
    if stripped:
        scene = None
    if scene is not None and scene.mode == "photo":
        return plan.model_copy(update=_photograph(config, voxel_size_mm, extent_mm, draw) | {"scene": scene})
    if config.ct_physics and contrast in CT_CONTRASTS:
        plan = plan.model_copy(update={"log_bias": None, "gamma": 1.0, "noise_kind": "gaussian"})
    else:
        plan = plan.model_copy(update=_magnetic(config, plan, extent_mm, draw))
    if scene is not None or stripped:
        return plan.model_copy(update={"scene": scene})
    masking = sample_masking(config.masking, extent_mm, draw)
    return plan.model_copy(update={name: getattr(masking, name) for name in MaskingPlan.model_fields})


def _storage(config: ArtefactConfig, plan: ArtefactPlan, voxel_size_mm: float, draw: Draw) -> dict[str, Any]:
    storage = config.storage
    changes: dict[str, Any] = {}
    if draw.chance(storage.gaussian_profile_probability):
        changes["profile"] = "gaussian"
    if draw.chance(storage.interpolation_probability):
        by = draw.pick({"linear": 1.0, "cubic": 1.0, "zero_fill": 2.0, "nearest": 0.3})
        changes["stored"] = StoredPlan(by=by, factor=draw.uniform(*storage.interpolation_finer))  # type: ignore[arg-type]
        if max(plan.spacing_mm) <= voxel_size_mm:
            spacing, slice_axis = [voxel_size_mm * draw.uniform(*storage.interpolation_coarser)] * 3, -1
            if draw.chance(0.5):  # in the plane of the slices only
                slice_axis = int(draw.uniform(0, 3))
                spacing[slice_axis] = voxel_size_mm
            changes["spacing_mm"] = tuple(spacing)
            changes["thickness_mm"] = tuple(0.0 if a == slice_axis else mm for a, mm in enumerate(spacing))
    return changes


def _magnetic(config: ArtefactConfig, plan: ArtefactPlan, extent_mm: tuple[float, ...], draw: Draw) -> dict[str, Any]:
    """What happens in a magnet only."""
    changes: dict[str, Any] = {}
    for name, strength in (("log_exponent", config.local_contrast_std), ("log_gfactor", config.noise_spread)):
        std = draw.uniform(*strength)
        if std > 0:
            changes[name] = draw.field(1, extent_mm, draw.uniform(*config.bias_spacing_mm), std)
    kspace = config.kspace
    moves = draw.chance(kspace.motion_probability)
    slices_move = moves and draw.chance(kspace.motion_between_slices)
    if slices_move:
        coarse = max(plan.spacing_mm)
        axis = plan.spacing_mm.index(coarse) if min(plan.spacing_mm) < coarse else int(draw.uniform(0, 3))
        count = max(1, round(extent_mm[axis] / plan.spacing_mm[axis]))
        changes["slices"] = sample_slice_motion(kspace, axis, count, draw)
    changes["kspace"] = sample_kspace(kspace, moves and not slices_move, draw)
    if draw.chance(kspace.wrap_probability):
        lost = draw.uniform(*kspace.wrap_fraction)
        start = draw.uniform(0.0, lost)
        changes["wrap"] = WrapPlan(
            axis=int(draw.uniform(0, 3)),
            start=start,
            stop=start + 1 - lost,
            strength=draw.uniform(*kspace.wrap_strength),
        )
    return changes


def _photograph(
    config: ArtefactConfig, voxel_size_mm: float, extent_mm: tuple[float, ...], draw: Draw
) -> dict[str, Any]:
    """The face of each slab is photographed, in a light of its own, by a camera with Gaussian noise."""
    spacing, thickness = [voxel_size_mm] * 3, [0.0] * 3
    spacing[SLAB_AXIS] = max(voxel_size_mm, draw.uniform(*config.modes.photo_spacing_mm))
    count = max(1, round(extent_mm[SLAB_AXIS] / spacing[SLAB_AXIS]))
    return {
        "log_bias": None,
        "noise_kind": "gaussian",
        "spacing_mm": tuple(spacing),
        "thickness_mm": tuple(thickness),
        "profile": "box",
        "stored": None,
        "slices": sample_slabs(config.modes, count, draw),
    }
