"""The table of volumes of a batch, which several runs may fill together: TSV if its name ends so, else CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from synthseg.batch.claims import held
from synthseg.errors import OutputError
from synthseg.inputs import place_of

if TYPE_CHECKING:
    from synthseg.labels import LabelTable

Row = Mapping[str, str | float]
SUFFIXES = (".csv", ".tsv", ".txt")


def check_name(path: Path) -> None:
    """Raise OutputError unless the name is that of a table of text."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"{path}: expected a name that ends in .tsv (a table with tabs), .csv or .txt (with commas)")


class VolumeTable:
    """One row per scan. Rows that are in the file stay, those of the same scan are replaced.

    A scan may be named by any path to it; what is not the path of a file, such as the names of BIDS, stands for itself.
    Each change reads the file again and writes it whole, with a claim on it, so that nothing is lost when two runs
    share a table.

    Parameters
    ----------
    order : names of the scans of this run, in the order in which their rows are to stand.
    overwrite : begin a new table, whatever the file holds.
    """

    def __init__(self, path: Path, order: Sequence[str] = (), overwrite: bool = False) -> None:
        self.path = path
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._keys: dict[str, str] = {}
        self._rank = {self._key(name): rank for rank, name in enumerate(order)}
        self._afresh = overwrite
        self._waiting: dict[str, Row] = {}
        self._known: dict[str, Row] = {} if overwrite else dict(self._read())

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise OutputError unless rows with these columns can be added to the file."""
        if not self._afresh:
            _check_columns(self.path, self._known.values(), columns)

    def row(self, scan: str) -> Row | None:
        """The row of a scan, or None if the file has none."""
        if self._key(scan) not in self._known and not self._afresh:
            self._known = dict(self._read())
        return self._known.get(self._key(scan))

    def add(self, row: Row) -> None:
        """Write a row, and those that could not be written before. Raises OutputError if that fails."""
        from synthseg.reports.volumes import write_volumes_csv

        self._waiting[self._key(str(row["scan"]))] = row
        with held(self.path):
            rows: dict[str, Row] = {} if self._afresh else dict(self._read())
            for key, new in self._waiting.items():
                rows[key] = new
            _check_columns(self.path, rows.values(), list(row))
            write_volumes_csv(self.path, [rows[x] for x in sorted(rows, key=lambda key: self._rank.get(key, -1))])
        self._known, self._afresh = rows, False
        self._waiting.clear()

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.exists():
            return {}
        try:
            text = self.path.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read ({error.strerror}); choose another name") from error
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter)
        header = next(lines, [])
        rows = [line for line in lines if line]
        if header[:1] != ["scan"] or any(len(line) != len(header) for line in rows):
            raise OutputError(
                f"{self.path}: exists already, and is not a table of volumes; "
                "use --overwrite to replace it, or choose another name"
            )
        return {self._key(line[0]): dict(zip(header, line, strict=True)) for line in rows}

    def _key(self, scan: str) -> str:
        """What rows of one scan share; looked up once, as the table is read again for every scan."""
        if scan not in self._keys:
            self._keys[scan] = place_of(Path(scan)) if os.path.lexists(scan) else scan
        return self._keys[scan]


def _check_columns(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    if any(list(row) != list(columns) for row in rows):
        raise OutputError(
            f"{path}: has other columns than this run writes (another model, scheme, or --no-quality?); "
            "use --overwrite to begin a new table, or choose another name"
        )


def columns_of(table: LabelTable, judged: bool) -> list[str]:
    """The columns of rows of a label table, with or without those of the quality."""
    from synthseg.inference import Segmentation
    from synthseg.quality import Quality
    from synthseg.reports.volumes import volume_row

    nothing_ml = dict.fromkeys(table.names, 0.0)
    quality = Quality({}, None, (), True) if judged else None
    blank = Segmentation(np.zeros((1, 1, 1), np.uint8), np.eye(4), table, nothing_ml, nothing_ml, quality)
    return list(volume_row("", blank, table))
