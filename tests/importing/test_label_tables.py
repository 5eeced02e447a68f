"""Tables of other tools as label tables: what is read, what is guessed from names, what is refused."""

from pathlib import Path

import pytest

from synthseg.color_tables import write_color_table
from synthseg.errors import LabelError
from synthseg.importing.label_tables import (
    charm_entries,
    freesurfer_entries,
    other_side,
    read_entries,
    table_from,
    tissue_of,
    unknown_tissues,
)
from synthseg.labels import LabelTable, load_scheme


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_colour_table_is_read_with_and_without_colours(tmp_path: Path) -> None:
    text = "# id name\n0 Unknown 0 0 0 0\n\n7 Left-Nucleus 10 20 30 0  # a comment\n8 Right Nucleus 1 2 3\n9\tArea 51\n"
    assert read_entries(written(tmp_path / "lut.txt", text)) == {
        0: ("Unknown", (0, 0, 0)),
        7: ("Left-Nucleus", (10, 20, 30)),
        8: ("Right-Nucleus", (1, 2, 3)),
        9: ("Area-51", None),
    }


def test_a_label_description_of_itk_snap_is_read(tmp_path: Path) -> None:
    text = (
        "################\n# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL\n"
        '    0     0    0    0        0  0  0    "Clear Label"\n'
        '    1   255    0    0        1  1  1    "Grey matter"\n'
        '    7    10   20   30      0.5  1  0    "Area #2"\n'
    )
    assert read_entries(written(tmp_path / "labels.txt", text)) == {
        0: ("Clear-Label", (0, 0, 0)),
        1: ("Grey-matter", (255, 0, 0)),
        7: ("Area-#2", (10, 20, 30)),
    }


def test_what_is_written_for_itk_snap_is_read(tmp_path: Path) -> None:
    table = load_scheme("head")
    write_color_table(tmp_path / "head.txt", table)
    assert read_entries(tmp_path / "head.txt") == {x.id: ("-".join(x.name.split()), x.color) for x in table.labels}


def test_ids_that_no_map_can_hold_are_passed_over(tmp_path: Path) -> None:
    assert read_entries(written(tmp_path / "a.txt", "-1 Outside 0 0 0 0\n2 In 1 2 3 0\n")) == {2: ("In", (1, 2, 3))}
    assert read_entries(written(tmp_path / "a.tsv", "index\tname\n-1\tOutside\n2\tIn\n")) == {2: ("In", None)}


def test_slashes_in_names_become_hyphens(tmp_path: Path) -> None:
    lines = (
        "120 SC-Fat/Muscle 1 2 3 0\n136 Left-Caudate/Putamen 1 2 3 0\n137 Right-Caudate/Putamen 1 2 3 0\n"
        "150 R/C/S 1 2 3 0\n500 right_CA2\\3 1 2 3 0\n"
    )
    table = table_from(read_entries(written(tmp_path / "lut.txt", lines)), [120, 136, 137, 150, 500], "mine")
    assert table.names[1:] == ["SC-Fat-Muscle", "Left-Caudate-Putamen", "Right-Caudate-Putamen", "R-C-S", "right_CA2-3"]
    assert table[136].partner == 137
    assert LabelTable.from_dict(table.to_dict()) == table  # a scheme file with these names can be read


def test_a_dseg_tsv_is_read_by_its_column_names(tmp_path: Path) -> None:
    text = "name\tindex\tcolor\nGray Matter\t1\t#ff8000\nWhite Matter\t2\tn/a\n"
    assert read_entries(written(tmp_path / "dseg.tsv", text)) == {
        1: ("Gray-Matter", (255, 128, 0)),
        2: ("White-Matter", None),
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1 One\nthree Three\n", r"a\.txt, line 2: expected 'id name'.*'three Three'"),
        ("a.txt", "1 One\n1 Other\n", r"line 2: id 1 is One already, and now Other"),
        ("a.txt", '1 255 0 0 1 1 1 " "\n', "line 1: id 1 has no name"),
        ("a.txt", "# nothing\n", "holds no labels; write one a line"),
        ("a.tsv", "index,name\n1,One\n", r"columns 'index' and 'name'"),
        ("a.tsv", "index\tname\none\tOne\n", "line 2: 'index' must be a whole number"),
    ],
)
def test_tables_that_cannot_be_read_name_the_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LabelError, match=message):
        read_entries(written(tmp_path / name, text))


