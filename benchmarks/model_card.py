"""Write the model card from the figures that the other benchmarks measured: no number in it is typed by hand.

    python benchmarks/model_card.py [--model siam16] [--results benchmarks/results] [--out docs/models/siam16.md]

Reads NAME.json (accuracy.py), NAME_invariance.json (invariance.py), NAME_speed.json (bench_segment.py),
NAME_consistency.json (consistency.py), NAME_modes.json (modes.py), designs.json and designs_limit.json (designs.py).
Refuses figures that were measured with other weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from average_models import VALIDATED
from designs import DESIGNS

from synthseg.networks.checkpoint import Model, load_model
from synthseg.training.state import history_of


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def dice_rows(scores: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.3f}"] for name, value in scores.items()]


def runs_of(model: Model) -> list[dict[str, Any]]:
    """All runs that made the weights. What a record leaves out was so before records said it: one image, on a CPU."""
    return [
        {"batch_size": 1, "device": "CPU"} | run
        for run in (*model.record.get("earlier", []), history_of(dict(model.record)))
    ]


def hours_by_device(model: Model) -> dict[str, float]:
    hours: dict[str, float] = defaultdict(float)
    for run in runs_of(model):
        hours[run["device"]] += run["train_seconds"] / 3600
    return dict(hours)


def history(model: Model) -> str:
    runs = runs_of(model)
    rows = [
        [
            str(number),
            f"{run['voxel_size_mm']:g} mm",
            run["device"],
            f"{run['steps']:,}",
            f"{run['steps'] * run['batch_size']:,}",
            f"{run['train_seconds'] / 3600:.2f}",
            str(len(run["templates"])),
        ]
        for number, run in enumerate(runs, 1)
    ]
    images = sum(run["steps"] * run["batch_size"] for run in runs)
    spent = " and ".join(f"{hours:.2f} ({name})" for name, hours in hours_by_device(model).items())
    rows.append(["all", "", "", f"{sum(run['steps'] for run in runs):,}", f"{images:,}", spent, ""])
    return table(["run", "voxel size of input and output", "on", "steps", "images", "hours", "templates"], rows)


def averaged(model: Model) -> str:
    note = model.record.get("averaged")
    if not note:
        return ""
    before = (
        " The figures of validation inside the file are those of the run before; those on this page are of the weights "
        "that ship."
    )
    return f" The weights are the {note} (Wortsman et al., ICML 2022).{'' if VALIDATED in note else before}"


def choice(designs: dict[str, Any], limit: dict[str, Any], config: dict[str, Any]) -> str:
    """Why the networks that ship are not the row with the highest Dice."""
    tried = []
    if (schedule := config["optimiser"]["schedule"]) != "cosine":
        tried.append("a constant rate" + (" for 60 % of the steps" if schedule == "trapezoid" else ""))
    if config["dice_weight"] > config["cross_entropy_weight"]:
        tried.append(f"a weight of soft Dice of {config['dice_weight'] / config['cross_entropy_weight']:g}")
    ours, coarse = "c: subpixel, 1 mm in and out", "a: U-Net at 2 mm, probabilities upsampled"
    if not limit or ours not in designs or coarse not in designs:
        return ""
    shown = ", ".join(f"{name} {limit[name]:.2f}" for name in ("GM", "CSF", "Vessels", "Dura"))
    higher = [
        f"{name.removeprefix('f: c, ')} ({row['unseen_maps']:.3f})"
        for name, row in designs.items()
        if name.startswith("f: ") and row["unseen_maps"] > designs[ours]["unseen_maps"] + 0.01
    ]
    return f"""
