"""Write the model card from the figures that the other benchmarks measured: no number in it is typed by hand.

    python benchmarks/model_card.py [--model siam16] [--results benchmarks/results] [--out docs/models/siam16.md]

Reads NAME.json (accuracy.py), NAME_invariance.json (invariance.py), NAME_speed.json (bench_segment.py),
NAME_consistency.json (consistency.py) and networks.json (bench_networks.py).
Refuses figures that were measured with other weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from synthseg.networks.checkpoint import Model, load_model


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def dice_rows(scores: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.3f}"] for name, value in scores.items()]


def history(model: Model) -> str:
    record = model.record
    last = {
        "steps": record["steps"],
        "train_seconds": record["train_seconds"],
        "voxel_size_mm": model.voxel_size_mm,
        "templates": record["templates"],
    }
    runs = [*record.get("earlier", []), last]
    rows = [
        [
            str(number),
            f"{run['voxel_size_mm']:g} mm",
            f"{run['steps']:,}",
            f"{run['train_seconds'] / 3600:.2f}",
            str(len(run["templates"])),
        ]
        for number, run in enumerate(runs, 1)
    ]
    hours = sum(run["train_seconds"] for run in runs) / 3600
    rows.append(["all", "", f"{sum(run['steps'] for run in runs):,}", f"{hours:.2f}", ""])
    return table(["run", "voxel size of input and output", "steps", "hours", "templates"], rows)


def averaged(model: Model) -> str:
    note = model.record.get("averaged")
    return f" The weights are the {note} (Wortsman et al., ICML 2022)." if note else ""


def networks_minutes(networks: dict[str, Any]) -> str:
    return next(iter(networks)).rsplit("@ ", 1)[1].removesuffix(" min")


def networks_table(networks: dict[str, Any]) -> str:
    rows = [
        [
            key.rsplit(" @", 1)[0],
            f"{row['dice']:.3f}",
            f"{row['steps']:,}",
            f"{row['cpu_seconds_per_step']:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
        ]
        for key, row in networks.items()
    ]
    minutes = networks_minutes(networks)
    return table(["network", f"Dice after {minutes} CPU minutes", "steps", "CPU seconds a step", "parameters"], rows)


def held_out(result: dict[str, Any]) -> str:
    contrasts = result["contrasts"]
    names = list(next(iter(contrasts.values())))
    rows = [[name, *[f"{row[name]:.3f}" for row in contrasts.values()]] for name in names]
    return table(["structure", *contrasts], rows)


def card(
    model: Model,
    accuracy: dict[str, Any],
    invariance: dict[str, Any],
    speed: dict[str, Any],
    consistency: dict[str, Any],
    networks: dict[str, Any],
) -> str:
    network = model.record["config"]["network"]
    maps = accuracy["held_out"]["maps"]
    templates = ", ".join(model.record["templates"])
    speed_rows = [
        [row["scan"], " × ".join(map(str, row["shape"])), f"{row['seconds']:.1f}", f"{row['peak_gb']:.2f}"]
        for row in speed["rows"]
    ]
    hard, soft = consistency["atrophy"]["hard"], consistency["atrophy"]["soft"]
    consistency_header = [
        "structure",
        "volume over contrasts, SD / mean",
        "Dice between contrasts",
        "volume in a second scan",
    ]
    consistency_rows = [
        [
            name,
            f"{spread:.1%}",
            f"{consistency['contrast']['dice_of_pairs'][name]:.3f}",
            f"± {consistency['retest'][name]:.1%}",
        ]
        for name, spread in consistency["contrast"]["volume_spread"].items()
    ]
    oasis = {name: value for name, value in accuracy["oasis_aseg"].items() if name != "mean"}
    return f"""# {model.name}

Segments the head into {len(model.labels) - 1} structures and background, in scans of any contrast. The network has
never seen a real scan. Its file holds its weights, settings, label table and history
(`synthseg/weights/{model.name}.safetensors`, sha256 `{model.sha256}`).

This page is written by `python benchmarks/model_card.py` from the files in `benchmarks/results`.

## Network and training

- {network["architecture"]} of MONAI, channels {" - ".join(map(str, network["channels"]))},
  {model.record["parameters"]:,} parameters, space-to-depth stem and subpixel head of factor {network["subpixel"]}
  ({model.voxel_size_mm:g} mm in and out); see [concepts](../concepts.md).
- Templates: {templates}. `training_seg_*` are label maps of SynthSeg (Billot et al., MedIA 2023), `subject*` BrainWeb
  models (Aubert-Broche et al., IEEE TMI 2006). Dura of the SynthSeg maps is derived, not drawn.
- Optimiser {model.record["config"]["optimiser"]["name"]}, batch {model.record["config"]["batch_size"]}, torch
  {model.record["torch"]}. A later run starts from the averaged weights of the one before it.

