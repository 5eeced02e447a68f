"""Seconds and memory of a step of every contrastive loss, against the whole Gram matrix and MONAI.

    python benchmarks/bench_contrastive.py [--voxels 4096] [--levels 6] [--threads 1] [--device cuda] [--out JSON]

steps    forward and backward of each loss over embeddings (levels, voxels, 128) with the masks that four views of one
         head have (points or labels, as the loss asks). Every measurement is a process of its own; rounds are
         interleaved; medians. Memory: what the process holds before the first step (libraries, embeddings and masks),
         how much more it holds at its highest, and its highest while masks of one more level are made; with --device
         cuda, what the device allocates. A loss of which either is above --limit-gb is marked, and the exit code is 1.
peers    the same loss as it is often written, over whole Gram matrices of all levels with autograd, and MONAI's
         ContrastiveLoss (one level of two views; it makes N x N x channels values). They are compared at sizes that fit
         in memory, ours at the same size. Ratio: their seconds, or their memory, over ours.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

Job = dict[str, Any]
CHANNELS, VIEWS, LABELS = 128, 4, 17
DENSE = ("info_nce", "decoupled", "sup_con", "ucl", "scl", "hucl", "hscl")  # those with a peer over whole matrices


def run_child(job: Job) -> Job:
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(job["threads"])
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{job['method']} {job['loss']}: failed with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------- in a process of its own


def masks(loss: str, n: int, views: int, plain: bool, device: Any) -> Any:
    """Positives and weights (N, N) and labels (N,), of views of points spread over a head; as `pair_masks` has them.

    Plain: every other point is a negative, as MONAI has it. Labels are their own partners: a scheme without sides.
    """
    import torch

    from synthseg.config.pretraining import SamplingConfig
    from synthseg.training.contrastive import Voxels, kind_of, pair_masks

    source = torch.Generator().manual_seed(0)
    points = n // views
    place = 80 * torch.rand((points, 3), generator=source) - 40
    label = torch.randint(1, LABELS, (points,), generator=source)
    flat = torch.arange(points).expand(views, -1)
    side = (place[:, 0] > 0).long().expand(views, -1)
    tensors = (flat, place.expand(views, -1, -1), label.expand(views, -1), flat, 2 * side - 1, 0 * flat)
    voxels = Voxels(*(tensor.to(device) for tensor in tensors), SamplingConfig())
    positives, weights = pair_masks(voxels, kind_of(loss), range(LABELS))
    if plain:
        weights = voxels.point.flatten()[:, None] != voxels.point.flatten()
    return positives, weights, voxels.label.flatten()


def dense(loss: str, z: Any, positives: Any, weights: Any, temperature: float, beta: float) -> Any:
    """The loss over whole matrices (levels, N, N), as it is often written."""
    import torch

    cosines = z @ z.mT
    scores = (cosines / temperature).exp()
    negative = weights.float()
    positive = positives.float()
    counts = positive.sum(-1)
    others = (scores * negative).sum(-1, keepdim=True)
    if loss in ("ucl", "scl", "hucl", "hscl"):
        tilt = (0.0 if loss in ("ucl", "scl") else beta) * cosines.detach()
        q = tilt.exp() * negative
        q = q / q.sum(-1, keepdim=True).clamp_min(1e-12)
        others = (scores * q).sum(-1, keepdim=True)
    if loss == "sup_con":
        others = others + (scores * positive).sum(-1, keepdim=True)
    total = others if loss in ("sup_con", "decoupled") else scores + others
    values = ((total.log() - cosines / temperature) * positive).sum(-1) / counts.clamp_min(1)
    return torch.where(counts > 0, values, 0).sum() / (counts > 0).sum()


def forget_peak(device: Any) -> float:
    """Memory that is held, in GB, and its highest forgotten: of the device if it is a GPU, else of the process.

    Freed memory that the C library kept is given back first. Only Linux forgets the highest of a process; elsewhere
    this is the highest so far.
    """
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    try:
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return status_gb("VmRSS")
    except OSError:
        return highest_gb(device)


def highest_gb(device: Any) -> float:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    try:
        return status_gb("VmHWM")
    except OSError:
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def status_gb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name))


def child(job: Job) -> Job:
    import time

    import torch

    torch.set_num_threads(job["threads"])
    device, loss, n = torch.device(job["device"]), job["loss"], job["voxels"]
    source = torch.Generator().manual_seed(1)
    shape = (job["levels"], n, CHANNELS)
    z = torch.nn.functional.normalize(torch.randn(shape, generator=source), dim=-1).to(device).requires_grad_()
    positives, weights, labels = masks(loss, n, job["views"], job.get("plain", False), device)
    # each level samples voxels of its own: its masks are its own, too
    positives, weights = (t.repeat(job["levels"], 1, 1) for t in (positives, weights))
    forget_peak(device)
    masks(loss, n, job["views"], job.get("plain", False), device)  # once more, while those of the levels are held
    while_masks_are_made = highest_gb(device)

    if job["method"] == "synthseg":
        from synthseg.training.contrastive import LOSSES

        if loss == "barlow_twins":
            import monai.losses  # noqa: F401

        def value() -> torch.Tensor:
            return LOSSES[loss](z, positives, weights, temperature=0.33, beta=5.0, labels=labels)

    elif job["method"] == "dense":

        def value() -> torch.Tensor:
            return torch.as_tensor(dense(loss, z, positives, weights, 0.33, 5.0))

    else:
        from monai.losses import ContrastiveLoss

        monai_loss = ContrastiveLoss(temperature=0.33)

        def value() -> torch.Tensor:
            return torch.as_tensor(monai_loss(*z[0].chunk(2)))

    def step() -> float:
        found = value()
        torch.autograd.grad(found, z)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(found.detach())

    before = forget_peak(device)
    found = step()  # not counted: the first touches memory and loads kernels
    seconds, cpu = [], []
    for _ in range(job["steps"]):
        start, begun = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - start)
        seconds.append(time.perf_counter() - begun)
    memory = {"held_gb": before, "more_gb": highest_gb(device) - before, "masks_gb": while_masks_are_made}
    return {"seconds": seconds, "cpu_seconds": cpu, **memory, "value": found}


# ---------------------------------------------------------------- the table


def measure(jobs: list[Job], rounds: int) -> list[Job]:
    answers: list[list[Job]] = [[] for _ in jobs]
    for turn in range(rounds):
        for which in range(len(jobs))[:: 1 if turn % 2 == 0 else -1]:
            answer = run_child(jobs[which])
            answers[which].append(answer)
            what = f"{jobs[which]['method']} {jobs[which]['loss']}, {jobs[which]['voxels']} voxels"
            say(f"round {turn + 1}: {what}: {median(answer['seconds']):.3f} s, {answer['more_gb']:.2f} GB more")
    rows = []
    for job, done in zip(jobs, answers, strict=True):
        row = {k: job[k] for k in ("method", "loss", "voxels", "levels", "views", "threads", "device")}
        row |= {
            "seconds": median(s for r in done for s in r["seconds"]),
            "cpu_seconds": median(s for r in done for s in r["cpu_seconds"]),
            "held_gb": max(r["held_gb"] for r in done),
            "more_gb": max(r["more_gb"] for r in done),
            "masks_gb": max(r["masks_gb"] for r in done),
            "value": done[0]["value"],
        }
        rows.append(row)
    return rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compared(peers: list[Job]) -> list[Job]:
    """Each peer beside ours at its size. Ends the program if they do not agree on the loss."""
    out = []
    for row in (p for p in peers if p["method"] != "synthseg"):
        same = ("loss", "voxels", "levels", "views")
        ours = next(p for p in peers if p["method"] == "synthseg" and all(p[k] == row[k] for k in same))
        if abs(ours["value"] - row["value"]) > 1e-3 * abs(ours["value"]):
            sys.exit(
                f"{row['method']} {row['loss']}: {row['value']:.6f}, and ours {ours['value']:.6f}: not the same loss"
            )
        ratio = {f"{k}_ratio": row[k] / max(ours[k], 1e-6) for k in ("seconds", "cpu_seconds", "more_gb")}
        out.append({**row, **{f"our_{k}": ours[k] for k in ("seconds", "cpu_seconds", "more_gb")}, **ratio})
    return out


def peak_gb(row: Job) -> float:
    """The highest memory of a step, the making of its masks included."""
    return max(float(row["held_gb"] + row["more_gb"]), float(row["masks_gb"]))


def show(steps: list[Job], peers: list[Job], limit_gb: float) -> None:
    print(f"\n{'loss':20}  seconds  CPU seconds  more GB  held GB  masks GB")
    for r in steps:
        over = f"  above {limit_gb:g} GB" if peak_gb(r) > limit_gb else ""
        times = f"{r['seconds']:7.2f}  {r['cpu_seconds']:11.2f}"
        print(f"{r['loss']:20}  {times}  {r['more_gb']:7.2f}  {r['held_gb']:7.2f}  {r['masks_gb']:8.2f}{over}")
    if peers:
        print(f"\n{'peer':6} {'loss':12}  voxels x levels  their s  our s  ratio (CPU)   their GB  our GB  ratio")
    for r in peers:
        print(
            f"{r['method']:6} {r['loss']:12}  {r['voxels']:6d} x {r['levels']:6d}  {r['seconds']:7.2f}  "
            f"{r['our_seconds']:5.2f}  {r['seconds_ratio']:5.1f} ({r['cpu_seconds_ratio']:.1f})  "
            f"{r['more_gb']:8.2f}  {r['our_more_gb']:6.2f}  {r['more_gb_ratio']:5.1f}"
        )


def write(path: Path, record: Job) -> None:
    """Beside the target and renamed, so that it is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(record, indent=1) + "\n")
    os.replace(file.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxels", type=int, default=4096, help="embeddings of each level, all views together")
    parser.add_argument("--levels", type=int, default=6)
    parser.add_argument("--peer-voxels", type=int, default=2048)
    parser.add_argument("--peer-levels", type=int, default=1)
    parser.add_argument(
        "--monai-voxels", type=int, default=768, help="of MONAI's ContrastiveLoss, one level; 0: not run"
    )
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="all, unless named")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(child(json.loads(options.job))))
        return
    listing = "from synthseg.training.contrastive import LOSSES; print(*LOSSES)"
    known = subprocess.run(
        [sys.executable, "-c", listing], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    wanted = options.losses or known
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        parser.error(f"--losses: there is no {', '.join(unknown)}; known: {', '.join(known)}")
    common = {"threads": options.threads, "device": options.device, "steps": options.steps, "views": VIEWS}
    ours = {**common, "method": "synthseg", "voxels": options.voxels, "levels": options.levels}
    steps = measure([{**ours, "loss": name} for name in wanted], options.rounds)
    jobs = []
    for name in (w for w in wanted if w in DENSE):
        job = {**common, "loss": name, "voxels": options.peer_voxels, "levels": options.peer_levels}
        jobs += [{**job, "method": method} for method in ("dense", "synthseg")]
    if options.monai_voxels and "info_nce" in wanted:
        job = {**common, "loss": "info_nce", "voxels": options.monai_voxels, "levels": 1, "views": 2, "plain": True}
        jobs += [{**job, "method": method} for method in ("monai", "synthseg")]
    peers = compared(measure(jobs, options.rounds))
    show(steps, peers, options.limit_gb)
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    if options.out:
        write(options.out, {"machine": machine, "limit_gb": options.limit_gb, "steps": steps, "peers": peers})
    if any(peak_gb(r) > options.limit_gb for r in steps):
        sys.exit(1)


if __name__ == "__main__":
    main()