A network at 2 mm (a) learns faster at first, and has a ceiling: the true labels of the unseen maps, as probabilities
at 2 mm, come back at 1 mm with a Dice of {limit["mean"]:.3f} ({shown}; `--limit`). The networks that ship therefore
give labels at 1 mm for about the cost of 2 mm (c), and were grown from a network at 2 mm (b and c), as all others at
1 mm cost more or learn more slowly. They were begun before this table was complete. What learns faster than c in it:
{", ".join(higher) or "nothing"}. The last run that made these weights has {" and ".join(tried) or "none of it"}.
"""


def designs_section(designs: dict[str, Any], limit: dict[str, Any], config: dict[str, Any]) -> str:
    """The table of designs, and its command; says so where it has not been measured."""
    if not designs:
        return "Designs have not been compared yet: `python benchmarks/designs.py`."
    rows = [
        [
            name,
            f"{row['unseen_maps']:.3f}",
            f"{row['oasis_aseg']:.3f}" if "oasis_aseg" in row else "",
            f"{row['steps']:,}",
            f"{row['cpu_seconds_per_step']:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
        ]
        for name, row in designs.items()
    ]
    minutes = f"{next(iter(designs.values()))['cpu_minutes']:g}"
    unmeasured = ""
    if missing := [name for name in DESIGNS if name not in designs]:
        unmeasured = f" Not measured: {'; '.join(missing)}."
    columns = ["design", "Dice, unseen maps", "Dice, OASIS", "steps", "CPU seconds a step", "parameters"]
    return f"""What each design of network and training learns from random weights in {minutes} CPU minutes on one
thread, from six templates; Dice of the four maps below rendered at 1 mm as T1, T2 and in a random contrast, and of 11
structures of the OASIS scan. One seed. So short a training shows what learns fast, not what is best in the
end.{unmeasured}

{table(columns, rows)}
{choice(designs, limit, config)}
    python benchmarks/designs.py --templates MAPS --held-out MAPS --data DATA --cpu-minutes {minutes} \\
        --out benchmarks/results/designs.json
    python benchmarks/designs.py --templates MAPS --held-out MAPS --limit --out benchmarks/results/designs_limit.json"""


def structures_table(columns: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(columns.values())))
    return table(["structure", *columns], [[name, *[f"{row[name]:.3f}" for row in columns.values()]] for name in names])


def network_section(model: Model, designs: dict[str, Any], limit: dict[str, Any]) -> str:
    record = model.record
    network = record["config"]["network"]
    return f"""## Network and training

- {network["architecture"]} of MONAI, channels {" - ".join(map(str, network["channels"]))},
  {record["parameters"]:,} parameters, space-to-depth stem and subpixel head of factor {network["subpixel"]}
  ({model.voxel_size_mm:g} mm in and out); see [concepts](../concepts.md).
- Templates: {", ".join(record["templates"])}. `training_seg_*` are label maps of SynthSeg (Billot et al., MedIA 2023),
  `subject*` BrainWeb models (Aubert-Broche et al., IEEE TMI 2006). Dura of the SynthSeg maps is derived, not drawn.
- Optimiser {record["config"]["optimiser"]["name"]}. A later run starts from the averaged weights of the one before it.

{history(model)}

CPU is one or both cores of a two-core machine, which most of the runs shared with other work.{averaged(model)}

{designs_section(designs, limit, record["config"])}
"""


def accuracy_section(model: Model, accuracy: dict[str, Any]) -> str:
    oasis = {name: value for name, value in accuracy["oasis_aseg"].items() if name != "mean"}
    text = f"""## Accuracy

Dice, measured by

    python benchmarks/accuracy.py --model {model.name} --data DATA --held-out MAPS \\
        --out benchmarks/results/{model.name}.json

### Maps that no training saw, rendered at 1 mm

{", ".join(accuracy["held_out"]["maps"])}; each rendered with a new shape and random artefacts
(bias field, noise, thick slices up to 8 mm in half of the images) in five contrasts, and segmented as a user would.
No weights were trained on them; the same maps, in other renderings, and the real scans below were looked at in choosing
these weights among a few candidates.
Mean over maps. Over all contrasts
**{accuracy["held_out"]["mean"]:.3f}**.

{structures_table(accuracy["held_out"]["contrasts"])}

The same maps as scanners make them, whole and with slices as thick as they are apart:

{structures_table(accuracy["held_out"]["scanned"])}

### A real skull-stripped T1 (OASIS) against its FreeSurfer labels

Mean of the {len(oasis)} structures{WITHOUT_SIDES[bool(accuracy.get("oasis_sides"))]}:
**{accuracy["oasis_aseg"]["mean"]:.3f}**. CSF outside the ventricles is left out: FreeSurfer's aseg does not label it in
the sulci.

{table(["structure", "Dice"], dice_rows(oasis))}
"""
    if "oasis_sides" in accuracy:
        sides = {name: value for name, value in accuracy["oasis_sides"].items() if name != "mean"}
        text += f"""
Side by side, every structure that FreeSurfer labels: mean **{accuracy["oasis_sides"]["mean"]:.3f}**.