{history(model)}

All on two CPU cores, which runs 3 to 5 shared with other work.{averaged(model)}

The architecture was chosen by what it learns in the same CPU time from the same images (2 mm, one thread, five
contrasts, the four maps below):

{networks_table(networks)}

    python benchmarks/bench_networks.py --templates MAPS --held-out MAPS --cpu-minutes {networks_minutes(networks)} \\
        --out benchmarks/results/networks.json

## Accuracy

Dice, measured by

    python benchmarks/accuracy.py --data DATA --held-out MAPS --out benchmarks/results/{model.name}.json

### Maps that no training saw, rendered at 1 mm

{", ".join(maps)}; each rendered with a new shape and random artefacts
(bias field, noise, thick slices up to 8 mm in half of the images) in five contrasts, and segmented as a user would.
No weights were trained on them; the same maps, in other renderings, and the real scans below were looked at in choosing
these weights among a few candidates.
Mean over maps. Over all contrasts
**{accuracy["held_out"]["mean"]:.3f}**.

{held_out(accuracy["held_out"])}

### A real skull-stripped T1 (OASIS) against its FreeSurfer labels

Mean of the {len(oasis)} structures: **{accuracy["oasis_aseg"]["mean"]:.3f}**. CSF outside the ventricles is left out:
FreeSurfer's aseg does not label it in the sulci.

{table(["structure", "Dice"], dice_rows(oasis))}

### A real whole-head T1 (Colin27)

Against a tissue map by others (github fangq/mcx), made with another definition of the skull base and face:

{table(["tissue", "Dice"], dice_rows(accuracy["colin27_tissues"]))}

Against the AAL regions, whose nuclei are drawn coarsely:

{table(["structure", "Dice"], dice_rows(accuracy["colin27_aal"]))}

## Consistency

Measured on {len(consistency["maps"])} heads that no training saw, rendered whole at 1 mm: one head in five contrasts
(T1, T2, FLAIR, PD, CT), and twice as T1, with other noise, bias field and resolution, 3.3 mm away. Volumes are soft.

{table(consistency_header, consistency_rows)}

Atrophy: of the cortex of each head 0, 1, 2, 5 and 10 % were turned to CSF. Of the true change of grey matter the
network measures {hard["slope"]:.0%} (soft volumes {soft["slope"]:.0%}), with a scatter of {hard["scatter"]:.2%} of the
grey matter about that line ({soft["scatter"]:.2%}): it sees atrophy, and understates it.

    python benchmarks/consistency.py --held-out DIR --out benchmarks/results/{model.name}_consistency.json

## Geometry

The same scan in {invariance["runs"]} stored forms (all 48 orientations; int16, float32 and scaled uint8), each
segmented from its file: at most **{invariance["worst"]} of {invariance["voxels"]:,} voxels** differ.

    python benchmarks/invariance.py --out benchmarks/results/{model.name}_invariance.json

## Time and memory

The whole command in a fresh process, {speed["threads"]} threads of a two-core CPU, no GPU:

{table(["scan", "voxels", "seconds", "peak GB"], speed_rows)}

    python benchmarks/bench_segment.py --out benchmarks/results/{model.name}_speed.json

## Other scans, looked at

No labels exist for these; the pictures are what `--overview` of `synthseg segment` draws.

T1, whole head ([brainchop](https://github.com/neuroneural/brainchop) sample):

![T1 overview](../images/overview_t1.png)

T2 with 2 mm slices ([niivue](https://github.com/niivue/niivue) sample):

![T2 overview](../images/overview_t2.png)

CT, average of older adults, 2 mm ([Clinical toolbox](https://github.com/neurolabusc/Clinical)):

![CT overview](../images/overview_ct.png)

## Limits

- Left and right are not separated. Brain stem, ventral DC, cerebellar white matter, lesions and spinal cord are WM.
- Small nuclei on skull-stripped T1 (accumbens, pallidum, amygdala) are the weakest; see the OASIS table.
- Dura, vessels and sulcal CSF are thinner than a voxel in many places; their Dice above says how far to trust them.
- Of the training maps, all are adult heads. Infants, resections and large tumours were not seen.
- Not a medical device; not for diagnosis.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    found = []
    for suffix in ("", "_invariance", "_speed", "_consistency"):
        file = options.results / f"{model.name}{suffix}.json"
        result = json.loads(file.read_text())
        if result.get("sha256") != model.sha256:
            sys.exit(f"{file}: was measured with other weights than {model.name}; measure it again")
        found.append(result)
    found.append(json.loads((options.results / "networks.json").read_text()))
    out = options.out or Path("docs/models") / f"{model.name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(card(model, *found))
    print(out)


if __name__ == "__main__":
    main()
