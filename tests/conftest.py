"""A small head in memory and on disk, and data outside the repository. No two sides or voxel edges are equal."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.labels import LabelTable, load_scheme
from synthseg.templates import Template

TINY_SHAPE = (20, 26, 23)
TINY_SPACING_MM = (1.5, 1.0, 2.0)
TINY_CENTER = (9.5, 12.5, 11.0)  # the middle voxel coordinate of TINY_SHAPE


def tiny_ids() -> np.ndarray:
    """FreeSurfer and CHARM ids of a head that differs left from right, front from back, top from bottom; RAS+.

    Its border is background, as in every loaded template.
    """
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in TINY_SHAPE], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)

    def ball(cx: float, cy: float, cz: float, r: float) -> np.ndarray:
        return (x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 < r**2

    ids = np.zeros(TINY_SHAPE, dtype=np.uint16)
    ids[(np.abs(x) < 0.2) & (y > 0.7) & (y < 0.99) & (np.abs(z) < 0.3)] = 507  # a nose
    ids[radius < 0.95] = 511  # skin
    ids[radius < 0.86] = 515  # skull
    ids[radius < 0.76] = 24  # CSF
    ids[(radius < 0.70) & (x < 0.05)] = 3  # cortex; the left side is the larger one
    ids[(radius < 0.70) & (x >= 0.05)] = 42
    ids[(radius < 0.52) & (x < 0.05)] = 2  # white matter
    ids[(radius < 0.52) & (x >= 0.05)] = 41
    ids[ball(-0.26, -0.15, 0.0, 0.22)] = 10  # thalamus
    ids[ball(0.30, -0.10, 0.1, 0.17)] = 49
    ids[ball(-0.18, 0.25, 0.1, 0.16)] = 4  # lateral ventricle
    ids[ball(0.20, 0.25, 0.1, 0.16)] = 43
    ids[ball(0.45, 0.25, 0.3, 0.14)] = 514  # a vein, on the right only
    return ids


@pytest.fixture(scope="session")
def head() -> LabelTable:
    return load_scheme("head")


@pytest.fixture(scope="session")
def tiny_template(head: LabelTable) -> Template:
    labels = torch.from_numpy(np.ascontiguousarray(head.to_index(tiny_ids())))
    return Template("tiny", labels, head, TINY_SPACING_MM, TINY_CENTER, {})


def write_template(folder: Path, ids: np.ndarray, scheme: str, spacing_mm: tuple[float, ...] = TINY_SPACING_MM) -> Path:
    """A template folder as ``templates import`` leaves it, written without the package."""
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(ids.astype(np.uint16), np.diag([*spacing_mm, 1.0])), folder / "labels.nii.gz")
    record = {"name": folder.name, "scheme": scheme, "derived": {}, "source": "a test", "labels": {}}
    (folder / "labels.json").write_text(json.dumps(record))
    (folder / "SOURCE.md").write_text("# made by a test\n")
    return folder


@pytest.fixture(scope="session")
def template_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``head``: the tiny head. ``other``: the same, thicker skull. ``coarse``: the same in the labels of BrainWeb."""
    root = tmp_path_factory.mktemp("templates")
    ids = tiny_ids()
    other = np.where(ids == 24, 515, ids)
    coarse = np.zeros_like(ids)
    to_brainweb = {2: 3, 41: 3, 3: 2, 42: 2, 10: 2, 49: 2, 4: 1, 43: 1, 24: 1, 515: 7, 511: 6, 507: 9, 514: 8}
    for label_id, coarse_id in to_brainweb.items():
        coarse[ids == label_id] = coarse_id
    return {
        "head": write_template(root / "tiny", ids, "head"),
        "other": write_template(root / "tiny_other", other, "head"),
        "coarse": write_template(root / "tiny_coarse", coarse, "brainweb"),
    }


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data that lies beside the repository, for tests marked ``shared``."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data of {folder}, which is not there")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device the suite can run on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def load_script() -> Callable[[Path], ModuleType]:
    """Reads a Python file that belongs to no package, such as a benchmark, as a module."""

    def load(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
