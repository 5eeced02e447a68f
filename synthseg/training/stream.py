"""An endless stream of synthetic batches; sample *i* is the same for any number of workers."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from synthseg import rng
from synthseg.config import RunConfig, TrainConfig
from synthseg.generator import anatomy
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import render
from synthseg.labels import LabelTable
from synthseg.templates import Template

B = TypeVar("B", covariant=True)


@dataclass
class Batch:
    """images (B, 1, D, H, W) float32 in [0, 1]; targets (B, D, H, W) uint8 group indices; groups (G, C) bool each."""

    images: torch.Tensor
    targets: torch.Tensor
    groups: list[torch.Tensor]
    plans: list[Plan]

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU can copy from while it computes."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


def group_table(source: LabelTable, target: LabelTable) -> tuple[torch.Tensor, torch.Tensor]:
    """The group index of each source label, uint8 (n_source,), and the classes of each group, bool (G, C).

    An exact relation keeps the target's own class order, so that a template without ambiguity has identity groups.
    """
    relation = source.groups(target)
    if (relation.sum(1) == 1).all():
        return torch.from_numpy(relation.argmax(1).astype(np.uint8)), torch.eye(len(target), dtype=torch.bool)
    unique = [relation[0]]
    for row in relation:
        if not any((row == u).all() for u in unique):
            unique.append(row)
    index = [next(i for i, u in enumerate(unique) if (row == u).all()) for row in relation]
    return torch.tensor(index, dtype=torch.uint8), torch.from_numpy(np.stack(unique))


class Stream(IterableDataset[B], Generic[B]):
    """Batches first, first + 1, ... forever. Worker *w* of *n* makes every n-th batch, so their order is kept.

    With ``world`` devices, the one of this ``rank`` makes samples rank, rank + world, ... of each batch. Images are
    rendered on ``device``.
    """

    def __init__(
        self, config: RunConfig, first: int = 0, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.first = first
        self.rank = rank
        self.world = world

    def samples(self, number: int) -> range:
        """The samples of batch ``number`` that are this device's."""
        size = self.config.batch_size
        return range(number * size + self.rank, (number + 1) * size, self.world)

    def batch(self, number: int) -> B:
        """Batch ``number``: the same whenever and wherever it is made."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Compute once what every worker process would compute for itself."""

    def __iter__(self) -> Iterator[B]:
        worker = get_worker_info()
        number, step = self.first, 1
        if worker is not None:
            number, step = number + worker.id, worker.num_workers
        while True:
            yield self.batch(number)
            number += step


def drawn_cells(seed: int, step: int, subpixel: int, count: int) -> torch.Tensor | None:
    """Which voxels of the subpixel blocks a step scores, (K,); None for all (``count`` 0, or as many as there are)."""
    blocks = subpixel**3
    if count == 0 or count >= blocks:
        return None
    return torch.randperm(blocks, generator=rng.generator(seed, step, "cells"))[:count]


def template_of(seed: int, index: int, templates: Sequence[Template]) -> int:
    """Which template sample ``index`` is made from."""
    source = rng.generator(seed, index, "template")
    return int(torch.randint(len(templates), (), generator=source))


class SyntheticStream(Stream[Batch]):
    """Batches of synthetic images and their labels."""

    def __init__(
        self,
        config: TrainConfig,
        templates: list[Template],
        target: LabelTable,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(config, first, rank, world, device)
        self.templates = templates
        self.tables = [group_table(t.table, target) for t in templates]

    def prepare(self) -> None:
        if self.config.generator.anatomy.probability > 0 and self.config.workers > 1:
            with ThreadPoolExecutor(self.config.workers) as pool:
                list(pool.map(anatomy.prepare, self.templates))

    def batch(self, number: int) -> Batch:
        config = self.config
        plans, chosen = [], []
        for index in self.samples(number):
            which = template_of(config.seed, index, self.templates)
            template = self.templates[which]
            plans.append(sample_plan(config.generator, template.name, template.table, config.seed, index))
            chosen.append(which)
        images, labels = render([self.templates[w] for w in chosen], plans, self.device)
        tables = [self.tables[w][0].to(self.device) for w in chosen]
        targets = torch.stack([table[lab.int()] for table, lab in zip(tables, labels, strict=True)])
        if get_worker_info() is not None:  # between processes go tensors in main memory
            images, targets = images.cpu(), targets.cpu()
        return Batch(images, targets, [self.tables[w][1] for w in chosen], plans)


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, Stream) and worker.dataset.device.type == "cuda":
        atexit.register(os._exit, 0)  # past the destructors: one aborts, and the run would take that for a failure


def loader(stream: Stream[B]) -> Iterator[B]:
    """Iterate over the stream, in this process or with worker processes."""
    workers, on_gpu = stream.config.workers, stream.device.type == "cuda"
    if workers == 0:
        return iter(stream)
    stream.prepare()
    return iter(
        DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2,
            worker_init_fn=_begin_worker,
            pin_memory=on_gpu,
            multiprocessing_context="spawn" if on_gpu else None,  # a forked process cannot use CUDA
        )
    )
