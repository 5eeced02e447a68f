"""Which design of network and training learns most per CPU hour? Equal CPU seconds for each, then Dice at 1 mm.

    python benchmarks/designs.py --templates DIR --held-out DIR [--data DIR] [--rows TEXT ...] [--cpu-minutes 8]
                                 [--out FILE.json]

Every design starts from random weights and sees the same templates through the same field of view, 128 x 160 x 128 mm,
with one thread; the seconds counted are CPU seconds of rendering and training. The learning rate falls along a cosine
over the budget, or over the part of it in which the network has the same layers. The network is then measured as a
user would meet it: maps that it has not seen, rendered at 1 mm in three contrasts, and with ``--data`` the labelled
real scans (benchmarks/accuracy.py).

A design that is done is kept in a file of its own in ``--work`` and not run again; one that was stopped starts anew.
``--rows`` takes parts of names, so that several processes can share the work. ``--limit`` only measures what a network
at 2 mm could reach at 1 mm if it made no mistake.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthseg.allocator import tune_allocator

tune_allocator()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accuracy import held_out_maps, real_scans  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from synthseg.config import GeneratorConfig, TrainConfig, parse  # noqa: E402
from synthseg.generator.plan import sample_plan  # noqa: E402
from synthseg.generator.synthesis import render  # noqa: E402
from synthseg.labels import load_scheme  # noqa: E402
from synthseg.metrics import dice_table  # noqa: E402
from synthseg.networks import layers  # noqa: E402
from synthseg.networks.backbone import (  # noqa: E402
    SegmentationNetwork,
    grown_names,
    make_body,
    space_to_depth,
    transfer,
    weights_of,
)
from synthseg.networks.checkpoint import Model  # noqa: E402
from synthseg.networks.features import FeatureNetwork  # noqa: E402
from synthseg.templates import Template, expand, load_template  # noqa: E402
from synthseg.training.losses import dice_and_cross_entropy  # noqa: E402
from synthseg.training.optimiser import learning_rate_factor, make_optimiser  # noqa: E402
from synthseg.training.stream import SyntheticStream  # noqa: E402
from synthseg.training.validation import exact_index, whole_head  # noqa: E402
from synthseg.volume import write_text_atomically  # noqa: E402

TICKS = 10_000  # the schedule counts the share of the budget that is spent in these
CONTRASTS = ("t1", "t2", "random")
REFINED = 96  # side of the patch that the refinement network is trained on, in voxels of 1 mm

Settings = dict[str, Any]
MM4: Settings = {"generator": {"voxel_size_mm": 4.0, "shape": [32, 40, 32], "subsamples": 8}}
MM2: Settings = {"generator": {"voxel_size_mm": 2.0, "shape": [64, 80, 64], "subsamples": 4}}
MM1: Settings = {"generator": {"voxel_size_mm": 1.0, "shape": [128, 160, 128], "subsamples": 2}}


def net(*channels: int, subpixel: int = 1, **more: Any) -> Settings:
    return {"network": {"channels": list(channels), "subpixel": subpixel, **more}}


def merged(*parts: Settings) -> Settings:
    result: Settings = {}
    for part in parts:
        for key, value in part.items():
            result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


@dataclass(frozen=True)
class Phase:
    """A part of a training: its share of the budget and its recipe.

    Attributes
    ----------
    kind : "plain", or what is built around the network: "prior", "deep" supervision, "cascade" on the network so far.
    grow : the network so far becomes the inner part of this one.
    severity : of artefacts and appearance, 1: as the recipe says.
    """

    share: float
    settings: Settings
    kind: str = "plain"
    grow: bool = False
    severity: float = 1.0

    @property
    def starts_anew(self) -> bool:
        """New layers, which a rate that has fallen already would leave as they are: the schedule begins again."""
        return self.grow or self.kind == "cascade"


SUBPIXEL = merged(MM1, net(32, 32, 64, 128, 192, subpixel=2), {"scored_cells": 2})


def alone(*changes: Settings, kind: str = "plain") -> tuple[Phase, ...]:
    return (Phase(1.0, merged(SUBPIXEL, *changes), kind),)


DESIGNS: dict[str, tuple[Phase, ...]] = {
    "a: U-Net at 2 mm, probabilities upsampled": (Phase(1.0, merged(MM2, net(32, 64, 128, 192))),),
    "b: progressive, 4 mm, 2 mm, 1 mm": (
        Phase(0.3, merged(MM4, net(64, 128, 192))),
        Phase(0.35, merged(MM2, net(32, 64, 128, 192)), grow=True),
        Phase(0.35, merged(MM1, net(16, 32, 64, 128, 192)), grow=True),
    ),
    "c: subpixel, 1 mm in and out": alone(),
    "b and c: progressive subpixel, 2 mm, 1 mm": (
        Phase(0.5, merged(MM2, net(32, 64, 128, 192, subpixel=2))),
        Phase(0.5, SUBPIXEL, grow=True),
    ),
    "U-Net at 1 mm": (Phase(1.0, merged(MM1, net(16, 32, 64, 128, 192))),),
    "d: 2 mm network and a light 1 mm refinement": (
        Phase(0.6, merged(MM2, net(32, 64, 128, 192))),
        Phase(0.4, merged(MM1, net(16, 32, 48)), kind="cascade"),
    ),
    "e: c with a spatial prior": alone(kind="prior"),
    "f: c, half the width": alone(net(16, 16, 32, 64, 96, subpixel=2)),
    "f: c, one level less": alone(net(32, 64, 128, 192, subpixel=2)),
    "f: c, residual": alone({"network": {"residual": True}}),
    "f: c, batch norm": alone({"network": {"norm": "batch"}}),
    "f: c, all voxels scored": alone({"scored_cells": 0}),
    "f: c, soft Dice alone": alone({"cross_entropy_weight": 0.0}),
    "f: c, cross-entropy alone": alone({"dice_weight": 0.0}),
    "f: c, deep supervision": alone(kind="deep"),
    "f: c, AdamW": alone({"optimiser": {"name": "adamw"}}),
    "f: c, constant rate": alone({"optimiser": {"schedule": "constant"}}),
    "f: c, shorter average": alone({"optimiser": {"ema_decay": 0.95}}),
    "f: c, two smaller images a step": alone({"batch_size": 2, "generator": {"shape": [96, 128, 96]}}),
    "f: c, from mild to severe": tuple(
        Phase(1 / 3, SUBPIXEL, severity=severity) for severity in (0.3, 0.65, 1.0)
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the networks


class WithPrior(nn.Module):
    """A network whose logits get those of a learned coarse map in coordinates normalised to the head in view."""

    def __init__(self, network: SegmentationNetwork, side: int = 12) -> None:
        super().__init__()
        self.network = network
        self.multiple = network.multiple
        self.prior = nn.Parameter(torch.zeros(1, network.n_classes, side, side, side))

    def forward(self, image: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.network(image, cells)
        prior = torch.cat([self._placed(one) for one in image]).to(logits.dtype)
        return logits + prior[:, :, None] if cells is not None else logits + functional.interpolate(
            prior, size=logits.shape[2:], mode="trilinear"
        )  # fmt: skip

    def _placed(self, image: torch.Tensor) -> torch.Tensor:
        """The prior (1, C, d, h, w) for an image (1, D, H, W), one value for each block of the network."""
        factor = self.network.config.subpixel
        seen = functional.avg_pool3d(image[None].float(), factor)[0, 0] > 0.05
        axes = []
        for axis, n in enumerate(seen.shape):
            weight = seen.sum([a for a in range(3) if a != axis]).double() + 1e-6
            position = torch.arange(n, dtype=torch.float64)
            middle = (weight * position).sum() / weight.sum()
            spread = ((weight * (position - middle) ** 2).sum() / weight.sum()).sqrt()
            axes.append(((position - middle) / (2.5 * spread)).float())
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)
        return functional.grid_sample(self.prior.float(), grid[None], padding_mode="border", align_corners=True)


class DeeplySupervised(nn.Module):
    """A subpixel network with a further head on each of two coarser levels of the decoder, which training scores."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.features = FeatureNetwork(network.config, {"segmentation": network.n_classes})
        self.multiple = network.multiple
        coarser = self.features.channels[-3:-1]
        self.coarse = nn.ModuleList(layers.PointwiseConvolution(n, network.n_classes, 1) for n in coarser)
        self.found: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
        levels = self.features(image)
        self.found = [head(level) for head, level in zip(self.coarse, levels[-3:-1], strict=True)]
        return self.features.head("segmentation", levels[-1], cells)


