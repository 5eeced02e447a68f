"""The Plan: everything random about one synthetic image, as one JSON-able record.

``sample_plan`` draws; ``synthesis.render`` only applies. Sample *i* is a pure function of (config, template table,
seed, *i*). Each stage draws its own part, in its own module, from a random stream of its own, so that a stage can be
redrawn while the others stay.
"""

from __future__ import annotations

from synthseg import rng
from synthseg.config import GeneratorConfig
from synthseg.generator.anatomy import AnatomyPlan, sample_anatomy
from synthseg.generator.anomalies import AnomalyPlan, sample_anomalies
from synthseg.generator.artefacts import ArtefactPlan, sample_artefacts
from synthseg.generator.contrast import ContrastPlan, sample_contrast
from synthseg.generator.deform import DeformPlan, sample_deform
from synthseg.generator.draw import Draw, Record
from synthseg.labels import LabelTable


class Plan(Record):
    template: str
    scheme: str
    seed: int
    index: int
    view: int = 0
    severity: float = 1.0
    voxel_size_mm: float
    shape: tuple[int, int, int]
    subsamples: int
    anatomy: AnatomyPlan | None = None
    anomalies: AnomalyPlan | None = None
    deform: DeformPlan
    contrast: ContrastPlan
    artefacts: ArtefactPlan


def sample_plan(
    config: GeneratorConfig, template: str, table: LabelTable, seed: int, index: int, view: int = 0
) -> Plan:
    """Draw everything that is random about sample ``index``. Its views differ in appearance, not in geometry."""
    extent = tuple(n * config.voxel_size_mm for n in config.shape)

    def draw(stage: str) -> Draw:
        return Draw(rng.generator(seed, index, stage))

    def draw_view(stage: str) -> Draw:
        return draw(stage if view == 0 else f"{stage}/{view}")

    strip = draw_view("strip").chance(config.artefacts.strip_probability)
    contrast = sample_contrast(config.contrast, table, extent, draw_view("contrast"), strip)
    return Plan(
        template=template,
        scheme=table.name,
        seed=seed,
        index=index,
        view=view,
        voxel_size_mm=config.voxel_size_mm,
        shape=config.shape,
        subsamples=config.subsamples,
        anatomy=sample_anatomy(config.anatomy, table, draw("anatomy")),
        anomalies=sample_anomalies(config.anomalies, table, draw("anomalies")),
        deform=sample_deform(config.deform, extent, draw("deform")),
        contrast=contrast,
        artefacts=sample_artefacts(
            config.artefacts, config.voxel_size_mm, extent, draw_view("artefacts"), contrast.name, stripped=strip
        ),
    )
