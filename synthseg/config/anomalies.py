"""What a diseased brain may hold: how often, how large."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthseg.config.base import Count, LengthRange, Section

Counts = tuple[Count, Count]
Chance = Annotated[float, Field(ge=0, le=1)]


class AnomalyConfig(Section):
    """Anomalies, each with its chance; off until ``probability`` is given.

    Ellipsoids with a rough surface, placed in the tissue where they occur. They do not push what is around them.
    """

    probability: Chance = Field(0.0, description="chance that an image may have anomalies at all")
    label: int | None = Field(
        None, ge=1, description="id of the network's scheme that all anomalies have; none: they are their host tissue"
    )
    lesion_probability: Chance = Field(0.6, description="of those: chance of white matter lesions")
    lesion_count: Counts = Field((1, 25), description="number of lesions, log-uniform")
    lesion_radius_mm: LengthRange = Field((1.0, 7.0), description="half axes of a lesion, log-uniform")
    perivascular_probability: Chance = Field(0.4, description="of those: chance of enlarged perivascular spaces")
    perivascular_count: Counts = Field((3, 60), description="number of such spaces, log-uniform")
    perivascular_radius_mm: LengthRange = Field((0.5, 1.5), description="their radius")
    perivascular_length_mm: LengthRange = Field((3.0, 14.0), description="their length")
    tumour_probability: Chance = Field(0.2, description="of those: chance of a tumour")
    tumour_radius_mm: LengthRange = Field((4.0, 22.0), description="half axes of its core")
    oedema_mm: LengthRange = Field((2.0, 18.0), description="width of the ring of oedema in the white matter around it")
    haemorrhage_probability: Chance = Field(0.15, description="of those: chance of a haemorrhage")
    haemorrhage_radius_mm: LengthRange = Field((2.0, 20.0), description="its half axes")
    cavity_probability: Chance = Field(0.15, description="of those: chance of a resection cavity, filled with fluid")
    cavity_radius_mm: LengthRange = Field((6.0, 25.0), description="its half axes")
    roughness: float = Field(0.25, ge=0, le=0.8, description="std of the surface about the ellipsoid, in radii")