class Cascade(nn.Module):
    """A trained network at 2 mm, and a light one at 1 mm that sees the image and the other's probabilities."""

    def __init__(self, coarse: SegmentationNetwork, config: TrainConfig) -> None:
        super().__init__()
        self.coarse = coarse.requires_grad_(False)
        self.fine = make_body(config.network, 1 + coarse.n_classes, coarse.n_classes)
        layers.replace(self.fine)
        last = [layer for layer in self.fine.modules() if isinstance(layer, nn.Conv3d)][-1]
        nn.init.zeros_(last.weight)  # it begins with what the coarse network says, and adds to that
        if last.bias is not None:
            nn.init.zeros_(last.bias)
        self.multiple = 2 * coarse.multiple

    def forward(self, image: torch.Tensor, cells: torch.Tensor | None = None) -> torch.Tensor:
        return self.refined(image, [slice(None)] * 3)

    def refined(self, image: torch.Tensor, window: Sequence[slice]) -> torch.Tensor:
        """Logits of a window of the image."""
        with torch.no_grad():
            guess = self.coarse(functional.avg_pool3d(image, 2)).float().softmax(1)
            guess = functional.interpolate(guess, scale_factor=2, mode="trilinear")
        window = (slice(None), slice(None), *window)
        seen = torch.cat([image, guess], 1)[window]
        return guess[window].clamp_min(1e-4).log() + self.fine(seen.contiguous(memory_format=torch.channels_last_3d))


