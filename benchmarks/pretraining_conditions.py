"""How the rows of benchmarks/pretraining.py were made, as sentences for its page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pretraining_findings import bullet, joined
from pretraining_table import BEST_SUM, NONE, SCRATCH, WITHOUT, Row, of_seeds

from synthseg.config.pretraining import SUPERVISED, ContrastConfig

WITHOUT_NEGATIVES = ("barlow_twins", "pix_pro", "equiangular")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def counted(n: int, what: str) -> str:
    return f"{NUMBERS[n] if n < len(NUMBERS) else n} {what}{'s' * (n != 1)}"


def what_was_compared(record: dict[str, Any]) -> str:
    """For example: eight objectives and one sum."""
    named = [name for name in record["order"] if name not in WITHOUT]
    sums = named.count(BEST_SUM)
    return counted(len(named) - sums, "objective") + (f" and {counted(sums, 'sum')}" if sums else "")


def terms_of(row: Row) -> list[ContrastConfig]:
    """The contrastive terms of a row, with what its recipe left to the defaults."""
    return [ContrastConfig.model_validate(term) for term in row.get("objective", {}).get("contrast", [])]


def conditions(record: dict[str, Any]) -> str:
    """All that the rows have in common, and what differs, as a list."""
    rows, settings = record["rows"], record["settings"]
    seeds = sorted({row["seed"] for row in rows.values()})
    several = [name for name in record["order"] if len(of_seeds(rows, name)) > 1]
    first, then = settings["cpu_minutes"], settings["fine_tune_minutes"]
    severities = joined([f"{value:g}" for value in settings["severities"]])
    shape = " × ".join(str(n) for n in settings["shape"])
    channels = "-".join(str(n) for n in settings["channels"])
    counts = joined([str(count) for count in settings["counts"]])
    lines = [
        f"Network: DynUNet, channels {channels}, at {settings['voxel_size_mm']:g} mm on the brain and what is near it "
        f"({shape} voxels); Muon, constant rate, averaged weights; one thread. The same for all rows, nothing tuned "
        "for one of them.",
        f"Pretraining: {first:g} CPU minutes on views of {settings['pretrain_templates']} templates, severities "
        f"{severities}, moved against each other by up to {settings['shift_mm']:g} mm (else the place in the image "
        "tells voxels apart).",
        *contrast_lines(record),
        f"Segmentation: {then:g} CPU minutes from the pretrained weights, all free, with {counts} of the templates. "
        f"*{SCRATCH}*: {first + then:g} minutes from random weights. *{NONE}*: {then:g} minutes from random weights.",
        "Minutes are CPU time of drawing images and training. Loading, distance maps and measuring are not counted.",
        f"Measured on {len(settings['held_out'])} maps that no row has seen, rendered in T1, T2, FLAIR, CT and random "
        "contrasts.",
        f"Seeds: {joined([str(seed) for seed in seeds])}; several for "
        f"{joined([f'*{name}*' for name in several]) if several else 'no row'}. Objectives with several were chosen by "
        "their first, which favours them a little. ± is the standard deviation over seeds.",
        f"*Better* and *worse* (bold in the tables): t-test of the differences to *{SCRATCH}*, seed by seed, at 5 % "
        "and corrected for the number of objectives. Its noise is pooled over all rows with several seeds.",
        time_taken(record),
        versions(rows.values()),
    ]
    return "\n".join(bullet(line) for line in lines)


# ---------------------------------------------------------------------------------------- contrastive terms


def contrast_lines(record: dict[str, Any]) -> list[str]:
    """The settings of the contrastive terms, and what they take from the labels."""
    named = {name: rows[0] for name in record["order"] if (rows := list(of_seeds(record["rows"], name).values()))}
    terms = {name: found for name, row in named.items() if (found := terms_of(row))}
    if not terms:
        return []
    every = [term for found in terms.values() for term in found]
    levels = values(",".join(str(level) for level in term.sampling.levels) for term in every)
    settings = (
        f"Contrastive terms: temperature {values(f'{term.temperature:g}' for term in every)}, projection "
        f"{values(f'`{term.projection}`' for term in every)} with {values(str(term.dimensions) for term in every)} "
        f"dimensions, {values(str(term.sampling.voxels) for term in every)} points of each head in every view, levels "
        f"{levels} of the decoder (-1 is the finest)."
    )
    twins = [n for n, found in terms.items() if any(t.loss == "barlow_twins" and t.projection != "none" for t in found)]
    if twins:
        settings += f" {mentioned(twins)} had that projection too, though `none` fits the loss better: a handicap."
    return [settings, labels_text(named, terms)]


def labels_text(named: dict[str, Row], terms: dict[str, list[ContrastConfig]]) -> str:
    """Which rows use labels, and what for."""
    by_label = [name for name, found in terms.items() if any(term.loss in SUPERVISED for term in found)]
    mirrored = [
        name
        for name, found in terms.items()
        if any(
            term.sampling.exclude_mirrored and term.loss not in SUPERVISED and term.loss not in WITHOUT_NEGATIVES
            for term in found
        )
    ]
    painted = [name for name, row in named.items() if row.get("objective", {}).get("anatomy_weight")]
    text = "Labels: all contrastive terms draw their voxels by them, and only inside the head."
    if by_label:
        text += f" They say what is alike in {mentioned(by_label)}."
    if mirrored:
        text += (
            f" {mentioned(mirrored)} {'go' if len(mirrored) > 1 else 'goes'} by the place instead, but by label the "
            "same structure on the other side is left out of the negatives."
        )
    if painted:
        text += f" The T1 image of {mentioned(painted)} is painted from them where a template has none."
    return text


def values(found: Iterable[str]) -> str:
    return joined(list(dict.fromkeys(found)))


def mentioned(names: list[str]) -> str:
    return joined([f"*{name}*" for name in names])


# --------------------------------------------------------------------------------------- time and versions


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def time_taken(record: dict[str, Any]) -> str:
    """Hours of training, and by the clock where the figures have them."""
    rows = list(record["rows"].values())
    parts = [part for row in rows for part in (row.get("pretraining"), *row["segmentation"].values()) if part]
    text = f"Training took {sum(part['cpu_seconds'] for part in parts) / 3600:.1f} CPU hours."
    if record.get("wall_seconds"):
        cores = counted(record.get("jobs", 1), "core")
        text = (
            f"{text[:-1]}, all of it {clock(record['wall_seconds'])} by the clock on {cores}, a row on each (file "
            "times, from the first to the last)."
        )
    known = [row["wall_seconds"] / 60 for row in rows if row.get("wall_seconds")]
    if known:
        text += f" A row took {min(known):.0f} to {max(known):.0f} minutes, measuring included."
    return text


def versions(rows: Iterable[Row]) -> str:
    """What code made the rows, and what that means for small differences."""
    found = [row.get("version") for row in rows]
    known = {(version["synthseg"], version["commit"]) for version in found if version}
    unsure = "do not read differences of a hundredth."
    if not all(found):
        lacking = "No row says" if not known else f"{found.count(None)} of {len(found)} rows do not say"
        return (
            f"{lacking} which version of the code made {'it' if not known else 'them'}, and details of the generator "
            f"have changed since. Rows end by CPU time, not by steps. So {unsure}"
        )
    if len(known) > 1:
        return f"{counted(len(known), 'version').capitalize()} of the code made these rows: {unsure}"
    ((version, commit),) = known
    return f"All rows were made by synthseg {version}{f', commit {commit[:12]}' if commit else ''}."