@pytest.mark.parametrize(
    ("name", "tissue"),
    [
        ("ctx-lh-superiorfrontal", "gm"),
        ("Left-Cerebellum-White-Matter", "wm"),
        ("Cerebellar_Grey", "cerebellar_gm"),
        ("WM-hypointensities", "lesion"),
        ("Compact_bone", "bone_cortical"),
        ("Spongy_bone", "bone_cancellous"),
        ("Eye_balls", "eye"),
        ("3rd-Ventricle", "ventricle"),
        ("Left-VentralDC", "brainstem"),
        ("optic nerve", "nerve"),
        ("Hypothalamus", "gm"),
        ("Blood", "vessel"),
        ("Left-Claustrum", "claustrum"),
        ("CC_Central", "wm"),
    ],
)
def test_names_speak_of_tissues(name: str, tissue: str) -> None:
    assert tissue_of(name) == tissue


def test_the_tissues_of_shipped_schemes_are_found_from_their_names() -> None:
    """Names of `siam16` alone lead to its own tissues."""
    for label in load_scheme("siam16").labels[1:]:
        guess = tissue_of(label.name)
        assert guess == label.tissue or {guess, label.tissue} <= {"bone_cortical", "bone_cancellous", "soft", "skin"}


def test_sides_are_found_and_are_partners() -> None:
    assert other_side("Left-Putamen") == "Right-Putamen"
    assert other_side("ctx-rh-insula") == "ctx-lh-insula"
    assert other_side("PUT_R") == "PUT_L"
    assert other_side("Brain-Stem") is None
    table = table_from(
        {1: ("lh_a", None), 2: ("rh_a", None), 3: ("Left-b", None), 4: ("White", None)}, [1, 2, 3, 4], "t"
    )
    assert [label.partner for label in table.labels] == [None, 2, 1, None, None]
    assert len({label.color for label in table.labels}) == 5


def test_a_table_holds_what_the_maps_hold_and_background() -> None:
    table = table_from(freesurfer_entries(), [2, 41, 77, 1001, 2001], "mine")
    assert table.ids.tolist() == [0, 2, 41, 77, 1001, 2001]
    assert [label.tissue for label in table.labels] == ["air", "wm", "wm", "lesion", "gm", "gm"]
    assert table[1001].partner == 2001
    with pytest.raises(LabelError, match=r"no line for the ids \[5000\].*add 'id name'"):
        table_from(freesurfer_entries(), [2, 5000], "mine")
    with pytest.raises(LabelError, match=r"ids \[40000\], but ids end at 32767; give these smaller ones"):
        table_from({40000: ("Large", None)}, [40000], "mine")
    with pytest.raises(LabelError, match="257 labels; at most 256"):
        table_from({i: (f"s{i}", None) for i in range(1, 257)}, range(1, 257), "mine")


def test_undivided_tissues_stand_for_the_classes_inside_them() -> None:
    """By hand: CHARM's grey matter holds cortex (1), cerebellum (5) and nuclei (6 to 12); it has no ventricles (4)
    and no dura (13) of its own, which lie in its CSF."""
    table = table_from(charm_entries(), [1, 2, 3, 5, 6, 7, 8, 9, 10], "charm")
    meant = {label.name: label.to["siam16"] for label in table.labels}
    assert meant["Gray-Matter"] == (1, 5, 6, 7, 8, 9, 10, 11, 12)
    assert meant["CSF"] == (3, 4, 13)
    assert meant["White-Matter"] == (2,)
    assert meant["Compact_bone"] == meant["Spongy_bone"] == (15,)
    assert meant["Blood"] == (14,)
    assert meant["Scalp"] == meant["Eye_balls"] == meant["Muscle"] == (16,)
    assert meant["Background"] == (0,)
    assert table.groups(load_scheme("siam16")).any(0).all()


def test_a_name_without_a_tissue_has_no_place_in_siam16() -> None:
    table = table_from({1: ("Grey", None), 2: ("Thingummy", None)}, [1, 2], "t")
    assert unknown_tissues(table) == ["Thingummy"]
    with pytest.raises(LabelError, match="does not say"):
        table.groups(load_scheme("siam16"))
