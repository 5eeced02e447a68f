"""What a folder holds, what is held out, and the recipe that is written for it."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from synthseg.config import TrainConfig, parse
from synthseg.errors import LabelError, TemplateError
from synthseg.importing.discovery import Found, Survey, look, scheme_of, survey
from synthseg.importing.recipes import LARGEST_PATCH, Machine, choose_grid, hold_out, slug, write_recipe

CPU = Machine("cpu", 2, False)
GPU = Machine("cuda", 16, True)


def write_map(path: Path, ids: np.ndarray | None = None, spacing: tuple[float, ...] = (2.0, 1.0, 1.5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros((9, 12, 10), np.int16)
    data[2:7, 3:10, 1:9] = 3
    data[3:5, 4:6, 2:4] = 2
    image = nib.MGHImage if path.suffix == ".mgz" else nib.Nifti1Image
    nib.save(image((data if ids is None else ids).astype(np.int32), np.diag([*spacing, 1.0])), path)
    return path


def a_survey(spacing: float = 1.0, extent: tuple[float, float, float] = (160.0, 200.0, 180.0), n: int = 6) -> Survey:
    return Survey({f"m{i}": [0, 1] for i in range(n)}, {f"m{i}": spacing for i in range(n)}, extent)


# ---------------------------------------------------------------- layouts


def test_plain_maps_with_a_table_beside_them(tmp_path: Path) -> None:
    write_map(tmp_path / "a.nii.gz")
    write_map(tmp_path / "b.mgz")
    (tmp_path / "labels.txt").write_text("2 A\n3 B\n")
    found = look(tmp_path)
    assert (found.kind, list(found.maps), found.lut) == ("label maps", ["a", "b"], tmp_path / "labels.txt")
    (tmp_path / "other_LUT.txt").write_text("2 C\n3 D\n")
    assert look(tmp_path).lut is None  # which of the two is not known


def test_freesurfer_subjects(tmp_path: Path) -> None:
    for subject in ("s1", "s2", "fsaverage"):
        write_map(tmp_path / subject / "mri" / "aseg.mgz")
    (tmp_path / "s3" / "mri").mkdir(parents=True)
    found = look(tmp_path)
    assert found.kind == "FreeSurfer subjects (aseg.mgz)"
    assert found.maps == {s: tmp_path / s / "mri" / "aseg.mgz" for s in ("s1", "s2")}
    assert "left out: s3" in found.notes[0]
    write_map(tmp_path / "other" / "s4" / "mri" / "aparc+aseg.mgz")
    assert look(tmp_path / "other").kind == "FreeSurfer subjects (aparc+aseg.mgz)"


def test_charm_output(tmp_path: Path) -> None:
    write_map(tmp_path / "m2m_ernie" / "final_tissues.nii.gz")
    write_map(tmp_path / "p" / "m2m_two" / "final_tissues.nii.gz")
    lut = tmp_path / "m2m_ernie" / "final_tissues_LUT.txt"
    lut.write_text("2 Gray-Matter 0 0 0 0\n3 CSF 0 0 0 0\n")
    found = look(tmp_path)
    assert list(found.maps) == ["ernie", "two"]
    assert found.lut == lut
    write_map(tmp_path / "q" / "m2m_three" / "label_prep" / "tissue_labeling_upsampled.nii.gz")
    found = look(tmp_path / "q")
    assert list(found.maps) == ["three"]
    table, _ = scheme_of(found, survey(found), None, None, "mine")
    assert not isinstance(table, str)
    assert table.names == ["Background", "Gray-Matter", "CSF"]


def test_a_bids_derivative(tmp_path: Path) -> None:
    write_map(tmp_path / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_desc-x_dseg.nii.gz")
    write_map(tmp_path / "sub-02" / "anat" / "sub-02_desc-x_dseg.nii.gz")
    (tmp_path / "desc-x_dseg.tsv").write_text("index\tname\n2\tWhite\n3\tGrey\n")
    found = look(tmp_path)
    assert set(found.maps) == {"sub-01_ses-a_desc-x", "sub-02_desc-x"}
    assert found.lut == tmp_path / "desc-x_dseg.tsv"
    write_map(tmp_path / "sub-02" / "anat" / "sub-02_desc-y_dseg.nii.gz")
    with pytest.raises(TemplateError, match=r"several segmentations \(desc-x_dseg, desc-y_dseg\).*--desc x or y$"):
        look(tmp_path)


def fmriprep(folder: Path, *specifiers: str) -> Path:
    """A derivative of two subjects, the first with two runs, with the segmentations that the specifiers name."""
    for scan in ("sub-01_run-1", "sub-01_run-2", "sub-02"):
        for specifier in specifiers:
            write_map(folder / scan.split("_")[0] / "anat" / f"{scan}{specifier}_dseg.nii.gz")
    return folder


def test_a_bids_derivative_with_several_segmentations(tmp_path: Path) -> None:
    fmriprep(tmp_path, "", "_desc-aseg", "_desc-aparcaseg")
    for name in ("desc-aseg_dseg.tsv", "desc-aparcaseg_dseg.tsv"):
        (tmp_path / name).write_text("index\tname\n2\tWhite\n3\tGrey\n")
    kinds = r"\(desc-aparcaseg_dseg, desc-aseg_dseg, dseg\)"
    with pytest.raises(
        TemplateError, match=rf"several segmentations {kinds}; choose with --desc aparcaseg or aseg or none"
    ):
        look(tmp_path)
    for desc in ("aseg", "desc-aseg"):
        found = look(tmp_path, desc)
        assert list(found.maps) == [f"{scan}_desc-aseg" for scan in ("sub-01_run-1", "sub-01_run-2", "sub-02")]
        assert (found.lut, found.notes) == (tmp_path / "desc-aseg_dseg.tsv", ())
    found = look(tmp_path, "none")
    assert list(found.maps) == ["sub-01_run-1", "sub-01_run-2", "sub-02"]
    assert found.lut is None
    with pytest.raises(TemplateError, match=rf"no segmentation for --desc aparc {kinds}; choose with --desc"):
        look(tmp_path, "aparc")
    (tmp_path / "sub-01" / "anat" / "sub-01_run-2_desc-aseg_dseg.nii.gz").unlink()
    assert look(tmp_path, "aseg").notes == ("no desc-aseg_dseg, left out: sub-01_run-2",)


def test_space_and_resolution_decide_beside_desc(tmp_path: Path) -> None:
    fmriprep(tmp_path, "", "_desc-aseg", "_space-MNI152NLin2009cAsym_res-2")
    with pytest.raises(TemplateError, match=r"\(dseg, space-MNI152NLin2009cAsym_res-2_dseg\); link those of one kind"):
        look(tmp_path, "none")
    assert len(look(tmp_path, "aseg").maps) == 3
    fmriprep(tmp_path / "t1w", "_space-T1w_desc-aseg", "_space-T1w_desc-x")
    table = tmp_path / "t1w" / "desc-aseg_dseg.tsv"
    for path in (table, table.with_name("dseg.tsv")):
        path.write_text("index\tname\n2\tWhite\n3\tGrey\n")
    assert look(tmp_path / "t1w", "aseg").lut == table
    assert look(tmp_path / "t1w", "x").lut == table.with_name("dseg.tsv")


def test_desc_is_refused_where_there_is_no_bids_derivative(tmp_path: Path) -> None:
    file = write_map(tmp_path / "a.nii.gz")
    for place in (tmp_path, file):
        with pytest.raises(TemplateError, match=r"no BIDS derivative .*; leave out --desc aseg"):
            look(place, "aseg")
    with pytest.raises(TemplateError, match="no such folder"):
        look(tmp_path / "nowhere", "aseg")


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="no such folder"):
        look(tmp_path / "nowhere")
    with pytest.raises(TemplateError, match=r"holds no label maps; expected .*aseg\.mgz.*m2m_"):
        look(tmp_path)


def test_two_maps_of_one_name_are_refused(tmp_path: Path) -> None:
    write_map(tmp_path / "a.nii.gz")
    write_map(tmp_path / "a.mgz")
    with pytest.raises(TemplateError, match="more than one map named a"):
        look(tmp_path)


def test_the_survey_measures_heads_and_names_every_bad_map(tmp_path: Path) -> None:
    write_map(tmp_path / "a.nii.gz")
    found = look(tmp_path)
    seen = survey(found)
    assert seen.all_ids == [0, 2, 3]
    assert seen.extent_mm == (5 * 2.0, 7 * 1.0, 8 * 1.5)
    assert seen.spacing_mm["a"] == pytest.approx(3 ** (1 / 3))
    write_map(tmp_path / "b.nii.gz", np.zeros((4, 5, 6)))
    image = np.linspace(0, 1, 120, dtype=np.float32).reshape(4, 5, 6)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "c.nii.gz")
    with pytest.raises(TemplateError, match=r"2 of 3 maps.*b\.nii\.gz.*c\.nii\.gz: holds non-integer"):
        survey(look(tmp_path))


# ---------------------------------------------------------------- what the ids mean


def found_with(ids: list[int]) -> tuple[Found, Survey]:
    return Found("label maps", {"a": Path("a.nii.gz")}), Survey({"a": ids}, {"a": 1.0}, (1.0, 1.0, 1.0))


def test_freesurfer_and_charm_ids_are_recognised_small_numbers_are_not() -> None:
    assert scheme_of(*found_with([0, 2, 3, 41, 42, 515]), None, None, "mine")[0] == "head"
    with pytest.raises(LabelError, match=r"ids 0, 1, 2, 9.*fit the schemes brainweb, siam16.*id name.*--labels FILE"):
        scheme_of(*found_with([0, 1, 2, 9]), None, None, "mine")
    with pytest.raises(LabelError, match=r"nothing says what they mean; write a text file"):
        scheme_of(*found_with([0, 400, 401]), None, None, "mine")


def test_a_scheme_must_have_the_ids() -> None:
    assert scheme_of(*found_with([0, 1, 16]), "siam16", None, "mine")[0] == "siam16"
    with pytest.raises(LabelError, match=r"ids \[17\] are not in scheme 'siam16'"):
        scheme_of(*found_with([0, 17]), "siam16", None, "mine")


@pytest.mark.parametrize(("folder", "name"), [("My Heads-2", "my_heads_2"), ("head", "head_maps"), ("--", "mine")])
def test_names_for_runs_and_schemes(folder: str, name: str, tmp_path: Path) -> None:
    assert slug(tmp_path / folder) == name


# ---------------------------------------------------------------- what is held out


def test_holding_out_grows_with_the_number_of_heads() -> None:
    for n, expected in ((1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (20, 4), (30, 6), (100, 6)):
        names = [f"h{i:03}" for i in range(n)]
        chosen, why = hold_out(names, set(names))
        assert len(chosen) == expected, n
        assert len(set(chosen)) == expected
        assert str(n) in why


def test_sessions_of_a_subject_stay_together_and_vague_maps_train() -> None:
    names = [f"sub-{i:02}_ses-{s}" for i in range(5) for s in "ab"]
    chosen, _ = hold_out(names, set(names))
    assert len(chosen) == 2
    assert chosen[0].split("_")[0] == chosen[1].split("_")[0]
    assert hold_out(names, set(names[:3]))[0] == names[:2]  # of sub-01 one map is not exact
    chosen, why = hold_out(names, set())
    assert chosen == []
    assert "Dice needs" in why


# ---------------------------------------------------------------- grid and recipe


def test_the_patch_covers_the_head_and_fits_the_network() -> None:
    grid = choose_grid(a_survey(), CPU)
    assert grid.voxel_size_mm == 2.0
    assert "no GPU" in grid.why_voxel
    assert grid.shape == (96, 112, 96)  # 168, 210 and 189 mm of 2 mm voxels, up to multiples of 16
    assert choose_grid(a_survey(), GPU).voxel_size_mm == 1.0
    assert choose_grid(a_survey(0.7), GPU).voxel_size_mm == 1.0
    assert choose_grid(a_survey(1.6), GPU).voxel_size_mm == 2.0
    assert choose_grid(a_survey(), CPU, 3.5).voxel_size_mm == 3.5


def test_a_patch_that_is_too_large_is_cut_down() -> None:
    grid = choose_grid(a_survey(extent=(200.0, 260.0, 300.0)), CPU, 1.0)
    assert np.prod(grid.shape) <= LARGEST_PATCH["cpu"]
    assert max(grid.shape) - min(grid.shape) <= 16
    assert "patches" in grid.why_shape
    assert choose_grid(a_survey(extent=(170.0, 232.0, 238.0)), CPU).shape == (96, 112, 112)  # whole: 96, 128, 128


def test_a_small_map_gets_more_than_one_voxel_at_the_coarsest_level() -> None:
    assert choose_grid(a_survey(extent=(8.0, 11.0, 9.0)), GPU).shape == (16, 32, 16)
    assert choose_grid(a_survey(extent=(8.0, 20.0, 9.0)), GPU).shape == (16, 32, 16)
    assert choose_grid(a_survey(extent=(8.0, 9.0, 11.0)), CPU, 3.0).shape == (8, 8, 16)  # without subpixel


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("voxel", [None, 1.0, 4.0])
def test_the_recipe_parses_and_every_key_is_explained(machine: Machine, voxel: float | None) -> None:
    text = write_recipe(
        name="mine",
        source="maps: 'mine'",
        scheme=("scheme.json", "9 labels"),
        seen=a_survey(),
        held_out=(["m3"], "1 of 6"),
        machine=machine,
        grid=choose_grid(a_survey(), machine, voxel),
    )
    config = parse(TrainConfig, yaml.safe_load(text), "text")
    assert config.templates == ("templates",)
    assert config.validation_templates == ("held_out",)
    assert all(side % config.network.multiple == 0 for side in config.generator.shape)
    assert config.precision == ("bf16" if machine.bf16 else "fp32")
    settings = [line for line in text.splitlines() if ": " in line and not line.startswith("#")]
    assert len(settings) > 25
    assert sum("# " in line for line in settings) >= len(settings) - 2


def test_a_recipe_that_goes_on_from_a_model_takes_its_grid() -> None:
    base = parse(
        TrainConfig,
        {"network": {"channels": [8, 16, 24]}, "generator": {"voxel_size_mm": 1.5, "shape": [64, 72, 80]}},
        "base",
    )
    grid = choose_grid(a_survey(), CPU)
    text = write_recipe(
        name="mine",
        source="maps",
        scheme=("head", "given"),
        seen=a_survey(),
        held_out=([], "none"),
        machine=CPU,
        grid=grid,
        start=("siam16", base),
    )
    config = parse(TrainConfig, yaml.safe_load(text), "text")
    assert config.init == "siam16"
    assert config.network == base.network
    assert config.generator.voxel_size_mm == 1.5
    assert config.generator.shape == (64, 72, 80)
    assert config.optimiser.muon_learning_rate < 0.02
