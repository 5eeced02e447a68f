"""An endless stream of views for pretraining: images of one anatomy that differ in contrast and artefacts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from synthseg.config import PretrainConfig
from synthseg.generator.plan import Plan
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import LabelTable
from synthseg.templates import Template
from synthseg.training.canonical import canonical_and_labels, has_t1, load_t1
from synthseg.training.stream import Stream, group_table, template_of


@dataclass
class ViewBatch:
    """A anatomies in V views each: N = A * V images, the views of the first anatomy first.

    Attributes
    ----------
    images : (N, 1, D, H, W), float32 in [0, 1].
    labels : (N, D, H, W), uint8 group indices; 0 is background, and what a view does not show.
    groups : for each anatomy bool (G, C), the classes that each of its groups stands for.
    canonical : (A, 1, D, H, W) in [0, 1], the T1 image of each anatomy; (N, 1, D, H, W) if views are displaced; None if
        not wanted.
    shown : (N, D, H, W) bool, all but what a stripped or cropped image does not show of the head; None like
        ``canonical``.
    displacement_mm : (N, 3, D, H, W); position p of a view is ``p + displacement_mm(p)`` of the first; None: all 0.
    plans : of the N images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    groups: list[torch.Tensor]
    canonical: torch.Tensor | None
    shown: torch.Tensor | None
    displacement_mm: torch.Tensor | None
    plans: list[Plan]

    @property
    def views(self) -> int:
        """Images of each anatomy."""
        return len(self.images) // len(self.groups)

    def to(self, device: torch.device | str) -> ViewBatch:
        """The same on a device."""

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            groups=[group.to(device) for group in self.groups],
            canonical=move(self.canonical),
            shown=move(self.shown),
            displacement_mm=move(self.displacement_mm),
        )

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For each image the canonical one as it shows the anatomy, and where it shows it, bool; (N, 1, D, H, W) each.

        Nothing is known of what a stripped or cropped image does not show, and nothing is asked of it there.
        """
        assert self.canonical is not None
        assert self.shown is not None
        times = len(self.images) // len(self.canonical)
        return self.canonical.repeat_interleave(times, 0), self.shown[:, None]


class ViewStream(Stream[ViewBatch]):
    """Batches of views; a sample is an anatomy."""

    config: PretrainConfig

    def __init__(
        self,
        config: PretrainConfig,
        templates: list[Template],
        target: LabelTable,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(config, first, rank, world)
        self.templates = templates
        self.tables = [group_table(t.table, target) for t in templates]
        if config.anatomy_weight > 0:
            for template in templates:  # before worker processes are made, which then share it
                if has_t1(template):
                    load_t1(template)

    def batch(self, number: int) -> ViewBatch:
        """Batch ``number``: the same whenever and wherever it is made."""
        return self.anatomies([(self.template_of(i), i) for i in self.samples(number)], self.config.seed)

    def template_of(self, index: int) -> int:
        """Number of the template of a sample."""
        return template_of(self.config.seed, index, self.templates)

    def plans(self, template: Template, seed: int, index: int) -> list[Plan]:
        """Plans of the views of a sample."""
        return sample_views(self.config.generator, template.name, template.table, seed, index)

    def anatomies(self, chosen: list[tuple[int, int]], seed: int) -> ViewBatch:
        """Views of samples: (which template, sample index) for each."""
        config = self.config
        images, labels, canonical, shown, moved = [], [], [], [], []
        plans: list[Plan] = []
        for which, index in chosen:
            template = self.templates[which]
            own = self.plans(template, seed, index)
            views = render_views(template, own)
            images.append(views.images)
            labels.append(self.tables[which][0][views.labels.int()])
            if config.generator.views.displaced:
                moved.append(views.displacement_mm)
            if config.anatomy_weight > 0:
                pairs = [
                    canonical_and_labels(template, plan)
                    for plan in (own if config.generator.views.displaced else own[:1])
                ]
                canonical += [image for image, _ in pairs]
                wholes = torch.stack([whole for _, whole in pairs])
                shown.append((views.labels > 0) | (wholes == 0))  # of the template's labels: whatever the classes
            plans += own
        return ViewBatch(
            images=torch.cat(images),
            labels=torch.cat(labels),
            groups=[self.tables[which][1] for which, _ in chosen],
            canonical=torch.stack(canonical) if canonical else None,
            shown=torch.cat(shown) if shown else None,
            displacement_mm=torch.cat(moved) if moved else None,
            plans=plans,
        )
