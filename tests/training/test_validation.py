"""Validation on real scans: what is read, what is refused, and what is scored when labels are coarse or partial."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.errors import ConfigError, LabelError, SynthSegError
from synthseg.labels import load_scheme
from synthseg.metrics import dice
from synthseg.training.loop import Trainer
from synthseg.training.validation import dice_of_groups, load_scan, load_scans, scan_table

SHAPE = (40, 52, 46)
GREY = {0: 0.0, 511: 0.2, 515: 0.4, 24: 0.6, 3: 0.8, 2: 1.0}  # from outside inwards, so that a mean lies between


def head_ids() -> np.ndarray:
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    ids = np.zeros(SHAPE, np.int16)
    for limit, label in ((0.95, 511), (0.85, 515), (0.75, 24), (0.6, 3), (0.4, 2)):
        ids[radius < limit] = label
    return ids


@pytest.fixture
def scan(tmp_path: Path) -> dict[str, str]:
    """An image with one grey for each label, stored right to left with 2.5 x 2 x 3 mm voxels."""
    ids = head_ids()
    affine = np.diag([-2.5, 2.0, 3.0, 1.0])
    affine[:3, 3] = (50, -52, -69)
    image = np.vectorize(GREY.get)(ids).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(ids, affine), tmp_path / "ids.nii.gz")
    return {"image": str(tmp_path / "scan.nii.gz"), "labels": str(tmp_path / "ids.nii.gz"), "scheme": "head"}


class ByGrey(torch.nn.Module):
    """Names each voxel by its grey: a perfect network for the scan of these tests."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        siam = load_scheme("siam16")
        ids = {0: 0, 2: 2, 3: 1, 24: 3, 515: 15, 511: 16}
        logits = torch.full((1, len(siam), *image.shape[2:]), -1e4)
        for label, grey in GREY.items():
            logits[0, siam.index_of[ids[label]]] = -200 * (image[0, 0] - grey) ** 2
        return logits


def test_a_network_that_is_right_scores_high_on_the_grid_of_the_scan(make_config: Any, scan: dict[str, str]) -> None:
    config = make_config(validation_scans=[scan], generator__shape=[64, 64, 64], generator__voxel_size_mm=2.0)
    siam = load_scheme("siam16")
    scans = load_scans(config, siam)
    row = scan_table(ByGrey(), config, scans, siam)["scan"]
    assert set(row) == {"GM", "WM", "CSF", "Skull", "Head"}
    assert row["WM"] > 0.95
    assert row["GM"] > 0.85
    assert row["Skull"] > 0.7


def test_figures_are_those_of_inference(make_config: Any, scan: dict[str, str]) -> None:
    """Same labels as ``segment`` without its clean-up, scored by the Dice of ``metrics``."""
    from synthseg import inference
    from synthseg.prediction import winners
    from synthseg.training.validation import _Live
    from synthseg.volume import load_volume

    config = make_config(validation_scans=[scan], generator__shape=[64, 64, 64], generator__voxel_size_mm=3.0)
    siam = load_scheme("siam16")
    torch.manual_seed(3)
    network = torch.nn.Conv3d(1, len(siam), 3, padding=1)  # says anything
    torch.nn.init.normal_(network.weight, std=3.0)
    row = scan_table(network, config, load_scans(config, siam), siam)["scan"]
    model = _Live(network, siam, 3.0, (64, 64, 64), 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "clean_up", lambda values, table, _: (winners(values), np.zeros(len(table))))
        options = inference.Options(mixed_precision=False, quality=False)
        found = inference.segment(load_volume(scan["image"]), model, options=options).labels
    truth = np.vectorize({0: 0, 2: 2, 3: 1, 24: 3, 515: 15, 511: 16}.get)(head_ids())
    ids = [siam.ids[siam.names.index(name)] for name in row]
    np.testing.assert_allclose(list(row.values()), dice(found, truth, ids), atol=1e-4)
    assert len(row) == 5


