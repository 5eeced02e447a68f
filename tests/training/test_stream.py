"""The stream of batches is the same for any number of workers, from any start."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthseg.config import TrainConfig, parse
from synthseg.generator.synthesis import render
from synthseg.labels import load_scheme
from synthseg.templates import load_template
from synthseg.training.stream import Batch, SyntheticStream, loader


@pytest.fixture(scope="module")
def make(template_folders: dict[str, Path]) -> Any:
    templates = [load_template(template_folders[name]) for name in ("head", "other", "coarse")]

    def stream(first: int = 0, **changes: Any) -> SyntheticStream:
        record = {"generator": {"shape": [8, 10, 9], "voxel_size_mm": 4.0, "subsamples": 1}, "batch_size": 2} | changes
        return SyntheticStream(parse(TrainConfig, record, "test"), templates, load_scheme("siam16"), first)

    return stream


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.targets, b.targets)
        and all(torch.equal(x, y) for x, y in zip(a.groups, b.groups, strict=True))
        and a.plans == b.plans
    )


def test_workers_do_not_matter(make: Any) -> None:
    alone = list(islice(loader(make()), 4))
    shared = list(islice(loader(make(workers=2)), 4))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert not same(alone[0], alone[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_rendered_on_the_gpu(make: Any, workers: int) -> None:
    stream = make(workers=workers)
    expected = list(islice(loader(make()), 2))
    stream.device = torch.device("cuda")
    for batch, same_plans in zip(islice(loader(stream), 2), expected, strict=True):
        assert batch.plans == same_plans.plans
        assert batch.images.is_pinned() if workers else batch.images.is_cuda
        assert (batch.targets.cpu() == same_plans.targets).float().mean() > 0.999
        by_name = {template.name: template for template in stream.templates}
        images, _ = render([by_name[plan.template] for plan in batch.plans], batch.plans, "cuda")
        torch.testing.assert_close(batch.images.cpu(), images.cpu())


def test_what_all_workers_need_is_computed_before_they_start(make: Any) -> None:
    changing = {"shape": [8, 10, 9], "voxel_size_mm": 4.0, "subsamples": 1, "anatomy": {"probability": 1.0}}
    stream = make(workers=2, generator=changing)
    for template in stream.templates:
        template.cache.clear()
    alone = next(loader(make(generator=changing)))
    for template in stream.templates:
        template.cache.clear()
    batch = next(loader(stream))
    assert all({"borders", "cortex", "morph", "nuclei"} <= template.cache.keys() for template in stream.templates)
    assert same(batch, alone)


def test_a_later_start_is_a_skip(make: Any) -> None:
    whole = list(islice(loader(make()), 5))
    tail = list(islice(loader(make(first=3)), 2))
    assert all(same(a, b) for a, b in zip(whole[3:], tail, strict=True))


def test_batches_are_consecutive_samples(make: Any) -> None:
    batches = list(islice(loader(make()), 3))
    assert [p.index for b in batches for p in b.plans] == [0, 1, 2, 3, 4, 5]
    singles = list(islice(loader(make(batch_size=1)), 6))
    for number, single in enumerate(singles):
        pair = batches[number // 2]
        assert single.plans[0] == pair.plans[number % 2]
        torch.testing.assert_close(single.images[0], pair.images[number % 2], rtol=1e-5, atol=1e-5)
        assert torch.equal(single.targets[0], pair.targets[number % 2])


def test_shapes_types_and_groups(make: Any) -> None:
    stream = make()
    seen = set()
    for batch in islice(loader(stream), 8):
        assert (batch.images.shape, batch.images.dtype) == ((2, 1, 8, 10, 9), torch.float32)
        assert (batch.targets.shape, batch.targets.dtype) == ((2, 8, 10, 9), torch.uint8)
        for plan, groups, target in zip(batch.plans, batch.groups, batch.targets, strict=True):
            assert groups.shape == ((9, 17) if plan.scheme == "brainweb" else (17, 17))
            assert target.max() < len(groups)
            seen.add(plan.template)
    assert seen == {"tiny", "tiny_other", "tiny_coarse"}


def test_targets_are_the_rendered_labels(make: Any) -> None:
    stream = make()
    siam = load_scheme("siam16")
    by_name = {t.name: t for t in stream.templates}
    for batch in islice(loader(stream), 4):
        for plan, groups, target in zip(batch.plans, batch.groups, batch.targets, strict=True):
            template = by_name[plan.template]
            _, labels = render([template], [plan])
            allowed = torch.from_numpy(template.table.groups(siam))
            assert torch.equal(groups[target.int()], allowed[labels[0].int()])


def test_another_seed_is_another_stream(make: Any) -> None:
    assert not same(next(loader(make())), next(loader(make(seed=1))))


def test_templates_of_other_voxel_size_and_shape_share_a_batch(make: Any, two_grids: list[str]) -> None:
    """Each is drawn at its own size: undeformed, it fills in the image the volume that it has in space."""
    still = {"rotation_deg": 0, "scaling": 0, "shear": 0, "translation_mm": 0, "svf_std_mm": 0, "flip_probability": 0}
    whole = {"crop_probability": 0, "strip_probability": 0}
    grid = {"shape": [24, 28, 32], "voxel_size_mm": 2.0, "subsamples": 4}
    stream = make(generator={**grid, "deform": still, "artefacts": whole})
    stream.templates = [load_template(path) for path in two_grids]
    stream.tables = stream.tables[:2]
    fine, coarse = stream.templates
    assert tuple(fine.labels.shape) != tuple(coarse.labels.shape)
    np.testing.assert_allclose(coarse.spacing_mm, 2 * np.array(fine.spacing_mm))
    volumes = {t.name: int((t.labels > 0).sum()) * float(np.prod(t.spacing_mm)) for t in stream.templates}
    batch = next(b for b in map(stream.batch, range(20)) if len({plan.template for plan in b.plans}) == 2)
    assert batch.images.shape == (2, 1, 24, 28, 32)
    for plan, target in zip(batch.plans, batch.targets, strict=True):
        drawn = int((target > 0).sum()) * 2.0**3
        assert drawn == pytest.approx(volumes[plan.template], rel=0.05), plan.template
