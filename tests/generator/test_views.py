"""Views of one sample share its anatomy; severity and displacement are what the Plan says."""

import pytest
import torch

from synthseg.config import AnatomyConfig, GeneratorConfig, ViewsConfig
from synthseg.errors import ConfigError
from synthseg.generator.deform import coordinates
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.views import render_views, sample_views
from synthseg.templates import Template


def settings(severities: list[float], perturbation_mm: float = 0.0) -> GeneratorConfig:
    base = GeneratorConfig(
        voxel_size_mm=2.0,
        shape=(22, 26, 24),
        subsamples=2,
        views=ViewsConfig(severities=severities, perturbation_mm=perturbation_mm),
        anatomy=AnatomyConfig(probability=1.0),
    )
    calm = base.artefacts.model_copy(update={"crop_probability": 0.0, "strip_probability": 0.0})
    return base.model_copy(update={"artefacts": calm})


def test_views_share_anatomy_and_differ_in_appearance(tiny_template: Template) -> None:
    plans = sample_views(settings([0.0, 0.0, 1.0, 1.0]), "tiny", tiny_template.table, 1, 5)
    views = render_views(tiny_template, plans)
    assert views.images.shape == (4, 1, 22, 26, 24)
    assert [plan.severity for plan in plans] == [0.0, 0.0, 1.0, 1.0]
    assert all((p.deform, p.anatomy) == (plans[0].deform, plans[0].anatomy) for p in plans)
    assert all(torch.equal(views.labels[v], views.labels[0]) for v in range(4))
    for a in range(4):
        for b in range(a):
            assert (views.images[a] - views.images[b]).abs().mean() > 0.01
    assert views.displacement_mm.abs().max() == 0


def test_the_first_view_at_full_severity_is_the_sample(tiny_template: Template) -> None:
    config = settings([1.0, 0.3])
    first = sample_views(config, "tiny", tiny_template.table, 1, 5)[0]
    assert first == sample_plan(config, "tiny", tiny_template.table, 1, 5)


def test_mild_views_have_less_noise_bias_and_gamma(tiny_template: Template) -> None:
    def strength(severity: float) -> tuple[float, float, float]:
        noise = bias = gamma = 0.0
        for index in range(40):
            plan = sample_views(settings([severity]), "tiny", tiny_template.table, 2, index)[0].artefacts
            noise += plan.noise_std
            bias += 0.0 if plan.log_bias is None else float(plan.log_bias.tensor().std())
            gamma += abs(plan.gamma - 1)
        return noise, bias, gamma

    mild, middle, severe = strength(0.0), strength(0.5), strength(1.0)
    for kind in range(3):
        assert mild[kind] < 0.5 * severe[kind]
        assert mild[kind] <= middle[kind] <= severe[kind]


@pytest.mark.parametrize(("perturbation_mm", "shift_mm"), [(4.0, 0.0), (0.0, 12.0), (2.0, 12.0)])
def test_the_displacement_between_views_is_the_one_returned(
    tiny_template: Template, perturbation_mm: float, shift_mm: float
) -> None:
    """Reading the first view's labels at p + displacement gives those of the displaced view."""
    config = settings([1.0, 1.0], perturbation_mm)
    config = config.model_copy(update={"views": config.views.model_copy(update={"shift_mm": shift_mm})})
    plans = sample_views(config, "tiny", tiny_template.table, 1, 4)
    views = render_views(tiny_template, plans)
    assert views.displacement_mm[0].abs().max() == 0
    assert views.displacement_mm[1].abs().max() > 1.0
    index = torch.stack(torch.meshgrid(*[torch.arange(n) for n in config.shape], indexing="ij")).float()
    at = (index + views.displacement_mm[1] / config.voxel_size_mm).round().long()
    inside = torch.stack([(at[a] >= 0) & (at[a] < n) for a, n in enumerate(config.shape)]).all(0)
    at = torch.stack([at[a].clamp(0, n - 1) for a, n in enumerate(config.shape)])
    predicted = views.labels[0][at[0], at[1], at[2]]
    agree = (predicted == views.labels[1])[inside].float().mean()
    without = (views.labels[0] == views.labels[1])[inside].float().mean()
    assert agree > 0.85
    assert 1 - agree < 0.6 * (1 - without)


