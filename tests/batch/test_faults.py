"""What goes wrong on real machines: full disks, killed and interrupted runs, damaged files, two runs at once.

Each run is a process of its own. Afterwards every file with a proper name is whole, and the same command completes
what is missing.
"""

import csv
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from synthseg.batch.resume import damage
from synthseg.cli import run
from tests.segmenting import SCRIPT, fake_checkpoint_module, write_scan

ROOT = SCRIPT.parents[1]
resource = pytest.importorskip("resource", reason="processes of Unix")
WAIT_S = 250.0


def start(
    *arguments: object, delay_s: float = 0.0, kill_at: int | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Begin ``synthseg segment`` with the double of the model."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGMENTING_DELAY_S": str(delay_s), "OMP_NUM_THREADS": "1"}
    if kill_at is not None:
        environment["SEGMENTING_KILL_AT"] = str(kill_at)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so all that they start.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, messages = process.communicate(timeout=WAIT_S)
    return process.returncode, messages


def segment(*arguments: object, **options: Any) -> tuple[int, str]:
    return finish(start(*arguments, **options))


Again = Callable[..., tuple[int, str]]


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Again:
    """Run the command in this process: quicker, where nothing has to happen to it."""
    monkeypatch.setitem(sys.modules, "synthseg.networks.checkpoint", fake_checkpoint_module())

    def segment_here(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run(["segment", *map(str, arguments), "--device", "cpu"])
        return code, capsys.readouterr().err

    return segment_here


def make_scans(folder: Path, count: int) -> list[Path]:
    return [write_scan(folder / f"s{index}.nii.gz", index) for index in range(count)]


def visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def names(folder: Path) -> list[str]:
    return [path.name for path in visible(folder)]


def assert_whole(folder: Path) -> None:
    for path in visible(folder):
        assert damage(path) == "", path


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -------------------------------------------------------------------------------------------------- full disk


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of that size at ``folder``; the test is skipped where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path, again: Again) -> None:
    scans, out = make_scans(tmp_path / "in", 4), tmp_path / "out"
    with small_disk(out, 48):  # room for one scan's probabilities, not for four
        code, messages = again(tmp_path / "in", "-o", out, "--posteriors", "--volumes", tmp_path / "v.csv")
        assert code == 1
        failed = [line for line in messages.splitlines() if line.startswith("error: ")]
        assert failed
        assert all("No space left on device" in line for line in failed)
        assert "Traceback" not in messages
        assert_whole(out)
        assert hidden(out) == []
        done = {path.name for path in visible(out) if "posteriors" in path.name}
        assert len(done) == len(scans) - len(failed)

        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        code, messages = again(tmp_path / "in", "-o", out, "--posteriors", "--volumes", tmp_path / "v.csv")
        assert code == 0
        assert len(visible(out)) == 2 * len(scans)
        assert len(table(tmp_path / "v.csv")) == len(scans)
        assert messages.count("skipped") == len(done) + (1 if done else 0)  # each, and the sum of them


def test_files_may_not_become_large(tmp_path: Path, again: Again) -> None:
    """The same by a limit of the process, for machines where nothing can be mounted."""
    make_scans(tmp_path / "in", 2)
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    code, messages = segment(tmp_path / "in", "-o", out, "--posteriors", preexec_fn=limit)
    assert code == 1
    assert messages.count("error: ") == 2
    assert "File too large" in messages
    assert_whole(out)
    assert hidden(out) == []
    assert names(out) == ["s0_seg.nii.gz", "s1_seg.nii.gz"]
    before = {path: path.stat().st_mtime_ns for path in visible(out)}
    assert again(tmp_path / "in", "-o", out, "--posteriors")[0] == 0
    assert len(visible(out)) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


# ----------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("kill_at", [1, 5])
def test_killed_while_writing(tmp_path: Path, kill_at: int, again: Again) -> None:
    make_scans(tmp_path / "in", 3)
    out, volumes = tmp_path / "out", tmp_path / "out" / "v.csv"
    wanted = [tmp_path / "in", "-o", out, "--mask", "--volumes", volumes]
    code, _ = segment(*wanted, kill_at=kill_at)
    assert code == -signal.SIGKILL
    assert_whole(out)
    assert len(visible(out)) < 7
    before = {path: path.stat().st_mtime_ns for path in visible(out) if path != volumes}
    code, messages = again(*wanted)
    assert code == 0, messages
    assert names(out) == [*(f"s{i}_{kind}.nii.gz" for i in range(3) for kind in ("mask", "seg")), "v.csv"]
    assert len(table(volumes)) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert_whole(out)


