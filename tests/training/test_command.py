"""``synthseg train`` as it is called: the network that ships as a start, and memory that is kept."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from synthseg.cli import run
from synthseg.cli.train import load_recipe
from synthseg.labels import load_scheme
from synthseg.networks.checkpoint import load_model, model_path, read_tensors

SMALL = ["--set", "generator.shape=[32, 32, 64]", "--set", "generator.subsamples=1", "--set", "steps=2"]
SMALL += ["--set", "report=false", "--set", "precision=fp32", "--set", "workers=0", "--device", "cpu"]


@pytest.mark.slow
def test_the_network_that_ships_is_fine_tuned(
    template_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps on a small patch, from the recipe that ``init`` writes: the same classes, then others of these ids."""
    weights, record = read_tensors(model_path("siam16"))
    head, siam = load_scheme("head"), load_scheme("siam16")
    image = nib.load(template_folders["head"] / "labels.nii.gz")
    ids = siam.ids[head.mapping(siam)[head.to_index(np.asarray(image.dataobj))]].astype(np.int16)
    (tmp_path / "maps").mkdir()
    nib.save(nib.Nifti1Image(ids, image.affine), tmp_path / "maps" / "tiny.nii.gz")
    others = [{"id": x.id, "name": f"Part-{x.id}", "tissue": x.tissue} for x in siam.labels]
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "labels": others}))
    last = "body.output_block."
    for name, scheme in (("same", "siam16"), ("other", str(tmp_path / "mine.json"))):
        project, out = tmp_path / name, tmp_path / "runs" / name
        arguments = ["--templates", str(tmp_path / "maps"), "--scheme", scheme, "--from", "siam16"]
        assert run(["init", str(project), *arguments]) == 0, capsys.readouterr().err
        recipe = str(project / "recipe.yaml")
        config = load_recipe(recipe, [])
        assert config.init == "siam16"
        trained = record["config"]
        assert config.scored_cells == trained["scored_cells"] == 2
        assert config.network.model_dump(mode="json") == trained["network"]
        assert list(config.generator.shape) == trained["generator"]["shape"]
        capsys.readouterr()
        assert run(["train", recipe, "--from", "siam16", "-o", str(out), *SMALL]) == 0, capsys.readouterr().err
        told = capsys.readouterr().err
        assert ("100% of the weights from siam16" in told) == (name == "same")
        assert "99% of the weights from siam16" in told or name == "same"
        model = load_model(out / "best.safetensors")
        history = [part["steps"] for part in record["earlier"]] + [record["steps"]]
        assert [part["steps"] for part in model.record["earlier"]] == history
        assert model.labels.ids.tolist() == siam.ids.tolist()
        assert (model.labels.names == siam.names) == (name == "same")
        found = read_tensors(out / "best.safetensors")[0]
        moved = {key: (found[key].float() - weights[key].float()).abs().max().item() for key in weights}
        body = [value for key, value in moved.items() if not key.startswith(last)]
        assert 0 < max(body) < 0.02  # two steps, the first of them at a small rate
        assert (max(value for key, value in moved.items() if key.startswith(last)) < 0.02) == (name == "same")


TAKES_MEMORY = """
import ctypes, sys
import torch
from synthseg.cli import run

class Statistics(ctypes.Structure):  # of malloc; the fourth is the number of blocks that are mapped from the system
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

of_malloc = ctypes.CDLL("libc.so.6").mallinfo2
of_malloc.restype = Statistics

def mapped():
    before = of_malloc().d
    kept = torch.ones(20_000_000)
    return of_malloc().d - before

before = mapped()
print(before, run(sys.argv[1:]), mapped())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_training_keeps_the_memory_that_it_frees(template_folders: dict[str, Path], tmp_path: Path) -> None:
    """A large tensor is a block mapped from the system and given back, but after the command has begun."""
    settings = [f"templates=[{template_folders['head']}]", "generator.shape=[16, 16, 32]", "network.channels=[4, 8, 8]"]
    arguments = ["train", "phantom", "--dry-run", "-o", str(tmp_path / "run"), "--device", "cpu"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-c", TAKES_MEMORY, *arguments], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1", "0", "0"], done.stderr[-3000:]