{table(["structure", "Dice"], dice_rows(sides))}
"""
    return f"""{text}
### A real whole-head T1 (Colin27)

Against a tissue map by others (github fangq/mcx), made with another definition of the skull base and face:

{table(["tissue", "Dice"], dice_rows(accuracy["colin27_tissues"]))}

Above the skull base (MNI z > -15 mm), where the definitions agree:

{table(["tissue", "Dice"], dice_rows(accuracy["colin27_vault"]))}

Against the AAL regions, whose nuclei are drawn coarsely:

{table(["structure", "Dice"], dice_rows(accuracy["colin27_aal"]))}

### Aims

What this project set out to reach with its first networks, and where these weights are:

{aims(accuracy)}

{shortfall(accuracy)}

The main reason is training: all runs together are {
        " and ".join(f"{hours:.1f} hours of {name}" for name, hours in hours_by_device(model).items())
    }, where SynthSeg's network
had about 7 days of a large GPU (Billot et al., MedIA 2023).{
        " " + NEVER_FOUND.format(names=", ".join(never_found(accuracy))) if never_found(accuracy) else ""
    }
"""


THIN = ("Dura", "Vessels", "Artery", "Vein")  # thinner than the 2 mm at which the body of the networks works
NEVER_FOUND = "**Never or hardly found, in no contrast above 0.05: {names}.**"
NEVER = 0.05


def never_found(accuracy: dict[str, Any]) -> list[str]:
    """Structures of the unseen maps whose Dice is nearly nothing in every contrast."""
    contrasts = accuracy["held_out"]["contrasts"].values()
    names = list(next(iter(contrasts)))
    return [name for name in names if max(row[name] for row in contrasts) < NEVER]


def shortfall(accuracy: dict[str, Any]) -> str:
    """What pulls each mean down: its mean without thin structures, and its lowest four."""
    scanned = accuracy["held_out"]["scanned"]
    tables = {"OASIS scan": accuracy["oasis_aseg"]}
    tables |= {f"unseen maps, {name}": row for name, row in scanned.items()}
    rows = []
    for name, scores in tables.items():
        single = {k: v for k, v in scores.items() if k != "mean"}
        thick = [v for k, v in single.items() if not k.startswith(THIN)]
        lowest = sorted(single, key=lambda k: single[k])[:4]
        rows.append(
            [
                name,
                f"{scores['mean']:.3f}",
                f"{statistics.mean(thick):.3f}" if len(thick) < len(single) else "none among them",
                ", ".join(f"{k} {single[k]:.2f}" for k in lowest),
            ]
        )
    return "What pulls the means down:\n\n" + table(["", "mean", "without dura and vessels", "lowest"], rows)


def aims(accuracy: dict[str, Any]) -> str:
    scanned, vault = accuracy["held_out"]["scanned"], accuracy["colin27_vault"]
    rows = [
        ("OASIS scan, mean of its structures", 0.85, accuracy["oasis_aseg"]["mean"]),
        ("unseen maps as T1 of 1 mm", 0.85, scanned["t1, 1 mm"]["mean"]),
        ("unseen maps as T2 with 5 mm slices", 0.80, scanned["t2, 5 mm"]["mean"]),
        ("unseen maps as FLAIR with 5 mm slices", 0.80, scanned["flair, 5 mm"]["mean"]),
        ("unseen maps as CT of 1 mm", 0.80, scanned["ct, 1 mm"]["mean"]),
        ("Colin27 above the skull base, skull", 0.88, vault["Skull"]),
        ("Colin27 above the skull base, scalp", 0.93, vault["Scalp (head)"]),
    ]
    return table(["Dice", "aim", "reached"], [[name, f"{aim:.2f}", f"{value:.3f}"] for name, aim, value in rows])


def consistency_section(model: Model, result: dict[str, Any]) -> str:
    hard, soft, again = result["atrophy"]["hard"], result["atrophy"]["soft"], result["retest"]
    header = [
        *("structure", "volume over contrasts, SD / mean", "Dice between contrasts"),
        *("volume in a second scan, SD / mean", "Dice of the two", "Dice of the truth"),
    ]
    rows = [
        [
            name,
            f"{spread:.1%}",
            f"{result['contrast']['dice_of_pairs'][name]:.3f}",
            f"{again['cv'][name]:.1%}",
            f"{again['dice'][name]:.3f}",
            f"{again['dice_of_truth'][name]:.3f}",
        ]
        for name, spread in result["contrast"]["volume_spread"].items()
    ]
    return f"""## Consistency

