"""Which files are made of one scan. Kept apart from what makes them, which is slow to import."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Spacing: TypeAlias = "float | Sequence[float]"


@dataclass(frozen=True)
class Targets:
    """Where the files of one scan go; None: not wanted.

    Attributes
    ----------
    labels : label map.
    posteriors : probabilities of all classes, 4-D NIfTI, the classes along the last axis in the order of the scheme.
    resampled : the scan on the grid of the other outputs.
    mask : the brain with its ventricles, holes filled.
    stripped : the scan with air outside the mask.
    meshes : (structure, file) pairs; a structure is the name of a label, or brain, skull or head.
    """

    labels: Path
    posteriors: Path | None = None
    resampled: Path | None = None
    mask: Path | None = None
    stripped: Path | None = None
    meshes: tuple[tuple[str, Path], ...] = ()

    def images(self) -> list[Path]:
        wanted = (self.labels, self.posteriors, self.resampled, self.mask, self.stripped)
        return [path for path in wanted if path is not None]

    def paths(self) -> list[Path]:
        """All files, in the order in which they are written."""
        return [*self.images(), *(path for _, path in self.meshes)]

    def need_posteriors(self, spacing_mm: Spacing | None = None, scheme: str | None = None) -> bool:
        """Whether the segmentation must keep its probabilities for these files."""
        return bool(self.posteriors or self.meshes or spacing_mm is not None or scheme)
