"""The commands `generate`, `train` and `templates`: what they write, what they refuse, and how they say so."""

import json
import re
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.cli import run
from synthseg.paths import data_dir

SMALL = ["--set", "shape=[24, 32, 16]", "--set", "voxel_size_mm=6.0", "--set", "subsamples=1"]
HEAD_SHAPE = (22, 26, 20)


def write_map(path: Path, data: np.ndarray, spacing: tuple[float, float, float] = (4.0, 3.0, 5.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])  # stored right to left
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def head_map() -> np.ndarray:
    """Skin around bone around CSF around cortex and white matter, left and right, as int16."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in HEAD_SHAPE], indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    data = np.zeros(HEAD_SHAPE, np.int16)
    for limit, label in ((0.95, 511), (0.85, 515), (0.75, 24), (0.55, 3), (0.35, 2)):
        data[radius < limit] = label
    right = grid[0] < 0  # the first axis runs from right to left
    data[right & (data == 3)] = 42
    data[right & (data == 2)] = 41
    return data


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def test_generate_writes_images_labels_and_plans_that_replay(tmp_path: Path) -> None:
    assert run(["generate", "-o", str(tmp_path / "a"), "--n", "2", "--seed", "5", *SMALL]) == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [f"000{i}_{kind}" for i in (0, 1) for kind in ("image.nii.gz", "label.nii.gz", "plan.json")]
    image, label = (nib.load(tmp_path / "a" / f"0001_{kind}.nii.gz") for kind in ("image", "label"))
    assert image.shape == label.shape == (24, 32, 16)
    np.testing.assert_allclose(image.header.get_zooms(), 6.0)
    np.testing.assert_array_equal(image.affine, label.affine)
    np.testing.assert_allclose(image.affine @ [11.5, 15.5, 7.5, 1], [0, 0, 0, 1])
    known = {0} | {
        int(i) for i in json.loads((data_dir("templates") / "phantom" / "labels.json").read_text())["labels"]
    }
    assert set(np.unique(label.dataobj).tolist()) <= known
    assert 0 <= image.get_fdata().min() < image.get_fdata().max() <= 1
    assert run(["generate", "-o", str(tmp_path / "b"), "--replay", str(tmp_path / "a" / "0001_plan.json")]) == 0
    again = nib.load(tmp_path / "b" / "0000_image.nii.gz")
    np.testing.assert_array_equal(again.get_fdata(), image.get_fdata())
    plans = [(tmp_path / "a" / f"000{i}_plan.json").read_text() for i in (0, 1)]
    (tmp_path / "offending_plan.json").write_text(f"[{plans[1]}, {plans[0]}]")
    assert run(["generate", "-o", str(tmp_path / "c"), "--replay", str(tmp_path / "offending_plan.json")]) == 0
    for number, was in enumerate((1, 0)):
        again = nib.load(tmp_path / "c" / f"000{number}_image.nii.gz")
        np.testing.assert_array_equal(
            again.get_fdata(), nib.load(tmp_path / "a" / f"000{was}_image.nii.gz").get_fdata()
        )


def test_generate_draws_anomalies_that_replay(tmp_path: Path) -> None:
    chances = [f"anomalies.{kind}_probability=1" for kind in ("tumour", "lesion", "cavity")]
    settings = [part for one in ["anomalies.probability=1", *chances] for part in ("--set", one)]
    assert run(["generate", "-o", str(tmp_path / "a"), *SMALL, *settings]) == 0
    assert run(["generate", "-o", str(tmp_path / "b"), "--replay", str(tmp_path / "a" / "0000_plan.json")]) == 0
    plan = json.loads((tmp_path / "a" / "0000_plan.json").read_text())
    assert plan["scheme"] == "head+anomalies"
    assert {blob["kind"] for blob in plan["anomalies"]["blobs"]} >= {"tumour", "cavity"}
    for kind in ("image", "label"):
        first, again = (nib.load(tmp_path / run / f"0000_{kind}.nii.gz").get_fdata() for run in ("a", "b"))
        np.testing.assert_array_equal(first, again)
    assert first.max() < 1000  # anomalies are their host tissue
    assert run(["generate", "-o", str(tmp_path / "c"), *SMALL, *settings, "--set", "anomalies.label=17"]) == 0
    assert nib.load(tmp_path / "c" / "0000_label.nii.gz").get_fdata().max() > 9000


def test_generate_can_write_the_ids_of_another_scheme(tmp_path: Path) -> None:
    assert run(["generate", "-o", str(tmp_path), "--scheme", "siam16", "--seed", "1", *SMALL]) == 0
    assert set(np.unique(nib.load(tmp_path / "0000_label.nii.gz").dataobj).tolist()) <= set(range(17))


def test_generate_depends_on_the_seed_and_the_number_alone(tmp_path: Path) -> None:
    assert run(["generate", "-o", str(tmp_path / "one"), "--n", "1", "--seed", "7", *SMALL]) == 0
    assert run(["generate", "-o", str(tmp_path / "two"), "--n", "2", "--seed", "7", *SMALL]) == 0
    assert run(["generate", "-o", str(tmp_path / "other"), "--n", "1", "--seed", "8", *SMALL]) == 0
    first, same, other = (
        nib.load(tmp_path / name / "0000_image.nii.gz").get_fdata() for name in ("one", "two", "other")
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1


def test_generate_refuses_to_replace_and_unknown_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-o", str(tmp_path / "a"), *SMALL]) == 0
    before = (tmp_path / "a" / "0000_image.nii.gz").read_bytes()
    capsys.readouterr()
    assert run(["generate", "-o", str(tmp_path / "a"), *SMALL]) == 2
    assert "0000_image.nii.gz" in one_error(capsys)
    assert (tmp_path / "a" / "0000_image.nii.gz").read_bytes() == before
    assert run(["generate", "-o", str(tmp_path / "b"), "--set", "artefacts.gama_std=1"]) == 2
    assert "did you mean 'gamma_std'?" in one_error(capsys)
    assert (
        run(["generate", "-o", str(tmp_path / "b"), *SMALL, "--set", "contrast.named_weights={t1: 1, t9: 0.01}"]) == 2
    )
    assert "t9" in one_error(capsys)
    assert run(["generate", "-o", str(tmp_path / "b"), "--template", "nobody"]) == 2
    assert "nobody" in one_error(capsys)
    (tmp_path / "text.json").write_text("not a plan")
    assert run(["generate", "-o", str(tmp_path / "b"), "--replay", str(tmp_path / "text.json")]) == 2
    assert "text.json" in one_error(capsys)
    (tmp_path / "none.json").write_text("[]")
    assert run(["generate", "-o", str(tmp_path / "b"), "--replay", str(tmp_path / "none.json")]) == 2
    assert "none.json" in one_error(capsys)
    assert not (tmp_path / "b").exists()


TINY_GRID = ["--set", "shape=[20, 24, 16]", "--set", "voxel_size_mm=8.0", "--set", "subsamples=1"]


def test_generate_from_a_preset_draws_a_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a preset is found by name from any folder
    sheet = tmp_path / "new" / "grid.png"
    arguments = ["generate", "--preset", "siam", "--n", "3", "-o", "a", "--preview", str(sheet), *TINY_GRID]
    assert run(arguments) == 0
    assert json.loads(Path("a/0002_plan.json").read_text())["artefacts"]["profile"] in {"box", "gaussian"}
    assert sorted(p.name for p in sheet.parent.iterdir()) == ["grid.png"]  # no temporary file is left
    picture = matplotlib.image.imread(sheet)
    assert picture.shape[2] >= 3
    assert picture[..., :3].max() > 0.9
    assert (picture[..., 0] != picture[..., 2]).any()  # the label maps are coloured


def test_generate_with_views_numbers_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    views = ["--set", "views.severities=[0, 1, 0.5]", "--set", "views.perturbation_mm=5"]
    views += ["--set", "shape=[32, 36, 28]", "--set", "voxel_size_mm=2.5", "--set", "subsamples=1"]
    strip = ["--set", "artefacts.strip_probability=0", "--set", "artefacts.crop_probability=0"]
    out = tmp_path / "a"
    assert run(["generate", "-o", str(out), "--preview", str(tmp_path / "a.png"), *views, *strip]) == 0
    kinds = ("image.nii.gz", "label.nii.gz", "plan.json")
    expected = {f"0000_view{v}_{kind}" for v in range(3) for kind in kinds}
    expected |= {f"0000_view{v}_displacement.nii.gz" for v in (1, 2)}
    assert {p.name for p in out.iterdir()} == expected
    plans = [json.loads((out / f"0000_view{v}_plan.json").read_text()) for v in range(3)]
    assert [plan["severity"] for plan in plans] == [0.0, 1.0, 0.5]
    assert len({json.dumps(plan["contrast"]["mean"]) for plan in plans}) == 3

    vectors = nib.load(out / "0000_view1_displacement.nii.gz")
    label = nib.load(out / "0000_view1_label.nii.gz")
    assert vectors.shape == (32, 36, 28, 1, 3)
    assert vectors.header.get_intent()[0] == "vector"
    np.testing.assert_array_equal(vectors.affine, label.affine)
    # The anatomy at p of view 1 is that at p + u(p) of view 0; the nearest voxel is right for most.
    moved = np.asarray(vectors.dataobj)[..., 0, :] / 2.5 + np.stack(np.indices((32, 36, 28)), -1)
    at = [moved[..., axis].round().astype(int).clip(0, n - 1) for axis, n in enumerate((32, 36, 28))]
    first, second = (np.asarray(nib.load(out / f"0000_view{v}_label.nii.gz").dataobj) for v in (0, 1))
    inner = (slice(4, -4),) * 3  # what comes in from outside the grid is not known
    assert (first[tuple(at)] == second)[inner].mean() > 1.3 * (first == second)[inner].mean()

    capsys.readouterr()
    assert run(["generate", "-o", str(out), *views]) == 2
    assert "0000_view0_image.nii.gz: exists already" in one_error(capsys)

    # every view replays, and so does its displacement
    again = tmp_path / "again"
    plan = out / "0000_view1_plan.json"
    assert run(["generate", "-o", str(again), "--replay", str(plan), "--preview", str(tmp_path / "b.png")]) == 0
    assert {p.name for p in again.iterdir()} == {f"0000_{kind}" for kind in (*kinds, "displacement.nii.gz")}
    for kind in ("image", "label", "displacement"):
        one, two = (nib.load(p).get_fdata() for p in (out / f"0000_view1_{kind}.nii.gz", again / f"0000_{kind}.nii.gz"))
        np.testing.assert_array_equal(one, two)
    # without a displacement, an old one does not stay
    plan = out / "0000_view0_plan.json"
    assert run(["generate", "-o", str(again), "--replay", str(plan), "--overwrite"]) == 0
    assert not (again / "0000_displacement.nii.gz").exists()


def test_generate_refuses_options_that_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", "-o", str(tmp_path / "a"), *SMALL]) == 0
    capsys.readouterr()
    plan, out, config = str(tmp_path / "a" / "0000_plan.json"), tmp_path / "b", tmp_path / "settings.yaml"
    config.write_text("subsamples: 1\n")
    (tmp_path / "there.png").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for arguments, word in (
        (["--replay", plan, "--n", "1"], "leave out --n"),
        (["--replay", plan, "--seed", "0"], "leave out --seed"),
        (["--replay", plan, "--config", str(config)], "leave out --config"),
        (["--replay", plan, "--preset", "siam", "--n", "2"], "leave out --preset, --n"),
        (["--replay", plan, "--set", "subsamples=1"], "leave out --set"),
        (["--preset", "siam", "--config", str(config)], "give one of them"),
        (["--preset", "brainid"], "no preset 'brainid'; presets that ship: brain-id, "),
        (["--preview", str(tmp_path / "grid.jpg")], "end its name in .png"),
        (["--preview", str(tmp_path / "there.png")], "exists already"),
        (["--preview", str(tmp_path / "file" / "grid.png")], "is not a folder"),
    ):
        assert run(["generate", "-o", str(out), *arguments]) == 2
        assert word in one_error(capsys)
        assert not out.exists()
    assert run(["generate"]) == 2  # the folder has no default
    assert "--output" in one_error(capsys)


def test_the_preview_replaces_another_only_if_told_to(tmp_path: Path) -> None:
    sheet = tmp_path / "grid.png"
    sheet.write_bytes(b"old")
    arguments = ["generate", "-o", str(tmp_path / "a"), "--preview", str(sheet), *TINY_GRID]
    assert run(arguments) == 2
    assert sheet.read_bytes() == b"old"
    assert run([*arguments, "--overwrite"]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")


def test_the_info_command_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    listed = re.search(r"^presets: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert listed is not None
    assert listed.group(1).split(", ") == ["brain-id", "ct", "flair", "infant", "siam", "synthseg", "t1", "t2"]


def test_templates_check_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = head_map()
    write_map(tmp_path / "good.nii.gz", good)
    write_map(tmp_path / "stored_as_float.nii.gz", good.astype(np.float32))
    write_map(tmp_path / "other_grid.nii.gz", good, spacing=(4.0, 3.0, 4.0))
    write_map(tmp_path / "empty.nii.gz", np.zeros_like(good))
    write_map(tmp_path / "fraction.nii.gz", good + np.float32(0.5))
    unknown = good.copy()
    unknown[5, 5, 5] = 999
    write_map(tmp_path / "unknown.nii.gz", unknown)
    assert run(["templates", "check", str(tmp_path), "--scheme", "head"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 4
    for name, why in (
        ("other_grid", "keep maps of different grids"),
        ("empty", "every voxel is 0"),
        ("fraction", "non-integer"),
        ("unknown", "999"),
    ):
        assert any(name in line and why in line for line in errors), (name, errors)


def test_templates_check_passes_a_good_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_map(tmp_path / "a.nii.gz", head_map())
    write_map(tmp_path / "b.nii.gz", head_map().astype(np.float32))
    assert run(["templates", "check", str(tmp_path), "--scheme", "head"]) == 0
    assert "2 label maps, 0 problems" in capsys.readouterr().out


def test_templates_import_reorients_cleans_and_derives_dura(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = head_map()
    data[0, 0, 0] = 511  # a speck in the air
    source = write_map(tmp_path / "in" / "sub.nii.gz", data, spacing=(1.0, 1.0, 1.0))
    assert run(["templates", "import", str(source), "--scheme", "head", "-o", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "sub"
    assert f"note: {folder}: 1 voxels in specks apart from the rest were removed at import" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == ["SOURCE.md", "labels.json", "labels.nii.gz"]
    image = nib.load(folder / "labels.nii.gz")
    labels = np.asarray(image.dataobj)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    record = json.loads((folder / "labels.json").read_text())
    assert record["scheme"] == "head"
    assert list(record["derived"]) == ["540"]
    # By hand: dura is exactly the CSF that has a face neighbour of bone (1 mm voxels, reach 1.2 mm); the rest stays.
    flat = data[::-1]
    bone = np.pad(flat == 515, 1)
    near = np.zeros_like(flat, dtype=bool)
    for axis in range(3):
        for shift in (-1, 1):
            near |= np.roll(bone, shift, axis)[1:-1, 1:-1, 1:-1]
    assert (labels == 540).sum() == (near & (flat == 24)).sum() > 0
    for label in (2, 3, 41, 42, 515):
        assert (labels == label).sum() == (data == label).sum()
    assert (labels == 511).sum() == (data == 511).sum() - 1
    world = image.affine @ [*np.argwhere(labels == 42).mean(0), 1]
    assert world[0] > image.affine[0, 3] + labels.shape[0] / 2  # the right cortex lies to the right


def test_templates_import_writes_nothing_if_one_map_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_map(tmp_path / "in" / "a.nii.gz", head_map())
    bad = head_map()
    bad[3, 3, 3] = 777
    write_map(tmp_path / "in" / "b.nii.gz", bad)
    assert run(["templates", "import", str(tmp_path / "in"), "--scheme", "head", "-o", str(tmp_path / "out")]) == 2
    assert "b.nii.gz" in one_error(capsys)
    assert not (tmp_path / "out").exists()
    assert run(["templates", "import", str(tmp_path / "in"), "--scheme", "haed", "-o", str(tmp_path / "out")]) == 2
    assert "did you mean 'head'?" in one_error(capsys)


def test_templates_list_shows_the_phantom(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["templates", "list"]) == 0
    assert re.search(r"^phantom\thead\t44 labels", capsys.readouterr().out, re.MULTILINE)


TINY = [
    *("--set", "generator.shape=[16, 24, 16]", "--set", "generator.voxel_size_mm=10.0"),
    *("--set", "network.channels=[4, 8, 8]", "--set", "generator.subsamples=1", "--set", "steps=4"),
]


def test_train_on_the_phantom_then_segment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run(["train", "phantom", "-o", str(out), "--device", "cpu", *TINY]) == 0
    manifest = json.loads((out / "train.json").read_text())
    assert manifest["steps"] == 4
    assert manifest["templates"] == ["phantom"]
    assert run(["generate", "-o", str(tmp_path / "scan"), *SMALL]) == 0
    scan = tmp_path / "scan" / "0000_image.nii.gz"
    target = tmp_path / "seg.nii.gz"
    model = str(out / "best.safetensors")
    assert run(["segment", str(scan), "-o", str(target), "--model", model, "--device", "cpu"]) == 0
    assert nib.load(target).shape == nib.load(scan).shape
    capsys.readouterr()
    assert run(["train", "phantom", "-o", str(out), "--device", "cpu", *TINY]) == 2
    assert "--resume" in one_error(capsys)
    assert run(["train", "phantom", "-o", str(out), "--device", "cpu", "--resume", *TINY, "--set", "steps=6"]) == 0
    assert json.loads((out / "train.json").read_text())["steps"] == 6


def test_train_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    for arguments, word in (
        (["nowhere.yaml"], "nowhere.yaml"),
        (["phantom", "--set", "optimizer.name=muon"], "did you mean 'optimiser'?"),
        (["phantom", "--set", "generator.shape=[17, 16, 16]"], "divisible"),
        (["phantom", "--set", "templates=[missing]"], "missing"),
        (["phantom", "--set", "network.channels=[8, 8]"], "at least 3 levels"),
        (["phantom", "--set", "steps=none"], "steps"),
        (["phantom", "--resume"], "no run to resume"),
    ):
        assert run(["train", *arguments, "-o", str(out), "--device", "cpu"]) == 2
        assert word in one_error(capsys)
        assert not out.exists()


def test_train_dry_run_draws_and_does_not_train(tmp_path: Path) -> None:
    assert run(["train", "phantom", "-o", str(tmp_path / "run"), "--dry-run", "--device", "cpu", *TINY]) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["first_batch.png"]


def test_version_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("synthseg ")
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "models: head, siam16, bias-field" in out
    assert "siam16 (default): 1 mm, 17 labels" in out
    assert "bias-field (default of correct-bias): 3 mm, bias-field" in out
    assert "templates:" in out
