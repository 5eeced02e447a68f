"""Which scans a user means: files, folders, quoted wildcards, and text files of paths."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from synthseg.errors import InputError
from synthseg.volume import IMAGE_SUFFIXES, image_stem, image_suffix

SEGMENTATION = "_seg"
# What a run writes beside a scan and its segmentation.
DERIVED = ("_posteriors", "_resampled", "_mask", "_stripped", "_features", "_t1synth", "_unbiased")


@dataclass(frozen=True)
class Scan:
    """A file to segment. ``named``: by the user, so that a mistake in it stops the run; False: found in a folder."""

    path: Path
    named: bool = True


def find_scans(inputs: Sequence[str | Path]) -> list[Scan]:
    """Files as they are; of a folder the sorted scans in it; of a pattern (``*``, ``?``, ``**``) what matches it.

    From folders and patterns, hidden files, segmentations (``*_seg``) and other outputs that lie beside their scan
    are left out, and sub-folders are not searched (``**`` searches them). A path that exists is never a pattern.
    A scan that is named more than once is taken once. Raises InputError if a folder or pattern holds no scan.
    """
    scans: list[Scan] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            scans += _in_folder(path)
        elif not os.path.lexists(path) and glob.has_magic(str(given)):
            scans += _matching(str(given))
        else:
            scans.append(Scan(path))
    first: dict[str, Scan] = {}
    for scan in scans:
        before = first.setdefault(place_of(scan.path), scan)
        if scan.named and not before.named:
            first[place_of(scan.path)] = Scan(before.path)
    return list(first.values())


def place_of(path: Path) -> str:
    """The one path of a file among all that lead to it through folders. A link is a file of its own."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def read_list(path: Path) -> list[str]:
    """The inputs that a UTF-8 text file names, one a line; ``-`` reads standard input.

    Blank lines and lines that begin with ``#`` are left out. Relative paths start at the current folder, as on the
    command line. Raises InputError if the file cannot be read or names nothing.
    """
    name = "standard input" if str(path) == "-" else str(path)
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"{name}: the list cannot be read ({error.strerror}); check the path") from error
    if "\0" in text:
        raise InputError(f"{name}: is not a text file; expected one path a line (scans are given without --from-list)")
    lines = [line.strip() for line in text.splitlines()]
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"{name}: names no scan; expected one path a line")
    return paths


def is_own_output(path: Path) -> bool:
    """Whether a file is a segmentation by its name, or another output whose scan lies beside it."""
    stem = image_stem(path)
    if stem.endswith(SEGMENTATION):
        return True
    for ending in DERIVED:
        if stem.endswith(ending) and len(stem) > len(ending):
            scan = stem[: -len(ending)]
            return any((path.parent / f"{scan}{suffix}").exists() for suffix in IMAGE_SUFFIXES)
    return False


def _in_folder(folder: Path) -> list[Scan]:
    try:
        inside = _scans_among(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    if not inside:
        raise InputError(f"{folder}: no scan in this folder; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return inside


def _matching(pattern: str) -> list[Scan]:
    found = [Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)]
    inside = _scans_among(path for path in found if not path.is_dir())
    if not inside:
        raise InputError(f"{pattern}: no scan matches; expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return inside


def _scans_among(paths: Iterable[Path]) -> list[Scan]:
    return [Scan(path, named=False) for path in sorted(paths) if _is_scan(path)]


def _is_scan(path: Path) -> bool:
    if image_suffix(path) is None or path.name.startswith("."):
        return False
    return path.is_file() and not is_own_output(path)