@pytest.mark.parametrize("anatomy_moves", [False, True])
def test_a_displacement_finer_than_the_lattice_is_returned_as_it_is_applied(
    tiny_template: Template, anatomy_moves: bool
) -> None:
    """To a small part of a voxel, against the places that the views read, brought back through their affine map."""
    config = settings([1.0, 1.0], perturbation_mm=3.0)
    changes = {
        "views": config.views.model_copy(update={"perturbation_spacing_mm": (3.0, 3.0)}),
        "deform": config.deform.model_copy(update={"svf_std_mm": 0.0}),
        "anatomy": AnatomyConfig(probability=1.0, ventricle_probability=1.0) if anatomy_moves else AnatomyConfig(),
    }
    plans = sample_views(config.model_copy(update=changes), "tiny", tiny_template.table, 1, 4)
    spacing = torch.tensor(tiny_template.spacing_mm)
    nothing = torch.zeros_like if anatomy_moves else None
    first, second = (
        coordinates(p.deform, p.shape, p.voxel_size_mm, tiny_template.center, spacing.tolist(), displacement=nothing)
        for p in plans
    )
    read_mm = (second - first) * spacing.view(3, 1, 1, 1)
    if plans[0].deform.flip:
        read_mm[0] *= -1
    applied = torch.einsum("ij,jdhw->idhw", torch.tensor(plans[0].deform.matrix).inverse(), read_mm)
    found = render_views(tiny_template, plans).displacement_mm[1]
    assert applied.std() > 0.5
    assert (found - applied).abs().max() < 0.01 * config.voxel_size_mm


def test_a_shift_is_one_for_all_voxels_and_another_for_each_view(tiny_template: Template) -> None:
    config = settings([1.0, 1.0, 1.0])
    config = config.model_copy(update={"views": config.views.model_copy(update={"shift_mm": 12.0})})
    moved = render_views(tiny_template, sample_views(config, "tiny", tiny_template.table, 0, 0)).displacement_mm
    assert moved[0].abs().max() == 0
    assert float(moved.abs().max()) <= 12.0
    torch.testing.assert_close(moved.flatten(2).amin(2), moved.flatten(2).amax(2))
    assert not torch.allclose(moved[1], moved[2])


def test_plans_of_views_survive_json(tiny_template: Template) -> None:
    for plan in sample_views(settings([0.2, 0.9], 1.0), "tiny", tiny_template.table, 0, 0):
        assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_severity_has_its_range() -> None:
    with pytest.raises(ConfigError, match="severity"):
        GeneratorConfig().at_severity(1.5)
    with pytest.raises(ValueError, match="severities"):
        ViewsConfig(severities=[0.5, 1.2])


def test_a_larger_head_fills_more_voxels(tiny_template: Template) -> None:
    def voxels(scale: float) -> int:
        config = settings([1.0])
        deform = config.deform.model_copy(
            update={"head_scale": (scale, scale), "scaling": 0.0, "translation_mm": 0.0, "svf_std_mm": 0.0}
        )
        config = config.model_copy(update={"deform": deform, "anatomy": AnatomyConfig()})
        plans = sample_views(config, "tiny", tiny_template.table, 0, 0)
        return int((render_views(tiny_template, plans).labels > 0).sum())

    assert voxels(0.7) == pytest.approx(0.7**3 * voxels(1.0), rel=0.05)


def test_plagiocephaly_shifts_one_side_against_the_other(tiny_template: Template) -> None:
    config = settings([1.0])
    deform = config.deform.model_copy(update={"plagiocephaly": 0.3, "rotation_deg": 0.0, "shear": 0.0, "scaling": 0.0})
    skews = [
        sample_plan(config.model_copy(update={"deform": deform}), "tiny", tiny_template.table, 0, i).deform.matrix[1][0]
        for i in range(20)
    ]
    assert min(skews) < -0.1 < 0.1 < max(skews)
    assert max(abs(s) for s in skews) <= 0.3
