"""The three ways to run a network over a scan. What each gains and costs is measured by ``benchmarks/modes.py``."""

from __future__ import annotations

from synthseg.prediction import Member

FAST_FACTOR = 1.25  # voxel size of the fast mode, in those of the model; with 1.5, thin structures are lost

# Mirrored and zoomed members add to the mean. Intensities are not inverted: such a member alone is worse than the plain
# one, since a network that learns from random contrasts has no contrast to be turned away from.
MEMBERS: dict[str, tuple[Member, ...]] = {
    "default": (Member(),),
    "fast": (Member(),),
    "robust": (
        Member(),
        Member(mirrored=True),
        Member(zoom=0.9, shift=(5, 3, 7)),
        Member(zoom=1.1, mirrored=True),
    ),
}
