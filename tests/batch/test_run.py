"""The batch: what overlaps, what is held in memory, in which order scans end, and who does which."""

import csv
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from synthseg.batch import run
from synthseg.batch.claims import Claim, remove_leftovers
from synthseg.batch.jobs import Job, Wanted, check_jobs, file_word, parse_sizes, plan_jobs
from synthseg.batch.resume import check_same, damage
from synthseg.batch.run import Outcome, Settings, run_jobs
from synthseg.batch.volume_table import VolumeTable
from synthseg.errors import OutputError
from synthseg.inference import Options
from synthseg.inputs import Scan, find_scans
from synthseg.outputs import facts_of, write_outputs
from synthseg.volume import Volume, load_volume
from tests.segmenting import Fake, Levels, files, write_scan

WAIT_S = 20.0


def make_jobs(folder: Path, count: int, wanted: Wanted | None = None) -> list[Job]:
    for index in range(count):
        write_scan(folder / "in" / f"s{index}.nii.gz", index)
    return plan_jobs(find_scans([folder / "in"]), folder / "out", wanted=wanted)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


# --------------------------------------------------------------------------------------------------- overlap


class Meeting(Levels):
    """A network that does not end before something else has happened."""

    def __init__(self, before: Callable[[int], bool]) -> None:
        super().__init__()
        self.before = before
        self.count = 0

    def forward(self, image):  # type: ignore[no-untyped-def]
        self.count += 1
        assert self.before(self.count), "nothing overlapped with the network"
        return super().forward(image)


def test_the_next_scan_is_read_while_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = [threading.Event() for _ in range(4)]

    def load(path: Path) -> Volume:
        read[int(path.name[1])].set()
        return load_volume(path)

    monkeypatch.setattr(run, "load_volume", load)
    network = Meeting(lambda count: count == 4 or read[count].wait(WAIT_S))
    outcomes = run_jobs(make_jobs(tmp_path, 4), Fake(network))
    assert statuses(outcomes) == ["done"] * 4


def test_the_last_scan_is_written_while_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = [threading.Event() for _ in range(4)]
    late = []

    def write(targets, *arguments, **options) -> None:  # type: ignore[no-untyped-def]
        following = int(targets.labels.name[1]) + 1
        if following < 4 and not started[following].wait(WAIT_S):  # pragma: no cover
            late.append(following)
        write_outputs(targets, *arguments, **options)

    def note(count: int) -> bool:
        started[count - 1].set()
        return True

    monkeypatch.setattr("synthseg.outputs.write_outputs", write)
    outcomes = run_jobs(make_jobs(tmp_path, 4), Fake(Meeting(note)))
    assert statuses(outcomes) == ["done"] * 4
    assert late == []


def test_at_most_one_scan_waits_on_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Volume] = weakref.WeakSet()
    most = 0

    def load(path: Path) -> Volume:
        nonlocal most
        volume = load_volume(path)
        alive.add(volume)
        most = max(most, len(alive))
        return volume

    def write(*arguments, **options) -> None:  # type: ignore[no-untyped-def]
        time.sleep(0.1)  # the slowest step
        write_outputs(*arguments, **options)

    monkeypatch.setattr(run, "load_volume", load)
    monkeypatch.setattr("synthseg.outputs.write_outputs", write)
    outcomes = run_jobs(make_jobs(tmp_path, 8), Fake())
    assert statuses(outcomes) == ["done"] * 8
    assert most <= 3  # one is read, one is in the network, one is being written
    assert not alive


def test_large_scans_are_done_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def load(path: Path) -> Volume:
        events.append(f"read {path.name[1]}")
        return load_volume(path)

    def write(targets, *arguments, **options) -> None:  # type: ignore[no-untyped-def]
        write_outputs(targets, *arguments, **options)
        events.append(f"wrote {targets.labels.name[1]}")

    monkeypatch.setattr(run, "OVERLAP_BYTES", 0)
    monkeypatch.setattr(run, "load_volume", load)
    monkeypatch.setattr("synthseg.outputs.write_outputs", write)
    run_jobs(make_jobs(tmp_path, 3), Fake())
    assert events == ["read 0", "wrote 0", "read 1", "wrote 1", "read 2", "wrote 2"]