Measured on {len(result["maps"])} heads that no training saw, rendered whole at 1 mm: one head in five contrasts
(T1, T2, FLAIR, PD, CT), and twice as T1, with other noise, bias field and resolution, turned by
{again["turn_deg"]:g}° and shifted by {again["shift_mm"]:g} mm along each axis. Volumes are soft. The labels of the
first scan are brought to the second by nearest neighbour; the last column is what that costs the true labels.

{table(header, rows)}

Atrophy: of the cortex of each head 0, 1, 2, 5 and 10 % were turned to CSF. Of the true change of grey matter the
network measures {hard["slope"]:.0%} (soft volumes {soft["slope"]:.0%}), with a scatter of {hard["scatter"]:.2%} of the
grey matter about that line ({soft["scatter"]:.2%}).

    python benchmarks/consistency.py --model {model.name} --held-out DIR \\
        --out benchmarks/results/{model.name}_consistency.json
"""


def geometry_section(model: Model, invariance: dict[str, Any]) -> str:
    return f"""## Geometry

The same scan in {invariance["runs"]} stored forms (all 48 orientations; int16, float32 and scaled uint8), each
segmented from its file: at most **{invariance["worst"]} of {invariance["voxels"]:,} voxels** differ.

    python benchmarks/invariance.py --model {model.name} --out benchmarks/results/{model.name}_invariance.json
"""


def speed_section(model: Model, speed: dict[str, Any]) -> str:
    rows = [
        [
            row["scan"],
            " × ".join(map(str, row["shape"])),
            row["mode"],
            f"{row['seconds']:.1f}",
            f"{row['peak_gb']:.2f}",
            ", ".join(f"{name} {spent:.1f}" for name, spent in row["steps_s"].items()),
        ]
        for row in speed["rows"]
    ]
    return f"""## Time and memory

The whole command in a fresh process, {speed["threads"]} threads of a two-core CPU, no GPU:

{table(["scan", "voxels", "mode", "seconds", "peak GB", "of them, seconds a step"], rows)}

    python benchmarks/bench_segment.py --model {model.name} --modes default fast robust \\
        --out benchmarks/results/{model.name}_speed.json
"""


MODES = {
    "adult": "unseen maps rendered whole at 1 mm",
    "infant": "the same at 0.72 of the size, that of three months, scanned at 1 mm",
    "real": "OASIS and Colin27 against their labels",
}


def gain_of(cases: list[dict[str, Any]], variant: str) -> list[str]:
    """Mean Dice, mean, least and greatest gain over the default, and time over the default (median)."""
    pairs = [(case["variants"][variant], case["variants"]["default"]) for case in cases]
    gains = [one["mean"] - plain["mean"] for one, plain in pairs]
    times = [one["seconds"] / plain["seconds"] for one, plain in pairs]
    mean = sum(one["mean"] for one, _ in pairs) / len(pairs)
    if variant == "default":
        return [f"{mean:.3f}", "", "", ""]
    return [
        f"{mean:.3f}",
        f"{sum(gains) / len(gains):+.3f}",
        f"{min(gains):+.3f} to {max(gains):+.3f}",
        f"{statistics.median(times):.1f}",
    ]


def modes_section(model: Model, modes: dict[str, Any]) -> str:
    rows = []
    for kind, what in MODES.items():
        cases = [case for case in modes["cases"].values() if case["kind"] == kind and case["variants"]]
        for name in cases[0]["variants"] if cases else ():
            rows.append([f"{what} ({len(cases)})", name, *gain_of(cases, name)])
    header = ["scans", "mode", "Dice", "gain", "least and greatest", "times as long"]
    longer = ", and how many times as long it takes (network,\nclean-up and resampling, without start-up and writing)"
    if not modes.get("timed", True):  # other work shared the machine: the record says so
        header, rows, longer = header[:-1], [row[:-1] for row in rows], ""
    return f"""## Modes

What each mode gains over the default, in mean Dice over all structures{longer}. "Crop" is a box of
{" x ".join(f"{side:g}" for side in modes["crop_mm"])} mm. "Voxel size" is the option `--voxel-size`, which brings the
small heads back to an adult's size; "voxels of 1.5 mm" is that option where it should not be used: the network then
sees a small head. Seconds and memory of the whole command are below.

