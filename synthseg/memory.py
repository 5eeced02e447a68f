"""How much memory this process may use, and a message instead of being killed when it wants more.

A container or a job of a cluster has its limit in a control group (cgroup). Linux hands out more memory than the group
may use and kills the process when it is touched, without a word. ``limit_allocations`` tells the kernel to refuse
instead; the refusal becomes an error that says what happened (``as_shortage``).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from synthseg.errors import MemoryShortageError

START_BYTES = 700 * 10**6  # to import PyTorch and load the network; measured: 0.45 GB, and pages of its libraries
RESERVE_BYTES = 64 * 10**6  # for what is not an allocation of this process: page tables, files being written
STACK_BYTES = 8 * 2**20  # of one thread, if the system sets no limit
UNLIMITED_BYTES = 2**60  # cgroup v1 writes "no limit" as a number near 2**63

# What torch, its convolution library, and C++ say when memory is refused.
_REFUSALS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "could not create a memory",
)


@dataclass(frozen=True)
class Allowance:
    """Bytes that this process may still take, and the limit that binds: of the machine, or of a control group."""

    free_bytes: int
    limit_bytes: int
    of_group: bool

    @property
    def limit(self) -> str:
        owner = "the container or job may use" if self.of_group else "this machine has"
        return f"{owner} {in_gb(self.limit_bytes)}"

    @property
    def remedy(self) -> str:
        return "give it more (docker run --memory, sbatch --mem)" if self.of_group else "close other programs"


def in_gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


# ------------------------------------------------------------------------------------------------- what there is


def allowance(root: Path = Path("/")) -> Allowance | None:
    """What this process may still take; None where the system does not tell (it is not Linux).

    The smallest of the free memory of the machine and of every control group (v1 or v2) that the process is in. Swap
    counts, and so do pages of files, which the kernel gives up when memory is short. ``root`` stands for ``/``.
    """
    machine = _numbers(root / "proc/meminfo", 1024)
    if "MemTotal" not in machine:
        return None
    swap = machine.get("SwapFree", 0)
    found = [
        Allowance(
            machine.get("MemAvailable", machine.get("MemFree", 0)) + swap,
            machine["MemTotal"] + machine.get("SwapTotal", 0),
            False,
        )
    ]
    for folder, version in _groups(root):
        group = (_group_v2 if version == 2 else _group_v1)(folder, swap)
        if group is not None:
            found.append(group)
    return min(found, key=lambda one: one.free_bytes)


def _groups(root: Path) -> list[tuple[Path, int]]:
    """The memory control groups of this process, and the groups that hold them, with their version."""
    groups: list[tuple[Path, int]] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops = [(root / "sys/fs/cgroup", 2), (root / "sys/fs/cgroup/unified", 2)]
        elif "memory" in controllers.split(","):
            tops = [(root / "sys/fs/cgroup/memory", 1)]
        else:
            continue
        for top, version in tops:
            # Inside a container the path may be that of the host; then the top itself is the container's group.
            folder = top / path.strip("/")
            while folder != top:
                groups.append((folder, version))
                folder = folder.parent
            groups.append((top, version))
    return groups


def _group_v2(folder: Path, swap_free: int) -> Allowance | None:
    limit = _number(folder / "memory.max")
    if limit is None:
        return None
    used = _number(folder / "memory.current") or 0
    files = _numbers(folder / "memory.stat")
    reclaimable = files.get("inactive_file", 0) + files.get("active_file", 0)
    swap_limit = _number(folder / "memory.swap.max")
    if swap_limit is None:
        swap = swap_free
    else:
        swap = min(swap_free, swap_limit - (_number(folder / "memory.swap.current") or 0))
    return _of_group(limit, used - reclaimable, swap)


def _group_v1(folder: Path, swap_free: int) -> Allowance | None:
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is None:
        return None
    used = _number(folder / "memory.usage_in_bytes") or 0
    files = _numbers(folder / "memory.stat")
    reclaimable = files.get("total_inactive_file", 0) + files.get("total_active_file", 0)
    both = _number(folder / "memory.memsw.limit_in_bytes")
    return _of_group(limit, used - reclaimable, swap_free if both is None else min(swap_free, both - limit))


def _of_group(limit: int, used: int, swap: int) -> Allowance:
    swap = max(0, swap)
    return Allowance(max(0, limit - max(0, used) + swap), limit + swap, True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none, or if it means "no limit"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() and int(text) < UNLIMITED_BYTES else None


def _numbers(path: Path, unit: int = 1) -> dict[str, int]:
    """Lines like ``MemTotal:  1024 kB`` or ``active_file 4096`` as a dictionary, in bytes."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) * unit for line in words if len(line) > 1 and line[1].isdecimal()}


# ----------------------------------------------------------------------------------------------- what is refused


def require(needed_bytes: int, purpose: str) -> None:
    """Raise MemoryShortageError if ``purpose`` ("starting", "this scan") needs more than there is."""
    there = allowance()
    if there is not None and needed_bytes > there.free_bytes:
        raise MemoryShortageError(
            f"too little memory: {purpose} needs about {in_gb(needed_bytes)}; {there.limit}, "
            f"and {in_gb(there.free_bytes)} are free; {there.remedy}"
        )


def limit_allocations(threads: int = 1) -> int | None:
    """Have the kernel refuse an allocation that does not fit, instead of killing the process; CPU only.

    Sets the soft limit RLIMIT_DATA: what the process holds now and may still take (``allowance``). Call it when the
    libraries are loaded and before scans are read. Not for CUDA, which reserves more addresses than it uses.

    Parameters
    ----------
    threads : the threads that may start yet; their stacks are reserved, and hardly used.

    Returns
    -------
    The limit in bytes, or None where there is none (not Linux; a smaller limit is set already).
    """
    there = allowance()
    if not sys.platform.startswith("linux") or there is None:
        return None
    import resource

    held = _numbers(Path("/proc/self/status"), 1024).get("VmData", 0)
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stacks = threads * (STACK_BYTES if stack == resource.RLIM_INFINITY else stack)
    limit = held + max(0, there.free_bytes - RESERVE_BYTES) + stacks
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if any(other != resource.RLIM_INFINITY and other <= limit for other in (soft, hard)):
        return None
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


def as_shortage(error: BaseException) -> MemoryShortageError | None:
    """The error to show if memory was refused (by Python, numpy, torch or a library below), else None.

    An error that was raised from such a refusal is one too.

    Errors of a GPU's memory are not this: they are DeviceErrors.
    """
    if isinstance(error, MemoryShortageError):
        return error
    text = str(error).lower()
    refused = isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _REFUSALS)
    )
    if not refused:
        return None if error.__cause__ is None else as_shortage(error.__cause__)
    there = allowance()
    advice = "run fewer scans at once, or crop the scan to the head"
    if there is None:
        return MemoryShortageError(f"too little memory for this scan; close other programs, {advice}")
    return MemoryShortageError(f"too little memory for this scan: {there.limit}; {there.remedy}, {advice}")
