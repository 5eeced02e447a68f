"""Write synthetic samples to a folder: image, label map and the Plan that made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from synthseg import rng
from synthseg.config import GeneratorConfig
from synthseg.errors import ConfigError, OutputError, TemplateError
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable
from synthseg.templates import Template
from synthseg.volume import Volume, save_image, save_label_map, write_text_atomically


def sample_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Image, label map and Plan of one sample."""
    return tuple(folder / f"{number:04d}_{kind}" for kind in ("image.nii.gz", "label.nii.gz", "plan.json"))  # type: ignore[return-value]


def check_free(folder: Path, numbers: Sequence[int], overwrite: bool) -> None:
    """Refuse to replace samples that are there, before anything is rendered."""
    for number in numbers:
        for file in sample_files(folder, number):
            if file.exists() and not overwrite:
                raise OutputError(f"{file}: exists already; use --overwrite, or choose another folder")


def grid_affine(plan: Plan) -> np.ndarray:
    """RAS+ affine of a sample: the middle of the patch is at 0 mm."""
    affine = np.diag([plan.voxel_size_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) * plan.voxel_size_mm / 2 for n in plan.shape]
    return affine


def write_sample(
    folder: Path, number: int, template: Template, plan: Plan, scheme: LabelTable, device: torch.device | str = "cpu"
) -> None:
    """Render one Plan and write its three files. Labels are ids of ``scheme``."""
    indices = np.arange(len(scheme)) if scheme.name == template.table.name else template.table.mapping(scheme)
    images, labels = render([template], [plan], device)
    image_file, label_file, plan_file = sample_files(folder, number)
    grid = Volume(images[0, 0].cpu().numpy(), grid_affine(plan))
    save_image(image_file, grid)
    save_label_map(label_file, scheme.ids[indices[labels[0].cpu().numpy()]], grid, scheme.ids)
    write_text_atomically(plan_file, plan.model_dump_json(indent=1) + "\n")


def generate(
    config: GeneratorConfig,
    templates: Sequence[Template],
    count: int,
    seed: int,
    folder: Path,
    scheme: LabelTable | None = None,
    device: torch.device | str = "cpu",
    on_done: Callable[[Path], None] = lambda file: None,
) -> None:
    """Write samples 0 to count - 1, each from a template drawn at random."""
    for number in range(count):
        which = int(torch.randint(len(templates), (), generator=rng.generator(seed, number, "template")))
        template = templates[which]
        plan = sample_plan(config, template.name, template.table, seed, number)
        write_sample(folder, number, template, plan, scheme or template.table, device)
        on_done(sample_files(folder, number)[0])


def load_plan(file: Path) -> Plan:
    """Read a Plan. Raises ConfigError if it is not one."""
    try:
        return Plan.model_validate_json(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a *_plan.json of 'generate'") from None
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{file}: is not a Plan ({first}); give a *_plan.json of 'generate'") from None


def check_plan_fits(plan: Plan, template: Template, file: Path) -> None:
    """Raise TemplateError unless the Plan was drawn for this kind of template."""
    if plan.scheme != template.table.name or len(plan.contrast.mean) != len(template.table):
        raise TemplateError(
            f"{file}: was made with scheme '{plan.scheme}' ({len(plan.contrast.mean)} labels), but template "
            f"{template.name} has '{template.table.name}' ({len(template.table)}); name its own with --template"
        )
