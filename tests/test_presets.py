"""The presets that ship: they load, render, replay, and have on what they promise."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from synthseg.config import GeneratorConfig, Section, generator_config, shipped_presets
from synthseg.errors import ConfigError
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.contrast import named_contrasts
from synthseg.generator.plan import Plan
from synthseg.generator.views import render_views, sample_views
from synthseg.labels import LabelTable, load_scheme
from synthseg.templates import Template

NAMES = ["brain-id", "ct", "flair", "infant", "siam", "synthseg", "t1", "t2"]
TINY = ["voxel_size_mm=3.0", "shape=[14, 18, 16]"]
CONTRASTS = {
    "synthseg": {"random"},
    "brain-id": {"random"},
    "t1": {"t1", "physics_mprage", "physics_t1_spoiled", "physics_t1_spin_echo", "physics_t1_inversion_recovery"},
    "t2": {"t2", "physics_t2_spin_echo", "physics_t2star_spoiled"},
    "flair": {"flair", "physics_flair"},
    "ct": {"hounsfield"},
    "infant": {"random", "t1", "t2", "t1_neonate", "t2_neonate"},
}


@pytest.fixture(scope="module")
def plans_of(tiny_template: Template) -> Callable[[str], list[list[Plan]]]:
    """The Plans of samples 0 to 119 of a preset, a list of views for each."""

    @cache
    def draw(name: str) -> list[list[Plan]]:
        config = generator_config(None, TINY, name)
        table = with_anomalies(tiny_template, config.anomalies).table
        return [sample_views(config, "tiny", table, 1, index) for index in range(120)]

    return draw


def test_these_presets_ship() -> None:
    assert list(shipped_presets()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_commented_and_gives_its_grid(name: str) -> None:
    text = shipped_presets()[name].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "To change:" in text
    assert {"voxel_size_mm", "shape", "subsamples"} <= set(yaml.safe_load(text))
    assert generator_config(None, preset=name) != GeneratorConfig()


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_renders_and_replays_bitwise(name: str, tiny_template: Template) -> None:
    config = generator_config(None, TINY, name)
    template = with_anomalies(tiny_template, config.anomalies)
    plans = sample_views(config, "tiny", template.table, 3, 0)
    views = render_views(template, plans)
    assert views.images.shape == (len(config.views.severities), 1, 14, 18, 16)
    assert 0 <= float(views.images.min()) < float(views.images.max()) <= 1
    assert len(views.labels.unique()) > 3
    again = render_views(template, [Plan.model_validate_json(plan.model_dump_json()) for plan in plans])
    assert torch.equal(again.images, views.images)
    assert torch.equal(again.labels, views.labels)


@pytest.mark.parametrize("name", sorted(CONTRASTS))
def test_a_preset_draws_its_contrasts_and_no_other(name: str, plans_of: Callable[[str], list[list[Plan]]]) -> None:
    assert {plan.contrast.name for views in plans_of(name) for plan in views} == CONTRASTS[name]


def test_every_stage_of_siam_appears(plans_of: Callable[[str], list[list[Plan]]]) -> None:
    plans = [views[0] for views in plans_of("siam")]
    present: dict[str, Callable[[Plan], object]] = {
        "anatomy": lambda p: p.anatomy is not None,
        "cortex": lambda p: p.anatomy and p.anatomy.shifts.get("cortex_outer"),
        "recarved cortex": lambda p: p.anatomy and p.anatomy.recarve,
        "nuclei": lambda p: p.anatomy and p.anatomy.volume_ratio,
        "ventricles": lambda p: p.anatomy and p.anatomy.ventricle_ratio != 1,
        "skull": lambda p: p.anatomy and p.anatomy.layers,
        "anomalies": lambda p: p.anomalies,
        "template as it is": lambda p: p.anatomy is None,
        "velocity": lambda p: p.deform.velocity_mm,
        "flip": lambda p: p.deform.flip,
        "random contrast": lambda p: p.contrast.name == "random",
        "named contrast": lambda p: p.contrast.name in named_contrasts(),
        "physics": lambda p: p.contrast.name.startswith("physics_"),
        "hounsfield": lambda p: p.contrast.name == "hounsfield",
        "clusters": lambda p: p.contrast.clusters,
        "octaves": lambda p: p.contrast.octaves,
        "other CT window": lambda p: p.contrast.ct and p.contrast.ct.window_hu != (-100.0, 150.0),
        "streaks": lambda p: p.contrast.ct and p.contrast.ct.beam_hardening,
        "headrest": lambda p: p.contrast.ct and p.contrast.ct.headrest,
        "stripped": lambda p: not all(p.contrast.visible),
        "bright air": lambda p: p.contrast.name == "random" and p.contrast.mean[0] > 0.2,
        "bias": lambda p: p.artefacts.log_bias,
        "gamma": lambda p: p.artefacts.gamma != 1,
        "local contrast": lambda p: p.artefacts.log_exponent,
        "noise": lambda p: p.artefacts.noise_std,
        "no noise": lambda p: p.artefacts.noise_std == 0,
        "noise over space": lambda p: p.artefacts.log_gfactor,
        "Gaussian noise of CT": lambda p: p.artefacts.noise_kind == "gaussian",
        "coarse": lambda p: max(p.artefacts.spacing_mm) > p.voxel_size_mm,
        "crop": lambda p: set(p.artefacts.crop) != {(0.0, 1.0)},
        "slice motion": lambda p: p.artefacts.slices and any(p.artefacts.slices.across_mm),
        "motion in k-space": lambda p: p.artefacts.kspace and p.artefacts.kspace.motion,
        "ghosting": lambda p: p.artefacts.kspace and p.artefacts.kspace.ghosting,
        "ringing": lambda p: p.artefacts.kspace and min(p.artefacts.kspace.kept) < 1,
        "spikes": lambda p: p.artefacts.kspace and p.artefacts.kspace.spikes,
        "wrap-around": lambda p: p.artefacts.wrap,
        "Gaussian slices": lambda p: p.artefacts.profile == "gaussian",
        "interpolation": lambda p: p.artefacts.stored,
        "bad stripping": lambda p: p.artefacts.strip,
        "defacing": lambda p: p.artefacts.deface,
        "background": lambda p: p.artefacts.background_mm is not None,
        "ex vivo": lambda p: p.artefacts.scene and p.artefacts.scene.mode == "exvivo",
        "photographs": lambda p: p.artefacts.scene and p.artefacts.scene.mode == "photo",
    }
    missing = [name for name, has in present.items() if not any(map(has, plans))]
    assert not missing


def test_brain_id_has_two_mild_and_two_severe_views(plans_of: Callable[[str], list[list[Plan]]]) -> None:
    samples = plans_of("brain-id")
    assert all([plan.severity for plan in views] == [0.0, 0.0, 1.0, 1.0] for views in samples)

    def mean(strength: Callable[[Plan], float], views: slice) -> float:
        values = [strength(plan) for sample in samples for plan in sample[views]]
        return sum(values) / len(values)

    strengths: dict[str, Callable[[Plan], float]] = {
        "bias": lambda p: float(p.artefacts.log_bias.tensor().std()) if p.artefacts.log_bias else 0.0,
        "gamma": lambda p: abs(p.artefacts.gamma - 1),
        "noise": lambda p: p.artefacts.noise_std,
        "spread inside labels": lambda p: sum(p.contrast.std) / len(p.contrast.std),
        "coarse grids": lambda p: max(p.artefacts.spacing_mm) - p.voxel_size_mm,
        "scenes": lambda p: float(p.artefacts.scene is not None),
    }
    for name, strength in strengths.items():
        assert mean(strength, slice(0, 2)) < 0.3 * mean(strength, slice(2, 4)), name
    for sample in samples:
        assert len({plan.contrast.mean for plan in sample}) == 4
        assert all(plan.deform == sample[0].deform for plan in sample)


def test_synthseg_has_the_published_ranges(plans_of: Callable[[str], list[list[Plan]]], head: LabelTable) -> None:
    """Scale ±0.2, rotation ±15°, means 25 to 225 of 255, log gamma N(0, 0.5), 5 % at the resolution of the grid."""
    plans = [views[0] for views in plans_of("synthseg")]
    inside = [m for p in plans for m, label in zip(p.contrast.mean, head.labels, strict=True) if label.tissue != "air"]
    assert 25 / 255 - 1e-3 < min(inside) < 0.12
    assert 0.86 < max(inside) < 225 / 255 + 1e-3
    gamma = torch.tensor([p.artefacts.gamma for p in plans]).log()
    assert 0.35 < float(gamma.std()) < 0.65
    assert sum(max(p.artefacts.spacing_mm) > p.voxel_size_mm for p in plans) > 50
    volumes = [float(torch.linalg.det(torch.tensor(p.deform.matrix))) for p in plans]
    assert 0.8**3 - 1e-6 < min(volumes) < max(volumes) < 1.2**3 + 1e-6
    assert max(abs(volume - 1) for volume in volumes) > 0.2
    assert generator_config(None, preset="synthseg").deform.svf_spacing_mm == (1 / 0.04, 1 / 0.04)
    assert generator_config(None, preset="synthseg").artefacts.bias_spacing_mm == (1 / 0.025, 1 / 0.025)


def test_infant_heads_are_small_and_lopsided_with_inverted_contrast(
    plans_of: Callable[[str], list[list[Plan]]], head: LabelTable
) -> None:
    plans = [views[0] for views in plans_of("infant")]
    size = [float(torch.linalg.det(torch.tensor(p.deform.matrix))) ** (-1 / 3) for p in plans]  # template to image
    assert sum(0.55 < s < 1.03 for s in size) == len(plans)
    assert min(size) < 0.7
    assert sum(size) / len(size) < 0.85
    grey, white = head.index_of[3], head.index_of[2]
    neonatal = [p.contrast for p in plans if p.contrast.name.endswith("_neonate")]
    above = {c.name: 0 for c in neonatal}
    for contrast in neonatal:
        above[contrast.name] += 1 if contrast.mean[white] > contrast.mean[grey] else -1
    assert above["t1_neonate"] < 0 < above["t2_neonate"]


def test_ct_has_no_artefact_of_a_magnet(plans_of: Callable[[str], list[list[Plan]]]) -> None:
    for (plan,) in plans_of("ct"):
        assert plan.artefacts.noise_kind == "gaussian"
        assert (plan.artefacts.log_bias, plan.artefacts.gamma, plan.artefacts.kspace) == (None, 1.0, None)


def test_the_artefacts_of_single_sequences_are_milder_than_those_of_siam(
    plans_of: Callable[[str], list[list[Plan]]],
) -> None:
    def noise(name: str) -> float:
        return sum(views[0].artefacts.noise_std for views in plans_of(name))

    siam = generator_config(None, preset="siam").artefacts
    for name in ("t1", "t2", "flair"):
        artefacts = generator_config(None, preset=name).artefacts
        assert noise(name) < 0.75 * noise("siam")
        assert artefacts.bias_std[1] < siam.bias_std[1]
        assert artefacts.gamma_std < siam.gamma_std
        assert artefacts.kspace.motion_probability < siam.kspace.motion_probability


def test_an_unknown_preset_is_an_error_that_names_the_nearest_first() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'flare'; presets that ship: flair, .*siam") as caught:
        generator_config(None, preset="flare")
    assert all(name in str(caught.value) for name in NAMES)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no preset"):
        generator_config(None, preset="../phantom")


def test_a_preset_takes_changes_and_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changed = generator_config(None, ["artefacts.gamma_std=0.07"], "siam")
    assert changed.artefacts.gamma_std == 0.07
    copy = tmp_path / "mine.yaml"
    copy.write_bytes(shipped_presets()["siam"].read_bytes())
    assert generator_config(copy) == generator_config(None, preset="siam")
    with pytest.raises(ConfigError, match="one of them"):
        generator_config(copy, preset="siam")


def test_severity_zero_of_every_preset_is_never_stronger() -> None:
    """Every field that declares a mild form has one that is at most what the preset asks for."""

    def stronger(mild: Section, full: Section) -> list[str]:
        found = []
        for name in type(full).model_fields:
            low, high = getattr(mild, name), getattr(full, name)
            if isinstance(high, Section):
                found += stronger(low, high)
            elif isinstance(high, float) and "probability" in name and low > high:
                found.append(name)
        return found

    for name in NAMES:
        config = generator_config(None, preset=name)
        assert not stronger(config.at_severity(0.0), config)


@pytest.mark.parametrize("scheme", ["head", "siam16", "brainweb"])
@pytest.mark.parametrize("contrast", ["t1_neonate", "t2_neonate"])
def test_a_neonatal_contrast_has_a_range_for_every_tissue(contrast: str, scheme: str) -> None:
    ranges = named_contrasts()[contrast]
    assert {label.tissue for label in load_scheme(scheme).labels} <= set(ranges)
    assert set(ranges) == set(named_contrasts()["t1"])
    assert all(0 <= low <= high <= 1.5 for low, high in ranges.values())
    assert ranges["wm"][0] < ranges["gm"][1]  # they may look alike
    assert ranges["gm"][0] < ranges["wm"][1]
