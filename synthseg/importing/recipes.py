"""Recipes for the label maps of others: what a folder holds, what its ids mean, and the training that fits it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from synthseg.config import TrainConfig, parse
from synthseg.errors import ConfigError, LabelError, OutputError, TemplateError
from synthseg.importing.discovery import Found, Survey, look, scheme_of, survey
from synthseg.importing.label_tables import unknown_tissues
from synthseg.labels import BRAIN_TISSUES, INTRACRANIAL_TISSUES, LabelTable, available_schemes, load_scheme
from synthseg.templates import check_folder, import_template, read_record
from synthseg.volume import check_writable, write_text_atomically

HOLD_OUT_FROM = 4  # with fewer heads, each is worth more in training than as a figure
LARGEST_PATCH = {"cpu": 1_250_000, "other": 5_000_000}  # voxels
MARGIN = 1.05  # room around the largest head
HEADER = """\
# Made by synthseg init from {source}. Change what you like; a key that is left out has its default.
# All keys with their limits: docs/reference_config.md. Each can be set for one run: --set steps=500
# First look at the images (synthseg train THIS_FILE --dry-run), then train (synthseg train THIS_FILE).
"""
NETWORK_COMMENTS = {
    "architecture": "dynunet, segresnet or unet (MONAI)",
    "channels": "of each level, finest first",
    "subpixel": "2: the body works at twice the voxel size, which is faster; 1: it does not",
}


@dataclass(frozen=True)
class Machine:
    """What the values of a recipe depend on besides the maps."""

    device: str
    cores: int
    bf16: bool

    @classmethod
    def here(cls) -> Machine:
        from synthseg.devices import has_native_bf16, resolve_device

        device = resolve_device()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(device.type, cores, has_native_bf16(device))


def slug(folder: Path) -> str:
    """A name for run and scheme, from the folder's; never that of a scheme that ships."""
    name = re.sub(r"[^A-Za-z0-9]+", "_", folder.resolve().name).strip("_").lower() or "mine"
    return f"{name}_maps" if name in available_schemes() else name


# -- what is held out --------------------------------------------------------------------------------------------------
def hold_out(names: Sequence[str], exact: set[str]) -> tuple[list[str], str]:
    """Names that are never trained on, and why that many. All maps of a BIDS subject stay together.

    ``exact`` are those that can tell all classes apart: Dice needs that.
    """
    subject = {name: re.sub(r"[_.-](ses|run|acq|long)[-_.].*", "", name) for name in names}
    heads = sorted(set(subject.values()))
    able = [head for head in heads if all(name in exact for name in names if subject[name] == head)]
    if len(heads) < HOLD_OUT_FROM:
        return [], f"none of {len(heads)}: with fewer than {HOLD_OUT_FROM} heads each is worth more in training"
    if not able:
        return [], f"none of {len(heads)}: no map tells all classes apart, and Dice needs that"
    count = min(len(able), max(1, round(len(heads) / 5)), 6)
    chosen = {able[int((k + 0.5) * len(able) / count)] for k in range(count)}
    why = f"{count} of {len(heads)} heads: one in five, at most six, spread over the names"
    return [name for name in names if subject[name] in chosen], why


# -- the recipe --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """Grid and network that fit the maps and the machine, each with the reason for it."""

    voxel_size_mm: float
    shape: tuple[int, int, int]
    channels: tuple[int, ...]
    subpixel: int
    why_voxel: str
    why_shape: str


def choose_grid(seen: Survey, machine: Machine, voxel_size_mm: float | None = None) -> Choice:
    """Voxel size of the maps, coarser where there is no GPU; a patch around the largest head, if that is affordable."""
    finest = min(seen.spacing_mm.values())
    fitting = max(1.0, math.ceil(round(finest, 2) * 2) / 2)
    slow = machine.device == "cpu"
    voxel = voxel_size_mm or (max(fitting, 2.0) if slow else fitting)
    if voxel_size_mm:
        why = f"asked for; the maps have {finest:.2g} mm"
    elif voxel > fitting:
        why = f"the maps have {finest:.2g} mm, but there is no GPU: at 2 mm a step costs an eighth of one at 1 mm"
    else:
        why = f"the maps have {finest:.2g} mm"
    channels, subpixel = ((16, 32, 64, 128), 1) if voxel >= 3 else ((32, 64, 128, 192), 2)
    multiple = subpixel * 2 ** (len(channels) - 1)
    whole = [max(multiple, math.ceil(mm * MARGIN / voxel / multiple) * multiple) for mm in seen.extent_mm]
    if max(whole) == multiple:  # a single voxel at the coarsest level could not be normalised
        whole[int(np.argmax(seen.extent_mm))] *= 2
    sides, limit = list(whole), LARGEST_PATCH["cpu" if slow else "other"]
    while math.prod(sides) > limit:
        longest = max(range(3), key=lambda axis: (sides[axis], axis))  # the neck before the face
        sides[longest] -= multiple
    head = " x ".join(f"{mm:.0f}" for mm in seen.extent_mm)
    why_shape = f"the largest head measures {head} mm"
    if sides != whole:
        why_shape += f"; whole it would be {whole}, too much for a step: patches"
    return Choice(voxel, (sides[0], sides[1], sides[2]), channels, subpixel, why, why_shape)


