"""What import derives from the maps, and what the Colin27 template promises."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from synthseg.paths import data_dir
from synthseg.templates import (
    DEEP_OF,
    check_folder,
    import_template,
    load_template,
    mark_deep,
    read_record,
    remove_specks,
)


def brainweb_ball(shape: tuple[int, int, int] = (70, 84, 72)) -> np.ndarray:
    """Two half-brains of white matter in a rind of grey matter and CSF, in BrainWeb's ids."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    return np.select([r < 0.6, r < 0.75, r < 0.85, r < 0.95], [3, 2, 1, 7], 0).astype(np.int32)


def test_deep_tissue_is_marked_and_the_cortex_is_not() -> None:
    before = brainweb_ball()
    after = mark_deep(before)
    middle = tuple(n // 2 for n in before.shape)
    assert after[middle] == DEEP_OF[3]
    for axis in (0, 1):  # left, right, front and back of the cortex
        for side in (slice(0, 15), slice(-15, None)):
            part = tuple(side if a == axis else slice(None) for a in range(3))
            assert not np.isin(after[part], list(DEEP_OF.values())).any()
    top = after[:, :, -16:]
    assert not np.isin(top, list(DEEP_OF.values())).any()
    unchanged = ~np.isin(before, list(DEEP_OF))
    np.testing.assert_array_equal(after[unchanged], before[unchanged])
    assert (before == brainweb_ball()).all()


def test_marks_follow_left_and_right() -> None:
    after = mark_deep(brainweb_ball())
    deep = np.isin(after, list(DEEP_OF.values()))
    np.testing.assert_array_equal(deep, deep[::-1])


def test_import_says_what_it_derived(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(brainweb_ball().astype(np.uint8), np.eye(4)), tmp_path / "subject.nii.gz")
    folder = import_template(tmp_path / "subject.nii.gz", "brainweb", tmp_path / "out")
    record = read_record(folder)
    assert set(record["derived"]) == {"12", "13"}
    assert "Deep-WM" in record["labels"].values()
    assert "Deep-GM" in (folder / "SOURCE.md").read_text() or "Deep-WM" in (folder / "SOURCE.md").read_text()


def test_import_records_licence_and_citation(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(brainweb_ball().astype(np.uint8), np.eye(4)), tmp_path / "subject.nii.gz")
    more = {"license": "terms", "citation": "somebody"}
    folder = import_template(tmp_path / "subject.nii.gz", "brainweb", tmp_path / "out", "a server", "other", more)
    record = read_record(folder)
    assert folder.name == record["name"] == "other"
    assert (record["source"], record["license"], record["citation"]) == ("a server", "terms", "somebody")
    assert "- citation: somebody" in (folder / "SOURCE.md").read_text()


def parts() -> np.ndarray:
    """One structure on two sides, a larger one above, and crumbs of two labels; nothing touches."""
    data = np.zeros((30, 24, 40), np.int32)
    data[2:8, 2:8, 2:8] = 17
    data[20:26, 2:8, 2:8] = 53
    data[2:28, 2:22, 20:38] = 2
    data[15, 15, 5] = 26  # all that there is of it
    data[15, 18, 5] = 2
    return data


def test_pieces_of_structures_stay_and_specks_go() -> None:
    before = parts()
    np.testing.assert_array_equal(
        np.flatnonzero(before != remove_specks(before)), [np.ravel_multi_index((15, 18, 5), before.shape)]
    )
    same = np.where(before == 53, 17, before)  # one id on both sides
    assert (remove_specks(same) == 17).sum() == 2 * 6**3
    scattered = np.zeros_like(before)
    scattered[2:28, 2:22, 20:38] = 2
    scattered[2:28:3, 2:22:3, 2:17:3] = 514
    scattered[2:4, 2, 20] = 514  # a little of it lies inside
    np.testing.assert_array_equal(remove_specks(scattered), scattered)
    assert (before == parts()).all()


def test_a_piece_of_a_thousandth_is_a_speck_and_one_of_three_is_none() -> None:
    data = np.zeros((20, 30, 20), np.int32)
    data[:, :20] = 3  # 8000 voxels
    data[:2, 25:27, :2] = 3
    data[10:14, 25:28, :2] = 3
    after = remove_specks(data)
    assert (after[:2, 25:27, :2] == 0).all()
    assert (after[10:14, 25:28, :2] == 3).all()


def test_import_says_how_much_it_removed(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(parts(), np.diag([1.0, 1.5, 2.0, 1.0])), tmp_path / "parts.nii.gz")
    assert "1 voxels are specks" in check_folder(tmp_path, "freesurfer")[1][0]
    folder = import_template(tmp_path / "parts.nii.gz", "freesurfer", tmp_path / "out")
    assert read_record(folder)["removed_voxels"] == 1
    assert set(read_record(folder)["labels"]) == {"0", "2", "17", "26", "53"}
    assert "Removed: 1 voxels" in (folder / "SOURCE.md").read_text()
    again = import_template(folder / "labels.nii.gz", "freesurfer", tmp_path / "again")
    assert "removed_voxels" not in read_record(again)


def test_without_bone_no_dura_is_derived(tmp_path: Path) -> None:
    data = np.full((6, 8, 7), 24, np.uint8)
    data[2:4, 2:6, 2:5] = 2
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1.5, 2.0, 1.0])), tmp_path / "brain.nii.gz")
    folder = import_template(tmp_path / "brain.nii.gz", "head", tmp_path / "out")
    assert read_record(folder)["derived"] == {}
    np.testing.assert_array_equal(nib.load(folder / "labels.nii.gz").dataobj, data)


