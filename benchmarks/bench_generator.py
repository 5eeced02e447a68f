"""Seconds and memory of one synthetic image-and-label pair, against TorchIO and cornucopia, and where the time goes.

    python benchmarks/bench_generator.py [--template NAME|DIR] [--preset NAME|FILE ...] [--threads 1 2] [--out JSON]

pairs    one pair of 160 x 160 x 160 voxels of 1 mm from one whole-head label map. Every measurement is a process of
         its own; rounds are interleaved (every method once, then again from the last to the first); medians. Loading
         the label map is not in the time but is in the memory, which is the highest resident size of the process
         (ru_maxrss). Each process first makes a pair that is not counted (cornucopia, a minute a pair: a small one);
         ours makes a small one with every stage before, whose CPU seconds are "once": the distance maps of a template.
         The peers run with malloc as it comes and with the settings that the synthseg command makes
         (synthseg/allocator.py). Ratio: the peer's seconds over ours at the same number of threads. On a busy machine
         trust the ratio of CPU seconds (all threads) more. "Every stage on": each probability above 0 becomes 1.
stages   time of each function that the generator calls, and two bounds: the bytes that the stage must move if it
         were one pass (tensors in and out), and the bytes that its operations do move, each over the bandwidth of a
         copy measured in turn with the rendering. Random numbers and interpolation cost arithmetic besides.
scaling  seconds an image against volume and batch.

With --device cuda the times are those of CUDA events (TorchIO, on the CPU, has none) and the memory is that of the
device. Without --preset the settings are the defaults at 1 mm, with one point a voxel and as configured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

# Only the standard library: on Linux a child's ru_maxrss begins at the size of the process that starts it.
PEERS = ("torchio", "cornucopia")
PARTS = ("pairs", "stages", "scaling")
Job = dict[str, Any]


def run_child(job: Job) -> Job:
    """Run a job in a process of its own, with malloc and thread settings that come from the job alone."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
        environment[name] = str(job["threads"])
    command = [sys.executable, str(Path(__file__).resolve().with_name("generator_jobs.py")), json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{job['name']}: failed with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def our_variants(presets: list[str]) -> list[Job]:
    """The settings that are timed: each preset as it is, and with every effect that it has in every image."""
    base = {"method": "synthseg", "tuned": True, "points": 0, "every_stage": False, "preset": None}
    if not presets:
        return [
            {**base, "name": "default, 1 point a voxel", "points": 1},
            {**base, "name": "default, 1 point, malloc as it comes", "points": 1, "tuned": False},
            {**base, "name": "default"},
            {**base, "name": "default, every stage on", "every_stage": True},
        ]
    variants = []
    for preset in presets:
        name = Path(preset).stem
        variants.append({**base, "name": name, "preset": preset})
        variants.append({**base, "name": f"{name}, every stage on", "preset": preset, "every_stage": True})
    return variants


def peer_variants(peers: list[str]) -> list[Job]:
    """The peers that are installed, with malloc as it comes and tuned."""
    variants = []
    for peer in peers:
        try:
            name = f"{peer} {version(peer)}"
        except PackageNotFoundError:
            print(f"{peer} is not installed (pip install -e '.[bench]'): left out", file=sys.stderr)
            continue
        base = {"method": peer, "points": 0, "every_stage": False, "preset": None}
        variants += [{**base, "name": name, "tuned": False}, {**base, "name": f"{name}, malloc tuned", "tuned": True}]
    return variants


def measure_pairs(common: Job, variants: list[Job], options: argparse.Namespace) -> list[Job]:
    jobs = [{**common, **v, "threads": t, "part": "pairs"} for t in options.threads for v in variants]
    times: dict[int, list[Job]] = defaultdict(list)
    for turn in range(options.rounds):
        for which in range(len(jobs))[:: 1 if turn % 2 == 0 else -1]:
            job = jobs[which]
            pairs = options.pairs if job["method"] == "synthseg" else 1
            answer = run_child({**job, "round": turn, "pairs": pairs})
            times[which].append(answer)
            say(f"round {turn + 1}: {job['name']}, {job['threads']} threads: {median(answer['seconds']):.2f} s")
    rows = []
    for which, job in enumerate(jobs):
        done = times[which]
        seconds = [s for r in done for s in r["seconds"]]
        rows.append(
            {
                "name": job["name"], "method": job["method"], "tuned": job["tuned"], "threads": job["threads"],
                "seconds": median(seconds), "cpu_seconds": median(s for r in done for s in r["cpu_seconds"]),
                "mean_seconds": sum(seconds) / len(seconds),
                "once_cpu_seconds": median(r["once_cpu_seconds"] for r in done),
                "loaded_gb": max(r["loaded_gb"] for r in done), "peak_gb": max(r["peak_gb"] for r in done),
                "device_gb": max((r["device_gb"] for r in done if r["device_gb"] is not None), default=None),
                "all_seconds": seconds,
            }
        )  # fmt: skip
    for row in rows:
        if row["method"] == "synthseg":
            same = [r for r in rows if r["threads"] == row["threads"] and r["method"] != "synthseg"]
            row["ratios"] = {r["name"]: r["seconds"] / row["seconds"] for r in same}
            row["mean_ratios"] = {r["name"]: r["mean_seconds"] / row["mean_seconds"] for r in same}
            row["cpu_ratios"] = {r["name"]: r["cpu_seconds"] / row["cpu_seconds"] for r in same}
    return rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_pairs(rows: list[Job]) -> None:
    width = max(len(r["name"]) for r in rows)
    print(f"\n{'method':{width}}  threads  seconds   mean  CPU seconds  peak GB  of it loaded  once")
    for r in rows:
        device = f"  {r['device_gb']:.2f} GB on the device" if r["device_gb"] is not None else ""
        print(
            f"{r['name']:{width}}  {r['threads']:7d}  {r['seconds']:7.2f}  {r['mean_seconds']:5.2f}  "
            f"{r['cpu_seconds']:11.2f}  {r['peak_gb']:7.2f}  {r['loaded_gb']:12.2f}  {r['once_cpu_seconds']:4.1f}"
            f"{device}"
        )
    ours = [r for r in rows if r.get("ratios")]
    for r in ours[:1]:
        peers = list(r["ratios"])
        print(f"\n{'their seconds over ours (CPU seconds)':{width}}  threads  " + "  ".join(peers))
    for r in ours:
        cells = [f"{x:.1f} ({r['cpu_ratios'][n]:.1f})".rjust(len(n)) for n, x in r["ratios"].items()]
        print(f"{r['name']:{width}}  {r['threads']:7d}  " + "  ".join(cells))


def print_stages(record: Job) -> None:
    total, least = record["render_seconds"], record["least_seconds"]
    print(
        f"\n{record['name']}, {record['threads']} threads: {total * 1e3:.0f} ms to render "
        f"({record['render_seconds_with_the_clocks'] * 1e3:.0f} with the clocks); a copy moves "
        f"{record['copy_gb_per_second']:.1f} GB/s\n"
        f"  bound, labels read and the pair written: {least * 1e3:.1f} ms, {total / least:.0f} times that\n"
        f"  bound, every stage one pass: {record['one_pass_seconds'] * 1e3:.0f} ms, "
        f"{total / record['one_pass_seconds']:.1f} times that\n"
        f"  bound, the operations as they are: {record['moved_seconds'] * 1e3:.0f} ms, "
        f"{total / record['moved_seconds']:.1f} times that"
    )
    print(f"  {'stage':52s}      ms   CPU ms  share  one pass MB  moved MB  x one pass  x moved")
    for name, r in record["stages"].items():
        if r["share"] < 0.002:
            continue
        shown = f"  {name.rpartition(' > ')[2]}" if " > " in name else name
        parts = [f"  {shown:52s} {r['seconds'] * 1e3:7.1f}  {r['cpu_seconds'] * 1e3:7.1f} {r['share']:6.1%}"]
        for key, form in (("one_pass_mb", "12.1f"), ("moved_mb", "9.1f")):
            parts.append(f"{r[key]:{form}}" if r.get(key) else " " * int(form.split(".")[0]))
        for key, form in (("one_pass_seconds", "10.1f"), ("moved_seconds", "8.1f")):
            parts.append(f"{r['seconds'] / r[key]:{form}}x" if r.get(key, 0) > 1e-4 else "")
        print(" ".join(parts).rstrip())


def print_scaling(record: Job) -> None:
    print(f"\n{record['name']}, {record['threads']} threads: cost of rendering")
    base = record["rows"][0]["ns_per_voxel"]
    for r in record["rows"]:
        print(
            f"  {r['size']}^3, batch {r['batch']}: {r['seconds_per_image']:6.3f} s an image, "
            f"{r['ns_per_voxel']:5.0f} ns a voxel ({r['ns_per_voxel'] / base:.2f} of the first row)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", default="phantom", help="name of one that ships, or an imported folder")
    parser.add_argument("--preset", action="append", default=[], help="name or YAML file of settings (repeat)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of ours that a round counts; peers: one")
    parser.add_argument("--size", type=int, default=160, help="voxels a side")
    parser.add_argument("--volumes", nargs="+", type=int, default=[96, 128, 160, 192, 256])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--copy-mb", type=int, default=512, help="size of the copy that measures the bandwidth")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    options = parser.parse_args()
    ours = our_variants(options.preset)
    common = {k: getattr(options, k) for k in ("template", "device", "seed", "size", "rounds", "copy_mb")}
    common |= {"volumes": options.volumes, "batches": options.batches}
    record: Job = {
        **common, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "torch": version("torch"), "load_before": os.getloadavg(),
    }  # fmt: skip
    if "pairs" in options.parts:
        record["pairs"] = measure_pairs(common, ours + peer_variants(options.peers), options)
        print(f"One pair of {options.size}^3 voxels of 1 mm from {options.template}, {options.rounds} rounds, medians")
        print_pairs(record["pairs"])
    timed = [v for v in ours if v["tuned"]]
    for part, variants, show in (("stages", timed, print_stages), ("scaling", timed[:1], print_scaling)):
        if part not in options.parts:
            continue
        record[part] = []
        for variant in variants:
            for threads in options.threads:
                job = {**common, **variant, "threads": threads, "part": part}
                record[part].append({"name": variant["name"], "threads": threads, **run_child(job)})
                show(record[part][-1])
    record["load_after"] = os.getloadavg()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
