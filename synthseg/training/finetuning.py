"""Fine-tuning: one layer for one task on the features of a trained network, frozen or free.

A run folder holds, beside what every run writes (`run.Run`), ``finetuned.safetensors`` (the weights with the best
validation), ``last.safetensors``, ``segmentation.safetensors`` (for ``synthseg segment``, if that is the task) and
``examples.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from synthseg import rng
from synthseg.config import FinetuneConfig, GeneratorConfig, NetworkConfig, TrainConfig
from synthseg.errors import ConfigError
from synthseg.generator.artefacts import sample_artefacts
from synthseg.generator.contrast import named_contrasts
from synthseg.generator.draw import Draw
from synthseg.generator.plan import Plan, sample_plan
from synthseg.labels import LabelTable
from synthseg.networks.backbone import SegmentationNetwork, load_weights, transfer, weights_of, with_classes
from synthseg.networks.checkpoint import model_path, read_weights, save_model
from synthseg.networks.feature_file import as_feature_weights, save_features
from synthseg.networks.features import LAST, FeatureNetwork, segmentation_weights
from synthseg.templates import Template
from synthseg.training.examples import Example, load_examples
from synthseg.training.run import Run, check_grid, check_loss_weights
from synthseg.training.scenes import ImagePlan, image_plan, moved, painted
from synthseg.training.state import Tensors
from synthseg.training.stream import Stream, group_table, template_of
from synthseg.training.tasks import Pair, Segmentation, Task, make_task, without_artefacts
from synthseg.training.validation import told_apart, whole_head

VALIDATION_SEED = 977


@dataclass
class PairBatch:
    """Images with their targets, and the plans that made them."""

    pairs: list[Pair]
    plans: list[Any]


class TaskNetwork(nn.Module):
    """A feature network and the head of one task: images (B, 1, D, H, W) to the head's values (B, n, D, H, W).

    With ``frozen`` only the head learns, and the rest stays in evaluation mode.
    """

    def __init__(self, network: NetworkConfig, heads: dict[str, int], task: str, frozen: bool) -> None:
        super().__init__()
        self.features = FeatureNetwork(network, heads)
        self.task = task
        self.frozen = frozen
        own = set(self.features.heads[task].parameters())
        for parameter in self.features.parameters():
            parameter.requires_grad_(parameter in own or not frozen)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.features(images)[-1]
        return self.features.head(self.task, features).float()

    def train(self, mode: bool = True) -> TaskNetwork:
        super().train(mode)
        if self.frozen:
            self.features.train(False)
        return self


def check(config: FinetuneConfig, world: int = 1) -> None:
    """Refuse a recipe that cannot run on ``world`` devices, before anything is loaded."""
    check_grid(config, world)
    if not config.templates and not config.images:
        raise ConfigError("nothing to learn from: give templates, or images (a list of image and labels)")
    if config.frozen and config.init is None:
        raise ConfigError(
            "frozen features need a trained network: name it with init (siam16, or a file of 'synthseg pretrain'), "
            "or set frozen: false to train a network from random weights"
        )
    if config.task == "segmentation":
        check_loss_weights(config)
    if config.few_shot and config.templates and config.images:
        raise ConfigError("few_shot counts images of templates or real ones; give templates or images, not both")
    if config.images and config.few_shot > len(config.images):
        raise ConfigError(f"few_shot is {config.few_shot}, but there are {len(config.images)} images")
    learned = {Path(one.image).resolve() for one in config.images}
    both = {one.image for one in config.validation_images if Path(one.image).resolve() in learned}
    if both:
        raise ConfigError(f"validation_images: {sorted(both)} are also trained on; a held-out figure needs others")
    wrong = sorted(c for c in {*config.validation_contrasts} - set(named_contrasts()) if not c.startswith("random"))
    if wrong:
        known = ", ".join(["random", *named_contrasts()])
        raise ConfigError(f"validation_contrasts: there is no contrast {wrong}; known: {known}")
    FeatureNetwork(config.network)


class PairStream(Stream[PairBatch]):
    """Batches of images and targets. Sample *i* depends on the recipe, its seed and *i* alone."""

    config: FinetuneConfig

    def __init__(
        self,
        config: FinetuneConfig,
        task: Task,
        templates: Sequence[Template],
        examples: Sequence[Example],
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(config, first, rank, world)
        self.task = task
        self.templates = list(templates)
        self.examples = list(examples)
        self.settings = task.settings(config.generator)
        self.quiet = quiet(config, task)

    def batch(self, number: int) -> PairBatch:
        made = [self.sample(i) for i in self.samples(number)]
        return PairBatch([pair for pair, _ in made], [plan for _, plan in made])

    def sample(self, index: int) -> tuple[Pair, Plan | ImagePlan]:
        """Sample ``index`` and its plan. Templates and real images are drawn with equal chances."""
        seed, sources = self.config.seed, len(self.templates) + len(self.examples)
        source = rng.generator(seed, index, "source")
        which = int(torch.randint(sources, (), generator=source))
        if which < len(self.examples):
            example = self.examples[which]
            settings = self.settings if self.config.augment else self.quiet
            look = image_plan(settings, example, seed, index, pose=self.config.augment)
            return self.task.pair(moved(example, look)), look
        number = index % self.config.few_shot if self.config.few_shot else index
        template = self.templates[template_of(seed, number, self.templates)]
        plan = sample_plan(self.settings, template.name, template.table, seed, number)
        if number != index and self.config.augment:
            plan = self._other_artefacts(plan, index)
        return self.task.pair(painted(template, plan)), plan

    def _other_artefacts(self, plan: Plan, index: int) -> Plan:
        """The same painted head, gone through the scanner once more."""
        extent = tuple(n * plan.voxel_size_mm for n in plan.shape)
        stripped = not all(plan.contrast.visible)
        draw = Draw(rng.generator(self.config.seed, index, "artefacts"))
        again = sample_artefacts(
            self.settings.artefacts, plan.voxel_size_mm, extent, draw, plan.contrast.name, stripped
        )
        return plan.model_copy(update={"artefacts": again})


def quiet(config: FinetuneConfig, task: Task) -> GeneratorConfig:
    """Generator settings under which a real image stays as it is, but for what the task is about."""
    generator = config.generator
    bare = generator.model_copy(update={"artefacts": without_artefacts(generator.artefacts, task.name)})
    return task.settings(bare)


class Finetuner(Run[FinetuneConfig, PairBatch]):
    """One run. ``Finetuner(config, folder).run()`` returns the path of ``finetuned.safetensors``."""

    model_name: ClassVar[str] = "finetuned"
    figure: ClassVar[str] = "figure"
    score: ClassVar[str] = "score"
    fixed: ClassVar[tuple[str, ...]] = ("task", "images", "validation_images", "frozen", "few_shot", "augment")
    plain: TaskNetwork

    def check(self, world: int) -> None:
        check(self.config, world)

    def prepare(self) -> None:
        config = self.config
        self.task = make_task(config, self.target)
        self.task.settings(config.generator)
        few = config.images[: config.few_shot or None]
        self.examples = load_examples(few, config.scheme, config.task)
        contrasts = config.validation_contrasts if self.held_out else ()
        self.held_out_examples = load_examples(config.validation_images, config.scheme, config.task, contrasts)
        if config.task == "segmentation":
            tables = [template.table for template in (*self.templates, *self.held_out)]
            tables += [one.table for one in (*self.examples, *self.held_out_examples) if one.table is not None]
            for table in tables:
                table.groups(self.target)  # or a LabelError, before anything is drawn
            self._check_scorable()
        self.heads: dict[str, dict[str, Any]] = {}
        self.channels: dict[str, int] = {}
        if config.init and config.frozen:  # what other heads say stays true while the features do not change
            last = self.folder / f"{self.last_name}.safetensors"  # a run that goes on needs the file of init no more
            weights, record = read_weights(last if self.resuming and last.is_file() else model_path(config.init))
            named, heads = as_feature_weights(weights, record)
            self.heads = {name: head for name, head in heads.items() if head["task"] != config.task}
            cells = config.network.subpixel**3
            self.channels = {name: len(named[f"heads.{name}.weight"]) // cells for name in self.heads}
        described: dict[str, Any] = {"task": config.task}
        if config.task == "segmentation":
            described["labels"] = self.target.to_dict()
        self.heads[config.task] = described
        self.channels[config.task] = self.task.channels

    def _check_scorable(self) -> None:
        """Raise ConfigError unless the labels of all that is held out tell a class from the others."""
        for key, held_out in (("templates", self.held_out), ("images", self.held_out_examples)):
            for one in held_out:
                assert one.table is not None
                index, groups = group_table(one.table, self.target)
                if not len(told_apart(index[one.labels.int()].numpy(), groups.numpy())):
                    raise ConfigError(
                        f"validation_{key}: the labels of {one.name} tell no class of {self.target.name} from the "
                        f"others; is '{one.table.name}' their scheme? Mend it, or leave {one.name} out"
                    )

    def make_network(self) -> TaskNetwork:
        network = TaskNetwork(self.config.network, self.channels, self.config.task, self.config.frozen)
        rows = self.task.at_rest * self.config.network.subpixel**3
        for parameter in network.features.heads[self.config.task].parameters():
            nn.init.zeros_(parameter[:rows])
        return network

    def start_from(self, weights: Tensors, record: dict[str, Any]) -> None:
        """Take over body and heads. Raises ConfigError if the body would start anew, or frozen, in part."""
        config, features = self.config, self.plain.features
        named, heads = as_feature_weights(weights, record)
        same = next((name for name, head in heads.items() if head["task"] == config.task), None)
        if same is not None:
            named = self._own_head(named, same, heads[same])
        _, fresh = transfer(features, named)
        body = {name: tensor for name, tensor in weights_of(features).items() if name.startswith("body.")}
        lost = [name for name in fresh if name in body]
        new = sum(body[name].numel() for name in lost) / sum(tensor.numel() for tensor in body.values())
        if new > 0.5 or (lost and config.frozen):
            raise ConfigError(
                f"init: of the features of {config.init} only {1 - new:.0%} fit the recipe's network; leave out "
                "'network' and the generator's voxel_size_mm and shape to take over the model's"
            )
        kept = "" if f"heads.{config.task}.weight" in fresh else f" and the layer for {config.task}"
        self.start = f"{1 - new:.0%} of the features{kept} from {config.init}"

    def _own_head(self, named: Tensors, head: str, described: dict[str, Any]) -> Tensors:
        """A head for this task under the name that it has here; of a segmentation, for the recipe's classes."""
        keys = [f"heads.{head}.{kind}" for kind in ("weight", "bias")]
        own = {key: tensor for key, tensor in named.items() if key not in keys}
        if self.config.new_head:
            return own
        found = {key.rpartition(".")[2]: named[key] for key in keys}
        if self.config.task == "segmentation":
            source = LabelTable.from_dict(described["labels"])
            last = with_classes({LAST + kind: tensor for kind, tensor in found.items()}, source, self.target)
            found = {name.removeprefix(LAST): tensor for name, tensor in last.items()}
        return own | {f"heads.{self.config.task}.{kind}": tensor for kind, tensor in found.items()}

    def stream(self, rank: int = 0, world: int = 1) -> PairStream:
        return PairStream(self.config, self.task, self.templates, self.examples, self.state.step, rank, world)

    # -- work --------------------------------------------------------------------------------------------------------
    def compute(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of a batch, and the figure of each image (B,)."""
        pairs = [pair.to(self.fabric.device) for pair in batch.pairs]
        images = torch.stack([pair.image for pair in pairs])
        results = self.task.result(self.network(images), images)
        losses = [self.task.loss(result, pair) for result, pair in zip(results, pairs, strict=True)]
        figures = [self._figure(result.detach(), pair) for result, pair in zip(results, pairs, strict=True)]
        return torch.stack(losses).mean(), torch.tensor(figures, device=self.fabric.device)

    def _figure(self, result: torch.Tensor, pair: Pair) -> float:
        return self.task.figures(result, pair)[self.task.figure] if self.task.measurable(pair) else float("nan")

    # -- validation --------------------------------------------------------------------------------------------------
    def validation_pairs(self) -> dict[str, list[Pair]]:
        """What is held out, the same at each call: by contrast, and each real image by its name."""
        config = self.config
        found: dict[str, list[Pair]] = {}
        for number, contrast in enumerate(config.validation_contrasts if self.held_out else ()):
            settings = self.task.settings(whole_head(config.generator, contrast))
            found[contrast] = []
            for place, template in enumerate(self.held_out):
                index = number * 1000 + place
                plan = sample_plan(settings, template.name, template.table, VALIDATION_SEED, index)
                found[contrast].append(self.task.pair(painted(template, plan)))
        for number, example in enumerate(self.held_out_examples):
            look = image_plan(quiet(config, self.task), example, VALIDATION_SEED, number, pose=False)
            found[example.name] = [self.task.pair(moved(example, look))]
        return found

    def validate(self) -> float:
        """Score of the averaged weights: the mean Dice, or the part of the baseline's mean error that is gone.

        Images that show nothing that could be measured are left out; NaN if there is no other.
        """
        if not self.held_out and not self.held_out_examples:
            return float("nan")
        task, rows = self.task, {}
        without = f"baseline_{task.figure}"
        with self.averaged(), torch.no_grad():
            for name, pairs in self.validation_pairs().items():
                found: dict[str, list[float]] = {}
                for pair in (one.to(self.fabric.device) for one in pairs if task.measurable(one)):
                    result = task.result(self.network(pair.image[None]), pair.image[None])[0]
                    for key, value in task.figures(result, pair).items():
                        found.setdefault(key, []).append(value)
                    for key, value in task.figures(task.baseline(pair), pair).items():
                        found.setdefault(f"baseline_{key}", []).append(value)
                if not found:
                    continue
                row = {key: float(np.mean(values)) for key, values in found.items()}
                row["score"] = task.score(row[task.figure], row[without])
                rows[name] = {key: round(value, 5) for key, value in row.items()}
        if not rows:
            return float("nan")
        means = [float(np.mean([row[key] for row in rows.values()])) for key in (task.figure, without)]
        mean = task.score(*means)
        self.state.validation = {
            "step": self.state.step,
            "mean": round(mean, 4),
            "task": task.name,
            "baseline": task.baseline_name,
            "figures": rows,
        }
        self.state.validations.append(self.state.validation)
        return mean

    # -- files -------------------------------------------------------------------------------------------------------
    def manifest(self) -> dict[str, Any]:
        images = {
            "images": [example.name for example in self.examples],
            "validation_images": [example.name for example in self.held_out_examples],
        }
        return super().manifest() | images

    def save_model(self, name: str) -> Path:
        """Write the averaged weights with all heads; a segmentation also as a model for ``synthseg segment``."""
        config = self.config
        weights = {key.removeprefix("features."): tensor for key, tensor in self.ema.items()}
        network = FeatureNetwork(config.network, self.channels)
        load_weights(network, weights)
        path = self.folder / f"{name}.safetensors"
        save_features(path, network, config, self.heads, self.manifest())
        if isinstance(self.task, Segmentation) and name == self.model_name:
            whole = SegmentationNetwork(config.network, len(self.target))
            load_weights(whole, segmentation_weights(weights))
            keys = set(TrainConfig.model_fields) & set(FinetuneConfig.model_fields) - {"templates"}
            record = {key: getattr(config, key) for key in keys}
            names = config.templates or tuple(example.name for example in self.examples)
            save_model(
                self.folder / "segmentation.safetensors",
                whole,
                TrainConfig(templates=names, **record),
                self.target,
                self.manifest(),
            )
        return path

    def keep_best(self) -> None:
        self.save_model(self.model_name)

    def keep_early(self) -> None:
        """A layer is soon trained: what it was like before is not kept."""

    def write_report(self) -> None:
        """``examples.png``: the first held-out image of each contrast, its target, the result and the baseline."""
        from synthseg.training.task_pictures import draw

        if not self.held_out and not self.held_out_examples:
            return
        rows = {}
        with self.averaged(), torch.no_grad():
            for name, pairs in self.validation_pairs().items():
                pair = pairs[0].to(self.fabric.device)
                result = self.task.result(self.network(pair.image[None]), pair.image[None])[0]
                rows[name] = (pair, result, self.task.baseline(pair))
        draw(self.folder / "examples.png", self.task, rows)

    def draw_first_batch(self, path: Path) -> Path:
        """The next batch, to look at before training: image, target and what the baseline says."""
        from synthseg.training.task_pictures import draw

        pairs = self.stream().batch(self.state.step).pairs
        rows = {f"image {number}": (pair, None, self.task.baseline(pair)) for number, pair in enumerate(pairs)}
        draw(path, self.task, rows)
        return path