{table(header, rows)}

    python benchmarks/modes.py --model {model.name} --data DATA --held-out MAPS \\
        --out benchmarks/results/{model.name}_modes.json
"""


SECTIONS = {
    "_consistency": consistency_section,
    "_invariance": geometry_section,
    "_modes": modes_section,
    "_speed": speed_section,
}


def card(model: Model, found: dict[str, dict[str, Any]], designs: dict[str, Any], limit: dict[str, Any]) -> str:
    sections = [network_section(model, designs, limit), accuracy_section(model, found[""])]
    sections += [section(model, found[suffix]) for suffix, section in SECTIONS.items() if suffix in found]
    if model.name in PICTURES:
        sections.append(PICTURES[model.name])
    own = [*LIMITS.get(model.name, []), *limits_of(found[""])]
    limits = "\n".join(f"- {line}" for line in [*own, *LIMITS_OF_ALL])
    return f"""# {model.name}

Segments the head into {len(model.labels) - 1} structures and background, in scans of any contrast. The network has
never seen a real scan. Its file holds its weights, settings, label table and history
(`synthseg/weights/{model.name}.safetensors`, sha256 `{model.sha256}`).

This page is written by `python benchmarks/model_card.py` from the files in `benchmarks/results`.

{chr(10).join(sections)}
## Limits

{limits}
"""


def limits_of(accuracy: dict[str, Any]) -> list[str]:
    """What the figures say of single structures."""
    oasis = {name: value for name, value in accuracy["oasis_aseg"].items() if name != "mean"}
    weakest = sorted(oasis, key=lambda name: oasis[name])[:4]
    lines = [f"On skull-stripped T1 the weakest are {', '.join(weakest)}; see the OASIS table."]
    if missing := never_found(accuracy):
        lines.insert(0, f"Never or hardly found: {', '.join(missing)}. Do not use their volumes.")
    return lines


WITHOUT_SIDES = {False: "", True: ", left and right together as in siam16"}
PICTURES = {
    name: f"""## Other scans, looked at

No labels exist for these; the pictures are what `--overview` of `synthseg segment` draws.

T1, whole head ([brainchop](https://github.com/neuroneural/brainchop) sample):

![T1 overview](../images/overview_t1{part}.png)

T2 with 2 mm slices ([niivue](https://github.com/niivue/niivue) sample):

![T2 overview](../images/overview_t2{part}.png)

CT, average of older adults, 2 mm ([Clinical toolbox](https://github.com/neurolabusc/Clinical)):

![CT overview](../images/overview_ct{part}.png)
"""
    for name, part in (("siam16", ""), ("head", "_head"))
}
LIMITS = {
    "siam16": [
        "Left and right are not separated.",
        "Brain stem, ventral DC, cerebellar white matter, lesions and spinal cord are WM.",
    ],
    "head": [
        "Left and right are those of the head, told by anatomy: an image whose header mirrors it is labelled mirrored.",
        "Lesions are white matter, and choroid plexus is ventricle.",
        "Cortical and cancellous bone, muscle and other soft tissue are told apart roughly: compare their sums.",
    ],
}
LIMITS_OF_ALL = [
    "Dura, vessels and sulcal CSF are often thinner than a voxel: their Dice above says how far to trust them.",
    "Of the training maps, all are adult heads. Infants, resections and large tumours were not seen.",
    "Not a medical device; not for diagnosis.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="siam16")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    found: dict[str, dict[str, Any]] = {}
    for suffix in ("", *SECTIONS):
        file = options.results / f"{model.name}{suffix}.json"
        if suffix and not file.is_file():
            print(f"{file}: not there; the card goes without it", file=sys.stderr)
            continue
        found[suffix] = json.loads(file.read_text())
        if found[suffix].get("sha256") != model.sha256:
            sys.exit(f"{file}: was measured with other weights than {model.name}; measure it again")
    designs, limit = (
        json.loads(file.read_text()) if file.is_file() else {}
        for file in (options.results / "designs.json", options.results / "designs_limit.json")
    )
    out = options.out or Path("docs/models") / f"{model.name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(card(model, found, designs, limit))
    print(out)


if __name__ == "__main__":
    main()
