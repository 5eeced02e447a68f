"""How much the anatomy of a template is changed. Ranges follow SIAM (2026)."""

from __future__ import annotations

from pydantic import Field

from synthseg.config.base import Length, LengthRange, Section

Ratio = tuple[Length, Length]


class AnatomyConfig(Section):
    """Thickness of layers, size of structures; off until ``probability`` is given.

    A shift of a border is a mean and a smooth variation over space.
    """

    probability: float = Field(0.0, ge=0, le=1, description="chance that the anatomy of the template is changed at all")
    cortex_probability: float = Field(0.5, ge=0, le=1, description="of those: chance that the cortex changes")
    cortex_outer_mm: float = Field(
        0.6, ge=0, description="grey matter into CSF (or, negative, CSF into grey matter) by U[-this, this]"
    )
    cortex_inner_mm: float = Field(0.5, ge=0, description="grey matter into white matter by U[-this, this]")
    recarve_probability: float = Field(
        0.25, ge=0, le=1, description="of the cortices that change: chance of a cortex carved anew from white matter"
    )
    recarve_mm: LengthRange = Field((1.8, 3.5), description="thickness of a cortex that is carved anew")
    cerebellum_mm: float = Field(
        0.5, ge=0, description="cerebellar cortex into CSF and into white matter by U[-this, this]"
    )
    nuclei_probability: float = Field(0.7, ge=0, le=1, description="chance that the deep grey matter changes in size")
    nuclei_ratio: Ratio = Field(
        (0.6, 1.5), description="volume of each deep nucleus, hippocampus and amygdala, against the template's"
    )
    ventricle_probability: float = Field(0.5, ge=0, le=1, description="chance that the ventricles change in size")
    ventricle_ratio: Ratio = Field((0.4, 3.0), description="volume of the ventricles against the template's")
    skull_probability: float = Field(0.5, ge=0, le=1, description="chance that skull, scalp and CSF layers change")
    skull_mm: float = Field(3.0, ge=0, description="thickness of the skull changes by U[-this, this]")
    diploe_mm: float = Field(1.0, ge=0, description="cancellous into cortical bone by U[-this, this]")
    scalp_mm: float = Field(4.0, ge=0, description="thickness of skin, fat and muscle changes by U[-this, this]")
    skin_mm: float = Field(1.0, ge=0, description="skin into what lies under it by U[-this, this]")
    subarachnoid_mm: float = Field(2.0, ge=0, description="the gap between brain and skull changes by U[-this, this]")
    dura_mm: float = Field(0.7, ge=0, description="dura into CSF by U[-this, this]")
    vessel_mm: float = Field(0.5, ge=0, description="calibre of the vessels changes by twice U[-this, this]")
    variation: float = Field(0.7, ge=0, description="std of a shift over space, as a part of its largest mean")
    variation_spacing_mm: LengthRange = Field(
        (25.0, 60.0), description="spacing of the control points of that variation"
    )
    atrophy: float = Field(
        0.0, ge=0, le=0.5, description="part of the cerebral cortex that becomes CSF: a known amount, in every image"
    )
