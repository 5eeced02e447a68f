"""Draw the figures of the generator's pages in docs/images, all from the phantom that ships, and that of `colin27`.

    python docs/make_figures.py [NAME ...] [--out FOLDER]

Without names all of them, among them one of weak, medium and strong for every effect: the same random draw, its range
scaled. The values under the panels are those of the key that is named above them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from synthseg.config import GeneratorConfig, generator_config, parse, set_by_path, shipped_presets
from synthseg.generator.anomalies import for_plan, with_anomalies
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import LabelTable, load_scheme
from synthseg.paths import data_dir
from synthseg.reports.mosaic import PLANES, bounding_box, grey_window, take_slice
from synthseg.templates import Template, load_template, read_label_map, read_record
from synthseg.volume import canonical, load_volume

VOXEL_MM, SHAPE = 1.5, [120, 152, 144]
LARGEST_BYTES = 195_000
AXIAL, CORONAL, SAGITTAL = 2, 1, 0
COLIN27_MM, COLIN27_SCALE = (4.0, -5.0, 8.0), 1.5  # where its slices lie, axial, coronal, sagittal; pixels a mm
GAP = 3
CONTRASTS = ("t1", "t2", "flair", "pd", "ct", "random")
QUIET = {"strip_probability": 0.0, "crop_probability": 0.0, "lowres_probability": 0.0, "noise_std": [0.0, 0.02]}
# A clean T1-weighted image of the template as it is.
PLAIN = (
    "contrast.random_weight=0", "contrast.named_weights={t1: 1}", "contrast.std=[0.01, 0.01]",
    "contrast.texture_std=[0.01, 0.01]", "contrast.soft_texture_std=[0.15, 0.15]", "contrast.tie_probability=0",
    "deform.rotation_deg=0", "deform.scaling=0", "deform.shear=0", "deform.translation_mm=0", "deform.svf_std_mm=0",
    "deform.flip_probability=0", "artefacts.bias_std=[0, 0]", "artefacts.gamma_std=0",
    "artefacts.noise_probability=0", "artefacts.lowres_probability=0", "artefacts.crop_probability=0",
    "artefacts.strip_probability=0",
)  # fmt: skip
ALWAYS_ANATOMY = ("anatomy.probability=1", *(f"anatomy.{n}_probability=0" for n in ("cortex", "nuclei", "ventricle")),
                  "anatomy.skull_probability=0")  # fmt: skip
CT = ("contrast.named_weights={}", "contrast.hounsfield_weight=1")
RANDOM = ("contrast.named_weights={}", "contrast.random_weight=1", "contrast.mean=[0.1, 0.9]")

# The key whose three values are shown, those values, what else must be set, the slice (and its place), the seed.
Effect = tuple[str, Sequence[str], tuple[str, ...], int, float, int]
_SKULL = (*ALWAYS_ANATOMY, "anatomy.skull_probability=1",
          *(f"anatomy.{n}_mm=0" for n in ("skull", "scalp", "subarachnoid", "diploe", "skin", "dura", "vessel")),
          "anatomy.variation=0.3")  # fmt: skip
_CORTEX = (*ALWAYS_ANATOMY, "anatomy.cortex_probability=1", "anatomy.recarve_probability=0", "anatomy.cerebellum_mm=0",
           "anatomy.variation=0.2")  # fmt: skip
_SLICES = ("artefacts.lowres_probability=1", "artefacts.lowres_isotropic_probability=0")
_NEAR = ("voxel_size_mm=1",)
_SMOOTH = ("contrast.texture_std=[0, 0]", "contrast.soft_texture_std=[0, 0]")
_NO_ANOMALY = tuple(
    f"anomalies.{kind}_probability=0" for kind in ("lesion", "perivascular", "tumour", "haemorrhage", "cavity")
)
EFFECTS: dict[str, list[Effect]] = {
    "anatomy": [
        ("anatomy.cortex_outer_mm", ("0.5", "1", "2"), (*_CORTEX, *_NEAR, "anatomy.cortex_inner_mm=0"), AXIAL, 0.6, 11),
        ("anatomy.atrophy", ("0.05", "0.15", "0.3"), _NEAR, AXIAL, 0.6, 0),
        ("anatomy.ventricle_ratio", ("[0.4, 0.4]", "[1.7, 1.7]", "[3, 3]"),
         (*ALWAYS_ANATOMY, *_NEAR, "anatomy.ventricle_probability=1"), CORONAL, 0.5, 0),
        ("anatomy.nuclei_ratio", ("[1.5, 1.5]", "[0.8, 0.8]", "[0.6, 0.6]"),
         (*ALWAYS_ANATOMY, *_NEAR, "anatomy.nuclei_probability=1"), CORONAL, 0.5, 0),
        ("anatomy.skull_mm", ("1", "3", "6"), _SKULL, SAGITTAL, 0.45, 3),
        ("anatomy.scalp_mm", ("1", "2.5", "4"), _SKULL, SAGITTAL, 0.45, 13),
    ],
    "anomalies": [
        ("anomalies.lesion_count", ("[4, 4]", "[15, 15]", "[40, 40]"),
         ("anomalies.probability=1", "anomalies.lesion_probability=1", *_NO_ANOMALY[1:]), AXIAL, 0.6, 38),
        ("anomalies.perivascular_count", ("[10, 10]", "[60, 60]", "[200, 200]"),
         ("anomalies.probability=1", _NO_ANOMALY[0], "anomalies.perivascular_probability=1", *_NO_ANOMALY[2:]),
         AXIAL, 0.6, 2),
        ("anomalies.tumour_radius_mm", ("[5, 5]", "[10, 10]", "[20, 20]"),
         ("anomalies.probability=1", *_NO_ANOMALY[:2], "anomalies.tumour_probability=1", *_NO_ANOMALY[3:]),
         AXIAL, 0.6, 30),
        ("anomalies.oedema_mm", ("[3, 3]", "[8, 8]", "[18, 18]"),
         ("anomalies.probability=1", *_NO_ANOMALY[:2], "anomalies.tumour_probability=1", *_NO_ANOMALY[3:],
          "anomalies.tumour_radius_mm=[8, 8]"), AXIAL, 0.6, 31),
        ("anomalies.haemorrhage_radius_mm", ("[4, 4]", "[9, 9]", "[18, 18]"),
         ("anomalies.probability=1", *_NO_ANOMALY[:3], "anomalies.haemorrhage_probability=1", _NO_ANOMALY[4]),
         AXIAL, 0.6, 14),
        ("anomalies.cavity_radius_mm", ("[7, 7]", "[14, 14]", "[24, 24]"),
         ("anomalies.probability=1", *_NO_ANOMALY[:4], "anomalies.cavity_probability=1"), AXIAL, 0.6, 31),
    ],
    "deformation": [
        ("deform.rotation_deg", ("8", "16", "25"), (), CORONAL, 0.5, 2),
        ("deform.scaling", ("0.07", "0.15", "0.25"), (), SAGITTAL, 0.5, 3),
        ("deform.svf_std_mm", ("3", "6", "10"), ("deform.svf_spacing_mm=[35, 35]",), AXIAL, 0.5, 1),
        ("deform.svf_std_mm", ("2", "4", "6"), ("deform.svf_spacing_mm=[20, 20]",), AXIAL, 0.5, 3),
        ("deform.head_scale", ("[1.1, 1.1]", "[0.85, 0.85]", "[0.65, 0.65]"), (), SAGITTAL, 0.5, 0),
        ("deform.plagiocephaly", ("0.05", "0.12", "0.25"), (), AXIAL, 0.5, 5),
    ],
    "contrast": [
        ("contrast.std", ("[0.03, 0.03]", "[0.06, 0.06]", "[0.12, 0.12]"), (), AXIAL, 0.5, 0),
        ("contrast.texture_std", ("[0.03, 0.03]", "[0.08, 0.08]", "[0.15, 0.15]"), (), AXIAL, 0.5, 0),
        ("contrast.octave_spacing_mm", ("[40]", "[15]", "[3]"),
         ("contrast.octave_probability=1", "contrast.texture_std=[0.1, 0.1]"), AXIAL, 0.5, 0),
        ("contrast.cluster_offset", ("[0.03, 0.03]", "[0.08, 0.08]", "[0.15, 0.15]"),
         ("contrast.cluster_probability=1", "contrast.soft_cluster_offset=[0.2, 0.2]", *_SMOOTH), AXIAL, 0.5, 2),
        ("contrast.touching_tie_probability", ("0.05", "0.15", "0.4"), _SMOOTH, CORONAL, 0.5, 7),
        ("contrast.ct_streak_strength", ("[0.03, 0.03]", "[0.08, 0.08]", "[0.15, 0.15]"),
         (*CT, "contrast.ct_table_probability=1"), AXIAL, 0.33, 0),
    ],
    "artefacts_scanner": [
        ("artefacts.bias_std", ("[0.2, 0.2]", "[0.5, 0.5]", "[0.9, 0.9]"),
         ("artefacts.bias_spacing_mm=[80, 80]",), AXIAL, 0.5, 1),
        ("artefacts.gamma_std", ("0.2", "0.5", "1"), (), AXIAL, 0.5, 4),
        ("artefacts.local_contrast_std", ("[0.1, 0.1]", "[0.3, 0.3]", "[0.7, 0.7]"),
         ("artefacts.bias_spacing_mm=[80, 80]",), AXIAL, 0.5, 1),
        ("artefacts.noise_std", ("[0.03, 0.03]", "[0.08, 0.08]", "[0.2, 0.2]"),
         ("artefacts.noise_probability=1",), AXIAL, 0.5, 0),
    ],
    "artefacts_kspace": [
        ("artefacts.kspace.motion_mm", ("[1, 1]", "[3, 3]", "[6, 6]"),
         ("artefacts.kspace.motion_probability=1", "artefacts.kspace.motion_between_slices=0",
          "artefacts.kspace.motion_deg=[1, 1]"), AXIAL, 0.5, 1),
        ("artefacts.kspace.motion_mm", ("[1, 1]", "[3, 3]", "[6, 6]"),
         ("artefacts.kspace.motion_probability=1", "artefacts.kspace.motion_between_slices=1",
          *_SLICES, "artefacts.lowres_spacing_mm=5"), SAGITTAL, 0.5, 5),
        ("artefacts.kspace.ghosting_strength", ("[0.2, 0.2]", "[0.45, 0.45]", "[0.7, 0.7]"),
         ("artefacts.kspace.ghosting_probability=1",), AXIAL, 0.5, 0),
        ("artefacts.kspace.gibbs_kept", ("[0.8, 0.8]", "[0.6, 0.6]", "[0.4, 0.4]"),
         ("artefacts.kspace.gibbs_probability=1",), AXIAL, 0.5, 0),
        ("artefacts.kspace.spike_strength", ("[0.02, 0.02]", "[0.05, 0.05]", "[0.1, 0.1]"),
         ("artefacts.kspace.spike_probability=1",), AXIAL, 0.5, 0),
        ("artefacts.kspace.wrap_fraction", ("[0.15, 0.15]", "[0.25, 0.25]", "[0.35, 0.35]"),
         ("artefacts.kspace.wrap_probability=1",), SAGITTAL, 0.5, 4),
    ],
    "artefacts_storage": [
        ("artefacts.lowres_spacing_mm", ("3", "6", "12"),
         _SLICES, SAGITTAL, 0.5, 5),
        ("artefacts.lowres_isotropic_mm", ("2.5", "4", "7"),
         ("artefacts.lowres_probability=1", "artefacts.lowres_isotropic_probability=1"), SAGITTAL, 0.5, 5),
        ("artefacts.storage.interpolation_coarser", ("[1.3, 1.3]", "[2, 2]", "[3, 3]"),
         ("artefacts.storage.interpolation_probability=1", "artefacts.noise_probability=1",
          "artefacts.noise_std=[0.06, 0.06]"), AXIAL, 0.5, 1),
        ("artefacts.crop_fraction", ("0.15", "0.3", "0.5"), ("artefacts.crop_probability=1",), SAGITTAL, 0.5, 5),
    ],
    "artefacts_masking": [
        ("artefacts.masking.bad_strip_offset_mm", ("[0, 0]", "[3, 3]", "[7, 7]"),
         ("artefacts.masking.bad_strip_probability=1", "artefacts.masking.leftover_probability=0"), SAGITTAL, 0.47, 0),
        ("artefacts.masking.bad_strip_ragged_mm", ("[0.5, 0.5]", "[2.5, 2.5]", "[6, 6]"),
         ("artefacts.masking.bad_strip_probability=1", "artefacts.masking.leftover_probability=1",
          "artefacts.masking.bad_strip_offset_mm=[2, 2]"), AXIAL, 0.45, 1),
        ("artefacts.masking.deface_margin_mm", ("[30, 30]", "[15, 15]", "[3, 3]"),
         ("artefacts.masking.deface_probability=1", "artefacts.masking.deface_box_probability=0"), SAGITTAL, 0.47, 2),
        ("artefacts.masking.background_mm", ("[6, 6]", "[0, 0]", "[-4, -4]"),
         ("artefacts.masking.background_probability=1", "artefacts.noise_probability=1",
          "artefacts.noise_std=[0.1, 0.1]"), AXIAL, 0.45, 0),
        ("artefacts.modes.exvivo_fluid_mean", ("[0.1, 0.1]", "[0.5, 0.5]", "[0.95, 0.95]"),
         ("artefacts.modes.exvivo_probability=1",), CORONAL, 0.45, 0),
        ("artefacts.modes.photo_spacing_mm", ("[3, 3]", "[6, 6]", "[10, 10]"),
         ("artefacts.modes.photo_probability=1",), SAGITTAL, 0.42, 0),
    ],
}  # fmt: skip
KINDS: list[tuple[str, tuple[str, ...], int, float, int]] = [
    *((name, ("contrast.named_weights={}", "contrast.physics_weight=1", f"contrast.physics_sequences={{{name}: 1}}"),
       SAGITTAL, 0.47, 3) for name in ("mprage", "t1_spin_echo", "t2_spin_echo", "flair", "stir", "t2star_spoiled")),
    ("mprage, enhanced", ("contrast.named_weights={}", "contrast.physics_weight=1",
     "contrast.physics_sequences={mprage: 1}", "contrast.enhanced_probability=1"), SAGITTAL, 0.47, 3),
    ("CT", (*CT, "contrast.ct_table_probability=1"), SAGITTAL, 0.47, 3),
    ("CT, other window", (*CT, "contrast.ct_other_window_probability=1"), SAGITTAL, 0.47, 3),
    *((f"random {seed}", (*RANDOM, "contrast.cluster_probability=1", "contrast.octave_probability=1",
       "contrast.texture_std=[0, 0.08]"), SAGITTAL, 0.47, seed) for seed in (11, 12, 13)),
]  # fmt: skip


def settings(changes: Sequence[str], preset: str | None = None) -> GeneratorConfig:
    record: dict[str, Any] = {}
    if preset is not None:
        record = generator_config(None, preset=preset).model_dump(mode="json") | {"voxel_size_mm": VOXEL_MM}
    for change in changes:
        set_by_path(record, change)
    record = {"voxel_size_mm": VOXEL_MM} | record | {"shape": SHAPE}
    return parse(GeneratorConfig, record, "make_figures.py")


def image_of(template: Template, plan: Plan) -> np.ndarray:
    return render([for_plan(template, plan.scheme, plan.anomalies)], [plan])[0][0, 0].numpy()


def cut(volume: np.ndarray, axis: int, place: float = 0.5) -> np.ndarray:
    """A slice across an axis, left of the head to the left, rows running downwards."""
    return np.take(volume, round(place * (volume.shape[axis] - 1)), axis=axis).T[::-1]


def grey(plane: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(255 * plane.clip(0, 1)).astype(np.uint8)).convert("RGB")


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def mosaic(
    rows: Sequence[Sequence[Image.Image | tuple[str, Image.Image]]], headings: Sequence[str] = ()
) -> Image.Image:
    """Panels side by side, each with its caption below; a heading above each row."""
    small, large = font(11), font(12)
    cells = [[("", c) if isinstance(c, Image.Image) else c for c in row] for row in rows]
    caption = 16 if any(text for row in cells for text, _ in row) else 0
    heading = 20 if headings else 0
    height = [heading + max(c.height for _, c in row) + caption + GAP for row in cells]
    width = max(sum(c.width + GAP for _, c in row) for row in cells)
    sheet = Image.new("RGB", (width, sum(height)), "black")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(cells):
        top, left = sum(height[:number]), 0
        if headings:
            pen.text((2, top + 3), headings[number], fill="white", font=large)
        for text, panel in row:
            sheet.paste(panel, (left, top + heading + height[number] - heading - caption - GAP - panel.height))
            box = (left + panel.width / 2, top + height[number] - GAP - caption / 2)
            pen.text(box, text, fill=(210, 210, 210), font=small, anchor="mm")
            left += panel.width + GAP
    return sheet


def effects(template: Template, rows: Sequence[Effect]) -> Image.Image:
    """Two effects a row, each weak, medium and strong."""
    drawn = []
    for key, values, others, axis, place, seed in rows:
        panels: list[Image.Image | tuple[str, Image.Image]] = []
        for value in values:
            config = settings((*PLAIN, *others, f"{key}={value}"))
            table = with_anomalies(template, config.anomalies).table
            plan = sample_plan(config, template.name, table, seed, 0)
            caption = value.split(",")[0].strip("[]")  # of a range whose ends are equal
            panels.append((caption, grey(cut(image_of(template, plan), axis, place))))
        drawn.append(mosaic([panels], [key]))
    width = max(trio.width for trio in drawn)
    same = []
    for trio in drawn:
        padded = Image.new("RGB", (width + 10, trio.height), "black")
        padded.paste(trio, (0, 0))
        same.append(padded)
    return mosaic([same[i : i + 2] for i in range(0, len(same), 2)])


def kinds(template: Template) -> Image.Image:
    panels: list[Image.Image | tuple[str, Image.Image]] = []
    for name, changes, axis, place, seed in KINDS:
        plan = sample_plan(settings((*PLAIN, *changes)), template.name, template.table, seed, 0)
        panels.append((name, grey(cut(image_of(template, plan), axis, place))))
    return mosaic([panels[:6], panels[6:]])


def views(template: Template) -> Image.Image:
    severities = (0.0, 0.25, 0.5, 0.75, 1.0)
    rows = []
    for seed in (4, 6, 9):
        changes = (f"views.severities={list(severities)}", "artefacts.strip_probability=0",
                   "artefacts.modes.exvivo_probability=0", "artefacts.modes.photo_probability=0")  # fmt: skip
        config = settings(changes, "brain-id")
        found = render_views(template, sample_views(config, template.name, template.table, seed, 0))
        rows.append(
            [
                (f"severity {s:g}", grey(cut(i[0].numpy(), AXIAL, 0.55)))
                for s, i in zip(severities, found.images, strict=True)
            ]
        )
    return mosaic(rows)


def presets(template: Template) -> Image.Image:
    names = ["synthseg", "siam", "brain-id", "t1", "t2", "flair", "ct", "infant"]
    assert sorted(names) == sorted(shipped_presets())
    rows = []
    for name in names:
        config = settings((), name)
        table = with_anomalies(template, config.anomalies).table
        plans = [plan for i in range(6) for plan in sample_views(config, template.name, table, 5, i)][:6]
        panels = [grey(cut(image_of(template, p), (AXIAL, SAGITTAL, CORONAL)[n % 3])) for n, p in enumerate(plans)]
        rows.append([panel.resize((panel.width * 3 // 4, panel.height * 3 // 4)) for panel in panels])
    return mosaic(rows, names)


def generator_grid(template: Template) -> Image.Image:
    """Twelve images in six contrasts with their label maps; in the lower half with all artefacts at their defaults."""
    rows: list[list[Any]] = [[], [], [], []]
    for number in range(2 * len(CONTRASTS)):
        row, column = divmod(number, len(CONTRASTS))
        contrast = CONTRASTS[column]
        record = {
            "voxel_size_mm": 1.5,
            "shape": [128, 160, 160],
            "contrast": {
                "random_weight": float(contrast == "random"),
                "named_weights": {} if contrast == "random" else {contrast: 1.0},
            },
            "artefacts": QUIET if row == 0 else {},
            "deform": {"flip_probability": 0.5, "translation_mm": 5.0},
        }
        config = parse(GeneratorConfig, record, "make_figures.py")
        plan = sample_plan(config, template.name, template.table, 0, number)
        image, labels = render([template], [plan])
        axis = (AXIAL, CORONAL, SAGITTAL)[(column + row) % 3]
        color = template.table.colors[cut(labels[0].numpy(), axis)]
        for line, panel in ((0, grey(cut(image[0, 0].numpy(), axis))), (1, Image.fromarray(color))):
            framed = Image.new("RGB", (160, 160), "black")
            framed.paste(panel, ((160 - panel.width) // 2, (160 - panel.height) // 2))
            rows[2 * row + line].append((contrast if line == 0 else "", framed))
    return mosaic(rows)


def legend(table: LabelTable, indices: Sequence[int], height: int) -> Image.Image:
    """Name and colour of some classes, one below the other."""
    sheet = Image.new("RGB", (140, height), "black")
    pen = ImageDraw.Draw(sheet)
    for number, index in enumerate(indices):
        top = 10 + number * (height - 10) // len(indices)
        pen.rectangle((8, top, 22, top + 14), fill=tuple(table.colors[index].tolist()))
        pen.text((30, top + 7), table.names[index], fill="white", font=font(13), anchor="lm")
    return sheet


def template_colin27(_: Template) -> Image.Image:
    """Three slices of the T1, and below them the label map in its colours; left of the picture is left of the head."""
    folder = data_dir("templates") / "colin27"
    table = load_scheme(read_record(folder)["scheme"])
    scan = canonical(load_volume(data_dir("samples") / "colin27_t1.nii.gz"))
    indices = table.to_index(read_label_map(folder / "labels.nii.gz").data)
    box = bounding_box(indices > 0, scan.spacing_mm)
    low, high = grey_window(scan.data)
    rows: list[list[Image.Image | tuple[str, Image.Image]]] = [[], []]
    for (plane, axis, _across, _up, _sides), world in zip(PLANES, COLIN27_MM, strict=True):
        position = round((world - scan.affine[axis, 3]) / scan.spacing_mm[axis])
        image, classes = (take_slice(data, axis, position, box)[::-1] for data in (scan.data, indices))
        panel, colored = grey((image - low) / (high - low)), Image.fromarray(table.colors[classes].astype(np.uint8))
        size = (round(COLIN27_SCALE * panel.width), round(COLIN27_SCALE * panel.height))
        rows[0].append(panel.resize(size, Image.Resampling.BICUBIC))
        rows[1].append((f"{plane}, {'xyz'[axis]} = {world:g} mm", colored.resize(size, Image.Resampling.NEAREST)))
    present = [index for index in range(len(table)) if index and (indices == index).any()]
    for row, part in zip(rows, (present[: len(present) // 2], present[len(present) // 2 :]), strict=True):
        row.append(legend(table, part, 300))
    palette = Image.new("P", (1, 1))  # few enough colours that saving merges no two classes
    levels = [level for level in range(0, 256, 4) for _ in range(3)]
    palette.putpalette([*levels, *table.colors[present].flatten().tolist()])
    return mosaic(rows).quantize(palette=palette, dither=Image.Dither.NONE).convert("RGB")


FIGURES: dict[str, Callable[[Template], Image.Image]] = {
    "template_colin27": template_colin27,
    "generator_grid": generator_grid,
    **{name: (lambda template, rows=rows: effects(template, rows)) for name, rows in EFFECTS.items()},
    "contrast_kinds": kinds,
    "views": views,
    "presets": presets,
}


def save(picture: Image.Image, path: Path) -> None:
    """As PNG with a palette, of as many colours as fit into the size that a figure may have."""
    for colors in (96, 64, 48, 32, 24, 16):
        buffer = io.BytesIO()
        picture.quantize(colors, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
        if buffer.tell() <= LARGEST_BYTES:
            break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    print(f"{path}: {picture.width} x {picture.height}, {colors} colours, {buffer.tell() // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(FIGURES))
    if unknown:
        parser.error(f"no figure {', '.join(unknown)}; figures: {', '.join(FIGURES)}")
    template = load_template("phantom")
    for name in options.names or FIGURES:
        save(FIGURES[name](template), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
