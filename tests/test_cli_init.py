"""`synthseg init` and `synthseg train --from`: what they write, take over and refuse."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from synthseg.cli import run
from synthseg.cli.train import load_recipe
from synthseg.config import PretrainConfig, parse
from synthseg.errors import ConfigError
from synthseg.networks.checkpoint import read_tensors
from synthseg.networks.feature_file import save_features
from synthseg.networks.features import FeatureNetwork
from synthseg.templates import load_template

NAMES = "1 Skin\n2 Left-Grey\n3 Right-Grey\n4 White\n5 CSF\n6 Odd-Thing\n"
TINY = [
    *("--set", "generator.shape=[16, 24, 16]", "--set", "generator.voxel_size_mm=10.0", "--set", "report=false"),
    *("--set", "network.channels=[4, 8, 8]", "--set", "generator.subsamples=1", "--set", "steps=2"),
    *("--set", "validate_every=2", "--set", "validation_contrasts=[t1]", "--set", "precision=fp32", "--device", "cpu"),
]


def head_map(seed: int = 0) -> np.ndarray:
    """Skin, CSF, grey left and right, white, and a small odd thing; RAS+."""
    shape = (22, 26, 20)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0)) * (1 + 0.01 * seed)
    data = np.zeros(shape, np.int16)
    for limit, label in ((0.95, 1), (0.8, 5), (0.65, 2), (0.4, 4), (0.15, 6)):
        data[radius < limit] = label
    data[(grid[0] > 0) & (data == 2)] = 3
    return data


def write_maps(folder: Path, n: int) -> Path:
    folder.mkdir()
    for i in range(n):
        nib.save(nib.Nifti1Image(head_map(i), np.diag([8.0, 7.5, 9.0, 1.0])), folder / f"m{i}.nii.gz")
    return folder


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def test_init_imports_holds_out_and_writes_a_recipe_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_maps(tmp_path / "maps", 5)
    Path("names.txt").write_text(NAMES)
    assert run(["init", "mine", "--templates", "maps", "--labels", "names.txt"]) == 0
    said = capsys.readouterr().err
    assert "held out: 1 of 5 heads" in said
    assert "Odd-Thing: no tissue is known by that name" in said
    assert sorted(os.listdir("mine")) == ["held_out", "recipe.yaml", "scheme.json", "templates"]
    assert sorted(os.listdir("mine/templates")) == ["m0", "m1", "m3", "m4"]
    assert os.listdir("mine/held_out") == ["m2"]
    template = load_template("mine/held_out/m2")
    assert template.table.names == ["Background", "Skin", "Left-Grey", "Right-Grey", "White", "CSF", "Odd-Thing"]
    np.testing.assert_array_equal(np.unique(template.labels), range(7))
    recipe = yaml.safe_load(Path("mine/recipe.yaml").read_text())
    assert recipe["scheme"] == "scheme.json"
    assert recipe["generator"]["voxel_size_mm"] == 8.5  # the maps have 8.1 mm

    monkeypatch.chdir("mine")  # found from any folder
    assert run(["train", str(tmp_path / "mine" / "recipe.yaml"), *TINY]) == 0
    said = capsys.readouterr().err
    assert "6 of mine and background: Skin, Left-Grey" in said
    assert "4 to train on, 1 held out (m2)" in said
    assert "steps an hour (measured" in said
    record = read_tensors(Path("runs/mine/best.safetensors"))[1]
    assert [label["id"] for label in record["labels"]["labels"]] == list(range(7))
    assert set(record["validation"]["dice"]["t1"]) >= {"Skin", "White", "Odd-Thing"}


def test_init_keeps_apart_structures_and_says_what_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.zeros((20, 24, 22), np.int16)
    data[1:9, 2:18, 2:18] = 17
    data[11:19, 2:18, 2:18] = 53
    data[10, 22, 20] = 17
    (tmp_path / "maps").mkdir()
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 1.5, 3.0, 1.0])), tmp_path / "maps" / "a.nii.gz")
    arguments = ["--templates", str(tmp_path / "maps"), "--scheme", "freesurfer", "--classes", "freesurfer"]
    assert run(["init", str(tmp_path / "mine"), *arguments]) == 0
    folder = tmp_path / "mine" / "templates" / "a"
    assert f"note: {folder}: 1 voxels in specks" in capsys.readouterr().err
    labels = np.asarray(nib.load(folder / "labels.nii.gz").dataobj)
    assert [(labels == i).sum() for i in (17, 53)] == [8 * 16 * 16] * 2


def test_init_takes_imported_templates_as_they_are(tmp_path: Path) -> None:
    write_maps(tmp_path / "maps", 2)
    scheme = {"name": "old", "labels": [{"id": i, "name": f"s{i}"} for i in range(7)]}
    (tmp_path / "old.json").write_text(json.dumps(scheme))
    imported = tmp_path / "imported"
    arguments = ["--scheme", str(tmp_path / "old.json"), "-o", str(imported)]
    assert run(["templates", "import", str(tmp_path / "maps"), *arguments]) == 0
    assert run(["init", str(tmp_path / "new"), "--templates", str(imported)]) == 0
    for name in ("m0", "m1"):
        old, new = (load_template(folder / name) for folder in (imported, tmp_path / "new" / "templates"))
        assert (old.labels == new.labels).all()
        assert new.table.name == "old"
    assert json.loads((tmp_path / "new" / "scheme.json").read_text())["name"] == "old"


def test_init_from_freesurfer_keeps_the_names_of_subjects(tmp_path: Path) -> None:
    ids = np.array([0, 0, 3, 42, 2, 24, 77])[head_map()]
    for subject in ("ann", "bob"):
        (tmp_path / "subjects" / subject / "mri").mkdir(parents=True)
        image = nib.MGHImage(ids.astype(np.int32), np.diag([2.0, 2.0, 2.0, 1.0]))
        nib.save(image, tmp_path / "subjects" / subject / "mri" / "aseg.mgz")
    out = tmp_path / "fs"
    assert run(["init", str(out), "--templates", str(tmp_path / "subjects")]) == 0
    assert sorted(os.listdir(out / "templates")) == ["ann", "bob"]
    template = load_template(out / "templates" / "ann")
    assert template.table.ids.tolist() == [0, 2, 3, 24, 42, 77]
    assert template.table[3].partner == 42
    record = json.loads((out / "templates" / "ann" / "labels.json").read_text())
    assert record["source"] == os.path.join("ann", "mri", "aseg.mgz")
    sixteen = tmp_path / "sixteen"
    assert run(["init", str(sixteen), "--templates", str(tmp_path / "subjects"), "--classes", "siam16"]) == 0
    assert yaml.safe_load((sixteen / "recipe.yaml").read_text())["scheme"] == "siam16"


def write_bids(folder: Path, *specifiers: str) -> Path:
    """A BIDS derivative of four subjects, one with two sessions, and the table of its segmentations."""
    for i, scan in enumerate(("sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03", "sub-04")):
        anat = folder.joinpath(*scan.split("_"), "anat")
        anat.mkdir(parents=True)
        for specifier in specifiers:
            data = np.where(head_map(i) == 6, 4, head_map(i))
            nib.save(nib.Nifti1Image(data, np.diag([8.0, 7.5, 9.0, 1.0])), anat / f"{scan}{specifier}_dseg.nii.gz")
    table = "index\tname\tcolor\n1\tSkin\t#ff0000\n2\tLeft-Grey\n3\tRight-Grey\n4\tWhite\n5\tCSF\n"
    (folder / "dseg.tsv").write_text(table)
    return folder


def test_init_from_a_bids_derivative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = write_bids(tmp_path / "maps", "")
    out = tmp_path / "mine"
    assert run(["init", str(out), "--templates", str(maps)]) == 0
    said = capsys.readouterr().err
    assert f"{maps}: BIDS derivative, 5 of them" in said
    assert "made from dseg.tsv" in said
    held_out, names = os.listdir(out / "held_out"), os.listdir(out / "templates")
    assert sorted(held_out + names) == ["sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03", "sub-04"]
    assert {name.split("_")[0] for name in held_out}.isdisjoint(name.split("_")[0] for name in names)
    template = load_template(out / "templates" / "sub-01")
    assert template.table.names == ["Background", "Skin", "Left-Grey", "Right-Grey", "White", "CSF"]
    assert template.table[1].color == (255, 0, 0)
    assert template.table[2].partner == 3
    np.testing.assert_array_equal(np.unique(template.labels), range(6))
    record = json.loads((out / "templates" / "sub-01" / "labels.json").read_text())
    assert record["source"] == os.path.join("sub-01", "anat", "sub-01_dseg.nii.gz")
    config = load_recipe(str(out / "recipe.yaml"), [])
    assert (config.name, config.scheme) == ("mine", str(out / "scheme.json"))
    sixteen = tmp_path / "sixteen"
    assert run(["init", str(sixteen), "--templates", str(maps), "--classes", "siam16"]) == 0
    assert load_recipe(str(sixteen / "recipe.yaml"), []).scheme == "siam16"


@pytest.mark.parametrize("with_table", [True, False])
def test_init_from_charm_keeps_the_names_of_subjects(
    with_table: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = np.array([0, 5, 2, 2, 1, 3, 7])[head_map()]  # CHARM's scalp, grey and white matter, CSF and compact bone
    for subject in ("ernie", "bert"):
        folder = tmp_path / "study" / f"m2m_{subject}"
        folder.mkdir(parents=True)
        nib.save(nib.Nifti1Image(ids.astype(np.uint16), np.diag([8.0, 7.5, 9.0, 1.0])), folder / "final_tissues.nii.gz")
        if with_table:
            lines = (
                "#No. Label Name: R G B A",
                "1 WM 230 230 230 255",
                "2 GM 129 129 129 255",
                "3 CSF 104 163 255 255",
            )
            lines += ("5 Scalp 255 239 179 255", "7 Compact_bone 255 138 57 255", "500 Saline_or_gel 25 35 45 255")
            (folder / "final_tissues_LUT.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "study" / "m2m_unfinished").mkdir()
    out = tmp_path / "charm"
    assert run(["init", str(out), "--templates", str(tmp_path / "study")]) == 0
    said = capsys.readouterr().err
    assert "no final_tissues.nii.gz, left out: m2m_unfinished" in said
    assert sorted(os.listdir(out / "templates")) == ["bert", "ernie"]
    template = load_template(out / "templates" / "ernie")
    assert template.table.ids.tolist() == [0, 1, 2, 3, 5, 7]
    white, grey = ("WM", "GM") if with_table else ("White-Matter", "Gray-Matter")
    assert template.table.names == ["Background", white, grey, "CSF", "Scalp", "Compact_bone"]
    assert [label.tissue for label in template.table.labels] == ["air", "wm", "gm", "csf", "skin", "bone_cortical"]
    record = json.loads((out / "templates" / "ernie" / "labels.json").read_text())
    assert record["source"] == os.path.join("m2m_ernie", "final_tissues.nii.gz")
    assert load_recipe(str(out / "recipe.yaml"), []).scheme == str(out / "scheme.json")
    alone = tmp_path / "alone"  # the folder of one subject, and the 16 structures
    subject = tmp_path / "study" / "m2m_ernie"
    assert run(["init", str(alone), "--templates", str(subject), "--classes", "siam16"]) == 0
    assert os.listdir(alone / "templates") == ["ernie"]
    assert load_recipe(str(alone / "recipe.yaml"), []).scheme == "siam16"


def test_init_chooses_among_the_segmentations_of_fmriprep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = write_bids(tmp_path / "maps", "", "_desc-aseg", "_desc-aparcaseg")
    out = tmp_path / "mine"
    assert run(["init", str(out), "--templates", str(maps)]) == 2
    assert "choose with --desc aparcaseg or aseg or none" in one_error(capsys)
    assert not out.exists()
    scans = ("sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03", "sub-04")
    for desc, suffix in (("aseg", "_desc-aseg"), ("none", "")):
        out = tmp_path / desc
        assert run(["init", str(out), "--templates", str(maps), "--desc", desc]) == 0
        names = os.listdir(out / "held_out") + os.listdir(out / "templates")
        assert sorted(names) == [f"{scan}{suffix}" for scan in scans]
        template = load_template(out / "templates" / f"sub-01{suffix}")
        assert template.table.names == ["Background", "Skin", "Left-Grey", "Right-Grey", "White", "CSF"]
        assert load_recipe(str(out / "recipe.yaml"), []).name == desc


def test_init_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = str(write_maps(tmp_path / "maps", 2))
    names = tmp_path / "names.txt"
    names.write_text(NAMES.replace("5 CSF\n", ""))
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for arguments, word in (
        (["--templates", str(tmp_path / "nowhere")], "no such folder"),
        (["--templates", str(tmp_path / "empty")], "holds no label maps"),
        (["--templates", maps], "--labels FILE"),
        (["--templates", maps, "--labels", str(tmp_path / "no.txt")], "no such file"),
        (["--templates", maps, "--labels", str(names)], "no line for the ids [5]"),
        (["--templates", maps, "--labels", str(names), "--scheme", "head"], "give one of them"),
        (["--templates", maps, "--scheme", "haed"], "did you mean 'head'?"),
        (["--templates", maps, "--scheme", "siam16", "--classes", "head"], "does not say"),
        (["--templates", maps, "--scheme", "siam16", "--from", "nobody"], "nobody: no such weights file"),
        (
            ["--templates", maps, "--scheme", "siam16", "--from", "siam16", "--voxel-size", "2"],
            "leave out --voxel-size",
        ),
    ):
        assert run(["init", str(out), *arguments]) == 2, arguments
        assert word in one_error(capsys)
        assert not out.exists()
    (tmp_path / "large").mkdir()
    nib.save(nib.Nifti1Image(head_map().astype(np.int32) * 8000, np.eye(4)), tmp_path / "large" / "a.nii.gz")
    names.write_text("".join(f"{8000 * i} N{i}\n" for i in range(1, 7)))
    assert run(["init", str(out), "--templates", str(tmp_path / "large"), "--labels", str(names)]) == 2
    assert "the maps hold the ids [40000, 48000], but ids end at 32767" in one_error(capsys)
    assert not out.exists()
    names.write_text(NAMES)
    assert run(["init", str(out), "--templates", maps, "--labels", str(names), "--classes", "siam16"]) == 2
    assert "what Odd-Thing is in siam16 cannot be told" in one_error(capsys)
    assert not out.exists()
    out.mkdir()
    (out / "recipe.yaml").write_text("mine")
    assert run(["init", str(out), "--templates", maps, "--scheme", "siam16"]) == 2
    assert "exists already" in one_error(capsys)
    assert (out / "recipe.yaml").read_text() == "mine"


# ---------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of siam16 at 10 mm."""
    out = tmp_path_factory.mktemp("model")
    assert run(["train", "phantom", "-o", str(out / "run"), *TINY, "--set", "seed=3"]) == 0
    return out / "run" / "best.safetensors"


