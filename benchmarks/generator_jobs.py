"""The measurements of bench_generator.py, each in a fresh process that answers with one line of JSON.

python benchmarks/generator_jobs.py JOB
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import synthseg
from synthseg.allocator import tune_allocator
from synthseg.config import GeneratorConfig, Section, generator_config
from synthseg.generator import synthesis
from synthseg.generator.anomalies import with_anomalies
from synthseg.generator.plan import sample_plan
from synthseg.generator.synthesis import render
from synthseg.templates import Template, load_template

SMALL = 48  # voxels a side of the uncounted pair of a method that takes a minute
Job = dict[str, Any]


# ------------------------------------------------------------------------------------------- what is timed


def settings(job: Job, size: int) -> GeneratorConfig:
    """The generator settings of a job, at 1 mm and ``size`` voxels a side."""
    overrides = ["voxel_size_mm=1.0", f"shape=[{size}, {size}, {size}]"]
    if job["points"]:
        overrides.append(f"subsamples={job['points']}")
    config = generator_config(Path(job["preset"]) if job["preset"] else None, overrides)

    def certain(section: Section) -> Section:
        changed: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, Section):
                changed[name] = certain(value)
            elif name.endswith("probability") and value > 0:
                changed[name] = 1.0
        return section.model_copy(update=changed)

    return certain(config) if job["every_stage"] else config  # type: ignore[return-value]


def patch_1mm(template: Template, size: int) -> torch.Tensor:
    """Label indices (size, size, size), uint8, at 1 mm around the centre of the brain: what the peers start from."""
    patch = template.labels
    for axis in range(3):
        steps = (torch.arange(size) - (size - 1) / 2) / template.spacing_mm[axis]
        at = (template.center[axis] + steps).round().long()
        inside = (at >= 0) & (at < patch.shape[axis])
        patch = patch.index_select(axis, at.clamp(0, patch.shape[axis] - 1))
        patch = patch * inside.view([-1 if a == axis else 1 for a in range(3)])
    return patch


def pair_maker(job: Job, template: Template, size: int) -> Callable[[int], Any]:
    """A function that makes pair number i by the method of the job."""
    device = job["device"]
    if job["method"] == "synthseg":
        config = settings(job, size)

        def make(number: int) -> Any:
            plan = sample_plan(config, template.name, template.table, job["seed"], number)
            return render([template], [plan], device)

        return make
    labels = patch_1mm(template, size)[None]
    transform: Callable[[Any], Any]
    if job["method"] == "torchio":
        import torchio as tio

        transform = tio.Compose(
            [
                tio.RandomAffine(),
                tio.RandomElasticDeformation(),
                tio.RandomLabelsToImage(label_key="label", image_key="image"),
                tio.RandomBiasField(),
                tio.RandomGamma(),
                tio.RandomAnisotropy(),
                tio.RandomNoise(),
            ]
        )

        def make(number: int) -> Any:
            torch.manual_seed(job["seed"] + number)
            subject = transform(tio.Subject(label=tio.LabelMap(tensor=labels)))
            return subject["image"].data, subject["label"].data
    else:
        import cornucopia as cc

        transform = cc.SynthFromLabelTransform()
        labels = labels.int().to(device)

        def make(number: int) -> Any:
            torch.manual_seed(job["seed"] + number)
            random.seed(job["seed"] + number)
            return transform(labels)

    return make


# ---------------------------------------------------------------------------------------- time and memory


def prepare(job: Job) -> Template:
    """The state of a fresh process before anything is timed."""
    if job["tuned"]:
        tune_allocator()
    warnings.simplefilter("ignore")
    torch.set_num_threads(job["threads"])
    template = load_template(job["template"])
    return with_anomalies(template, settings(job, 160).anomalies) if job.get("preset") else template


class Stopwatch:
    """Moments on the clock of a device (CUDA events, or the wall clock) and the CPU time of all threads."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter(), time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event, time.process_time()

    def between(self, start: Any, end: Any) -> tuple[float, float]:
        """Seconds on the clock and seconds of CPU time."""
        if not self.cuda:
            return end[0] - start[0], end[1] - start[1]
        end[0].synchronize()
        return start[0].elapsed_time(end[0]) / 1000, end[1] - start[1]

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Both of a call; what it returns is freed after the end."""
        start = self.mark()
        result = call()
        end = self.mark()
        del result
        return self.between(start, end)


def resident_gb() -> float:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e9 / 1024)


def child_pairs(job: Job) -> Job:
    """Seconds of the pairs of one method, and the memory of the process that made them."""
    template = prepare(job)
    on_device = job["device"].startswith("cuda") and job["method"] != "torchio"
    watch = Stopwatch(job["device"] if on_device else "cpu")
    make = pair_maker(job, template, job["size"])
    loaded = resident_gb()
    first = job["round"] * job["pairs"]
    small, once = min(SMALL, job["size"]), 0.0
    if job["method"] == "cornucopia":
        pair_maker(job, template, small)(0)
    else:
        if job["method"] == "synthseg":  # with every stage: the distance maps of the template are made here
            once = watch.time(lambda: pair_maker({**job, "every_stage": True}, template, small)(0))[1]
        make(first + job["pairs"])  # not one of those counted
    times = [watch.time(lambda i=i: make(first + i)) for i in range(job["pairs"])]  # type: ignore[misc]
    record = {"seconds": [t[0] for t in times], "cpu_seconds": [t[1] for t in times], "once_cpu_seconds": once}
    device_gb = None
    if on_device:
        device_gb = torch.cuda.max_memory_allocated() / 1e9
    return {**record, "loaded_gb": loaded, "peak_gb": resident_gb(), "device_gb": device_gb}


def tensor_bytes(value: Any, seen: set[int] | None = None) -> int:
    """Bytes of the distinct elements of the tensors in a nest of lists, tuples, dictionaries and dataclasses."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        if id(value) in seen:
            return 0
        seen.add(id(value))
        distinct = value.element_size()
        for n, stride in zip(value.shape, value.stride(), strict=True):
            distinct *= n if stride else 1
        return distinct
    if isinstance(value, dict):
        return sum(tensor_bytes(v, seen) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(v, seen) for v in value)
    return 0


