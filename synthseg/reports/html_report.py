"""The report of a run as one HTML file: a table of all scans, and for each its slices, volumes, flags and timings.

The file needs no network and loads nothing: style, script and pictures are inside, and its content security policy
allows nothing else. What comes from outside (names of files, messages, the manifest) is escaped by the templates of
``page``.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from synthseg.labels import LabelTable
from synthseg.quality import Quality
from synthseg.reports import plain
from synthseg.reports.figures import Distribution, timing_bar
from synthseg.reports.mosaic import WIDTH_PX, Mosaic, draw_mosaic
from synthseg.reports.volumes import counted_ml, volume_row
from synthseg.volume import Volume, atomic_path

if TYPE_CHECKING:
    from synthseg.inference import Segmentation

MANY_SCANS = 100  # pictures of a larger batch are smaller, so that the file still opens
MANY_WIDTH_PX = 1000
COMPARED_FROM = 4  # scans with a known volume; of fewer, each lies at an end or in the middle
MOST_DOTS = 100  # in the picture of one volume over the batch
FLAGGED_BEFORE = "an earlier run judged that this scan should be looked at"
_TOTALS = ("intracranial", "brain")
_HARD, _SOFT = "_ml", "_soft_ml"


@dataclass(frozen=True)
class ReportEntry:
    """What the report says about one scan.

    Attributes
    ----------
    error : why it failed; for a scan that was skipped, what the report does not know about it.
    volumes : the row of the table of volumes without the name: ``<label>_ml``, ``<label>_soft_ml``; NaN is not known.
    flags : what should be looked at, one sentence each, those of ``quality`` among them.
    timings_s : seconds by step.
    facts : size, voxel size and orientation of the scan, by name.
    """

    name: str
    status: Literal["done", "skipped", "failed"]
    error: str = ""
    volumes: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    flags: tuple[str, ...] = ()
    timings_s: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    mosaic: Mosaic | None = None

    @property
    def state(self) -> Literal["failed", "look", "ok", "done", "unknown"]:
        """How it stands.

        ``look`` has flags or a quality that did not pass, ``ok`` has none, ``done`` was not judged, ``unknown`` was
        skipped unread.
        """
        if self.status == "failed":
            return "failed"
        if self.flags or (self.quality is not None and not self.quality.passed):
            return "look"
        if self.quality is not None:
            return "ok"
        return "done" if self.volumes else "unknown"


def report_entry(name: str, volume: Volume, segmentation: Segmentation, *, n_scans: int = 1) -> ReportEntry:
    """The entry of a scan that was segmented. Draws its mosaic.

    Parameters
    ----------
    volume : the scan as it was read, on the grid of ``segmentation.labels``.
    n_scans : how many scans the run has; over `MANY_SCANS` of them the pictures are smaller.
    """
    row = volume_row(name, segmentation, segmentation.table)
    return ReportEntry(
        name,
        "done",
        volumes={key: value for key, value in row.items() if key.endswith(_HARD) and not isinstance(value, str)},
        quality=segmentation.quality,
        flags=tuple(dict.fromkeys(segmentation.warnings)),
        timings_s=dict(segmentation.timings_s),
        facts=_facts(volume),
        mosaic=draw_mosaic(volume, segmentation.labels, segmentation.table, _width_px(n_scans)),
    )


def failed_entry(name: str, error: BaseException | str) -> ReportEntry:
    """The entry of a scan that could not be segmented."""
    return ReportEntry(name, "failed", str(error) or type(error).__name__)


def skipped_entry(
    name: str,
    *,
    row: Mapping[str, str | float] | None = None,
    volume: Volume | None = None,
    labels: np.ndarray | None = None,
    table: LabelTable | None = None,
    n_scans: int = 1,
) -> ReportEntry:
    """The entry of a scan that an earlier run did: with what is still known of it.

    Parameters
    ----------
    row : its row of the table of volumes, as numbers or text; what it says of the quality is kept.
    volume, labels, table : the scan and its label map (D, H, W) on one grid, to draw the mosaic from; the volumes of
        its voxels are counted if there is no row.
    """
    volumes = _numbers(row or {})
    mosaic, facts = None, {}
    if volume is not None and labels is not None and table is not None:
        mosaic = draw_mosaic(volume, labels, table, _width_px(n_scans))
        facts = _facts(volume)
        volumes = volumes or counted_ml(labels, table, volume.voxel_ml)
    what = "segmented by an earlier run" + ("" if mosaic else "; its pictures were not drawn again")
    quality = _judgement(row or {})
    return ReportEntry(
        name,
        "skipped",
        what,
        volumes=volumes,
        quality=quality,
        flags=quality.flags if quality is not None else (),
        facts=facts,
        mosaic=mosaic,
    )


def write_html_report(path: Path, entries: Sequence[ReportEntry], manifest: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all.

    Parameters
    ----------
    entries : in the order of the table; may be none.
    manifest : how the run was made, in any depth: model, checksum, versions, options, command. ``model``, ``synthseg``
        and ``command`` are shown in the heading where they are texts.
    """
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).with_name("page")
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else plain(value),
    )
    environment.filters |= {"number": _number, "seconds": _seconds, "webp": _webp}
    page = environment.get_template("page.html").stream(
        **_Page(entries, manifest).context(),
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
    )
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(page)


