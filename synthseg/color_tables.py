"""Colour tables of a label scheme, in the formats of the usual viewers.

======================== ============================ ==========================================================
name ends in             viewer                       a line
======================== ============================ ==========================================================
FreeSurferColorLUT.txt   Freeview, FreeSurfer, MRtrix ``id name R G B 0`` (0 is opaque there)
.lut                     FSLeyes                      ``id r g b name``, colours from 0 to 1
.ctbl                    3D Slicer                    ``id name R G B A``, no blanks in names
.txt (any other)         ITK-SNAP                     ``id R G B opacity visible mesh "name"``
======================== ============================ ==========================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from synthseg.errors import OutputError
from synthseg.labels import Label, LabelTable
from synthseg.volume import write_text_atomically

FREESURFER_SUFFIX = "FreeSurferColorLUT.txt"
_ENDINGS = (f"_{FREESURFER_SUFFIX}", ".lut", ".txt", ".ctbl")

_ITK_SNAP_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""


def write_color_table(path: str | Path, table: LabelTable) -> None:
    """Write the ids, names and colours of a scheme in the format that the file name asks for.

    Raises OutputError if the name asks for none. The file is written whole or not at all.
    """
    write_text_atomically(path, _format_of(Path(path))(table))


def write_all(folder: str | Path, table: LabelTable) -> list[Path]:
    """Write the table in every format into a folder, as ``<scheme>_FreeSurferColorLUT.txt``, ``<scheme>.lut``,
    ``<scheme>.txt`` and ``<scheme>.ctbl``; return the paths."""
    paths = color_table_paths(folder, table)
    for path in paths:
        write_color_table(path, table)
    return paths


def color_table_paths(folder: str | Path, table: LabelTable) -> list[Path]:
    """What `write_all` writes."""
    return [Path(folder) / f"{_word(table.name)}{ending}" for ending in _ENDINGS]


def _format_of(path: Path) -> Callable[[LabelTable], str]:
    name = path.name.lower()
    if name.endswith(FREESURFER_SUFFIX.lower()):
        return _freesurfer
    formats = {".lut": _fsleyes, ".ctbl": _slicer, ".txt": _itk_snap}
    if path.suffix.lower() not in formats:
        raise OutputError(
            f"{path}: not the name of a colour table; end it in _{FREESURFER_SUFFIX} (Freeview), .lut (FSLeyes), "
            ".txt (ITK-SNAP) or .ctbl (3D Slicer)"
        )
    return formats[path.suffix.lower()]


def _ordered(table: LabelTable) -> list[Label]:
    """By id: some viewers read no further than the first id that goes back."""
    return sorted(table.labels, key=lambda label: label.id)


def _word(name: str) -> str:
    """A name without blanks."""
    return re.sub(r"\s+", "_", name.strip())


def _freesurfer(table: LabelTable) -> str:
    width = max(len(label.name) for label in table.labels)
    lines = [f"# {_word(table.name)}", f"#{'No.':<5} {'Label Name:':<{width}}   R   G   B   A"]
    for label in _ordered(table):
        r, g, b = label.color
        lines.append(f"{label.id:<6d} {_word(label.name):<{width}} {r:3d} {g:3d} {b:3d}   0")
    return "\n".join(lines) + "\n"


def _fsleyes(table: LabelTable) -> str:
    """Background is left out: it would be drawn over the scan. Comments are not allowed."""
    lines = []
    for label in _ordered(table):
        if label.id:
            r, g, b = (value / 255 for value in label.color)
            lines.append(f"{label.id} {r:.5f} {g:.5f} {b:.5f} {label.name}")
    return "\n".join(lines) + "\n"


def _itk_snap(table: LabelTable) -> str:
    lines = []
    for label in _ordered(table):
        r, g, b = label.color
        shown = 0 if label.id == 0 else 1
        name = label.name.replace('"', "'")
        lines.append(f'{label.id:5d}  {r:3d}  {g:3d}  {b:3d}        {shown}  {shown}  {shown}    "{name}"')
    return _ITK_SNAP_HEADER + "\n".join(lines) + "\n"


def _slicer(table: LabelTable) -> str:
    lines = [f"# Color table file {_word(table.name)}.ctbl", f"# {len(table)} values"]
    for label in _ordered(table):
        r, g, b = label.color
        lines.append(f"{label.id} {_word(label.name)} {r} {g} {b} {0 if label.id == 0 else 255}")
    return "\n".join(lines) + "\n"