@pytest.mark.slow
def test_memory_stays_flat_over_200_scans(tmp_path: Path) -> None:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("reads the memory of the process from /proc")
    (tmp_path / "in").mkdir()
    first = tmp_path / "in" / "000.nii"
    data = np.random.default_rng(0).normal(0, 1, (48, 40, 44)).astype(np.float32)
    data[8:40, 8:32, 8:36] += 50
    data[16:30, 14:24, 14:28] += 50
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), first)
    for index in range(1, 200):
        os.link(first, first.with_name(f"{index:03d}.nii"))
    used_mb: list[float] = []

    def on_done(outcome: Outcome) -> None:
        used_mb.append(int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)

    jobs = plan_jobs(find_scans([tmp_path / "in"]), tmp_path / "out")
    settings = Settings(table=VolumeTable(tmp_path / "v.csv", [job.name for job in jobs]))
    outcomes = run_jobs(jobs, Fake(), options=Options(quality=False), settings=settings, on_done=on_done)
    assert statuses(outcomes) == ["done"] * 200
    # A scan and its labels are 0.4 MB, its probabilities 0.5 MB: 150 of them kept would be 60 MB and more.
    assert max(used_mb[150:]) - max(used_mb[20:50]) < 15


# --------------------------------------------------------------------------------------------------- results


def test_outcomes_are_in_order_and_one_failure_is_one(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 5)
    jobs[1].source.write_text("not a scan")
    jobs[3].source.write_bytes(jobs[3].source.read_bytes()[:-200])
    seen: list[str] = []
    outcomes = run_jobs(jobs, Fake(), on_done=lambda outcome: seen.append(outcome.job.source.name))
    assert statuses(outcomes) == ["done", "failed", "done", "failed", "done"]
    assert [outcome.job for outcome in outcomes] == jobs
    assert sorted(seen) == [job.source.name for job in jobs]
    assert all(
        str(job.source) in str(outcome.error) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.error
    )
    assert files(tmp_path / "out") == ["s0_seg.nii.gz", "s2_seg.nii.gz", "s4_seg.nii.gz"]


def test_timings_name_every_step(tmp_path: Path) -> None:
    (outcome,) = run_jobs(make_jobs(tmp_path, 1), Fake())
    assert list(outcome.timings_s) == ["read", "conform", "network", "clean-up", "resample", "quality", "write"]
    assert all(seconds >= 0 for seconds in outcome.timings_s.values())


def test_a_missing_output_alone_is_made(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 2, Wanted(mask=True, posteriors=True, stripped=True))
    options = Options(keep_posteriors=True)
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["done", "done"]
    before = {path: path.read_bytes() for job in jobs for path in job.files()}
    times = {path: path.stat().st_mtime_ns for path in before}
    mask, posteriors = jobs[0].targets.mask, jobs[1].targets.posteriors
    assert mask is not None
    assert posteriors is not None
    mask.unlink()
    posteriors.unlink()
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["done", "done"]
    assert {path: path.read_bytes() for path in before} == before
    assert [path for path in before if path.stat().st_mtime_ns != times[path]] == [mask, posteriors]
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["skipped", "skipped"]
    assert len(files(tmp_path / "out")) == 8


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"sha256": "b" * 64}, "weights aaaaaaaa, now bbbbbbbb"),
        ({"mode": "fast"}, "mode default, now fast"),
        ({"crop_mm": (160.0, 160.0, 160.0)}, "--crop none, now (160.0, 160.0, 160.0)"),
    ],
)
def test_a_label_map_that_was_made_otherwise_is_neither_skipped_nor_replaced(
    tmp_path: Path, other: dict[str, object], told: str
) -> None:
    facts = {"sha256": "a" * 64, "mode": "default", "crop_mm": None, "scheme": "two"}
    jobs = make_jobs(tmp_path, 1)
    assert statuses(run_jobs(jobs, Fake(), settings=Settings(facts=facts))) == ["done"]
    labels = jobs[0].targets.labels
    assert facts_of(labels) == facts
    before = labels.read_bytes()
    assert statuses(run_jobs(jobs, Fake(), settings=Settings(facts=facts))) == ["skipped"]
    outcome = run_jobs(jobs, Fake(), settings=Settings(facts=facts | other))[0]
    assert outcome.status == "failed"
    assert told in str(outcome.error)
    assert labels.read_bytes() == before
    again = Settings(facts=facts | other, overwrite=True)
    assert statuses(run_jobs(jobs, Fake(), settings=again)) == ["done"]
    assert statuses(run_jobs(jobs, Fake(), settings=replace(again, overwrite=False))) == ["skipped"]  # tuples, lists


