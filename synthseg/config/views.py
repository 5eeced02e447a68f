"""Several images of one anatomy."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from synthseg.config.base import LengthRange, Section

Severity = Annotated[float, Field(ge=0, le=1)]


class ViewsConfig(Section):
    """Images of one anatomy that differ in contrast and artefacts, from mild to severe (Brain-ID, ECCV 2024)."""

    severities: list[Severity] = Field(
        [1.0],
        min_length=1,
        description="one for each view: 1 draws from the ranges as they are, 0 from their mild form",
    )
    perturbation_mm: float = Field(
        0.0, ge=0, description="std of a small displacement of each view but the first, known and returned"
    )
    perturbation_spacing_mm: LengthRange = Field((20.0, 40.0), description="spacing of its control points")
    shift_mm: float = Field(
        0.0,
        ge=0,
        description="each view but the first sees the anatomy moved by up to this along each axis, known and returned",
    )

    @property
    def displaced(self) -> bool:
        """Whether views differ in geometry."""
        return self.perturbation_mm > 0 or self.shift_mm > 0
