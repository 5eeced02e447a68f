"""The canonical T1 image: a template's own scan moved as its labels are, or one painted by the physics of a T1."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.config import GeneratorConfig, generator_config, parse
from synthseg.errors import TemplateError
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.deform import coordinates
from synthseg.generator.plan import Plan, sample_plan
from synthseg.generator.synthesis import read_anatomy
from synthseg.generator.views import sample_views
from synthseg.labels import load_scheme
from synthseg.templates import Template, load_template
from synthseg.training.canonical import WHITE_MATTER, canonical_image, has_t1, load_t1, typical_t1

VALUES = {0: 0.0, 511: 90.0, 507: 90.0, 515: 10.0, 24: 20.0, 3: 55.0, 42: 55.0, 2: 70.0, 41: 70.0, 10: 60.0, 49: 60.0}
DEFAULT = 20.0


def settings(**changes: Any) -> GeneratorConfig:
    record: dict[str, Any] = {"shape": [24, 30, 26], "voxel_size_mm": 1.2, "subsamples": 8, **changes}
    return parse(GeneratorConfig, record, "test")


def plan_of(template: Template, index: int = 0, **changes: Any) -> Plan:
    return sample_plan(settings(**changes), template.name, template.table, 3, index)


@pytest.fixture
def with_t1(template_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny head with a T1 scan: one value for each label, in another voxel order, on a larger grid."""
    folder = tmp_path / "scanned"
    folder.mkdir()
    source = template_folders["head"]
    for name in ("labels.nii.gz", "labels.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    image = nib.load(source / "labels.nii.gz")
    ids = np.asarray(image.dataobj)
    values = np.pad(np.vectorize(lambda i: VALUES.get(int(i), DEFAULT))(ids), ((2, 1), (0, 3), (4, 0)))
    affine = image.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [2, 0, 4]
    scan = nib.Nifti1Image(values.astype(np.float32), affine)
    turned = scan.as_reoriented(nib.orientations.axcodes2ornt(("P", "I", "L")))
    assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(image.affine)
    nib.save(turned, folder / "t1.nii.gz")
    return folder


def test_painted_tissues_are_in_the_order_of_a_t1() -> None:
    table = load_scheme("head")
    plan = typical_t1(table)
    level = {label.tissue: value for label, value in zip(table.labels, plan.mean, strict=True)}
    assert level["wm"] == pytest.approx(WHITE_MATTER)
    assert level["air"] == 0
    assert level["csf"] < level["gm"] < level["thalamus"] < level["pallidum"] < level["wm"] < level["soft"]
    assert level["bone_cortical"] < level["csf"]
    assert not any(plan.std)
    assert not any(plan.texture_std)
    assert all(plan.visible)
    assert typical_t1(table) == plan


def test_the_painted_image_depends_on_the_anatomy_alone(template_folders: dict[str, Path]) -> None:
    template = load_template(template_folders["head"])
    assert not has_t1(template)
    plan, other = plan_of(template), plan_of(template, 1)
    same_shape = other.model_copy(update={"deform": plan.deform, "anatomy": plan.anatomy})
    image = canonical_image(template, plan)
    assert image.shape == (1, 24, 30, 26)
    assert image.dtype == torch.float32
    assert float(image.min()) >= 0
    assert float(image.max()) <= 1
    assert torch.equal(image, canonical_image(template, same_shape))  # whatever its contrast and artefacts
    assert not torch.equal(image, canonical_image(template, other))
    reading, labels = read_anatomy(template, plan)
    pure = torch.ones(labels.numel(), dtype=torch.bool)
    pure[reading.mixed] = False
    means = torch.tensor(typical_t1(template.table).mean).clamp_max(1)
    torch.testing.assert_close(image.flatten()[pure], means[labels.flatten().long()][pure])


@pytest.mark.parametrize("flip", [False, True])
def test_a_scan_moves_as_the_labels_do(with_t1: Path, flip: bool) -> None:
    template = load_template(with_t1)
    assert has_t1(template)
    fine: dict[str, Any] = {"voxel_size_mm": 0.6, "shape": [48, 44, 72], "subsamples": 2}
    plan = plan_of(template, anatomy={"probability": 0.0}, deform={"rotation_deg": 25.0, "svf_std_mm": 2.0}, **fine)
    plan = plan.model_copy(update={"deform": plan.deform.model_copy(update={"flip": flip})})
    image = canonical_image(template, plan)[0]
    _, labels = read_anatomy(template, plan)
    ids = torch.tensor([label.id for label in template.table.labels])[labels.long()]
    expected = torch.tensor([VALUES.get(int(i), DEFAULT) for i in ids.flatten()]).reshape(ids.shape)
    expected = (expected / VALUES[2] * WHITE_MATTER).clamp_max(1)
    inside = torch.nn.functional.max_pool3d  # a voxel whose surroundings are of one value is not blurred
    spread = inside(expected[None, None], 9, 1, 4) + inside(-expected[None, None], 9, 1, 4)
    pure = spread[0, 0] == 0
    assert int(pure.sum()) > 2000
    assert len(expected[pure].unique()) >= 2
    torch.testing.assert_close(image[pure], expected[pure], atol=0.02, rtol=0)
    apart = (image - expected).abs().mean()
    assert apart < 0.5 * (image.flip(0) - expected).abs().mean()
    for axis in range(3):  # and it lies where the labels are, to a voxel of 0.6 mm
        for shift in (-1, 1):
            assert apart < (image.roll(shift, axis) - expected).abs().mean()


def turn(*degrees: float) -> np.ndarray:
    """A rotation about z, y and x, as an affine."""
    out = np.eye(4)
    for (i, j), angle in zip(((0, 1), (0, 2), (1, 2)), np.radians(degrees), strict=True):
        one = np.eye(4)
        one[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        out = one @ out
    return out


@pytest.mark.parametrize("flip", [False, True])
def test_maps_and_scans_may_be_oblique(with_t1: Path, flip: bool) -> None:
    """A scan whose intensity rises linearly through the room, on a grid turned otherwise than that of the labels."""
    file = with_t1 / "labels.nii.gz"
    image = nib.load(file)
    affine = turn(20, -10, 15) @ image.affine
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), file)
    grid = turn(-15, 25, 5) @ np.diag([1.5, 1.8, 2.1, 1])
    grid[:3, 3] = affine[:3] @ [*((n - 1) / 2 for n in image.shape), 1] - grid[:3, :3] @ [29.5, 29.5, 29.5]
    rise = np.array([0.3, -0.7, 0.5])
    room = np.einsum("ij,j...->i...", grid[:3, :3], np.indices((60, 60, 60))) + grid[:3, 3, None, None, None]
    scan = np.tensordot(rise, room, 1)
    nib.save(nib.Nifti1Image((scan - scan.min()).astype(np.float32), grid), with_t1 / "t1.nii.gz")
    template = load_template(with_t1)
    plan = plan_of(template, anatomy={"probability": 0.0}, deform={"rotation_deg": 25.0, "svf_std_mm": 2.0})
    plan = plan.model_copy(update={"deform": plan.deform.model_copy(update={"flip": flip})})
    found = canonical_image(template, plan)[0].numpy()
    at = coordinates(plan.deform, plan.shape, plan.voxel_size_mm, template.center, template.spacing_mm).numpy() - 1
    expected = np.tensordot(rise, np.einsum("ij,j...->i...", affine[:3, :3], at) + affine[:3, 3, None, None, None], 1)
    shown = (found > 0.02) & (found < 0.98)
    assert shown.mean() > 0.5
    fit = np.polyfit(expected[shown], found[shown], 1)
    assert fit[0] > 0
    assert np.abs(np.polyval(fit, expected[shown]) - found[shown]).max() < 1e-3


