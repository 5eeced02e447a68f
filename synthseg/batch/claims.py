"""Claims: which of several runs on one folder does a scan, and whose turn it is to write a shared table.

A claim is a lock of the operating system on a small hidden file beside the output, so that it ends with the process
that holds it, however that ends. The file is removed with the claim.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from synthseg.errors import OutputError

LEFTOVER_S = 24 * 3600.0
_LEFTOVER = re.compile(r"\.synthseg-[0-9a-f]{16,32}(\.|$)")
_ATTEMPTS = 20


class Claim:
    """The right to write one output, held by one run at a time. Folders that it makes and nobody fills are removed."""

    def __init__(self, output: Path) -> None:
        real = os.path.realpath(output)
        self.output = output
        self._file = Path(real).parent / f".synthseg-{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}.lock"
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    def take(self, timeout_s: float = 0.0) -> bool:
        """Take the claim, waiting at most ``timeout_s`` (negative: for ever). False if another run holds it.

        Raises OutputError if the folder cannot be made. On a file system without locks every run gets its claim:
        files are still written whole, but two runs may do one scan twice.
        """
        for _ in range(_ATTEMPTS):
            try:
                self._make_folder()
            except OSError as error:
                raise OutputError(
                    f"{self.output}: cannot be written ({error.strerror}); choose another place"
                ) from error
            lock = self._lock = FileLock(self._file, thread_local=False)  # known before it is held: see release
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a file system without flock
                    lock.acquire(timeout=timeout_s, poll_interval=0.2)
            except Timeout:
                self._lock = None
                return False
            except FileNotFoundError:
                self._lock = None
                continue  # another run removed the empty folder in between
            except OSError:
                self._lock = None
            return True
        raise OutputError(f"{self.output}: its folder disappears again and again; choose another place")

    def release(self) -> None:
        """Give the claim up. Does nothing if it is not held; one whose taking was interrupted is given up too."""
        if self._lock is not None and self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._file.unlink()  # while it is locked: who waits for it sees that this file is gone
            self._lock.release()
        self._lock = None
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails, as it should, unless it is empty
        self._made = []

    def _make_folder(self) -> None:
        missing = []
        folder = self._file.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._made += missing


@contextlib.contextmanager
def held(output: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the claim on a file that several runs change, for one change. Raises OutputError if it is not to be had."""
    claim = Claim(output)
    if not claim.take(timeout_s):
        raise OutputError(
            f"{output}: another run holds it for {timeout_s:.0f} s already; end that run, or write elsewhere"
        )
    try:
        yield
    finally:
        claim.release()


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove what a killed run left in these folders: temporary files of ours that nobody wrote to for a day."""
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in list(folder.glob(".synthseg-*")):
                if _LEFTOVER.match(path.name) and time.time() - path.lstat().st_mtime > LEFTOVER_S:
                    with contextlib.suppress(OSError):
                        path.unlink()