# ------------------------------------------------------------------------------------------------ interrupted


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, expected: int, again: Again) -> None:
    make_scans(tmp_path / "in", 6)
    out, html = tmp_path / "out", tmp_path / "r.html"
    wanted = [tmp_path / "in", "-o", out, "--volumes", tmp_path / "v.csv", "--report", html]
    process = start(*wanted, delay_s=1.0)
    until(lambda: out.is_dir() and visible(out))
    process.send_signal(number)
    code, messages = finish(process)
    assert code == expected
    assert "Traceback" not in messages
    assert ("error: interrupted" in messages.splitlines()) == (number == signal.SIGINT)
    done = names(out)
    assert 1 <= len(done) < 6
    assert f"{len(done)} of 6 done; the same command goes on" in messages.splitlines()
    assert_whole(out)
    assert hidden(out) == []  # neither temporary files nor claims
    assert sorted(table(tmp_path / "v.csv")) == [name.replace("_seg", "") for name in done]
    assert html.read_text().count("s0.nii.gz") > 0  # what was done is in the report
    assert re.search(rf"interrupted\W+.*{len(done)} of 6 done", html.read_text())
    code, messages = again(*wanted)
    assert code == 0
    assert f"{6 - len(done)} done, {len(done)} skipped" in messages
    assert len(table(tmp_path / "v.csv")) == 6
    assert "of 6 done" not in html.read_text()


# ---------------------------------------------------------------------------------------------- bad inputs


def test_a_damaged_file_in_the_middle(tmp_path: Path, again: Again) -> None:
    scans = make_scans(tmp_path / "in", 5)
    scans[2].write_bytes(scans[2].read_bytes()[:-500])
    code, messages = again(tmp_path / "in", "-o", tmp_path / "out", "--volumes", tmp_path / "v.csv")
    assert code == 1
    (line,) = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert str(scans[2]) in line
    assert "4 done, 1 failed" in messages
    assert names(tmp_path / "out") == [f"s{index}_seg.nii.gz" for index in (0, 1, 3, 4)]
    assert sorted(table(tmp_path / "v.csv")) == [f"s{index}.nii.gz" for index in (0, 1, 3, 4)]


def without_root_rights() -> None:
    """Permissions hold for root as well: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (Linux) before the program."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):
            if libc.prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
                raise OSError(ctypes.get_errno(), "prctl")


@pytest.mark.parametrize("what", ["folder", "file", "output"])
def test_without_permission(tmp_path: Path, what: str) -> None:
    scans = make_scans(tmp_path / "in", 2)
    out = tmp_path / "out"
    out.mkdir()
    forbidden = {"folder": tmp_path / "in", "file": scans[0], "output": out}[what]
    mode = forbidden.stat().st_mode
    forbidden.chmod(0o555 if what == "output" else 0o000)
    try:
        code, messages = segment(tmp_path / "in", "-o", out, preexec_fn=without_root_rights)
    except subprocess.SubprocessError:
        pytest.skip("the rights of root cannot be dropped here")
    finally:
        forbidden.chmod(mode)
    assert code == (1 if what == "file" else 2)
    (line,) = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert str(forbidden) in line
    assert "ermission denied" in line or "cannot be read" in line
    assert names(out) == (["s1_seg.nii.gz"] if what == "file" else [])


# --------------------------------------------------------------------------------------------------- two runs


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    by_name = {Path(row["scan"]).name: row for row in rows}
    assert len(by_name) == len(rows), "a scan has two rows"
    return by_name


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    count = 8
    make_scans(tmp_path / "in", count)
    out, volumes = tmp_path / "out", tmp_path / "v.csv"
    processes = [start(tmp_path / "in", "-o", out, "--mask", "--volumes", volumes, delay_s=0.4) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [code for code, _ in results] == [0, 0], results
    messages = "\n".join(text for _, text in results)
    did = [re.findall(r"^\[\d+/8\] \S*/(s\d).nii.gz -> \S+: [\d.]+ s", text, flags=re.M) for _, text in results]
    assert sorted(did[0] + did[1]) == [f"s{index}" for index in range(count)], messages  # each scan once
    assert all(did), messages  # and neither run did nothing
    assert names(out) == sorted(f"s{index}_{kind}.nii.gz" for index in range(count) for kind in ("mask", "seg"))
    assert len(table(volumes)) == count
    assert_whole(tmp_path)
    assert hidden(tmp_path) == []
    for index in range(count):
        labels = np.asarray(nib.load(out / f"s{index}_seg.nii.gz").dataobj)
        bright_ml = (labels == 7).sum() * 1.5 * 1.5 * 2 / 1000
        assert float(table(volumes)[f"s{index}.nii.gz"]["Bright_ml"]) == pytest.approx(bright_ml, abs=5e-4)


def test_a_run_goes_on_when_the_other_is_killed(tmp_path: Path) -> None:
    make_scans(tmp_path / "in", 3)
    out = tmp_path / "out"
    first = start(tmp_path / "in", "-o", out, delay_s=1000.0)  # it claims the first two scans, and does nothing
    until(lambda: out.is_dir() and len([name for name in hidden(out) if name.endswith(".lock")]) == 2)
    second = start(tmp_path / "in", "-o", out)
    until(lambda: names(out) == ["s2_seg.nii.gz"])
    first.kill()
    finish(first)
    code, messages = finish(second)
    assert code == 0
    assert "3 done" in messages
    assert names(out) == [f"s{index}_seg.nii.gz" for index in range(3)]
    assert hidden(out) == []