def test_coarse_and_partial_labels_are_scored_as_far_as_they_tell() -> None:
    groups = np.array([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    confusion = np.array(
        [
            [50, 2, 0, 1, 9],  # background, predicted as class 4 in part
            [3, 20, 10, 4, 0],  # class 1 or 2
            [0, 5, 0, 12, 0],  # class 3
            [0, 8, 8, 8, 0],  # any of 1, 2, 3
            [0, 0, 0, 0, 0],  # absent
        ]
    )
    found = dice_of_groups(confusion, groups)
    # predicted within what is told: classes 1, 2: 2 + 20 + 10 + 5 = 37; class 3: 1 + 4 + 12 = 17
    np.testing.assert_allclose(found, [np.nan, 2 * 30 / (37 + 37), 2 * 12 / (17 + 17), np.nan, np.nan])
    found = dice_of_groups(confusion[[0, 3]], groups[[0, 3]])  # alone, "any of 1, 2, 3" is a group like others
    np.testing.assert_allclose(found, [np.nan, 2 * 24 / (24 + 3 + 24)])
    overlapping = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool)
    assert np.isnan(dice_of_groups(np.ones((3, 4), int), overlapping)).all()


def test_unions_are_named(make_config: Any, scan: dict[str, str], tmp_path: Path) -> None:
    coarse = np.vectorize({0: 0, 2: 3, 3: 2, 24: 1, 515: 7, 511: 6}.get)(head_ids()).astype(np.int16)
    affine = nib.load(scan["labels"]).affine
    nib.save(nib.Nifti1Image(coarse, affine), tmp_path / "brainweb.nii.gz")
    scan |= {"labels": str(tmp_path / "brainweb.nii.gz"), "scheme": "brainweb", "name": "coarse"}
    config = make_config(validation_scans=[scan], generator__shape=[64, 64, 64], generator__voxel_size_mm=2.0)
    siam = load_scheme("siam16")
    row = scan_table(ByGrey(), config, load_scans(config, siam), siam)["coarse"]
    (grey,) = [name for name in row if name.startswith("GM + ")]
    assert grey == "GM + Cerebellar-GM"
    assert row[grey] > 0.85


def test_ids_that_the_scheme_does_not_have_can_be_read_as_others(make_config: Any, scan: dict[str, str]) -> None:
    """As the corpus callosum of FreeSurfer, which scheme head counts to the white matter."""
    siam = load_scheme("siam16")
    plain = load_scans(make_config(validation_scans=[scan]), siam)[0].truth.data
    image = nib.load(scan["labels"])
    ids = image.get_fdata().astype(np.int16)
    ids[:20][ids[:20] == 2] = 251
    nib.save(nib.Nifti1Image(ids, image.affine), scan["labels"])
    with pytest.raises(LabelError, match="251"):
        load_scans(make_config(validation_scans=[scan]), siam)
    config = make_config(validation_scans=[scan | {"read_as": {"251": 2}}])
    np.testing.assert_array_equal(load_scans(config, siam)[0].truth.data, plain)
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_only_the_classes_that_are_asked_for_are_scored(make_config: Any, scan: dict[str, str]) -> None:
    siam = load_scheme("siam16")
    config = make_config(validation_scans=[scan | {"classes": ["WM", "Skull"]}])
    table = scan_table(ByGrey(), config, load_scans(config, siam), siam)
    assert list(table["scan"]) == ["WM", "Skull"]
    with pytest.raises(
        ConfigError, match=r"do not tell \['Putamen', 'Skul'\] apart; they tell GM, WM, CSF, Skull, Head"
    ):
        load_scans(make_config(validation_scans=[scan | {"classes": ["WM", "Skul", "Putamen"]}]), siam)


def test_labels_outside_the_box_of_the_head_count(make_config: Any, scan: dict[str, str]) -> None:
    """Inference calls them background, so they are missed."""
    image = nib.load(scan["image"])
    data, affine = image.get_fdata(dtype=np.float32), image.affine
    padded = np.zeros((SHAPE[0], SHAPE[1] + 80, SHAPE[2]), np.float32)
    padded[:, : SHAPE[1]] = data
    ids = np.zeros(padded.shape, np.int16)
    ids[:, : SHAPE[1]] = head_ids()
    ids[4:36, -20:, 4:42] = 511
    nib.save(nib.Nifti1Image(padded, affine), scan["image"])
    nib.save(nib.Nifti1Image(ids, affine), scan["labels"])
    config = make_config(validation_scans=[scan], generator__shape=[64, 64, 64], generator__voxel_size_mm=2.0)
    siam = load_scheme("siam16")
    (loaded,) = load_scans(config, siam)
    assert loaded.outside[siam.names.index("Head")] == 32 * 20 * 38
    assert loaded.truth.data.shape[1] < padded.shape[1] - 20
    assert loaded.outside.sum() + loaded.truth.data.size == padded.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "nowhere.nii.gz"}, r"nowhere\.nii\.gz"),
        ({"labels": "nowhere.nii.gz"}, r"nowhere\.nii\.gz"),
        ({"labels": "other_grid"}, "not on the voxel grid"),
        ({"labels": "moved"}, "not on the voxel grid"),
        ({"scheme": "brainweb"}, r"ids \[.*\] are not in scheme 'brainweb'"),
        ({"scheme": "haed"}, "did you mean 'head'"),
        ({"scheme": "vague.json"}, "no class of siam16"),
    ],
)
def test_scans_that_cannot_be_used_are_refused_before_a_run(
    change: dict[str, str], message: str, make_config: Any, scan: dict[str, str], tmp_path: Path
) -> None:
    ids, affine = head_ids(), nib.load(scan["image"]).affine
    moved = affine.copy()
    moved[0, 3] += 5
    labels = [{"id": i, "name": str(i), "to": {"siam16": [0, 16] if i else [0]}} for i in GREY]
    (tmp_path / "vague.json").write_text(json.dumps({"name": "vague", "labels": labels}))
    for name, data, where in (("other_grid", ids[1:], affine), ("moved", ids, moved)):
        nib.save(nib.Nifti1Image(data.astype(np.int16), where), tmp_path / f"{name}.nii.gz")
    for key, value in change.items():
        for file in (tmp_path / value, tmp_path / f"{value}.nii.gz"):
            change = change | {key: str(file)} if file.is_file() else change
    with pytest.raises(SynthSegError, match=message):
        Trainer(make_config(validation_scans=[scan | change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_scans_of_one_name_are_refused(make_config: Any, scan: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"\['scan'\] are names of several scans"):
        load_scans(make_config(validation_scans=[scan, scan]), load_scheme("siam16"))


def test_scans_are_in_manifest_log_and_best(make_config: Any, scan: dict[str, str], tmp_path: Path) -> None:
    config = make_config(validation_scans=[scan | {"name": "mine"}], steps=2, report=True)
    trainer = Trainer(config, tmp_path / "run")
    trainer.run()
    manifest = json.loads((tmp_path / "run" / "train.json").read_text())
    row = manifest["validation"]["scans"]["mine"]
    assert manifest["validation"]["mean"] == pytest.approx(np.mean(list(row.values())), abs=1e-4)
    assert trainer.state.best == pytest.approx(manifest["validation"]["mean"], abs=1e-4)
    log = (tmp_path / "run" / "log.csv").read_text()
    assert "# 2 scan mine " in log
    assert "mine" in (tmp_path / "run" / "report.html").read_text()


def test_a_label_error_names_the_file(make_config: Any, scan: dict[str, str]) -> None:
    with pytest.raises(LabelError, match=r"ids\.nii\.gz: ids"):
        load_scan(
            make_config(validation_scans=[scan | {"scheme": "siam16"}]).validation_scans[0], 2.0, load_scheme("siam16")
        )