def test_a_label_map_that_does_not_say_how_it_was_made_is_taken_as_it_is(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 1)
    assert statuses(run_jobs(jobs, Fake())) == ["done"]
    assert facts_of(jobs[0].targets.labels) == {}
    assert statuses(run_jobs(jobs, Fake(), settings=Settings(facts={"mode": "fast"}))) == ["skipped"]


def test_a_surface_of_what_is_not_there_is_not_missing(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 1, Wanted(meshes=("Bright", "Dark")))
    options = Options(keep_posteriors=True)
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["done"]
    (_, bright), (_, dark) = jobs[0].targets.meshes
    assert (bright.name, dark.name) == ("s0_Bright.surf.gii", "s0_Dark.surf.gii")
    assert damage(bright) == damage(dark) == ""
    bright.unlink()
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["done"]
    assert bright.exists()

    labels = jobs[0].targets.labels
    image = nib.load(labels)
    without = np.where(np.asarray(image.dataobj) == 7, 3, np.asarray(image.dataobj))
    nib.save(nib.Nifti1Image(without.astype(np.uint8), image.affine, image.header), labels)
    bright.unlink()
    assert statuses(run_jobs(jobs, Fake(), options=options)) == ["skipped"]
    dark.unlink()
    (outcome,) = run_jobs(jobs, Fake(), options=options)
    assert outcome.status == "failed"  # it is missing, and the label map is not that of this run
    assert "differs" in str(outcome.error)