def build(phase: Phase, config: TrainConfig, n_classes: int, before: nn.Module | None) -> nn.Module:
    if phase.kind == "cascade":
        assert isinstance(before, SegmentationNetwork)
        return Cascade(before, config)
    network = SegmentationNetwork(config.network, n_classes)
    if phase.grow:
        assert before is not None
        transfer(network, grown_names(weights_of(before)))
    elif before is not None:
        transfer(network, weights_of(before))
    return {"plain": lambda n: n, "prior": WithPrior, "deep": DeeplySupervised}[phase.kind](network)


# ------------------------------------------------------------------------------------------------ training


@dataclass
class Budget:
    """CPU seconds of the whole design."""

    seconds: float
    spent: float = 0.0
    steps: int = 0
    losses: list[float] = field(default_factory=list)


def loss_of(network: nn.Module, batch: Any, config: TrainConfig) -> torch.Tensor:
    """Mean loss of a batch; as in training, some voxels of each subpixel block, or a patch, may stand for all."""
    factor = config.network.subpixel
    images, targets, coarser = batch.images, batch.targets, []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if isinstance(network, Cascade):
            window = [slice(s := int(torch.randint(n - REFINED + 1, ())), s + REFINED) for n in images.shape[2:]]
            logits, targets = network.refined(images, window), targets[(slice(None), *window)]
        elif config.scored_cells:
            cells = torch.randperm(factor**3)[: config.scored_cells]
            logits, targets = network(images, cells), space_to_depth(targets[:, None], factor)[:, cells]
        else:
            logits = network(images)
        if isinstance(network, DeeplySupervised):
            coarser = network.found
    loss = torch.zeros(())
    for number, groups in enumerate(batch.groups):
        dice, entropy, _ = dice_and_cross_entropy(logits[number], targets[number], groups)
        loss = loss + config.dice_weight * dice + config.cross_entropy_weight * entropy
        for weight, level in zip((0.25, 0.5), coarser, strict=False):
            stride = batch.targets.shape[1] // level.shape[2]
            middle = slice(stride // 2, None, stride)
            dice, entropy, _ = dice_and_cross_entropy(
                level[number], batch.targets[number, middle, middle, middle], groups
            )
            loss = loss + weight * (config.dice_weight * dice + config.cross_entropy_weight * entropy)
    return loss / len(batch.groups)


def schedules(phases: Sequence[Phase]) -> list[tuple[Phase, tuple[float, float]]]:
    """Each phase with the shares of the budget between which the schedule that it is part of runs."""
    ends = list(itertools.accumulate(phase.share for phase in phases))
    begins = [0.0, *ends[:-1]]
    anew = [i for i, phase in enumerate(phases) if i == 0 or phase.starts_anew]
    spans = zip(anew, [*anew[1:], len(phases)], strict=True)
    return [(phase, (begins[i], ends[k - 1])) for i, k in spans for phase in phases[i:k]]


def learn(
    network: nn.Module,
    phase: Phase,
    config: TrainConfig,
    templates: list[Template],
    budget: Budget,
    schedule: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Train for the phase's share of the budget; the network ends with the average of its weights."""
    if phase.severity < 1:
        config = config.model_copy(update={"generator": config.generator.at_severity(phase.severity)})
    stream = SyntheticStream(config, templates, load_scheme(config.scheme))
    for number in range(10**6, 10**6 + 4 * len(templates)):
        stream.batch(number)  # distance maps are made once a template, and not counted
    optimiser = make_optimiser(network, config.optimiser)
    average = {k: v.detach().clone() for k, v in weights_of(network).items()}
    until = budget.spent + phase.share * budget.seconds
    network.train()
    first = budget.steps
    while budget.spent < until:
        begun = time.process_time()
        start, end = schedule
        done = (budget.spent / budget.seconds - start) / (end - start)
        rate = learning_rate_factor(config.optimiser, int(TICKS * min(max(done, 0.0), 1.0)), TICKS)
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * rate
        loss = loss_of(network, stream.batch(budget.steps), config)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.optimiser.gradient_clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        budget.steps += 1
        decay = min(config.optimiser.ema_decay, (1 + budget.steps - first) / (10 + budget.steps - first))
        with torch.no_grad():
            for key, tensor in weights_of(network).items():
                if tensor.is_floating_point():
                    average[key].lerp_(tensor, 1 - decay)
                else:
                    average[key].copy_(tensor)
        budget.losses.append(float(loss.detach()))
        budget.spent += time.process_time() - begun
    with torch.no_grad():
        for key, tensor in weights_of(network).items():
            tensor.copy_(average[key])


def recipe(name: str, phase: Phase, options: argparse.Namespace) -> TrainConfig:
    record = {
        "name": name,
        "seed": options.seed,
        "templates": [str(path) for path in options.templates],
        "optimiser": {"name": "muon", "warmup_steps": TICKS // 20, "ema_decay": 0.99},
        "generator": {"deform": {"translation_mm": 30.0}},
    }
    return parse(TrainConfig, merged(record, phase.settings), name)


def score(name: str, templates: list[Template], options: argparse.Namespace) -> dict[str, Any]:
    """Train one design and measure it."""
    torch.manual_seed(options.seed)
    target = load_scheme("siam16")
    budget = Budget(60 * options.cpu_minutes)
    network: nn.Module | None = None
    for phase, schedule in schedules(DESIGNS[name]):
        config = recipe(name, phase, options)
        network = build(phase, config, len(target), network)
        learn(network, phase, config, templates, budget, schedule)
    assert network is not None
    model = Model(
        network=network.eval(),  # type: ignore[arg-type]
        labels=target,
        voxel_size_mm=config.generator.voxel_size_mm,
        window=config.generator.shape,
        multiple=network.multiple,  # type: ignore[arg-type]
        name=name,
        sha256="",
        record={"templates": [t.name for t in templates]},
    )
    maps = held_out_maps(model, [Path(path) for path in expand(options.held_out)], CONTRASTS)
    row = {
        "unseen_maps": maps["mean"],
        "unseen_maps_by_contrast": {contrast: table["mean"] for contrast, table in maps["contrasts"].items()},
        "steps": budget.steps,
        "cpu_seconds_per_step": round(budget.spent / budget.steps, 3),
        "parameters": sum(p.numel() for p in network.parameters()),
        "loss": round(sum(budget.losses[-50:]) / len(budget.losses[-50:]), 4),
    }
    if options.data:
        real = real_scans(model, options.data / "scans")
        row |= {"oasis_aseg": real["oasis_aseg"]["mean"], "colin27_tissues": real["colin27_tissues"]}
    return row


def limit(folders: list[Path]) -> dict[str, Any]:
    """Dice that the true labels of maps keep as probabilities at 2 mm, read linearly at 1 mm: the best of design a."""
    target = load_scheme("siam16")
    base = GeneratorConfig().model_copy(update={"voxel_size_mm": 1.0, "shape": (192, 224, 224), "subsamples": 1})
    rows = []
    for number, folder in enumerate(folders):
        template = load_template(folder)
        plan = sample_plan(whole_head(base, "t1"), template.name, template.table, 2026, 100 * number)
        truth = exact_index(template, target)[render([template], [plan])[1][0].int()]
        best, found = torch.zeros(truth.shape), torch.zeros(truth.shape, dtype=torch.uint8)
        for k in range(len(target)):
            coarse = functional.avg_pool3d((truth == k).float()[None, None], 2)
            fine = functional.interpolate(coarse, scale_factor=2, mode="trilinear")[0, 0]
            found[fine > best] = k
            best = torch.maximum(best, fine)
        groups = {label.name: ({label.id}, {label.id}) for label in target.labels[1:]}
        rows.append(dice_table(target.ids[found.numpy()], target.ids[truth.numpy()], groups))
    scores = {name: round(float(np.nanmean([row[name] for row in rows])), 4) for name in rows[0]}
    return {"maps": [folder.name for folder in folders], "mean": round(float(np.mean([*scores.values()])), 4), **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rows", nargs="*", default=[""], help="parts of the names of designs; default: all")
    parser.add_argument("--cpu-minutes", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/designs"))
    parser.add_argument("--out", type=Path, default=Path("runs/designs.json"))
    parser.add_argument("--limit", action="store_true", help="only: what labels at 2 mm can reach at 1 mm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.limit:
        found = limit(expand(options.held_out))
        write_text_atomically(options.out, json.dumps(found, indent=2) + "\n")
        print(f"mean Dice {found['mean']}")
        return
    done: dict[str, Any] = {}
    templates: list[Template] = []
    for name in DESIGNS:
        words = "".join(c if c.isalnum() else "_" for c in name)
        file = options.work / f"{words}_{options.seed}_{options.cpu_minutes:g}.json"
        if not file.exists():
            if not any(part in name for part in options.rows):
                continue
            templates = templates or [load_template(path) for path in expand(options.templates)]
            row = score(name, templates, options)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, json.dumps(row, indent=2) + "\n")
        done[name] = {"cpu_minutes": options.cpu_minutes, "seed": options.seed, **json.loads(file.read_text())}
        write_text_atomically(options.out, json.dumps(done, indent=2) + "\n")
        best = max(row["unseen_maps"] for row in done.values())
        row = done[name]
        print(
            f"{name:48s} Dice {row['unseen_maps']:.3f} ({row['unseen_maps'] / best:.2f} of the best), "
            f"OASIS {row.get('oasis_aseg', float('nan')):.3f}, {row['steps']} steps, "
            f"{row['cpu_seconds_per_step']:.2f} CPU s a step, {row['parameters'] / 1e6:.1f} M parameters",
            flush=True,
        )


if __name__ == "__main__":
    main()
