"""The wheel, installed outside the repository, finds its weights, schemes, templates, recipes and sample."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

FIND = """
import json, sys, synthseg
from pathlib import Path
from synthseg.labels import available_schemes
from synthseg.networks.checkpoint import FEATURE_FORMAT, load_model, shipped_models
from synthseg.networks.feature_file import load_features
from synthseg.templates import load_template, shipped_templates
from synthseg.config import TrainConfig, generator_config, load_yaml, shipped_presets
from synthseg.paths import data_dir
print(json.dumps({
    "where": str(Path(synthseg.__file__).parent),
    "schemes": available_schemes(),
    "models": {name: len(load_model(name).labels) for name in shipped_models()},
    "heads": {name: list(load_features(name).heads) for name in shipped_models(FEATURE_FORMAT)},
    "templates": {name: len(load_template(name).table) for name in shipped_templates()},
    "recipe": load_yaml(TrainConfig, "phantom").name,
    "presets": {name: generator_config(None, preset=name).subsamples for name in shipped_presets()},
    "sample": (data_dir("samples") / "colin27_t1.nii.gz").is_file(),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("synthseg-*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=200
    )
    return folder / "site"


def test_everything_that_ships_is_found(installed: Path, tmp_path: Path) -> None:
    import json

    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", FIND], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["where"]) == installed / "synthseg"
    assert found["schemes"] == ["brainweb", "freesurfer", "head", "head45", "siam16"]
    assert found["models"] == {"head": 46, "siam16": 17}
    assert found["heads"] == {"bias-field": ["bias-field"]}
    assert found["templates"] == {"colin27": 17, "phantom": 55}
    assert found["recipe"] == "phantom"
    eight = dict.fromkeys(("brain-id", "ct", "flair", "infant", "siam", "t1", "t2"), 8)
    assert found["presets"] == {"synthseg": 1} | eight
    assert found["sample"]


def test_the_wheel_holds_no_scripts_of_the_repository(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for template in ("colin27", "phantom"):
        for file in ("labels.nii.gz", "labels.json", "SOURCE.md"):
            assert f"synthseg/_data/templates/{template}/{file}" in names
    assert "synthseg/weights/siam16.safetensors" in names
    assert not [name for name in names if name.startswith("synthseg/_data") and name.endswith(".py")]
