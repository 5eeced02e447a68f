"""Write synthetic samples to a folder: image, label map and the Plan that made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from synthseg import rng
from synthseg.config import GeneratorConfig
from synthseg.errors import ConfigError, OutputError, TemplateError
from synthseg.generator.anatomy import check_atrophy
from synthseg.generator.anomalies import for_plan, with_anomalies
from synthseg.generator.plan import Plan
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import LabelTable
from synthseg.templates import Template
from synthseg.volume import Volume, save_image, save_label_map, save_vectors, write_text_atomically


@dataclass(frozen=True)
class SampleFiles:
    """The files of one image of a sample. The displacement is only written if the image has one."""

    image: Path
    label: Path
    plan: Path
    displacement: Path

    def all(self) -> tuple[Path, ...]:
        return self.image, self.label, self.plan, self.displacement


@dataclass(frozen=True)
class Written:
    """One image that was written: (D, H, W) in [0, 1], labels as indices into the table, and where it is."""

    files: SampleFiles
    image: np.ndarray
    labels: np.ndarray
    table: LabelTable
    plan: Plan


def sample_files(folder: Path, number: int, view: int | None = None) -> SampleFiles:
    """The files of a sample, or of one of its views."""
    stem = f"{number:04d}" if view is None else f"{number:04d}_view{view}"
    kinds = ("image.nii.gz", "label.nii.gz", "plan.json", "displacement.nii.gz")
    return SampleFiles(*(folder / f"{stem}_{kind}" for kind in kinds))


def check_free(folder: Path, numbers: Sequence[int], overwrite: bool, views: int = 1) -> None:
    """Refuse to replace samples that are there, before anything is rendered."""
    for number in numbers:
        for view in range(views):
            for file in sample_files(folder, number, view if views > 1 else None).all():
                if file.exists() and not overwrite:
                    raise OutputError(f"{file}: exists already; use --overwrite, or choose another folder")


def grid_affine(plan: Plan) -> np.ndarray:
    """RAS+ affine of a sample: the middle of the patch is at 0 mm."""
    affine = np.diag([plan.voxel_size_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) * plan.voxel_size_mm / 2 for n in plan.shape]
    return affine


def write_sample(
    folder: Path,
    number: int,
    template: Template,
    plans: Sequence[Plan],
    scheme: LabelTable,
    device: torch.device | str = "cpu",
    on_done: Callable[[Written], None] = lambda written: None,
) -> None:
    """Render the Plans of one sample, one for each view, and write their files. Labels are ids of ``scheme``.

    With several views the files are numbered by view. A view whose geometry differs from that of the first by a known
    displacement comes with it: float32 vectors in mm along right, anterior and superior.
    """
    indices = np.arange(len(scheme)) if scheme.name == template.table.name else template.table.mapping(scheme)
    views = render_views(template, plans, device)
    for view, plan in enumerate(plans):
        files = sample_files(folder, number, view if len(plans) > 1 else None)
        image, labels = views.images[view, 0].cpu().numpy(), indices[views.labels[view].cpu().numpy()]
        grid = Volume(image, grid_affine(plan))
        save_image(files.image, grid)
        save_label_map(files.label, scheme.ids[labels], grid, scheme.ids)
        if plan.deform.perturbation_mm is not None:
            save_vectors(files.displacement, views.displacement_mm[view].cpu().numpy(), grid.affine)
        else:
            files.displacement.unlink(missing_ok=True)  # of an overwritten sample
        write_text_atomically(files.plan, plan.model_dump_json(indent=1) + "\n")
        on_done(Written(files, image, labels, scheme, plan))


def generate(
    config: GeneratorConfig,
    templates: Sequence[Template],
    count: int,
    seed: int,
    folder: Path,
    scheme: LabelTable | None = None,
    device: torch.device | str = "cpu",
    on_done: Callable[[Written], None] = lambda written: None,
) -> None:
    """Write samples 0 to count - 1, each from a template drawn at random; with views, several images of each."""
    templates = [with_anomalies(template, config.anomalies) for template in templates]
    drawn = [
        templates[int(torch.randint(len(templates), (), generator=rng.generator(seed, number, "template")))]
        for number in range(count)
    ]
    if config.anatomy.atrophy > 0:
        for template in drawn:
            check_atrophy(template, config.anatomy.atrophy)
    for number, template in enumerate(drawn):
        plans = sample_views(config, template.name, template.table, seed, number)
        write_sample(folder, number, template, plans, scheme or template.table, device, on_done)


def load_plans(file: Path) -> list[Plan]:
    """Read a Plan, or a list of them. Raises ConfigError if it is neither."""
    try:
        return TypeAdapter(Annotated[list[Plan], BeforeValidator(_listed), Field(min_length=1)]).validate_python(
            json.loads(file.read_text())
        )
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a *_plan.json of 'generate'") from None
    except (ValidationError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{file}: is not a Plan ({first}); give a *_plan.json of 'generate'") from None


def _listed(record: object) -> object:
    return record if isinstance(record, list) else [record]


def fitting_template(plan: Plan, template: Template, file: Path) -> Template:
    """The template with the labels that the Plan was drawn for. Raises TemplateError if it is of another kind."""
    template = for_plan(template, plan.scheme, plan.anomalies)
    if plan.scheme != template.table.name or len(plan.contrast.mean) != len(template.table):
        raise TemplateError(
            f"{file}: was made with scheme '{plan.scheme}' ({len(plan.contrast.mean)} labels), but template "
            f"{template.name} has '{template.table.name}' ({len(template.table)}); name its own with --template"
        )
    return template
