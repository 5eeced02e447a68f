"""What import derives from the maps."""

from pathlib import Path

import nibabel as nib
import numpy as np

from synthseg.templates import DEEP_OF, import_template, mark_deep, read_record


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
