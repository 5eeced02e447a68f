"""From the weights of runs to a file that ships: their mean, validated, and written only if it is better.

    python benchmarks/average_models.py FILE[=WEIGHT] ... --held-out MAPS --out FILE.safetensors
                                        [--replace FILE.safetensors]

Mean of the weights, a share for each file (Wortsman et al., ICML 2022, "model soups"); one file is taken as it is. The
result is validated as in training on maps that no run trained on, and its record says the figures. With ``--replace``
nothing is written unless the mean Dice is higher than that of this file on the same images.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import torch  # noqa: E402

from synthseg.config import TrainConfig, parse  # noqa: E402
from synthseg.networks.checkpoint import Model, load_model, read_tensors, save_tensors  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.validation import mean_dice, validation_table  # noqa: E402

CONTRASTS = ("t1", "t2", "random")
VALIDATED = "validated after averaging"


def averaged(files: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Mean of the weights, and the record of the first file."""
    parts = [(Path(name), float(share or 1)) for name, _, share in (text.partition("=") for text in files)]
    total = sum(share for _, share in parts)
    mean: dict[str, torch.Tensor] = {}
    records, shares = [], []
    for path, share in parts:
        tensors, record = read_tensors(path)
        records.append(record)
        shares.append(f"{share / total:.2f} of a run of {record['steps']:,} steps")
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                mean[key] = mean.get(key, torch.zeros(())) + tensor.float() * (share / total)
            else:
                mean[key] = tensor  # how many batches were counted: of no use to inference
    if len(parts) > 1:
        records[0]["averaged"] = f"mean of the weights of {len(parts)} runs ({', '.join(shares)}), {VALIDATED}"
    return {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in mean.items()}, records[0]


def validated(model: Model, templates: list[Template], record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """On images that the recipe of this record makes."""
    config = parse(TrainConfig, record["config"], "checkpoint")
    return validation_table(model.network, config, templates, model.labels, CONTRASTS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE[=WEIGHT]")
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--replace", type=Path, help="the file that must be beaten")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tensors, record = averaged(options.files)
    held_out = [load_template(path) for path in expand(options.held_out)]
    trained = {name for run in [record, *record.get("earlier", [])] for name in run["templates"]}
    if seen := trained & {template.name for template in held_out}:
        sys.exit(f"{', '.join(sorted(seen))}: was trained on; give maps that no run has seen")
    trial = options.out.with_name(f".trial_{options.out.name}")
    try:
        save_tensors(trial, tensors, record)
        table = validated(load_model(trial), held_out, record)
    finally:
        trial.unlink(missing_ok=True)
    mean = mean_dice(table)
    print(f"mean Dice {mean:.4f}")
    if options.replace:
        before = mean_dice(validated(load_model(options.replace), held_out, record))
        print(f"{options.replace}: {before:.4f}")
        if mean <= before:
            sys.exit(f"not better than {options.replace}; nothing was written")
    record["validation"] = {"step": record["steps"], "mean": round(mean, 4), "dice": table}
    record["validation_templates"] = [template.name for template in held_out]
    save_tensors(options.out, tensors, record)
    print(options.out)


if __name__ == "__main__":
    main()