# ------------------------------------------------------------------------------------------ the Colin27 template

AIR, GM, WM, CSF, VENTRICLE, CEREBELLAR_GM, THALAMUS = range(7)
DURA, VESSEL, SKULL, HEAD = 13, 14, 15, 16
BRAIN = [GM, WM, *range(VENTRICLE, DURA)]
BASE = 57  # z = -14 mm: what is above it is the vault
ANY = np.ones((3, 3, 3), dtype=bool)
# Adult heads: volumes that a healthy adult's may have, and of what the scan shows of skull and soft tissue.
PLAUSIBLE_ML = {
    "GM": (450, 850), "WM": (400, 750), "CSF": (150, 400), "Ventricular-CSF": (10, 60), "Cerebellar-GM": (80, 180),
    "Thalamus": (10, 22), "Pallidum": (2, 6), "Putamen": (7, 16), "Caudate": (5, 13), "Accumbens": (0.6, 2.5),
    "Amygdala": (2, 5.5), "Hippocampus": (5, 12), "Dura": (20, 120), "Vessels": (10, 80), "Skull": (350, 800),
    "Head": (900, 2500),
}  # fmt: skip


@pytest.fixture(scope="module")
def colin27() -> np.ndarray:
    image = nib.load(data_dir("templates") / "colin27" / "labels.nii.gz")
    sample = nib.load(data_dir("samples") / "colin27_t1.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.affine, sample.affine)
    assert image.shape == sample.shape
    return np.asarray(image.dataobj)


def count(mask: np.ndarray, structure: np.ndarray | None = None) -> int:
    return int(ndimage.label(mask, structure)[1])


def leaks(labels: np.ndarray) -> bool:
    """Whether a path that avoids bone leads from the brain to the air outside, above the base of the skull."""
    vault = labels[:, :, BASE:]
    pieces, _ = ndimage.label(vault != SKULL, ANY)
    return bool(np.isin(pieces[vault == HEAD], np.unique(pieces[np.isin(vault, BRAIN)])).any())


def test_colin27_has_every_class_with_plausible_volumes(colin27: np.ndarray) -> None:
    table = load_template("colin27").table
    voxels = np.bincount(colin27.ravel(), minlength=17)
    for label in table.labels[1:]:
        low, high = PLAUSIBLE_ML[label.name]
        assert low < voxels[label.id] / 1000 < high, label.name
    assert {int(i) for i in read_record(data_dir("templates") / "colin27")["labels"]} == set(range(1, 17))
    assert (data_dir("templates") / "colin27" / "labels.nii.gz").stat().st_size < 1_000_000


def test_colin27_is_one_head_in_one_air(colin27: np.ndarray) -> None:
    assert count(colin27 > 0) == 1
    assert count(np.pad(colin27 == AIR, 1, constant_values=True)) == 1
    assert [index for index in (GM, WM, CEREBELLAR_GM, SKULL, HEAD) if count(colin27 == index, ANY) != 1] == []


def test_colin27_has_a_closed_skull(colin27: np.ndarray) -> None:
    assert not leaks(colin27)
    holed = colin27.copy()
    holed[90:92, 100:102, 140:] = np.where(holed[90:92, 100:102, 140:] == SKULL, CSF, holed[90:92, 100:102, 140:])
    assert leaks(holed)  # the check can fail
    vault = colin27[:, :, BASE:]
    outside, _ = ndimage.label(vault == AIR)
    bare = ndimage.binary_dilation(outside == outside[0, 0, -1], ANY) & (vault == SKULL)
    assert bare.sum() == 0


def test_colin27_has_fluid_between_brain_and_skull(colin27: np.ndarray) -> None:
    around = ndimage.binary_dilation(np.isin(colin27, BRAIN), ANY)
    assert set(np.unique(colin27[around]).tolist()) == {*BRAIN, CSF, VESSEL}  # dura keeps away as well


def test_colin27_has_one_nucleus_a_side(colin27: np.ndarray) -> None:
    for index in range(THALAMUS, DURA):
        halves = colin27[:90] == index, colin27[91:] == index
        assert [count(half, ANY) for half in halves] == [1, 1]
        left, right = (half.sum() for half in halves)
        assert abs(left - right) < 0.2 * (left + right) / 2
        assert not (colin27[90] == index).any()


# ------------------------------------------------------------------------------- how the Colin27 template is made

MIDDLE, VAULT_Z = 32, 17  # of the small head: its middle plane, and the lowest plane of its vault


def load_rules() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_colin27", data_dir("templates") / "colin27" / "make_colin27.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_colin27_breaks_no_promise(colin27: np.ndarray) -> None:
    assert load_rules().problems(colin27) == []


@pytest.fixture(scope="module")
def rules() -> ModuleType:
    """`make_colin27.py` with the planes of the small head below, whose surfaces are more curved than a real one's."""
    module = load_rules()
    module.MIDPLANE, module.BASE_Z, module.CANAL_Z, module.ROUGHEST = MIDDLE, VAULT_Z - 1, 6, 0.1
    return module


def ball(x: float, y: float, z: float, radius: float) -> np.ndarray:
    i, j, k = np.ogrid[:65, :73, :63]
    return (i - MIDDLE - x) ** 2 + (j - 36 - y) ** 2 + (k - 31 - z) ** 2 < radius**2


def small_head() -> np.ndarray:
    """Soft tissue, bone, fluid and brain in shells of 1 mm voxels, with ventricle, cerebellum and nuclei; no dura."""
    labels = np.zeros((65, 73, 63), np.uint8)
    for radius, index in ((30, HEAD), (26, SKULL), (22, CSF), (20, GM), (17, WM)):
        labels[ball(0, 0, 0, radius)] = index
    labels[ball(0, 0, 3, 4)] = VENTRICLE
    labels[ball(0, -10, -11, 5)] = CEREBELLAR_GM
    for number, index in enumerate(range(THALAMUS, DURA)):
        angle = 2 * np.pi * number / 7
        for side in (-8, 8):
            labels[ball(side, 10 * np.cos(angle), 10 * np.sin(angle), 3.5)] = index
    return labels


def t1_of(labels: np.ndarray) -> np.ndarray:
    """Fluid dark, white matter bright, as in the scan."""
    means = np.full(17, 80.0, np.float32)
    means[[AIR, CSF, VENTRICLE, WM, SKULL]] = 5, 45, 45, 109, 20
    return means[labels]


def mended(rules: ModuleType, labels: np.ndarray, t1: np.ndarray | None = None) -> np.ndarray:
    likely = np.zeros((17, *labels.shape), np.float32)
    likely[WM] = 1  # where the fluid is bright
    return rules.mend(labels, t1_of(labels) if t1 is None else t1, likely)


@pytest.fixture(scope="module")
def clean(rules: ModuleType) -> np.ndarray:
    return mended(rules, small_head())


def test_rules_keep_a_head_and_add_dura(rules: ModuleType, clean: np.ndarray) -> None:
    drawn = small_head()
    assert rules.problems(clean) == []
    assert set(np.unique(drawn[clean == DURA]).tolist()) == {CSF}
    same = (clean == drawn) | (clean == DURA)
    assert [index for index in range(17) if (drawn == index).any() and same[drawn == index].mean() < 0.9] == []


def hole_in_the_skull(labels: np.ndarray) -> None:
    labels[(labels == SKULL) & ball(0, 0, 24, 3)] = CSF


def hole_in_the_base(labels: np.ndarray) -> None:
    labels[(labels == SKULL) & ball(0, 14, -20, 3)] = HEAD


def thin_skin(labels: np.ndarray) -> None:
    labels[(labels == HEAD) & ~ball(0, 0, 0, 27)] = AIR


def islands(labels: np.ndarray) -> None:
    labels[ball(-28, 0, 0, 2)] = GM
    labels[ball(0, 0, 15, 2)] = HEAD
    labels[2:4, 2:4, 2:4] = SKULL


def brain_on_bone(labels: np.ndarray) -> None:
    labels[(labels == CSF) & ball(14, 0, 14, 8)] = GM


def broken_nucleus(labels: np.ndarray) -> None:
    labels[ball(8, 10, 0, 1)] = WM
    labels[ball(0, 10, 4, 2)] = THALAMUS


def sealed_sinus(labels: np.ndarray) -> None:
    labels[ball(0, 26, 0, 2)] = AIR


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        (hole_in_the_skull, "the vault of the skull has a gap"),
        (hole_in_the_base, "open the base of the skull"),
        (thin_skin, "of the vault lie under less than two voxels of soft tissue"),
        (islands, "label 1 is in 2 pieces; label 15 is in 2 pieces; label 16 is in 2 pieces"),
        (brain_on_bone, "of skull touch the brain"),
        (broken_nucleus, "nucleus 6 crosses the middle"),
        (sealed_sinus, "the air is in 2 pieces"),
    ],
)
def test_rules_mend_a_drawn_head(rules: ModuleType, damage: Callable[[np.ndarray], None], broken: str) -> None:
    labels = small_head()
    damage(labels)
    assert broken in "; ".join(rules.problems(labels))
    assert rules.problems(mended(rules, labels)) == []