class Undecided(Levels):
    """Bright voxels are Bright with 0.4, and with 0.3 each of the others."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = image > 0.9
        shares = torch.tensor([0.3, 0.3, 0.4]).log().view(1, 3, 1, 1, 1)
        return torch.where(bright, shares, super().forward(image))


def test_a_surface_that_could_not_be_made_is_not_missing(tmp_path: Path) -> None:
    model, options = Fake(Undecided()), Options(keep_posteriors=True)
    jobs = make_jobs(tmp_path, 1, Wanted(meshes=("bright", "Dark")))
    facts = {"mode": "default"}
    (outcome,) = run_jobs(jobs, model, options=options, settings=Settings(facts=facts))
    assert outcome.status == "done"
    assert any("no voxel of bright is likelier than not" in warning for warning in outcome.warnings)
    (_, bright), (_, dark) = jobs[0].targets.meshes
    labels = jobs[0].targets.labels
    assert 7 in np.asarray(nib.load(labels).dataobj)
    assert (bright.exists(), dark.exists()) == (False, True)
    assert facts_of(labels) == {**facts, "without_surface": ["bright"]}
    assert statuses(run_jobs(jobs, model, options=options, settings=Settings(facts=facts))) == ["skipped"]
    dark.unlink()
    assert statuses(run_jobs(jobs, model, options=options, settings=Settings(facts=facts))) == ["done"]
    assert dark.exists()


def bright_ml(labels: Path) -> float:
    return float((np.asarray(nib.load(labels).dataobj) == 7).sum() * 1.5 * 1.5 * 2 / 1000)


def test_the_row_of_another_label_map_is_missing(tmp_path: Path) -> None:
    """Two ways to segment into one table: a row counts as done only for the label map that it was counted in."""
    jobs = make_jobs(tmp_path, 2)
    others = plan_jobs([Scan(job.source) for job in jobs], tmp_path / "other")
    cropped = Options(crop_mm=(12.0, 12.0, 12.0))

    def again(jobs: list[Job], options: Options | None = None) -> tuple[list[str], list[str]]:
        table = VolumeTable(tmp_path / "v.csv", [job.name for job in jobs])
        outcomes = run_jobs(jobs, Fake(), options=options, settings=Settings(table=table, report=True))
        lines = csv.DictReader((tmp_path / "v.csv").read_text().splitlines())
        rows = [float(line["Bright_ml"]) for line in lines]
        assert rows == pytest.approx([bright_ml(job.targets.labels) for job in jobs], abs=6e-4)
        shown = [outcome.entry.volumes["Bright_ml"] for outcome in outcomes if outcome.entry is not None]
        assert shown == pytest.approx(rows, abs=6e-4)
        return statuses(outcomes), [f"{row:.3f}" for row in rows]

    _, first = again(jobs)
    before = [job.targets.labels.read_bytes() for job in jobs]
    _, second = again(others, cropped)
    assert first[0] != second[0]
    assert again(jobs) == (["done", "done"], first)
    assert [job.targets.labels.read_bytes() for job in jobs] == before
    assert again(jobs) == (["skipped", "skipped"], first)
    (tmp_path / "v.csv").unlink()
    image = nib.load(jobs[0].targets.labels)  # in one voxel another processor rounds otherwise
    data = np.asarray(image.dataobj).copy()
    data[9, 9, 9] = 3
    nib.save(nib.Nifti1Image(data, image.affine, image.header), jobs[0].targets.labels)
    assert again(jobs)[0] == ["done", "done"]
    assert again(jobs)[0] == ["skipped", "skipped"]


def test_any_row_will_do_for_a_label_map_on_another_grid(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 1)
    settings = Settings(Wanted(spacing_mm=2.0), VolumeTable(tmp_path / "v.csv"))
    options = Options(keep_posteriors=True)
    assert statuses(run_jobs(jobs, Fake(), options=options, settings=settings)) == ["done"]
    assert statuses(run_jobs(jobs, Fake(), options=options, settings=settings)) == ["skipped"]


# ----------------------------------------------------------------------------------------------------- claims


def test_a_claim_is_held_by_one(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a_seg.nii.gz"
    first, second = Claim(output), Claim(output)
    assert first.take()
    assert not second.take()
    assert Claim(tmp_path / "new" / "b_seg.nii.gz").take()
    first.release()
    assert second.take()
    second.release()
    assert not output.exists()


def test_a_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "x" / "y" / "a.nii.gz")
    assert claim.take()
    claim.release()
    claim.release()
    assert list(tmp_path.iterdir()) == []
    assert claim.take()
    (tmp_path / "x" / "y" / "a.nii.gz").touch()
    claim.release()
    assert files(tmp_path) == ["x/y/a.nii.gz"]


def test_a_scan_that_another_run_holds_is_waited_for(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 3)
    other = Claim(jobs[0].targets.labels)
    assert other.take()
    done: list[str] = []

    def on_done(outcome: Outcome) -> None:
        done.append(outcome.job.source.name[:2])
        if len(done) == 2:
            threading.Timer(0.3, other.release).start()

    outcomes = run_jobs(jobs, Fake(), on_done=on_done)
    assert done == ["s1", "s2", "s0"]  # the others first
    assert statuses(outcomes) == ["done"] * 3


def test_what_the_other_run_did_is_not_done_again(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path, 2)
    run_jobs(jobs[:1], Fake())
    result = jobs[0].targets.labels
    content = result.read_bytes()
    result.unlink()
    other = Claim(result)
    assert other.take()

    def finish() -> None:
        result.write_bytes(content)
        other.release()

    outcomes = run_jobs(jobs, Fake(), on_done=lambda outcome: threading.Timer(0.3, finish).start())
    assert statuses(outcomes) == ["skipped", "done"]


def test_leftovers_of_a_killed_run_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / f".synthseg-{'a' * 32}.nii.gz", tmp_path / f".synthseg-{'b' * 32}.nii.gz"
    others = [tmp_path / ".synthseg-notes.txt", tmp_path / f".other-{'a' * 32}", tmp_path / "synthseg-old.nii.gz"]
    for path in (old, new, *others):
        path.touch()
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    os.utime(new)
    remove_leftovers([tmp_path, tmp_path / "missing"])
    assert sorted(tmp_path.iterdir()) == sorted([new, *others])


# ------------------------------------------------------------------------------------------------ small parts


def test_label_maps_of_another_result_differ(tmp_path: Path) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 5:15, 5:15] = 3
    paths = []
    for name, changed, value in (("a", 0, 0), ("b", 4, 7), ("c", 6, 7), ("d", 1000, 0)):
        other = labels.copy()
        where = np.argwhere(labels)[:changed]
        other[tuple(where.T)] = value
        paths.append(tmp_path / f"{name}.nii")
        nib.save(nib.Nifti1Image(other, np.eye(4)), paths[-1])
    check_same(paths[0], paths[0])
    check_same(paths[1], paths[0])  # 4 of 1000 voxels
    for path in paths[2:]:
        with pytest.raises(OutputError, match="differs"):
            check_same(path, paths[0])


def test_damage_of_texts_pictures_and_surfaces(tmp_path: Path) -> None:
    cases = {
        "a.json": (b'{"a": 1}', b'{"a": '),
        "a.png": (b"\x89PNG..IEND\xaeB`\x82", b"\x89PNG..IEN"),
        "a.surf.gii": (b"<GIFTI></GIFTI>\n", b"<GIFTI></GIF"),
        "a.stl": (b"\0" * 80 + b"\1\0\0\0" + b"\0" * 50, b"\0" * 80 + b"\1\0\0\0" + b"\0" * 49),
        "a.tsv": (b"index\tname\n", b""),
    }
    for name, (whole, cut) in cases.items():
        (tmp_path / name).write_bytes(whole)
        assert damage(tmp_path / name) == "", name
        (tmp_path / name).write_bytes(cut)
        assert damage(tmp_path / name) != "", name
    (tmp_path / "folder").mkdir()
    assert damage(tmp_path / "folder") == "not a regular file"


def test_sizes() -> None:
    assert parse_sizes("1", "--spacing", (0.1, 20)) == (1.0, 1.0, 1.0)
    assert parse_sizes("0.5x1X2", "--spacing", (0.1, 20)) == (0.5, 1.0, 2.0)
    assert parse_sizes("1,1,2.5", "--spacing", (0.1, 20)) == (1.0, 1.0, 2.5)


def test_names_of_files(tmp_path: Path) -> None:
    assert file_word("Left Thalamus/x") == "Left-Thalamus-x"
    assert file_word("..") == "structure"
    scan = write_scan(tmp_path / "t1.nii.gz")
    wanted = Wanted(posteriors=True, resampled=True, mask=True, stripped=True, meshes=("skull",), mesh_format="stl")
    (job,) = plan_jobs(find_scans([scan]), tmp_path / "labels_seg.mgz", tmp_path / "p.png", wanted, one_file=True)
    names = ("labels_seg.mgz", "labels_posteriors.nii.gz", "labels_resampled.nii.gz", "labels_mask.nii.gz")
    assert [path.name for path in job.files()] == [*names, "labels_stripped.nii.gz", "labels_skull.stl", "p.png"]
    with pytest.raises(OutputError, match="one of the inputs"):
        check_jobs([replace(job, overview=scan)])


def test_a_table_is_shared_by_runs(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    first, second = VolumeTable(path, ["a", "b,c", "d"]), VolumeTable(path, ["a", "b,c", "d"])
    second.add({"scan": "d", "x_ml": 3.0})
    first.add({"scan": "a", "x_ml": 1.23456})
    second.add({"scan": "b,c", "x_ml": float("nan")})
    assert path.read_text() == 'scan,x_ml\na,1.235\n"b,c",n/a\nd,3.000\n'
    assert first.row("d") is not None
    assert first.row("e") is None
    first.add({"scan": "a", "x_ml": 2.0})
    assert path.read_text().splitlines()[1] == "a,2.000"
    with pytest.raises(OutputError, match="other columns"):
        first.add({"scan": "a", "y_ml": 2.0})
    VolumeTable(path, overwrite=True).add({"scan": "z", "y_ml": 2.0})
    assert path.read_text() == "scan,y_ml\nz,2.000\n"


def test_a_scan_has_one_row_by_whatever_path_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write_scan(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b.nii.gz").symlink_to(scan)  # a scan of its own, with outputs of its own
    monkeypatch.chdir(tmp_path)
    table = VolumeTable(tmp_path / "v.csv")
    ways = ("in/a.nii.gz", "./in/a.nii.gz", "in/../in/a.nii.gz", str(scan), "link/a.nii.gz")
    for number, name in enumerate(("sub-01/anat/sub-01_T1w.nii.gz", "in/b.nii.gz", *ways)):
        table.add({"scan": name, "x_ml": float(number)})
    rows = ["scan,x_ml", "sub-01/anat/sub-01_T1w.nii.gz,0.000", "in/b.nii.gz,1.000", "link/a.nii.gz,6.000"]
    assert (tmp_path / "v.csv").read_text().splitlines() == rows
    for known in (table, VolumeTable(tmp_path / "v.csv")):
        assert [float((known.row(name) or {})["x_ml"]) for name in ways] == [6.0] * 5
        assert known.row("sub-01/anat/sub-02_T1w.nii.gz") is None
    jobs = plan_jobs([Scan(Path("in/a.nii.gz"))], tmp_path / "out")
    (tmp_path / "v.csv").unlink()
    for name, status in (("in/a.nii.gz", "done"), (str(scan), "skipped")):
        settings = Settings(table=VolumeTable(tmp_path / "v.csv"))
        assert statuses(run_jobs([replace(jobs[0], name=name)], Fake(), settings=settings)) == [status]


def test_pictures_of_equal_names_are_told_apart_by_folders(tmp_path: Path) -> None:
    names = ("s/p1/t1.nii.gz", "s/p2/t1.nii.gz", "s/p3/a/t1.nii.gz", "s/p4/a/t1.nii.gz", "s/p1/t2.nii.gz")
    jobs = plan_jobs([Scan(tmp_path / name) for name in names], overview=tmp_path / "qc.png")
    pictures = [job.overview.name for job in jobs if job.overview is not None]
    assert pictures == ["qc_p1_t1.png", "qc_p2_t1.png", "qc_p3_a_t1.png", "qc_p4_a_t1.png", "qc_t2.png"]
    first, second = plan_jobs([Scan(tmp_path / name) for name in ("a.nii", "a.nii.gz")], overview=tmp_path / "qc.png")
    assert first.overview == second.overview  # nothing tells them apart: that of their label maps is refused


def test_a_row_that_could_not_be_written_is_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = VolumeTable(tmp_path / "v.csv", ["a", "b"])

    def full(path: Path, rows: object) -> None:
        raise OutputError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("synthseg.reports.volumes.write_volumes_csv", full)
        with pytest.raises(OutputError):
            table.add({"scan": "a", "x_ml": 1.0})
    table.add({"scan": "b", "x_ml": 2.0})
    assert (tmp_path / "v.csv").read_text() == "scan,x_ml\na,1.000\nb,2.000\n"
    assert files(tmp_path) == ["v.csv"]
