"""What is free is read from the control group, and memory that is refused becomes a message, not a killed process."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from synthseg import memory
from synthseg.errors import MemoryShortageError
from synthseg.memory import Allowance, allowance, as_shortage, limit_allocations, require

MIB = 2**20
NO_LIMIT = 9223372036854771712  # cgroup v1


def machine(root: Path, free_mib: int = 6000, total_mib: int = 8000, swap_mib: int = 0) -> Path:
    lines = {
        "MemTotal": total_mib,
        "MemFree": free_mib - 1000,
        "MemAvailable": free_mib,
        "SwapTotal": swap_mib,
        "SwapFree": swap_mib,
    }
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("".join(f"{name}:  {mib * 1024} kB\n" for name, mib in lines.items()))
    return root


def group(root: Path, line: str, folder: str, files: dict[str, object]) -> None:
    with (root / "proc/self/cgroup").open("a") as out:
        out.write(f"{line}\n")
    path = root / "sys/fs/cgroup" / folder
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name).write_text(f"{value}\n")


def v2_files(limit_mib: int, used_mib: int, cache_mib: int = 0) -> dict[str, object]:
    stat = f"anon 1\ninactive_file {cache_mib * MIB - 4096}\nactive_file 4096\nshmem 7" if cache_mib else "anon 1"
    return {"memory.max": limit_mib * MIB, "memory.current": used_mib * MIB, "memory.stat": stat}


def test_a_machine_without_groups(tmp_path: Path) -> None:
    there = allowance(machine(tmp_path, free_mib=6000, total_mib=8000, swap_mib=500))
    assert there == Allowance(6500 * MIB, 8500 * MIB, False)


def test_not_linux(tmp_path: Path) -> None:
    assert allowance(tmp_path) is None


def test_a_container_of_v2(tmp_path: Path) -> None:
    group(machine(tmp_path), "0::/", "", {**v2_files(2048, 900, cache_mib=300), "memory.swap.max": 0})
    assert allowance(tmp_path) == Allowance((2048 - 600) * MIB, 2048 * MIB, True)


def test_swap_of_v2_is_the_smaller_of_what_is_free_and_what_is_allowed(tmp_path: Path) -> None:
    files = {**v2_files(2048, 100), "memory.swap.max": 512 * MIB, "memory.swap.current": 12 * MIB}
    group(machine(tmp_path, swap_mib=300), "0::/", "", files)
    assert allowance(tmp_path) == Allowance((1948 + 300) * MIB, 2348 * MIB, True)
    (tmp_path / "sys/fs/cgroup/memory.swap.max").write_text(f"{112 * MIB}\n")
    assert allowance(tmp_path) == Allowance((1948 + 100) * MIB, 2148 * MIB, True)


def test_a_job_of_v2_is_bound_by_the_group_that_holds_it(tmp_path: Path) -> None:
    line = "0::/slurm/job_7/step_0"
    group(machine(tmp_path), line, "slurm/job_7/step_0", {"memory.max": "max", "memory.current": 50 * MIB})
    group(tmp_path, line, "slurm/job_7", {**v2_files(1000, 400), "memory.swap.max": 0})
    assert allowance(tmp_path) == Allowance(600 * MIB, 1000 * MIB, True)


@pytest.mark.parametrize("seen_inside", [True, False])
def test_a_container_of_v1(tmp_path: Path, seen_inside: bool) -> None:
    """Inside the container its group is the top folder, though its path is that of the host."""
    files = {
        "memory.limit_in_bytes": 1500 * MIB,
        "memory.usage_in_bytes": 700 * MIB,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {150 * MIB}\ntotal_active_file {50 * MIB}",
        "memory.memsw.limit_in_bytes": 1500 * MIB,
    }
    folder = "memory" if seen_inside else "memory/docker/abc"
    group(machine(tmp_path, swap_mib=900), "4:cpu,memory:/docker/abc", folder, files)
    assert allowance(tmp_path) == Allowance(1000 * MIB, 1500 * MIB, True)


def test_no_limit_of_v1(tmp_path: Path) -> None:
    group(machine(tmp_path), "4:memory:/", "memory", {"memory.limit_in_bytes": NO_LIMIT, "memory.usage_in_bytes": 1})
    assert allowance(tmp_path) == Allowance(6000 * MIB, 8000 * MIB, False)


def test_other_controllers_are_not_asked(tmp_path: Path) -> None:
    group(machine(tmp_path), "3:cpuset:/a", "cpuset/a", {"memory.limit_in_bytes": 10 * MIB})
    there = allowance(tmp_path)
    assert there is not None
    assert not there.of_group


def test_a_group_that_is_over_its_limit_has_nothing_free(tmp_path: Path) -> None:
    group(machine(tmp_path), "0::/", "", {**v2_files(100, 150), "memory.swap.max": 0})
    there = allowance(tmp_path)
    assert there is not None
    assert there.free_bytes == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_here_something_is_free() -> None:
    there = allowance()
    assert there is not None
    assert 10 * MIB < there.free_bytes <= there.limit_bytes


def test_require_says_what_is_needed_and_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "allowance", lambda: Allowance(10**9, 2 * 10**9, True))
    require(10**9, "this scan")
    with pytest.raises(MemoryShortageError, match=r"needs about 3\.5 GB; .* may use 2\.0 GB, and 1\.0 GB are free"):
        require(3_500_000_000, "this scan")
    monkeypatch.setattr(memory, "allowance", lambda: None)
    require(10**15, "this scan")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["numpy", "torch", "c++", "system"],
)
def test_refused_memory_is_a_shortage(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(memory, "allowance", lambda: Allowance(10**8, 10**9, True))
    shown = as_shortage(error)
    assert isinstance(shown, MemoryShortageError)
    assert "too little memory for this scan: the container or job may use 1.0 GB" in str(shown)
    assert "docker run --memory" in str(shown)


@pytest.mark.parametrize(
    "error", [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left"), KeyError("a")]
)
def test_other_errors_are_not(error: Exception) -> None:
    assert as_shortage(error) is None


def test_a_shortage_stays_what_it_is() -> None:
    error = MemoryShortageError("as it was")
    assert as_shortage(error) is error


def test_a_smaller_limit_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(memory, "allowance", lambda: Allowance(10**15, 10**15, False))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10**12, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("the limit was raised"))
    assert limit_allocations() is None


HUNGRY = """
import sys, torch
from synthseg import memory
from synthseg.memory import Allowance, as_shortage, limit_allocations
torch.ones(1000).sum()
memory.allowance = lambda: Allowance(400 * 2**20, 10**9, True)
limit = limit_allocations(threads=torch.get_num_threads())
assert limit is not None
held = []
try:
    while len(held) < 40:
        held.append(torch.zeros(50 * 2**20, dtype=torch.uint8))
except Exception as error:
    print(len(held), as_shortage(error))
    del error, held
    torch.zeros(200 * 2**20, dtype=torch.uint8)  # what was let go can be had again
    sys.exit(7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts mappings on Linux only")
def test_an_allocation_that_does_not_fit_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", HUNGRY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 7, done.stderr
    taken, _, message = done.stdout.partition(" ")
    assert 5 <= int(taken) < 20  # of 400 MiB, some reserved, stacks of threads added
    assert message.startswith("too little memory for this scan")