def test_rules_find_what_is_bright_in_the_fluid(rules: ModuleType) -> None:
    labels = small_head()
    fornix = ball(0, 3, 5, 2.5)
    t1 = t1_of(labels)
    t1[fornix] = 100
    assert set(np.unique(labels[fornix]).tolist()) == {WM, VENTRICLE}
    assert set(np.unique(mended(rules, labels, t1)[fornix]).tolist()) == {WM}


def thin_bone(labels: np.ndarray) -> None:
    inner = ndimage.binary_dilation((labels != SKULL) & ball(0, 0, 0, 24), ANY)
    labels[(labels == SKULL) & ~inner & ball(0, 0, 25, 4)] = HEAD


def bare_bone(labels: np.ndarray) -> None:
    labels[(labels == HEAD) & ball(0, 0, 28, 4)] = AIR


def dura_on_the_brain(labels: np.ndarray) -> None:
    labels[(labels == CSF) & ball(14, 0, 14, 6)] = DURA


def holed_nucleus(labels: np.ndarray) -> None:
    labels[MIDDLE + 8, 46, 31] = WM


def rough_skin(labels: np.ndarray) -> None:
    """Every other 2 x 2 column of the skin's outermost voxel is gone."""
    i, j = np.ogrid[:65, :73]
    rim = (labels == HEAD) & ndimage.binary_dilation(labels == AIR)
    labels[rim & ((i // 2 + j // 2) % 2 == 0)[:, :, None]] = AIR


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        (hole_in_the_skull, "the vault of the skull has a gap"),
        (thin_bone, "of the vault are bone of less than two voxels"),
        (hole_in_the_base, "open the base of the skull"),
        (bare_bone, "of the vault lie under less than two voxels of soft tissue"),
        (dura_on_the_brain, "of dura touch the brain"),
        (holed_nucleus, "nucleus 6 has holes of 1 voxels"),
        (rough_skin, "the head is rough"),
    ],
)
def test_a_map_that_breaks_a_promise_is_found(
    rules: ModuleType, clean: np.ndarray, damage: Callable[[np.ndarray], None], broken: str
) -> None:
    labels = clean.copy()
    damage(labels)
    assert broken in "; ".join(rules.problems(labels))


def test_a_map_that_breaks_a_promise_is_not_written(
    rules: ModuleType, clean: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "draw", lambda: (clean, clean, clean, np.eye(4)))
    monkeypatch.setattr("sys.argv", ["make_colin27.py", "--out", str(tmp_path / "out")])
    holed = clean.copy()
    hole_in_the_skull(holed)
    monkeypatch.setattr(rules, "mend", lambda *drawn: holed)
    with pytest.raises(SystemExit, match="not written: the vault of the skull has a gap"):
        rules.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(rules, "mend", lambda *drawn: clean)
    rules.main()
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "labels.nii.gz").dataobj, clean)
    assert read_record(tmp_path / "out")["scheme"] == "siam16"
