"""Anomalies: white matter lesions, perivascular spaces, tumours with oedema, haemorrhages and resection cavities.

They are labels of their own for the intensities, painted over the template before it is read. For the network they are
what the recipe says: a class, or the tissue that hosts them (SIAM, 2026, has both kinds of model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from synthseg.config import AnomalyConfig
from synthseg.errors import ConfigError
from synthseg.generator.draw import Draw, Field3D, Record
from synthseg.labels import MAX_LABELS, PARENCHYMA_TISSUES, Label, LabelTable, tissue_mask
from synthseg.templates import Template


@dataclass(frozen=True)
class Kind:
    """An anomaly: the tissue whose intensity it has, and the tissues that may host it."""

    tissue: str
    hosts: frozenset[str]


WHITE = frozenset({"wm", "brainstem", "lesion"})
KINDS = {
    "lesion": Kind("lesion", WHITE),
    "perivascular": Kind("ventricle", frozenset({"wm", "putamen", "caudate", "pallidum", "thalamus"})),
    "oedema": Kind("oedema", WHITE),
    "tumour": Kind("tumour", PARENCHYMA_TISSUES),
    "haemorrhage": Kind("haemorrhage", PARENCHYMA_TISSUES),
    "cavity": Kind("ventricle", PARENCHYMA_TISSUES),
}
FIRST_ID = 9001
SUFFIX = "+anomalies"


class Blob(Record):
    """An ellipsoid with a rough surface.

    Attributes
    ----------
    place : in [0, 1): which of the host's voxels, in the order of memory, is its middle.
    axes : rows are its half axes' directions.
    surface : (1, n, n, n) deviation of the surface over the cube of twice the ellipsoid, in radii.
    ring_mm : width of the oedema around it.
    """

    kind: str
    place: float
    radii_mm: tuple[float, float, float]
    axes: tuple[tuple[float, float, float], ...]
    surface: Field3D
    ring_mm: float = 0.0


class AnomalyPlan(Record):
    """The anomalies of an image, and the class that they are; None: they belong to their hosts."""

    blobs: tuple[Blob, ...]
    label: int | None


def with_anomalies(template: Template, config: AnomalyConfig) -> Template:
    """The template with a table that also has a label for each kind; itself if the settings have no anomalies.

    Raises ConfigError if the table has no room for them, and LabelError later, when the network's scheme does not have
    the ``label`` of the settings.
    """
    if config.probability == 0 or template.table.name.endswith(SUFFIX):
        return template
    if len(template.table) + len(KINDS) > MAX_LABELS:
        raise ConfigError(
            f"anomalies.probability is above 0, but the {len(template.table)} labels of scheme '{template.table.name}' "
            f"leave no room for the {len(KINDS)} kinds of anomalies; expected at most {MAX_LABELS - len(KINDS)}: "
            "merge some of them, or set anomalies.probability to 0"
        )
    return replace(template, table=_extended(template.table, config.label), cache={})


def for_plan(template: Template, scheme: str, plan: AnomalyPlan | None) -> Template:
    """The template with the table that a Plan of this scheme was drawn for."""
    if scheme != template.table.name + SUFFIX:
        return template
    return replace(template, table=_extended(template.table, plan.label if plan else None), cache={})


def _extended(table: LabelTable, label_id: int | None) -> LabelTable:
    own = table.name
    labels = [replace(label, to={**label.to, own: (label.id,)}) for label in table.labels]
    schemes = sorted({scheme for label in labels for scheme in label.to})
    # folded into their host, anomalies never reach the target; what they stand for then plays no part
    to = {scheme: (label_id or 0,) for scheme in schemes}
    extra = [
        Label(id=FIRST_ID + i, name=name.capitalize(), color=(255, 40 * i, 160), tissue=kind.tissue, to=to)
        for i, (name, kind) in enumerate(KINDS.items())
    ]
    return LabelTable(own + SUFFIX, (*labels, *extra), table.description)


def sample_anomalies(config: AnomalyConfig, table: LabelTable, draw: Draw) -> AnomalyPlan | None:
    """Draw the anomalies of one image; None for none. Raises ConfigError if the table has no labels for them."""
    if config.probability == 0 or not draw.chance(config.probability):
        return None
    if not table.name.endswith(SUFFIX):
        raise ConfigError(
            f"anomalies.probability is above 0, but the template's table '{table.name}' has no labels for anomalies; "
            "pass the template through generator.anomalies.with_anomalies first"
        )

    def blob(kind: str, radii: tuple[float, float, float], ring_mm: float = 0.0) -> Blob:
        random = torch.randn((3, 3), generator=draw.generator, dtype=torch.float64)
        axes = torch.linalg.qr(random).Q
        return Blob(
            kind=kind,
            place=draw.uniform(0.0, 1.0),
            radii_mm=radii,
            axes=tuple(tuple(row) for row in axes.tolist()),
            surface=draw.field(1, (1.0,) * 3, 0.4, config.roughness),
            ring_mm=ring_mm,
        )

    def round_one(limits: tuple[float, float]) -> tuple[float, float, float]:
        size = draw.log_uniform(*limits)
        a, b, c = (min(max(size * draw.uniform(0.7, 1.4), limits[0]), limits[1]) for _ in range(3))
        return a, b, c

    blobs: list[Blob] = []
    if draw.chance(config.tumour_probability):
        blobs.append(blob("tumour", round_one(config.tumour_radius_mm), draw.uniform(*config.oedema_mm)))
    if draw.chance(config.cavity_probability):
        blobs.append(blob("cavity", round_one(config.cavity_radius_mm)))
    if draw.chance(config.haemorrhage_probability):
        blobs.append(blob("haemorrhage", round_one(config.haemorrhage_radius_mm)))
    if draw.chance(config.lesion_probability):
        for _ in range(round(draw.log_uniform(*config.lesion_count))):
            blobs.append(blob("lesion", round_one(config.lesion_radius_mm)))
    if draw.chance(config.perivascular_probability):
        for _ in range(round(draw.log_uniform(*config.perivascular_count))):
            radius = draw.uniform(*config.perivascular_radius_mm)
            half = max(draw.uniform(*config.perivascular_length_mm) / 2, radius)
            blobs.append(blob("perivascular", (half, radius, radius)))
    return AnomalyPlan(blobs=tuple(blobs), label=config.label) if blobs else None


def first_index(table: LabelTable) -> int:
    """Labels of a table with anomalies are anomalies from this index on."""
    return len(table) - len(KINDS)


def paint_anomalies(template: Template, labels: torch.Tensor, plan: AnomalyPlan) -> torch.Tensor:
    """Labels (D, H, W) with the anomalies over their hosts; the input is left as it is."""
    painted = labels.clone()
    for blob in plan.blobs:
        _paint(template, labels, painted, blob)
    return painted


def _host_voxels(template: Template, kind: str) -> torch.Tensor:
    """Flat positions of the template's voxels that may host this kind, int32."""
    key = f"host/{kind}"
    if key not in template.cache:
        hosts = torch.from_numpy(tissue_mask(template.table, KINDS[kind].hosts))
        template.cache[key] = hosts[template.labels.view(-1).int()].nonzero()[:, 0].int()
    found: torch.Tensor = template.cache[key]
    return found


