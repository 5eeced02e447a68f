"""What scanner and storage do to an image.

Every stage takes and returns (B, 1, D, H, W) and one plan per image. Strength zero is the identity (the result may
then be the input itself), the input is not modified, and a batch equals its images one by one. ``corrupt`` runs all of
them.
"""

from synthseg.generator.artefacts.acquisition import acquire, corrupt
from synthseg.generator.artefacts.masking import mask
from synthseg.generator.artefacts.modes import scene
from synthseg.generator.artefacts.plan import ArtefactPlan, sample_artefacts
from synthseg.generator.artefacts.scanner import bias_field, gamma
from synthseg.generator.artefacts.storage import field_of_view, fold

__all__ = [
    "ArtefactPlan",
    "acquire",
    "bias_field",
    "corrupt",
    "field_of_view",
    "fold",
    "gamma",
    "mask",
    "sample_artefacts",
    "scene",
]
