"""Rows of benchmarks/pretraining.py and its sweeps as files: kept when they are done, several made at a time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import synthseg
from synthseg.errors import SynthSegError
from synthseg.volume import write_text_atomically


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON of a part of a row, made if it is not there yet."""
    if not file.exists():
        write_text_atomically(file, json.dumps(make(), indent=2) + "\n")
    return json.loads(file.read_text())


def slug(key: str) -> str:
    return key.replace(" ", "_").replace(",", "")


@cache
def code_version() -> dict[str, str | None]:
    """Version of the package, and the commit of the checkout that it is in; None where it is in none."""
    root = Path(__file__).resolve().parents[1]
    commit = None
    if Path(synthseg.__file__).resolve().parent == root / "synthseg":
        words = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
        try:
            top, head = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
            commit = head if Path(top).resolve() == root else None
        except (OSError, ValueError, subprocess.CalledProcessError):
            pass  # no git, or no checkout
    return {"synthseg": synthseg.__version__, "commit": commit}


def stamped(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that is made in ``folder``, with the version of the code and the seconds by the clock that it took.

    A row that was begun before has no seconds, and a version only if it is the same as then.
    """
    begun, fresh = time.monotonic(), not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "version.json"
    if fresh:
        kept(file, code_version)
    row = make()
    same = file.exists() and json.loads(file.read_text()) == code_version()
    wall = round(time.monotonic() - begun, 1) if fresh else None
    return row | {"version": code_version() if same else None, "wall_seconds": wall}


def wall_seconds(folder: Path) -> float | None:
    """Seconds from the first file of a table to its latest row, by the times of the files; None without a row."""
    rows = [file.stat().st_mtime for file in folder.glob("row_*.json")]
    return round(max(rows) - (folder / "settings.json").stat().st_mtime, 1) if rows else None


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Rows of one folder share their settings, also those that are half done. Ends the program if they would not."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    wanted = json.loads(json.dumps(settings))
    had = kept(file, lambda: wanted)
    other = sorted(key for key in {*had, *wanted} if had.get(key) != wanted.get(key))
    if other:
        what = "; ".join(f"{key} was {had.get(key)}, is {wanted.get(key)}" for key in other)
        raise SystemExit(f"{file}: the rows there were made with other settings ({what}); give another --work")


def run_keys(
    keys: list[str],
    options: argparse.Namespace,
    make: Callable[[str, argparse.Namespace], None],
    after: Callable[[], object],
) -> None:
    """Make rows, in this process one after the other, or several at a time in processes of their own.

    One that fails is told of, and the others go on; its file is then not there. ``after`` is called after each row.
    """
    lock = Lock()

    def apart(key: str) -> None:
        subprocess.run([sys.executable, *sys.argv, "--only", key], check=False)
        with lock:
            after()

    if options.jobs > 1:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(apart, keys))
        return
    for key in keys:
        try:
            make(key, options)
        except SynthSegError as error:
            print(f"{key}: {error}", file=sys.stderr, flush=True)
        after()
