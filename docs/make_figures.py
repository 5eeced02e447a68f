"""Draw docs/images/generator_grid.png: twelve synthetic images of the phantom with their label maps.

python docs/make_figures.py [OUT.png]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from synthseg.config import GeneratorConfig, parse
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.templates import Template, load_template

CONTRASTS = ("t1", "t2", "flair", "pd", "ct", "random")
ROUNDS = 2  # the second round of contrasts is drawn with every artefact at its default strength
COLORS = 96  # of the PNG's palette: small enough a file, no visible bands
QUIET = {"strip_probability": 0.0, "crop_probability": 0.0, "lowres_probability": 0.0, "noise_std": [0.0, 0.02]}


def draw_plan(template: Template, contrast: str, artefacts: dict[str, object], index: int) -> Plan:
    named = {} if contrast == "random" else {contrast: 1.0}
    record = {
        "voxel_size_mm": 1.5,
        "shape": [128, 160, 160],
        "contrast": {"random_weight": float(contrast == "random"), "named_weights": named},
        "artefacts": artefacts,
        "deform": {"flip_probability": 0.5, "translation_mm": 5.0},
    }
    return sample_plan(parse(GeneratorConfig, record, "make_figures.py"), template.name, template.table, 0, index)


def cut(volume: np.ndarray, number: int) -> np.ndarray:
    """An axial, coronal or sagittal slice through the middle, in turn, rows running upwards."""
    axis = (2, 1, 0)[number % 3]
    return np.take(volume, volume.shape[axis] // 2, axis=axis).T[::-1]


def figure() -> plt.Figure:
    template = load_template("phantom")
    drawing, axes = plt.subplots(2 * ROUNDS, len(CONTRASTS), figsize=(9.6, 2 * ROUNDS * 1.72), facecolor="black")
    for number in range(ROUNDS * len(CONTRASTS)):
        row, column = divmod(number, len(CONTRASTS))
        plan = draw_plan(template, CONTRASTS[column], QUIET if row == 0 else {}, number)
        image, labels = render([template], [plan])
        plane = column + row
        color = template.table.colors[cut(labels[0].numpy(), plane)]
        axes[2 * row, column].imshow(cut(image[0, 0].numpy(), plane), cmap="gray", vmin=0, vmax=1)
        axes[2 * row + 1, column].imshow(color, interpolation="nearest")
        axes[2 * row, column].set_title(CONTRASTS[column], color="white", fontsize=9, pad=3)
    for ax in axes.flat:
        ax.axis("off")
    drawing.subplots_adjust(left=0.003, right=0.997, bottom=0.003, top=0.965, wspace=0.02, hspace=0.09)
    return drawing


def main(path: Path) -> None:
    buffer = io.BytesIO()
    figure().savefig(buffer, format="png", dpi=125, facecolor="black")
    picture = Image.open(buffer).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images" / "generator_grid.png")