def _paint(template: Template, labels: torch.Tensor, painted: torch.Tensor, blob: Blob) -> None:
    places = _host_voxels(template, blob.kind)
    if len(places) == 0:
        return
    middle = np.unravel_index(int(places[int(blob.place * len(places))]), tuple(labels.shape))
    spacing = torch.tensor(template.spacing_mm)
    radii = torch.tensor(blob.radii_mm)
    turn = torch.tensor(blob.axes, dtype=torch.float32)
    field = blob.surface.tensor()[None]
    farthest = 1 + max(float(field.max()), 0.0) + blob.ring_mm / float(radii.mean())  # in radii
    reach = farthest * (turn * radii[:, None]).norm(dim=0) / spacing  # of an ellipsoid along each axis
    box = tuple(
        slice(max(int(m - r), 0), min(int(m + r) + 2, n)) for m, r, n in zip(middle, reach, labels.shape, strict=True)
    )
    axes = [(torch.arange(b.start, b.stop) - int(m)) * s for b, m, s in zip(box, middle, spacing, strict=True)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    along = torch.einsum("ij,jdhw->idhw", turn, position)
    unit = along / radii.view(3, 1, 1, 1)
    surface = F.grid_sample(field, unit.movedim(0, -1).flip(-1)[None] / 2, padding_mode="border", align_corners=True)[
        0, 0
    ]
    depth = unit.norm(dim=0) - 1 - surface  # in radii, negative inside
    first = first_index(template.table)
    names = list(KINDS)
    parts = [(blob.kind, depth < 0)]
    if blob.ring_mm > 0:
        parts.append(("oedema", (depth >= 0) & (depth * float(radii.mean()) < blob.ring_mm)))
    for name, region in parts:
        hosts = torch.from_numpy(tissue_mask(template.table, KINDS[name].hosts))[labels[box].int()]
        painted[box][region & hosts] = first + names.index(name)