# ------------------------------------------------------------------------------------------- what an entry holds


def _width_px(n_scans: int) -> int:
    return WIDTH_PX if n_scans <= MANY_SCANS else MANY_WIDTH_PX


def _facts(volume: Volume) -> dict[str, str]:
    return {
        "voxels": " × ".join(map(str, volume.data.shape)),
        "voxel size": " × ".join(f"{side:.3g}" for side in volume.spacing_mm) + " mm",
        "orientation": "".join(volume.axcodes),
    }


def _numbers(row: Mapping[str, str | float]) -> dict[str, float]:
    numbers = {}
    for key, value in row.items():
        if key.endswith(_HARD):
            try:
                numbers[key] = float(value)
            except ValueError:
                numbers[key] = math.nan
    return numbers


def _judgement(row: Mapping[str, str | float]) -> Quality | None:
    """What is left of a quality in a row of the table of volumes; None if it was not judged."""
    if "passed" not in row:
        return None
    try:
        score = float(row.get("predicted_dice", math.nan))
    except ValueError:
        score = math.nan
    passed = row["passed"] != "no"
    return Quality({}, score if math.isfinite(score) else None, () if passed else (FLAGGED_BEFORE,), passed)


# ----------------------------------------------------------------------------------------------------- the page


@dataclass(frozen=True)
class _Page:
    """What the template shows, made from the entries."""

    entries: Sequence[ReportEntry]
    manifest: Mapping[str, Any]

    def context(self) -> dict[str, Any]:
        scans = [self._scan(number, entry) for number, entry in enumerate(self.entries)]
        states = [entry.state for entry in self.entries]
        totals_s = [sum(entry.timings_s.values()) for entry in self.entries if entry.timings_s]
        scores = [q.scan for e in self.entries if (q := e.quality) is not None and q.scan is not None]
        return {
            "heading": self._heading(),
            "folder": self._common_folder,
            "scans": scans,
            "structures": self._structures,
            "distributions": self._distributions,
            "attention": [scan for scan in scans if scan["state"] in ("failed", "look")],
            "counts": {state: states.count(state) for state in ("failed", "look", "ok", "done", "unknown")},
            "skipped": sum(entry.status == "skipped" for entry in self.entries),
            "judged": bool(scores),
            "notes": sorted({e.quality.note for e in self.entries if e.quality is not None and e.quality.note}),
            "median_score": float(np.median(scores)) if scores else None,
            "median_s": float(np.median(totals_s)) if totals_s else None,
            "total_s": float(np.sum(totals_s)) if totals_s else None,
            "steps": self._steps(),
            "manifest": _tree(self.manifest),
            "numbers": {
                "names": [plain(entry.name) for entry in self.entries],
                "structures": self._structures,
                "intracranial": self._structures.index("intracranial") if "intracranial" in self._structures else -1,
                "scans": [self._row_numbers(entry) for entry in self.entries],
            },
        }

    def _heading(self) -> dict[str, str]:
        shown = {key: self.manifest.get(key) for key in ("synthseg", "model")}
        facts = {key: str(value) if _is_text(value) else "" for key, value in shown.items()}
        return {**facts, "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}

    @cached_property
    def _common_folder(self) -> str:
        """The folder that all names share, with its last separator, if it is worth leaving out."""
        if len(self.entries) < 2:
            return ""
        heads = [entry.name.replace("\\", "/").split("/")[:-1] for entry in self.entries]
        shared = 0
        while all(len(head) > shared for head in heads) and len({head[shared] for head in heads}) == 1:
            shared += 1
        length = sum(len(part) + 1 for part in heads[0][:shared])
        return self.entries[0].name[:length]

    @cached_property
    def _structures(self) -> list[str]:
        """Names in the order of the first entry that has them, totals first."""
        named = dict.fromkeys(
            key[: -len(_HARD)] for entry in self.entries for key in entry.volumes if not key.endswith(_SOFT)
        )
        return sorted(named, key=lambda name: _TOTALS.index(name) if name in _TOTALS else len(_TOTALS))

    @cached_property
    def _distributions(self) -> dict[str, Distribution]:
        return {
            name: Distribution.of([(number, entry.volumes[f"{name}{_HARD}"]) for number, entry in known], MOST_DOTS)
            for name in self._structures
            if len(known := [(i, e) for i, e in enumerate(self.entries) if _finite(e.volumes.get(f"{name}{_HARD}"))])
            >= COMPARED_FROM
        }

    def _scan(self, number: int, entry: ReportEntry) -> dict[str, Any]:
        colors = dict(entry.mosaic.legend) if entry.mosaic is not None else {}
        intracranial = entry.volumes.get(f"intracranial{_HARD}", math.nan)
        volumes = []
        for name in self._structures:
            hard = entry.volumes.get(f"{name}{_HARD}", math.nan)
            everyone = self._distributions.get(name)
            volumes.append(
                {
                    "name": name,
                    "color": "#{:02x}{:02x}{:02x}".format(*colors[name]) if name in colors else None,
                    "total": name in _TOTALS,
                    "hard": hard,
                    "soft": entry.volumes.get(f"{name}{_SOFT}", math.nan),
                    "percent": 100 * hard / intracranial if intracranial > 0 else math.nan,
                    "dice": entry.quality.structures.get(name, math.nan) if entry.quality is not None else math.nan,
                    "far": everyone is not None and everyone.is_far(hard),
                    "distribution": everyone,
                }
            )
        path = entry.name[len(self._common_folder) :]
        cut = max(path.rfind("/"), path.rfind("\\")) + 1
        folder, short = (path[:cut], path[cut:]) if path[cut:] else ("", path)
        score = entry.quality.scan if entry.quality is not None else None
        return {
            "entry": entry,
            "anchor": f"scan-{number + 1}",
            "number": number,
            "folder": folder,
            "short": short,
            "error": entry.error.removeprefix(f"{entry.name}: "),
            "state": entry.state,
            "score": math.nan if score is None else score,
            "volumes": volumes,
            "total_s": sum(entry.timings_s.values()) if entry.timings_s else math.nan,
            "bar": timing_bar(entry.timings_s),
        }

    def _row_numbers(self, entry: ReportEntry) -> dict[str, Any]:
        """What the script needs of an entry to show other units; null is not known."""
        return {
            kind: [_or_none(entry.volumes.get(f"{name}{suffix}")) for name in self._structures]
            for kind, suffix in (("hard", _HARD), ("soft", _SOFT))
        }

    def _steps(self) -> list[tuple[str, float, float]]:
        """Median and sum of the seconds of each step over the scans that have it."""
        seconds: dict[str, list[float]] = {}
        for entry in self.entries:
            for step, value in entry.timings_s.items():
                seconds.setdefault(step, []).append(value)
        return [(step, float(np.median(values)), float(np.sum(values))) for step, values in seconds.items()]


def _tree(value: Any) -> Any:
    """A manifest as the template shows it: pairs of names and values, lists, and texts."""
    if isinstance(value, Mapping):
        return {"pairs": [(str(key), _tree(inner)) for key, inner in value.items()]}
    if isinstance(value, list | tuple | set | frozenset):
        if all(_is_text(item) for item in value):
            return ", ".join(str(item) for item in value)
        return {"pairs": [(str(number), _tree(inner)) for number, inner in enumerate(value, 1)]}
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _or_none(value: float | None) -> float | None:
    return round(value, 4) if value is not None and math.isfinite(value) else None


def _number(value: float) -> str:
    """Two decimals below 10, one below 100; a dash for what is not known. The script writes numbers alike."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _webp(picture: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(picture).decode()


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
