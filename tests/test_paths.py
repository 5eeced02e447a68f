import subprocess
import sys
from pathlib import Path

import pytest

from synthseg import paths

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package folder that `paths` takes for its own."""
    folder = tmp_path / "site" / "synthseg"
    folder.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE_DIR", folder)
    return folder


@pytest.mark.parametrize("kind", ["weights", "schemes", "samples"])
def test_package_data_is_found_in_the_package(package, kind):
    (package / kind).mkdir()
    assert paths.data_dir(kind) == package / kind


@pytest.mark.parametrize("kind", ["templates", "pipelines"])
def test_wheel_data_is_found_before_the_repository(package, kind):
    (package.parent / "pyproject.toml").touch()
    (package.parent / kind).mkdir()
    assert paths.data_dir(kind) == package.parent / kind
    (package / "_data" / kind).mkdir(parents=True)
    assert paths.data_dir(kind) == package / "_data" / kind


def test_a_stray_folder_in_site_packages_is_not_taken(package):
    (package.parent / "templates").mkdir()
    with pytest.raises(FileNotFoundError, match="has no templates"):
        paths.data_dir("templates")


@pytest.mark.parametrize("kind", ["templates", "pipelines", "weights", "schemes", "samples"])
def test_a_missing_folder_is_named_with_the_way_out(package, kind):
    with pytest.raises(FileNotFoundError) as error:
        paths.data_dir(kind)
    assert str(package) in str(error.value)
    assert "install the package again" in str(error.value)


def test_an_unknown_kind_is_refused(package):
    with pytest.raises(ValueError, match=r"'template'.*templates, pipelines"):
        paths.data_dir("template")


def test_the_bundled_sample_and_its_notice_are_there():
    samples = paths.data_dir("samples")
    assert samples == REPOSITORY / "synthseg" / "samples"
    assert (samples / "colin27_t1.nii.gz").stat().st_size > 1_000_000
    assert "McGill University" in (samples / "NOTICE.md").read_text(encoding="utf-8")


def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'numpy', 'torch', 'monai', 'nibabel', 'matplotlib', 'pydantic'}"
    code = f"import sys, synthseg, synthseg.paths; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
