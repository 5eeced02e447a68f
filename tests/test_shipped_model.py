"""The network that ships, on real scans: the bundled sample, and labelled ones where they are at hand."""

from pathlib import Path

import numpy as np
import pytest

from synthseg.inference import Segmentation, segment
from synthseg.metrics import dice_table
from synthseg.networks.checkpoint import Model, load_model
from synthseg.networks.feature_file import load_features
from synthseg.paths import data_dir
from synthseg.representation.tasks import correct_bias
from synthseg.volume import Volume, load_volume


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("siam16")


@pytest.fixture(scope="module")
def colin(model: Model) -> Segmentation:
    return segment(load_volume(data_dir("samples") / "colin27_t1.nii.gz"), model)


@pytest.fixture(scope="module")
def head() -> Model:
    return load_model("head")


@pytest.fixture(scope="module")
def colin_sided(head: Model) -> Segmentation:
    return segment(load_volume(data_dir("samples") / "colin27_t1.nii.gz"), head)


@pytest.mark.parametrize("name", ["siam16", "head", "bias-field"])
def test_the_weights_file_is_small_enough_to_ship(name: str) -> None:
    assert (data_dir("weights") / f"{name}.safetensors").stat().st_size <= 15e6


def test_left_is_left(head: Model, colin_sided: Segmentation) -> None:
    """Nearly every voxel of a structure with a side lies on that side of Colin27's midline, which is at 0 mm."""
    volume = load_volume(data_dir("samples") / "colin27_t1.nii.gz")
    told = [label for label in head.labels.labels if label.partner is not None]
    assert len(told) == 28
    for label in told:
        voxels = np.argwhere(colin_sided.labels == label.id)
        if len(voxels) < 50:
            continue
        x_mm = (voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3])[:, 0]
        right = (x_mm > 0).mean()
        assert (right > 0.9) if label.name.startswith("Right-") else (right < 0.1), label.name


def test_both_sides_of_a_healthy_head_are_alike(head: Model, colin_sided: Segmentation) -> None:
    ml = colin_sided.hard_ml
    for name in ("Cerebral-Cortex", "Cerebral-White-Matter", "Cerebellum-Cortex", "Thalamus", "Hippocampus", "Putamen"):
        assert 0.75 < ml[f"Left-{name}"] / ml[f"Right-{name}"] < 1.33, name


def test_the_finer_network_agrees_with_the_coarser_one(
    head: Model, colin: Segmentation, colin_sided: Segmentation
) -> None:
    siam16 = load_model("siam16").labels
    folded = siam16.ids[head.labels.mapping(siam16)][head.labels.to_index(colin_sided.labels)]
    groups = {name: ({i}, {i}) for i, name in enumerate(siam16.names) if name in ("GM", "WM", "Skull", "Head", "CSF")}
    assert min(dice_table(folded, colin.labels, groups).values()) > 0.75


def test_every_structure_of_a_real_head_has_a_plausible_volume(model: Model, colin: Segmentation) -> None:
    """Wide bounds from adult anatomy, in ml; the sample is scaled to MNI space, which is a large head."""
    bounds = {
        "GM": (400, 1100), "WM": (350, 1000), "CSF": (100, 700), "Ventricular-CSF": (5, 120),
        "Cerebellar-GM": (60, 200), "Thalamus": (9, 30), "Pallidum": (1.5, 8), "Putamen": (6, 20),
        "Caudate": (5, 18), "Accumbens": (0.3, 3), "Amygdala": (1.5, 7), "Hippocampus": (4, 15),
        "Skull": (300, 1500), "Head": (500, 4000),
    }  # fmt: skip
    off = {name: colin.hard_ml[name] for name, (low, high) in bounds.items() if not low < colin.hard_ml[name] < high}
    assert not off
    assert colin.warnings == []


def test_the_two_sides_of_a_structure_lie_on_the_two_sides_of_the_head(colin: Segmentation) -> None:
    volume = load_volume(data_dir("samples") / "colin27_t1.nii.gz")
    for label_id in (6, 7, 8, 9, 12):
        x_mm = (np.argwhere(colin.labels == label_id) @ volume.affine[:3, :3].T + volume.affine[:3, 3])[:, 0]
        left = (x_mm < 0).mean()
        assert 0.35 < left < 0.65, label_id
        assert np.abs(x_mm).max() < 60, label_id


@pytest.mark.shared
def test_a_stripped_t1_agrees_with_its_freesurfer_labels(model: Model, shared_dir: Path) -> None:
    result = segment(load_volume(shared_dir / "scans" / "oasis_t1_stripped.nii.gz"), model)
    reference = load_volume(shared_dir / "scans" / "oasis_t1_stripped_aseg.nii.gz").data
    groups = {
        "GM": ({1}, {3, 42}), "Ventricles": ({4}, {4, 43, 5, 44, 14, 15, 31, 63, 72}), "Cerebellar-GM": ({5}, {8, 47}),
        "Thalamus": ({6}, {10, 49}), "Pallidum": ({7}, {13, 52}), "Putamen": ({8}, {12, 51}),
        "Caudate": ({9}, {11, 50}), "Amygdala": ({11}, {18, 54}), "Hippocampus": ({12}, {17, 53}),
    }  # fmt: skip
    assert np.mean(list(dice_table(result.labels, reference, groups).values())) > 0.65


def test_most_of_a_known_field_is_found_on_a_real_scan() -> None:
    """What is found in Colin27 times a field, over what is found in Colin27 itself, is that field."""
    scan = load_volume(data_dir("samples") / "colin27_t1.nii.gz")
    model = load_features("bias-field")
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in scan.data.shape], indexing="ij")
    log_field = 0.3 * x * y - 0.25 * z + 0.2 * y**2
    data = np.asarray(scan.data, dtype=np.float32)
    fields = [
        correct_bias(Volume(data * factor, scan.affine), model).field
        for factor in (np.float32(1), np.exp(log_field).astype(np.float32))
    ]
    head = data > 30
    left = np.log(fields[1] / fields[0]) - log_field
    assert left[head].std() < 0.5 * log_field[head].std()
