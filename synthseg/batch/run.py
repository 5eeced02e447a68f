"""Segment many scans: the next one is read and the last one written while the network runs on the one between.

A scan that fails leaves the others alone; a scan whose outputs are all there is skipped; two runs on the same scans
share them. At most one scan waits on either side of the network, so memory does not grow with the batch.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import nibabel as nib
import numpy as np

from synthseg.batch.claims import Claim, remove_leftovers
from synthseg.batch.jobs import Job, Wanted
from synthseg.batch.resume import check_same, existing, is_row_of, with_labels, without
from synthseg.batch.volume_table import Row, VolumeTable
from synthseg.errors import SynthSegError
from synthseg.memory import as_shortage
from synthseg.targets import Targets
from synthseg.volume import Volume, image_suffix, load_volume

if TYPE_CHECKING:
    import torch

    from synthseg.inference import Model, Options, Segmentation
    from synthseg.labels import LabelTable
    from synthseg.quality import Quality
    from synthseg.reports.html_report import ReportEntry

OVERLAP_BYTES = 512 * 2**20  # a scan (with its probabilities) that takes more is read, segmented and written in turn
POLL_S = 0.5

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job. Small: arrays are given up when they are written."""

    job: Job
    status: Status
    error: Exception | None = None
    warnings: tuple[str, ...] = ()
    quality: Quality | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    row: Row | None = None
    entry: ReportEntry | None = None


