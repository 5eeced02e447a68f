"""Dice of a network on rendered templates that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from synthseg.config import AnatomyConfig, AnomalyConfig, GeneratorConfig, TrainConfig
from synthseg.config.artefacts import MaskingConfig, ModesConfig
from synthseg.errors import ConfigError
from synthseg.generator.plan import sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable
from synthseg.templates import Template
from synthseg.training.stream import group_table


def exact_index(template: Template, target: LabelTable) -> torch.Tensor:
    """The class of ``target`` for each label of a template. Raises ConfigError if it cannot tell classes apart."""
    index, groups = group_table(template.table, target)
    if not torch.equal(groups, torch.eye(len(target), dtype=torch.bool)):
        raise ConfigError(f"validation_templates: {template.name} cannot tell all classes of {target.name} apart")
    return index


def whole_head(config: GeneratorConfig, contrast: str) -> GeneratorConfig:
    """Settings for a held-out map as it is, seen whole, in one contrast; ``random1``, ``random2`` are random."""
    quiet = config.artefacts.model_copy(
        update={
            "strip_probability": 0.0,
            "crop_probability": 0.0,
            "kspace": config.artefacts.kspace.model_copy(update={"wrap_probability": 0.0}),
            "masking": MaskingConfig(),
            "modes": ModesConfig(),
        }
    )
    only = config.contrast.only("random" if contrast.startswith("random") else contrast)
    return config.model_copy(
        update={"anatomy": AnatomyConfig(), "anomalies": AnomalyConfig(), "contrast": only, "artefacts": quiet}
    )


def validation_table(
    network: torch.nn.Module,
    config: TrainConfig,
    templates: Sequence[Template],
    target: LabelTable,
    contrasts: Sequence[str],
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, float]]:
    """Hard Dice per contrast and class on rendered templates: {contrast: {class: Dice}}, from fixed plans.

    Each template is rendered once per contrast, with its deformation fixed and the whole head visible. Templates that
    cannot tell classes apart are refused: Dice needs exact labels.
    """
    table: dict[str, dict[str, float]] = {}
    for number, contrast in enumerate(contrasts):
        generator = whole_head(config.generator, contrast)
        scores: list[np.ndarray] = []
        for template in templates:
            index = exact_index(template, target)
            plan = sample_plan(generator, template.name, template.table, 977, number * 1000 + len(scores))
            image, labels = render([template], [plan])
            with torch.no_grad():
                predicted = network(image.to(device)).argmax(1).cpu()
            truth = index[labels.int()].long().flatten()
            guess = predicted.flatten()
            n = len(target)
            both = torch.bincount(truth[truth == guess], minlength=n).double().numpy()
            size = (torch.bincount(truth, minlength=n) + torch.bincount(guess, minlength=n)).double().numpy()
            scores.append(
                np.where(torch.bincount(truth, minlength=n).numpy() > 0, 2 * both / np.maximum(size, 1), np.nan)
            )
        table[contrast] = {}
        for c in range(1, len(target)):
            found = [score[c] for score in scores if np.isfinite(score[c])]
            if found:
                table[contrast][target.names[c]] = round(float(np.mean(found)), 4)
    return table


def mean_dice(table: dict[str, dict[str, float]]) -> float:
    """Mean over contrasts and classes."""
    return float(np.mean([np.mean(list(row.values())) for row in table.values()]))