Entry = tuple[str, Any, str]  # key, value, comment


def write_recipe(
    *,
    name: str,
    source: str,
    scheme: tuple[str, str],
    seen: Survey,
    held_out: tuple[Sequence[str], str],
    machine: Machine,
    grid: Choice,
    start: tuple[str, TrainConfig] | None = None,
) -> str:
    """A commented recipe. ``scheme`` and ``held_out`` come with the reason for them.

    ``start`` names a model to fine-tune: its network, voxel size and patch are taken over. The text is checked: it
    parses, and its patch fits its network.
    """
    slow = machine.device == "cpu"
    steps = (2000 if start else 10_000) if slow else (10_000 if start else 50_000)
    like = f"that of {start[0]}" if start else ""
    if start:
        network: dict[str, Any] = start[1].network.model_dump(mode="json")
        voxel, shape = start[1].generator.voxel_size_mm, start[1].generator.shape
    else:
        network = {"architecture": "dynunet", "channels": list(grid.channels), "norm": "instance"}
        network["subpixel"] = grid.subpixel
        voxel, shape = grid.voxel_size_mm, grid.shape
    cells = 2 if start and network["subpixel"] == 2 else 0  # as siam16 was trained; quicker, the same loss on average
    workers = max(0, min(machine.cores - 1, 1 if slow else 6))
    size = " x ".join(f"{n * voxel:g}" for n in shape)
    n_train = len(seen.ids) - len(held_out[0])
    careful = "; lower than from nothing, so that what is known stays" if start else ""
    native = "this machine computes it natively" if machine.bf16 else "bfloat16 would be emulated on this machine"
    sections: list[tuple[str, str, list[Entry]]] = [
        (
            "",
            "data",
            [
                ("name", name, f"the run is in runs/{name}"),
                ("scheme", scheme[0], f"the network's classes; {scheme[1]}"),
                ("templates", ["templates"], f"{n_train} label maps, in the folder beside this file"),
                ("validation_templates", ["held_out"] if held_out[0] else [], f"never trained on; {held_out[1]}"),
                ("seed", 0, "of the first weights and of every image"),
            ],
        ),
        (
            "",
            "length and speed",
            [
                ("steps", steps, "train prints how long they take here; tens of thousands are usual"),
                ("batch_size", 1, "images a step; memory grows with it"),
                ("validate_every", max(100, steps // 20), "steps between figures on the held-out maps"),
                ("validation_contrasts", ["t1", "t2", "flair", "ct", "random"], "each held-out map is drawn in each"),
                ("checkpoint_every_s", 180, "seconds between saved states; --resume goes on from the last"),
                ("workers", workers, f"processes that draw images; this machine has {machine.cores} cores"),
                ("precision", "bf16" if machine.bf16 else "fp32", native),
            ],
        ),
        (
            "",
            "loss and first weights",
            [
                ("dice_weight", 1.0, "of 1 - soft Dice"),
                ("cross_entropy_weight", 1.0, "of the cross-entropy"),
                ("scored_cells", cells, "voxels of each 2 x 2 x 2 block that a step scores; 0: all"),
                ("init", start[0] if start else None, "weights to start from: all but the last layer"),
            ],
        ),
        (
            "generator",
            "images: keys of a preset (docs/generator/presets.md) can be copied to this section",
            [
                ("voxel_size_mm", voxel, f"of the network's input and output; {like or grid.why_voxel}"),
                ("shape", list(shape), f"voxels, {size} mm; {like or grid.why_shape}"),
                ("subsamples", 2 if voxel < 2 else 4, "points averaged in a voxel (partial volume): 1, 2, 4 or 8"),
                ("anatomy", {"probability": 0.5}, "images with another anatomy (docs/generator/anatomy.md)"),
            ],
        ),
        (
            "network",
            f"network: {like or 'sized for the voxel size'}; sides of shape divide by subpixel x 2^(levels - 1)",
            [(key, value, NETWORK_COMMENTS.get(key, "")) for key, value in network.items()],
        ),
        (
            "optimiser",
            "optimiser",
            [
                ("name", "muon", "Muon for kernels, AdamW for biases and norms; adamw: AdamW for all"),
                ("muon_learning_rate", 0.006 if start else 0.02, f"at its highest{careful}"),
                ("learning_rate", 0.001 if start else 0.003, "of AdamW, at its highest"),
                ("warmup_steps", min(100, steps // 20), "the rates rise over these"),
                ("schedule", "cosine", "falls to 1 % at the last step"),
            ],
        ),
    ]  # fmt: skip
    text = HEADER.format(source=source) + "".join(_section(*section) for section in sections)
    config = parse(TrainConfig, yaml.safe_load(text), "the recipe")
    if any(side % config.network.multiple for side in config.generator.shape):
        raise ConfigError(f"the patch {list(shape)} does not fit the network of {like or 'the recipe'}")
    return text


def _section(key: str, title: str, entries: Sequence[Entry]) -> str:
    indent = "  " if key else ""
    lines = ["", f"# -- {title}", *([f"{key}:"] if key else [])]
    for name, value, comment in entries:
        setting = f"{indent}{name}: {_flow(value)}"
        lines.append(f"{setting:<41} # {comment}" if comment else setting)
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


# -- all of it ---------------------------------------------------------------------------------------------------------
def start_project(
    folder: Path,
    source: Path,
    scheme: str | None = None,
    labels: Path | None = None,
    classes: str | None = None,
    start: tuple[str, TrainConfig] | None = None,
    voxel_size_mm: float | None = None,
    desc: str | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Path:
    """Import the label maps of ``source`` to ``folder``/templates and held_out, and write ``folder``/recipe.yaml.

    ``desc`` chooses a segmentation of a BIDS derivative, as in `look`. Everything is checked before the first file is
    written. Returns the recipe.
    """
    recipe = folder / "recipe.yaml"
    for name in ("recipe.yaml", "templates", "held_out", "scheme.json"):
        if (folder / name).exists():
            raise OutputError(f"{folder / name}: exists already; choose another folder, or remove it")
    check_writable(recipe)
    if scheme and labels:
        raise LabelError(f"--scheme {scheme} and --labels {labels} both say what the ids mean; give one of them")
    if labels and not labels.is_file():
        raise LabelError(
            f"{labels}: no such file; give a table of FreeSurfer or ITK-SNAP, a dseg.tsv or a scheme's JSON"
        )
    found = look(source, desc)
    tell(f"{source}: {found.kind}, {len(found.maps)} of them")
    for note in found.notes:
        tell(f"note: {note}")
    seen = survey(found)
    name = slug(folder)
    schemes, why = _schemes(found, seen, source, scheme, labels, name)
    tables = {key: value if isinstance(value, LabelTable) else load_scheme(value) for key, value in schemes.items()}
    target, why = _target(classes, tables, why)
    exact = {key for key, table in tables.items() if _relation(table, target)}
    own = target.name not in available_schemes()
    held_out = hold_out(list(found.maps), exact)
    grid = choose_grid(seen, Machine.here(), voxel_size_mm)
    text = write_recipe(
        name=name,
        source=str(source),
        scheme=("scheme.json" if own else target.name, f"{len(target)} labels, {why}"),
        seen=seen,
        held_out=held_out,
        machine=Machine.here(),
        grid=grid,
        start=start,
    )
    tell(f"classes: {len(target)} of {target.name}, {why}")
    tell(f"held out: {held_out[1]}{': ' + ', '.join(held_out[0]) if held_out[0] else ''}")
    for note in _notes_on(tables, seen):
        tell(f"note: {note}")
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".init-") as draft:
            written = _write(Path(draft), found, source, schemes, target if own else None, held_out[0])
            for piece in written:
                os.replace(piece, folder / piece.name)
        write_text_atomically(recipe, text)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        if fresh and not any(folder.iterdir()):
            folder.rmdir()
    return recipe


def _schemes(
    found: Found, seen: Survey, source: Path, scheme: str | None, labels: Path | None, name: str
) -> tuple[dict[str, str | LabelTable], str]:
    """The scheme of each map, and who says so."""
    if found.kind == "imported templates" and not labels:
        problems, _ = check_folder(source, scheme) if not (source / "labels.nii.gz").is_file() else ([], [])
        if problems:
            raise TemplateError(f"{len(problems)} problems: " + "; ".join(problems))
        records = {key: (file.parent, read_record(file.parent)["scheme"]) for key, file in found.maps.items()}
        own = {k: str(place / word) if word.endswith(".json") else word for k, (place, word) in records.items()}
        return {key: scheme or word for key, word in own.items()}, "as they were imported"
    one, why = scheme_of(found, seen, scheme, labels, name)
    return dict.fromkeys(found.maps, one), why


def _target(classes: str | None, tables: Mapping[str, LabelTable], why: str) -> tuple[LabelTable, str]:
    """The network's classes: what was asked for, or siam16 if all maps are of schemes that ship, or their own."""
    if classes:
        first = next(iter(tables.values()))
        return (first, why) if classes == first.name else (load_scheme(classes), "asked for with --classes")
    names = {table.name for table in tables.values()}
    if names <= set(available_schemes()):
        return load_scheme("siam16"), "which the maps' schemes relate to; --classes names others"
    if len(names) > 1:
        raise LabelError(f"the maps have different schemes ({', '.join(sorted(names))}); name one with --classes")
    return next(iter(tables.values())), why


def _relation(table: LabelTable, target: LabelTable) -> bool:
    """Whether every label of the table is one class of the target. Raises LabelError if one is none."""
    strange = unknown_tissues(table) if table.name not in available_schemes() and target.name != table.name else []
    if strange and any(target.name not in label.to for label in table.labels):
        raise LabelError(
            f"what {', '.join(strange[:8])} is in {target.name} cannot be told from the name; leave out --classes to "
            "train on the maps' own labels, or write a scheme with 'to' (docs/templates.md) and give it with --scheme"
        )
    return bool((table.groups(target).sum(1) == 1).all())


def _notes_on(tables: Mapping[str, LabelTable], seen: Survey) -> list[str]:
    """What a user should know of these maps before training."""
    notes = []
    for table in {table.name: table for table in tables.values()}.values():
        present = {i for key, ids in seen.ids.items() if tables[key].name == table.name for i in ids}
        tissues = {label.tissue for label in table.labels if label.id in present and label.id}
        if not tissues - INTRACRANIAL_TISSUES:
            notes.append(
                f"the maps of {table.name} hold the brain alone, without skull and skin: the network will expect scans "
                "whose skull is removed"
            )
        if not tissues & BRAIN_TISSUES:
            notes.append(f"no label of {table.name} is of the brain: patches are centred on the whole map")
        strange = unknown_tissues(table) if table.name not in available_schemes() else []
        if strange:
            notes.append(
                f"{', '.join(strange[:8])}{' …' if len(strange) > 8 else ''}: no tissue is known by that name, so that "
                "their intensity is random in every contrast; a scheme can say otherwise (docs/templates.md)"
            )
    sizes = [f"{size:.2g}" for size in sorted(set(np.round(list(seen.spacing_mm.values()), 2)))]
    if len(sizes) > 1:
        notes.append(f"the maps have voxels of {' and '.join(sizes[:4])} mm: they train together as they are")
    return notes


def _write(
    draft: Path,
    found: Found,
    source: Path,
    schemes: Mapping[str, str | LabelTable],
    target: LabelTable | None,
    held_out: Sequence[str],
) -> list[Path]:
    """Templates and label table in a folder of their own; returns what is to be moved to its place, in order."""
    written = []
    own = draft / "scheme.json"
    table = target or next((word for word in schemes.values() if isinstance(word, LabelTable)), None)
    if table:
        own.write_text(json.dumps(table.to_dict(), indent=1) + "\n")
        written.append(own)
    for key, file in found.maps.items():
        out = draft / ("held_out" if key in held_out else "templates")
        if found.kind == "imported templates":
            shutil.copytree(file.parent, out / key)
            continue
        word = schemes[key]
        inside = file.relative_to(source) if source.is_dir() else file.name
        import_template(file, str(own) if isinstance(word, LabelTable) else word, out, str(inside), key)
    return [*written, *(draft / part for part in ("templates", "held_out") if (draft / part).is_dir())]
