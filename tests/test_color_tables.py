"""Colour tables, read back as the viewers read them."""

import re
from pathlib import Path

import numpy as np
import pytest

from synthseg.color_tables import color_table_paths, write_all, write_color_table
from synthseg.errors import OutputError
from synthseg.importing.label_tables import read_entries
from synthseg.labels import Label, LabelTable, load_scheme


@pytest.fixture(params=["siam16", "head45", "freesurfer"])
def table(request: pytest.FixtureRequest) -> LabelTable:
    return load_scheme(request.param)


def expected(table: LabelTable) -> dict[int, tuple[str, tuple[int, ...]]]:
    return {label.id: (label.name, tuple(label.color)) for label in table.labels}


def test_freesurfer_reads_its_table(tmp_path: Path, table: LabelTable) -> None:
    path = tmp_path / "a_FreeSurferColorLUT.txt"
    write_color_table(path, table)
    assert read_entries(path) == expected(table)
    rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(len(row) == 6 and row[5] == "0" for row in rows)  # 0 is opaque
    ids = [int(row[0]) for row in rows]
    assert ids == sorted(ids)


def test_fsleyes_reads_its_table(tmp_path: Path, table: LabelTable) -> None:
    """As FSLeyes 1.x does: numbers with genfromtxt, names on a second pass over all lines."""
    path = tmp_path / "a.lut"
    write_color_table(path, table)
    numbers = np.genfromtxt(path, usecols=(0, 1, 2, 3))
    names = [line.split(None, 4)[4].strip() for line in path.read_text().splitlines()]
    read = {
        int(row[0]): (name, tuple(int(v) for v in np.rint(row[1:] * 255)))
        for row, name in zip(numbers, names, strict=True)
    }
    assert read == {i: entry for i, entry in expected(table).items() if i != 0}
    assert numbers[:, 1:].max() <= 1


def test_itk_snap_reads_its_table(tmp_path: Path, table: LabelTable) -> None:
    path = tmp_path / "a.txt"
    write_color_table(path, table)
    text = path.read_text()
    assert "# ITK-SnAP Label Description File" in text
    read = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            found = re.fullmatch(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+([\d.]+)\s+([01])\s+([01])\s+"(.*)"', line)
            assert found, line
            number, r, g, b, opacity, visible, mesh, name = found.groups()
            read[int(number)] = (name, (int(r), int(g), int(b)))
            assert float(opacity) == int(visible) == int(mesh) == (int(number) > 0)
    assert read == expected(table)


def test_slicer_reads_its_table(tmp_path: Path, table: LabelTable) -> None:
    path = tmp_path / "a.ctbl"
    write_color_table(path, table)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Color table file")
    assert lines[1] == f"# {len(table)} values"
    rows = [line.split(" ") for line in lines[2:]]
    assert {int(r[0]): (r[1], tuple(map(int, r[2:5]))) for r in rows} == expected(table)
    assert [int(r[5]) for r in rows] == [0 if int(r[0]) == 0 else 255 for r in rows]


def test_names_with_blanks_and_quotes_break_no_format(tmp_path: Path) -> None:
    odd = LabelTable("my heads", (Label(0, "Background", (0, 0, 0)), Label(700, 'the "other" part', (1, 2, 3))))
    fs, fsleyes, itk, slicer = write_all(tmp_path, odd)
    assert [p.name for p in (fs, fsleyes, itk, slicer)] == [
        *("my_heads_FreeSurferColorLUT.txt", "my_heads.lut", "my_heads.txt", "my_heads.ctbl")
    ]
    assert fs.read_text().splitlines()[-1].split() == ["700", 'the_"other"_part', "1", "2", "3", "0"]
    assert fsleyes.read_text() == '700 0.00392 0.00784 0.01176 the "other" part\n'
    assert itk.read_text().splitlines()[-1].endswith("\"the 'other' part\"")
    assert slicer.read_text().splitlines()[-1].split(" ") == ["700", 'the_"other"_part', "1", "2", "3", "255"]


def test_all_tables_are_written_into_a_new_folder(tmp_path: Path) -> None:
    table = load_scheme("siam16")
    paths = write_all(tmp_path / "new", table)
    assert paths == color_table_paths(tmp_path / "new", table)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(p.name for p in paths)


@pytest.mark.parametrize("name", ["a.csv", "a", "FreeSurferColorLUT", "a.lut.gz"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="not the name of a colour table"):
        write_color_table(tmp_path / name, load_scheme("siam16"))
    assert list(tmp_path.iterdir()) == []