def test_from_takes_over_network_and_grid(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = write_maps(tmp_path / "maps", 1)
    (tmp_path / "names.txt").write_text(NAMES)
    out = tmp_path / "fine"
    arguments = ["--templates", str(maps), "--labels", str(tmp_path / "names.txt"), "--from", str(model)]
    assert run(["init", str(out), *arguments]) == 0
    config = load_recipe(str(out / "recipe.yaml"), [])
    assert config.init == str(model)
    assert config.network.channels == (4, 8, 8)
    assert (config.generator.voxel_size_mm, config.generator.shape) == (10.0, (16, 24, 16))

    bare = tmp_path / "bare.yaml"
    bare.write_text(f"scheme: {out}/scheme.json\ntemplates: [{out}/templates]\n")
    short = ["--set", "steps=2", "--set", "generator.subsamples=1", "--set", "report=false", "--device", "cpu"]
    capsys.readouterr()
    assert run(["train", str(bare), "--from", str(model), "-o", str(tmp_path / "run"), *short]) == 0
    said = capsys.readouterr().err
    assert "6 of fine and background" in said
    assert f"of the weights from {model}" in said
    record = read_tensors(tmp_path / "run" / "last.safetensors")[1]
    assert record["config"]["network"]["channels"] == [4, 8, 8]
    assert record["earlier"][0]["steps"] == 2


def test_init_from_pretrained_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "network": {"channels": [4, 8, 8]},
        "generator": {"shape": [16, 24, 16], "voxel_size_mm": 10.0, "views": {"severities": [0, 1]}},
    }
    config = parse(PretrainConfig, record, "test")
    save_features(tmp_path / "pretrained.safetensors", FeatureNetwork(config.network), config, {}, {})
    maps = write_maps(tmp_path / "maps", 1)
    (tmp_path / "names.txt").write_text(NAMES)
    start = ["--from", str(tmp_path / "pretrained.safetensors")]
    arguments = ["--templates", str(maps), "--labels", str(tmp_path / "names.txt")]
    assert run(["init", str(tmp_path / "fine"), *arguments, *start]) == 0, capsys.readouterr().err
    recipe = load_recipe(str(tmp_path / "fine" / "recipe.yaml"), [])
    assert recipe.network.channels == (4, 8, 8)
    assert (recipe.generator.voxel_size_mm, recipe.generator.shape) == (10.0, (16, 24, 16))


def test_what_the_recipe_says_comes_before_the_model(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("generator:\n  voxel_size_mm: 7.0\n  anatomy: {probability: 0.5}\n")
    config = load_recipe(str(recipe), ["generator.shape=[24, 24, 24]"], str(model))
    assert config.generator.voxel_size_mm == 7.0
    assert config.generator.shape == (24, 24, 24)
    assert config.generator.anatomy.probability == 0.5
    assert config.network.channels == (4, 8, 8)
    with pytest.raises(
        ConfigError, match=r"its network has channels \[4, 8, 8\], the recipe channels \[8, 8, 8\]; leave"
    ):
        load_recipe(str(recipe), ["network.channels=[8, 8, 8]"], str(model))
