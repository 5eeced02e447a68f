"""Rows of benchmarks/pretraining.py and its sweeps as files: kept when they are done, several made at a time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from synthseg.errors import SynthSegError
from synthseg.volume import write_text_atomically


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON of a part of a row, made if it is not there yet."""
    if not file.exists():
        write_text_atomically(file, json.dumps(make(), indent=2) + "\n")
    return json.loads(file.read_text())


def slug(key: str) -> str:
    return key.replace(" ", "_").replace(",", "")


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