class Stages:
    """Time and bytes of each function of the package that the rendering calls, by name, two levels deep.

    The interpreter reports every call; those from synthesis.py into another module begin a stage. Nothing in the
    generator has to be named here.
    """

    def __init__(self, watch: Stopwatch) -> None:

        self.package = str(Path(synthseg.__file__).parent)
        self.pipeline = str(synthesis.__file__)
        self.watch = watch
        self.open: list[tuple[Any, str, Any, int]] = []
        self.spans: list[tuple[str, Any, Any]] = []
        self.fused: dict[str, int] = defaultdict(int)
        self.moved: dict[str, int] = defaultdict(int)

    def module(self, file: str) -> str:
        """The name of a module of the package, without the folder of the generator: deform, artefacts.noise."""
        parts = list(Path(file).relative_to(self.package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join(parts[1:] if parts[0] == "generator" and len(parts) > 1 else parts)

    def _event(self, frame: Any, event: str, result: Any) -> None:
        if event == "call":
            code = frame.f_code
            file = code.co_filename
            if (
                len(self.open) < 2
                and file.startswith(self.package)
                and file != self.pipeline
                and code.co_name[0] != "<"
            ):
                name = f"{self.module(file)}.{code.co_name}"
                name = f"{self.open[-1][1]} > {name}" if self.open else name
                self.open.append((frame, name, self.watch.mark(), tensor_bytes(list(frame.f_locals.values()))))
        elif event == "return" and self.open and self.open[-1][0] is frame:
            _, name, start, read = self.open.pop()
            self.spans.append((name, start, self.watch.mark()))
            self.fused[name] += read + tensor_bytes(result)

    @contextmanager
    def timing(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(before)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what each torch operation reads and writes; views move nothing. Too slow to time as well."""
        stages = self
        overwrites = {"copy_", "fill_", "zero_", "normal_", "uniform_"}  # do not read what they write to
        lookups = {"index_select", "index", "gather", "take", "embedding"}

        class Counter(TorchDispatchMode):  # type: ignore[misc]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                mutable = func._schema.is_mutable
                if mutable or not aliases(out, args):
                    base = func._schema.name.split("::")[1]
                    read = args[1:] if base in overwrites else args
                    written = tensor_bytes(out)
                    count = tensor_bytes(list(read)) + written
                    if base in lookups:  # of a table, not more is read than what comes out
                        count -= max(0, tensor_bytes(args[0]) - written)
                    for name in [entry[1] for entry in stages.open] or ["render"]:
                        stages.moved[name] += count
                return out

        with self.timing(), Counter():
            yield

    def totals(self) -> dict[str, tuple[float, float]]:
        """Seconds and CPU seconds of each function, its calls together."""
        total: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for name, start, end in self.spans:
            seconds, cpu = self.watch.between(start, end)
            total[name] = (total[name][0] + seconds, total[name][1] + cpu)
        return total


def aliases(out: Any, args: Any) -> bool:
    """Whether a result is a view of an argument."""
    if isinstance(out, (list, tuple)):
        return bool(out) and aliases(out[0], args)
    if not isinstance(out, torch.Tensor):
        return False
    ours = out.untyped_storage().data_ptr()
    return any(isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == ours for a in args)


def in_order(names: list[str]) -> list[str]:
    """Each stage before the functions that it calls; these end, and are listed, before it."""
    tops = [name for name in names if " > " not in name]
    return [n for top in tops for n in [top, *(m for m in names if m.startswith(f"{top} > "))]]


def child_stages(job: Job) -> Job:
    """Seconds and bytes of each stage, and the bandwidth of a copy, in turn."""
    template, device, watch = prepare(job), job["device"], Stopwatch(job["device"])
    config = settings(job, job["size"])
    source = torch.ones(job["copy_mb"] * 250_000, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    drawn, plain, clocked, bandwidth, timings = [], [], [], [], []
    stages, clock = Stages(watch), Stopwatch("cpu")
    for number in range(-1, job["rounds"]):
        start = clock.mark()
        plan = sample_plan(config, template.name, template.table, job["seed"], max(number, 0))
        drawing = clock.between(start, clock.mark())
        bare = watch.time(lambda: render([template], [plan], device))  # noqa: B023
        if number < 0:  # warm-up, and the bytes, which hardly change from image to image
            with stages.counting():
                render([template], [plan], device)
            continue
        timed = Stages(watch)
        with timed.timing():
            with_clocks = watch.time(lambda: render([template], [plan], device))  # noqa: B023
        drawn.append(drawing)
        plain.append(bare)
        clocked.append(with_clocks)
        timings.append(timed.totals())
        bandwidth.append(2 * source.nbytes / watch.time(lambda: target.copy_(source))[0])
    speed = median(bandwidth)
    total, total_cpu = (median(c[i] for c in clocked) for i in (0, 1))

    def row(seconds: float, cpu: float, fused: float = 0.0, moved: float = 0.0) -> Job:
        return {
            "seconds": seconds, "cpu_seconds": cpu, "share": seconds / total, "one_pass_mb": fused / 1e6,
            "moved_mb": moved / 1e6, "one_pass_seconds": fused / speed, "moved_seconds": moved / speed,
        }  # fmt: skip

    rows = {"plan.sample_plan (on the CPU)": row(*(median(d[i] for d in drawn) for i in (0, 1)))}
    for name in in_order(list(dict.fromkeys(n for t in timings for n in t))):
        seconds, cpu = (median(t[name][i] for t in timings) for i in (0, 1))
        rows[name] = row(seconds, cpu, stages.fused.get(name, 0), stages.moved.get(name, 0))
    called = [r for n, r in rows.items() if ">" not in n and "sample_plan" not in n]
    rest, rest_cpu = total - sum(r["seconds"] for r in called), total_cpu - sum(r["cpu_seconds"] for r in called)
    moved = stages.moved.get("render", 0)
    rows["synthesis.render itself"] = row(max(rest, 0.0), max(rest_cpu, 0.0), 0, moved)
    top = [r for n, r in rows.items() if ">" not in n]
    voxels = job["size"] ** 3
    return {
        "copy_gb_per_second": speed / 1e9,
        "render_seconds": median(p[0] for p in plain),
        "render_cpu_seconds": median(p[1] for p in plain),
        "render_seconds_with_the_clocks": total,
        # a label read, a label and a float32 intensity written, nothing else
        "least_seconds": voxels * (1 + 1 + 4) / speed,
        "one_pass_seconds": sum(r.get("one_pass_seconds", 0.0) for r in top),
        "moved_seconds": sum(r.get("moved_seconds", 0.0) for r in top),
        "stages": rows,
    }


def child_scaling(job: Job) -> Job:
    """Seconds of rendering against volume and batch, in interleaved rounds."""
    template, watch = prepare(job), Stopwatch(job["device"])
    cases = [(n, 1) for n in job["volumes"]] + [(job["size"], b) for b in job["batches"] if b > 1]
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for number in range(-1, job["rounds"]):
        for size, batch in cases:
            config = settings(job, size)
            plans = [
                sample_plan(config, template.name, template.table, job["seed"], max(number, 0) * batch + b)
                for b in range(batch)
            ]
            seconds = watch.time(lambda: render([template] * batch, plans, job["device"]))[0]  # noqa: B023
            if number >= 0:
                times[size, batch].append(seconds / batch)
    return {
        "rows": [
            {"size": n, "batch": b, "seconds_per_image": median(t), "ns_per_voxel": median(t) / n**3 * 1e9}
            for (n, b), t in times.items()
        ]
    }


JOBS = {"pairs": child_pairs, "stages": child_stages, "scaling": child_scaling}


def main() -> None:
    job = json.loads(sys.argv[1])
    print(json.dumps(JOBS[job["part"]](job)))


if __name__ == "__main__":
    main()