def test_an_anomaly_is_painted_into_the_image(template_folders: dict[str, Path]) -> None:
    """It belongs to the anatomy: every view shows the same one, and so does the T1."""
    config = settings(anomalies={"probability": 1.0, "tumour_probability": 1.0}, views={"severities": [0.0, 1.0]})
    template = with_anomalies(load_template(template_folders["head"]), config.anomalies)
    plans = sample_views(config, template.name, template.table, 3, 0)
    assert plans[0].anomalies == plans[1].anomalies
    assert plans[0].anomalies is not None
    healthy = canonical_image(template, plans[0].model_copy(update={"anomalies": None}))
    ill = canonical_image(template, plans[0])
    assert torch.equal(ill, canonical_image(template, plans[1]))
    assert float((ill - healthy).abs().max()) > 0.05


def test_a_changed_anatomy_is_painted(with_t1: Path, template_folders: dict[str, Path]) -> None:
    """The scan shows another shape then."""
    template, plain = load_template(with_t1), load_template(template_folders["head"])
    changed = plan_of(template, anatomy={"probability": 1.0})
    assert changed.anatomy is not None
    assert torch.equal(canonical_image(template, changed), canonical_image(plain, changed))
    alike = plan_of(template, anatomy={"probability": 0.0})
    assert not torch.equal(canonical_image(template, alike), canonical_image(plain, alike))


def test_a_scan_is_read_once(with_t1: Path) -> None:
    template = load_template(with_t1)
    first = load_t1(template)
    (with_t1 / "t1.nii.gz").unlink()
    assert load_t1(template) is first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("elsewhere", "does not show the head.*check their affines"),
        ("dark", "is dark where labels.nii.gz has white matter"),
        ("damaged", "t1.nii.gz"),
    ],
)
def test_a_scan_that_does_not_belong_is_refused(change: str, message: str, with_t1: Path) -> None:
    file = with_t1 / "t1.nii.gz"
    image = nib.load(file)
    data, affine = np.asarray(image.dataobj), image.affine.copy()
    if change == "elsewhere":
        affine[:3, 3] += 200
    if change == "dark":
        data = np.where(data == VALUES[2], 0, data)
    nib.save(nib.Nifti1Image(data, affine), file)
    if change == "damaged":
        file.write_bytes(file.read_bytes()[:200])
    template = load_template(with_t1)
    with pytest.raises(TemplateError, match=message):
        canonical_image(template, plan_of(template, anatomy={"probability": 0.0}))


def test_the_preset_t1_is_what_paints() -> None:
    assert generator_config(None, preset="t1").contrast.physics_sequences["mprage"] == 1.5  # the one that is painted
    assert json.loads(typical_t1(load_scheme("siam16")).model_dump_json())["name"] == "canonical_t1"
