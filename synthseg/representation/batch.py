"""Features of many scans: one by one, or in principal components that all of them share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from synthseg import __version__
from synthseg.networks.feature_file import FeatureModel
from synthseg.representation.extraction import extract
from synthseg.representation.files import write_values
from synthseg.representation.pca import Pca, fit_pca, sample
from synthseg.representation.picture import Row, write_picture
from synthseg.volume import canonical, load_volume

COLOR_COMPONENTS = 3


@dataclass(frozen=True)
class Task:
    """One scan: where it is read, and the file of its features, if one is wanted."""

    source: Path
    target: Path | None = None


OnDone: TypeAlias = Callable[[Task, Exception | None, Sequence[str]], None]  # scan, error, warnings


@dataclass
class _Kept:
    """What is kept of a scan until the basis of all is known; the features themselves wait in a file."""

    task: Task
    spool: Path
    affine: np.ndarray
    head: np.ndarray
    levels: tuple[int, ...]
    channels: tuple[int, ...]
    warnings: tuple[str, ...]

    def values(self) -> torch.Tensor:
        return torch.from_numpy(np.lib.format.open_memmap(self.spool, mode="c"))


def run(
    tasks: Sequence[Task],
    model: FeatureModel,
    device: torch.device | str = "cpu",
    levels: Sequence[int] = (-1,),
    *,
    components: int = 0,
    picture: Path | None = None,
    on_done: OnDone = lambda task, error, warnings: None,
) -> None:
    """Extract the features of each scan and write them.

    With ``components`` they are written as that many principal components of the head voxels of all scans; ``picture``
    shows the first three as colours. Either needs all scans first: features then wait in temporary files, so that
    memory holds one scan at a time. A scan that fails leaves the others alone.

    ``on_done`` is called once for each scan: with an error, or None when it is written, and what the user should know
    of the scan. Raises ConfigError if more components are asked for than there are channels, and OutputError if the
    picture cannot be written.
    """
    if components == 0 and picture is None:
        for task in tasks:
            _one(task, model, device, levels, on_done)
        return
    with tempfile.TemporaryDirectory(prefix="synthseg-features-") as folder:
        kept, samples = [], []
        for number, task in enumerate(tasks):
            try:
                volume = load_volume(task.source)
                found = extract(volume, model, device, levels)
                spool = Path(folder) / f"{number}.npy"
                np.save(spool, found.values.numpy())
            except Exception as error:
                on_done(task, error, ())
                continue
            samples.append(sample(found.values, found.head))
            head = found.head.numpy()
            kept.append(_Kept(task, spool, found.affine, head, found.levels, found.channels, volume.warnings))
            del volume, found
        if not kept:
            return
        n_channels = samples[0].shape[1]
        least = COLOR_COMPONENTS if picture is not None else 0
        basis = fit_pca(samples, max(components, min(least, n_channels)))
        del samples
        for one in kept:
            try:
                if one.task.target is not None:
                    _write(one, basis, components, model)
            except Exception as error:
                on_done(one.task, error, ())
            else:
                on_done(one.task, None, one.warnings)
        if picture is not None:
            write_picture(picture, _rows(kept, basis))


def _one(
    task: Task,
    model: FeatureModel,
    device: torch.device | str,
    levels: Sequence[int],
    on_done: OnDone,
) -> None:
    try:
        volume = load_volume(task.source)
        found = extract(volume, model, device, levels)
        if task.target is not None:
            record = describe(task.source, model, found.levels, found.channels)
            write_values(task.target, found.values, found.affine, record)
    except Exception as error:
        on_done(task, error, ())
    else:
        on_done(task, None, volume.warnings)


def _write(one: _Kept, basis: Pca, components: int, model: FeatureModel) -> None:
    assert one.task.target is not None
    record = describe(one.task.source, model, one.levels, one.channels)
    values = one.values()
    if components:
        shown = basis.first(components)
        values = shown.project(values)
        record["pca"] = shown.to_dict()
    write_values(one.task.target, values, one.affine, record)


def _rows(kept: Sequence[_Kept], basis: Pca) -> Iterator[Row]:
    for one in kept:
        scan = canonical(load_volume(one.task.source))
        yield Row(one.task.source.name, scan, basis.colors(one.values()), one.affine, one.head)


def describe(source: Path, model: FeatureModel, levels: Sequence[int], channels: Sequence[int]) -> dict[str, Any]:
    """How features were made, for the record of their file."""
    return {
        "synthseg": __version__,
        "model": model.name,
        "sha256": model.sha256,
        "scan": source.name,
        "levels": list(levels),
        "channels": list(channels),
        "pca": None,
    }