@dataclass(frozen=True)
class Settings:
    """What holds for all scans of a run.

    Attributes
    ----------
    table : where volumes are collected; a scan without a row of its label map in it is not done.
    report : whether each outcome carries an entry for the HTML report.
    overwrite : do again what is done already.
    color_folder : where colour tables go, if they are wanted; None: beside each label map.
    facts : how the segmentations are made, for sidecars and for the header of each label map.
    """

    wanted: Wanted = field(default_factory=Wanted)
    table: VolumeTable | None = None
    report: bool = False
    overwrite: bool = False
    color_folder: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def run_jobs(
    jobs: Sequence[Job],
    model: Model,
    device: torch.device | str = "cpu",
    options: Options | None = None,
    settings: Settings | None = None,
    on_step: Callable[[Job, str], None] = lambda job, step: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Segment every scan that is not done yet. Whatever ends one scan is in its outcome, and the others go on.

    ``on_done`` is called as each scan ends, perhaps from another thread, one call at a time. When this function is
    interrupted, the scan in the network is given up, and the one that is being written is finished first.
    """
    from synthseg.inference import Options

    run = _Run(model, device, options or Options(), settings or Settings(), on_step, on_done, len(jobs))
    remove_leftovers({path.parent for job in jobs for path in job.files()})
    with run.threads(len(jobs) > 1):
        others = run.go(jobs)  # those that another run holds come last: it may have done them by then
        run.go(others, wait=True)
    rank = {id(job): index for index, job in enumerate(jobs)}
    return sorted(run.outcomes, key=lambda outcome: rank[id(outcome.job)])


@dataclass
class _Ready:
    """A job after it was read: a volume to segment, or nothing more to do."""

    job: Job
    claim: Claim
    volume: Volume | None = None
    kept: tuple[Path, ...] = ()
    busy: bool = False
    read_s: float = 0.0
    outcome: Outcome | None = None


class _Run:
    """One run over the jobs: a thread that reads, the calling thread with the network, a thread that writes."""

    def __init__(
        self,
        model: Model,
        device: torch.device | str,
        options: Options,
        settings: Settings,
        on_step: Callable[[Job, str], None],
        on_done: Callable[[Outcome], None],
        n_scans: int,
    ) -> None:
        self.n_scans = n_scans
        self.table = model.labels
        if settings.wanted.scheme is not None:
            from synthseg.outputs import target_table

            self.table = target_table(model.labels, settings.wanted.scheme)
        self.model, self.device, self.options, self.settings = model, device, options, settings
        self.on_step, self.on_done = on_step, on_done
        self.outcomes: list[Outcome] = []
        self._colored: set[Path] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._reader: ThreadPoolExecutor | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._claims: list[Claim] = []  # every one that was taken; a signal may come between any two lines
        self._read_ahead: Future[_Ready] | None = None
        self._writing: Future[None] | None = None

    @contextmanager
    def threads(self, several: bool) -> Iterator[None]:
        """The two threads; none for a single scan. At the end, however it comes, no claim is left behind."""
        try:
            if not several:
                yield
                return
            with ThreadPoolExecutor(1, "synthseg-read") as reader, ThreadPoolExecutor(1, "synthseg-write") as writer:
                self._reader, self._writer = reader, writer
                self._leave_cores_to_the_network()
                try:
                    yield
                finally:
                    self._stop.set()
        finally:
            for claim in self._claims:
                claim.release()

    def _leave_cores_to_the_network(self) -> None:
        """On a CPU, reading and writing must not compete with the network for all cores: its threads would wait."""
        import torch

        if torch.device(self.device).type == "cpu" and self._reader is not None and self._writer is not None:
            n_threads = torch.get_num_threads()
            for executor in (self._reader, self._writer):
                executor.submit(torch.set_num_threads, 1).result()
            torch.set_num_threads(n_threads)

    def go(self, jobs: Sequence[Job], wait: bool = False) -> list[Job]:
        """Do these jobs; return those that another run holds (none if ``wait``)."""
        busy = []
        for index, ready in enumerate(self._read_in_turn(jobs, wait)):
            if ready.busy:
                busy.append(ready.job)
            elif ready.outcome is not None:
                self._done(ready.outcome)
            else:
                self._segment(ready, last=index == len(jobs) - 1)
        self._finish_writing()
        return busy

    # ------------------------------------------------------------------------------------------------ reading

    def _read_in_turn(self, jobs: Sequence[Job], wait: bool) -> Iterator[_Ready]:
        """Each job as it is read; the next one is being read meanwhile, unless it or this one is large."""
        for job, following in zip_longest(jobs, jobs[1:]):
            if self._read_ahead is not None:
                ready = self._read_ahead.result()
                self._read_ahead = None
            else:
                self.on_step(job, "waiting for another run" if wait else "read")
                ready = self._read(job, wait)
            small = ready.volume is None or ready.volume.data.nbytes <= OVERLAP_BYTES
            if following is not None and self._reader is not None and small and _n_bytes(following) <= OVERLAP_BYTES:
                self._read_ahead = self._reader.submit(self._read, following, wait)
            yield ready

    def _read(self, job: Job, wait: bool) -> _Ready:
        """Claim a job, see what is left to do, and read its scan."""
        start = time.perf_counter()
        ready = _Ready(job, Claim(job.targets.labels))
        self._claims.append(ready.claim)
        try:
            while not ready.claim.take(POLL_S if wait else 0.0):
                if not wait or self._stop.is_set():
                    ready.busy = True
                    return ready
            if not self.settings.overwrite:
                there = existing(job, self.settings.wanted, self.table, self.settings.facts)
                ready.outcome = self._skipped(job) if there.whole else None
                if ready.outcome is not None:
                    ready.claim.release()
                    return ready
                ready.kept = there.kept
            ready.volume = load_volume(job.source)
        except Exception as error:  # whatever it was, the other scans go on; the caller decides what to say
            ready.claim.release()
            ready.outcome = self._failed(job, error)
        except BaseException:
            ready.claim.release()
            raise
        ready.read_s = time.perf_counter() - start
        return ready

    def _skipped(self, job: Job) -> Outcome | None:
        """The outcome of a scan whose files are all there; None if a table is wanted that has no row of its label map.

        On another grid than the scan's (``--spacing``) a label map is not what a row counts: any row will do.
        """
        settings, row, volume, labels = self.settings, None, None, None
        if settings.table is not None:
            row = settings.table.row(job.name)
            if row is None:
                return None
        if settings.wanted.spacing_mm is None and (settings.report or row is not None):
            with suppress(SynthSegError):  # of a scan that cannot be read any more the row alone is known
                volume = load_volume(job.source)
                labels = np.asarray(nib.load(job.targets.labels).dataobj)
                if row is not None and not is_row_of(row, labels, self.table, volume.voxel_ml):
                    return None
        if settings.wanted.color_tables:
            self._write_color_tables(settings.color_folder or job.targets.labels.parent, self.table)
        entry = None
        if settings.report:
            from synthseg.reports.html_report import skipped_entry

            entry = skipped_entry(
                job.name, row=row, volume=volume, labels=labels, table=self.table, n_scans=self.n_scans
            )
        return Outcome(job, "skipped", row=row, entry=entry)

    # ------------------------------------------------------------------------------------ network and writing

    def _segment(self, ready: _Ready, last: bool) -> None:
        from synthseg.inference import segment

        assert ready.volume is not None
        job, step = ready.job, self.on_step
        mine = True  # until the writing thread has it
        try:
            if ready.volume.data.nbytes > OVERLAP_BYTES:
                self._finish_writing()
            segmentation = segment(
                ready.volume, self.model, self.device, self.options, on_step=lambda name: step(job, name)
            )
            self._finish_writing()
            size = ready.volume.data.nbytes + segmentation.labels.nbytes
            if segmentation.posteriors is not None:
                size += segmentation.posteriors.values.nbytes
            mine = False
            if self._writer is None or last or size > OVERLAP_BYTES:
                step(job, "write")
                self._write(ready, segmentation)
            else:
                self._writing = self._writer.submit(self._write, ready, segmentation)
        except Exception as error:
            if not mine:
                raise
            self._done(self._failed(job, error))
        finally:
            if mine:
                ready.claim.release()

    def _finish_writing(self) -> None:
        """Wait until the last scan is written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, ready: _Ready, segmentation: Segmentation) -> None:
        """Write all files of a scan, then its row; the claim is held until then."""
        job, volume, start = ready.job, ready.volume, time.perf_counter()
        ready.volume = None
        assert volume is not None
        outcome = None
        try:
            if self.settings.wanted.scheme is not None:
                from synthseg.outputs import relabelled

                segmentation = relabelled(segmentation, self.settings.wanted.scheme)
            self._write_files(job, ready.kept, volume, segmentation)
            if job.targets.labels in ready.kept and self.settings.wanted.spacing_mm is None:
                segmentation = with_labels(segmentation, job.targets.labels, volume.voxel_ml)
            timings_s = {
                "read": ready.read_s, **segmentation.timings_s, "write": time.perf_counter() - start
            }  # fmt: skip
            segmentation.timings_s = timings_s
            outcome = self._summary(job, volume, segmentation)
            if self.settings.table is not None and outcome.row is not None:
                self.settings.table.add(outcome.row)
        except Exception as error:
            outcome = self._failed(job, error)
        finally:
            ready.claim.release()
        self._done(outcome)

    def _write_files(self, job: Job, kept: tuple[Path, ...], volume: Volume, segmentation: Segmentation) -> None:
        from synthseg.outputs import write_outputs

        wanted = self.settings.wanted
        labels = job.targets.labels
        scratch = labels.with_name(f".synthseg-{uuid.uuid4().hex}{image_suffix(labels)}")
        todo = without(job, kept, scratch) if kept else job
        try:
            if labels in kept:
                write_outputs(
                    Targets(scratch), volume, segmentation, spacing_mm=wanted.spacing_mm, scheme=wanted.scheme
                )
                check_same(scratch, labels)
            if todo.targets.paths() != [scratch]:
                write_outputs(
                    todo.targets,
                    volume,
                    segmentation,
                    spacing_mm=wanted.spacing_mm,
                    scheme=wanted.scheme,
                    facts=self.settings.facts,
                )
        finally:
            with suppress(OSError):
                scratch.unlink()
        if todo.overview is not None:
            from synthseg.reports.overview import write_overview

            write_overview(todo.overview, volume, segmentation.labels, segmentation.table, title=job.source.name)
        if job.sidecars is not None:
            job.sidecars.write(segmentation, self.settings.facts, kept)
        if wanted.color_tables:
            self._write_color_tables(self.settings.color_folder or labels.parent, self.table)

    def _write_color_tables(self, folder: Path, table: LabelTable) -> None:
        """Once for each folder; tables that are there stay."""
        from synthseg.color_tables import color_table_paths, write_all

        if folder not in self._colored:
            if self.settings.overwrite or not all(path.exists() for path in color_table_paths(folder, table)):
                write_all(folder, table)
            self._colored.add(folder)

    def _summary(self, job: Job, volume: Volume, segmentation: Segmentation) -> Outcome:
        from synthseg.reports.volumes import volume_row

        entry = None
        if self.settings.report:
            from synthseg.reports.html_report import report_entry

            entry = report_entry(job.name, volume, segmentation, n_scans=self.n_scans)
        return Outcome(
            job,
            "done",
            warnings=tuple(segmentation.warnings),
            quality=segmentation.quality,
            timings_s=segmentation.timings_s,
            row=volume_row(job.name, segmentation, segmentation.table),
            entry=entry,
        )

    def _failed(self, job: Job, error: Exception) -> Outcome:
        error = as_shortage(error) or error
        entry = None
        if self.settings.report:
            from synthseg.reports.html_report import failed_entry

            entry = failed_entry(job.name, str(error))
        return Outcome(job, "failed", error, entry=entry)

    def _done(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            self.on_done(outcome)


def _n_bytes(job: Job) -> int:
    """What the voxels of a scan take in memory; 0 if its header cannot be read."""
    try:
        return int(np.prod(nib.load(job.source).shape, dtype=np.int64)) * 4
    except Exception:  # reading it will say what is wrong
        return 0
