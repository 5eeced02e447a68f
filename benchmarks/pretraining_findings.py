"""What the figures of benchmarks/pretraining.py say, as sentences for its page."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial

import numpy as np
from pretraining_table import (
    NONE,
    SCRATCH,
    Difference,
    Row,
    Rows,
    difference,
    differences,
    objectives,
    of_seeds,
    plural,
    real,
    separation,
    signed,
    spread_of,
    tuned_mean,
    unseen,
)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def bullet(text: str) -> str:
    return "- " + wrapped(text).replace("\n", "\n  ")


def joined(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def seeds_of(found: Difference) -> str:
    return "1 seed" if found.seeds == 1 else f"{found.seeds} seeds"


def probe_dice(row: Row) -> float:
    return float(row["features"]["probe"]["unseen_maps"]["mean"])


def best_told(rows: Rows, figure: Callable[[Row], float], other: str) -> tuple[str, dict[str, Difference]]:
    """All objectives less ``other``, and the best of those with the most seeds: one seed is mostly chance."""
    found = {name: difference(rows, name, figure, other) for name in objectives(rows)}
    told = {name: value for name, value in found.items() if value is not None}
    most = max((value.seeds for value in told.values()), default=0)
    return max((n for n in told if told[n].seeds == most), key=lambda n: told[n].mean, default=""), told


def conclusion(rows: Rows, counts: list[str]) -> list[str]:
    """Does it pay, as sentences."""
    if not objectives(rows) or not of_seeds(rows, SCRATCH):
        return ["Not judged: it takes the row *from scratch* and at least one objective."]
    lines, pays = [], []
    for count in counts:
        figure = partial(unseen, count=count)
        best, told = best_told(rows, figure, SCRATCH)
        if not told:
            continue
        winners = [name for name, value in told.items() if value.verdict == "better"]
        losers = [name for name, value in told.items() if value.verdict == "worse"]
        if winners:
            pays.append(count)
        scratch = spread_of([figure(row) for row in of_seeds(rows, SCRATCH).values()])
        lines.append(
            f"With {plural(count)}: from scratch {scratch}; best objective *{best}* {signed(told[best])} "
            f"({told[best].verdict}, {seeds_of(told[best])}{unbiased(rows, best, figure)}). "
            f"Of {len(told)} objectives {len(winners)} are better than training from scratch, {len(losers)} worse, "
            f"{len(told) - len(winners) - len(losers)} not told apart."
        )
    if not lines:
        return ["Not judged: no objective shares a seed with the row *from scratch*."]
    if not pays:
        first = "**Pretraining does not pay here.** No objective clearly beats training from scratch of the same time."
    elif pays == counts:
        first = "**Pretraining pays here**: with every number of templates an objective beats training from scratch."
    else:
        others = joined([count for count in counts if count not in pays])
        first = (
            f"**Pretraining pays with {joined(pays)} template{'s' * (pays != ['1'])}, not with {others}** "
            "of labelled heads, against training from scratch of the same total time."
        )
    return [first, *lines]


def unbiased(rows: Rows, name: str, figure: Callable[[Row], float]) -> str:
    """The difference on the seeds that had no say in which rows were repeated."""
    later = [value for seed, value in differences(rows, name, figure, SCRATCH).items() if seed > 0]
    return f"; {np.mean(later):+.3f} on those it was not chosen by" if later else ""


def real_scans(rows: Rows, counts: list[str]) -> list[str]:
    """The best objective on the real scans."""
    parts = []
    for count in counts:
        best, told = best_told(rows, partial(real, count=count), SCRATCH)
        if told:
            found = told[best]
            parts.append(f"{plural(count)} *{best}* {signed(found)} ({found.verdict}, {seeds_of(found)})")
    return [f"On the real scans, against training from scratch of the same time: {'; '.join(parts)}."] if parts else []


def few_steps(rows: Rows, counts: list[str]) -> list[str]:
    """What it adds to the same few steps, its own time not counted."""
    lines = []
    for count in counts:
        figure = partial(unseen, count=count)
        best, told = best_told(rows, figure, NONE)
        if told:
            lines.append(f"{plural(count)} {signed(told[best])} (*{best}*, {told[best].verdict})")
    text = (
        "Against the same few steps from random weights, the time of pretraining not counted, the best objective adds"
    )
    return [f"{text}: {'; '.join(lines)}."] if lines else []


def best_features(rows: Rows) -> list[str]:
    """Which objective makes the best features by each measure."""
    named = objectives(rows)
    if not named:
        return []
    measures: dict[str, Callable[[Row], float]] = {
        "L1 between heads over L1 between contrasts": separation,
        "matching": lambda row: float(row["features"]["matching"]),
        "effective rank": lambda row: float(row["features"]["effective_rank"]),
        "linear probe": probe_dice,
    }
    parts = []
    for text, figure in measures.items():
        means = {name: float(np.mean([figure(row) for row in of_seeds(rows, name).values()])) for name in named}
        means = {name: value for name, value in means.items() if np.isfinite(value)}
        if means:
            best = max(means, key=lambda name: means[name])
            beside = [
                f"*{name}* {np.mean([figure(row) for row in of_seeds(rows, name).values()]):.3g}"
                for name in (NONE, SCRATCH)
                if of_seeds(rows, name)
            ]
            parts.append(f"{text} *{best}* {means[best]:.3g} ({', '.join(beside)})" if beside else f"{text} *{best}*")
    return [f"The best features, by {'; by '.join(parts)}."]


def hard_negatives(rows: Rows) -> list[str]:
    """Hard against less hard negatives, with and without labels."""
    pairs = [("HUCL beta 2", "InfoNCE"), ("HUCL beta 10", "HUCL beta 2")]
    pairs += [("HSCL beta 2", "SupCon"), ("HSCL beta 10", "HSCL beta 2")]
    parts = []
    for name, other in pairs:
        found = difference(rows, name, tuned_mean, other)
        if found is not None:
            parts.append(f"*{name}* against *{other}* {signed(found)} ({found.verdict})")
    return [f"Harder negatives, mean Dice over the numbers of templates: {'; '.join(parts)}."] if parts else []


def what_predicts(rows: Rows) -> list[str]:
    """Rank correlation of each measure of the features with the Dice after few steps, over the rows of seed 0."""
    from scipy.stats import spearmanr

    first = [row for row in rows.values() if row["seed"] == 0 and row["name"] != SCRATCH]
    if len(first) < 5:
        return []
    measures: dict[str, Callable[[Row], float]] = {
        "separation": separation,
        "matching": lambda row: row["features"]["matching"],
        "effective rank": lambda row: row["features"]["effective_rank"],
        "linear probe": probe_dice,
    }
    dice = [tuned_mean(row) for row in first]
    parts = []
    for name, figure in measures.items():
        values = [float(figure(row)) for row in first]
        if np.isfinite(values).all() and len(set(values)) > 1 and len(set(dice)) > 1:
            parts.append(f"{name} {spearmanr(values, dice).statistic:+.2f}")
    return (
        [f"Rank correlation with the Dice after few steps, over {len(first)} rows: {', '.join(parts)}."]
        if parts
        else []
    )


def findings(rows: Rows, counts: list[str]) -> str:
    """All of it, as a list."""
    parts = [conclusion(rows, counts), real_scans(rows, counts), few_steps(rows, counts)]
    parts += [best_features(rows), hard_negatives(rows), what_predicts(rows)]
    return "\n".join(bullet(line) for part in parts for line in part)
