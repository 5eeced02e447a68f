"""The rows of benchmarks/pretraining.py: their figures, how they compare, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

NONE, SCRATCH, BEST_SUM = "none", "from scratch", "best sum"
WITHOUT = (NONE, SCRATCH)
REAL = ("colin27_tissues", "colin27_aal", "oasis_aseg")
NOT_RUN = "not run"
Row = dict[str, Any]
Rows = dict[str, Row]


def row_key(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"


def parse_key(key: str) -> tuple[str, int]:
    name, _, seed = key.rpartition(", seed ")
    return name, int(seed)


# ------------------------------------------------------------------------------------------------ figures


def unseen(row: Row, count: str) -> float:
    """Mean Dice on the held-out maps after the segmentation of ``count`` templates."""
    return float(row["segmentation"][count]["unseen_maps"])


def real(row: Row, count: str) -> float:
    """Mean Dice on the real scans: the mean over Colin27's tissues, its nuclei, and the OASIS scan. NaN without."""
    scores = row["segmentation"][count]
    if not all(key in scores for key in REAL):
        return float("nan")
    means = [np.mean([value for name, value in scores[key].items() if name != "mean"]) for key in REAL]
    return float(np.mean(means))


def tuned_mean(row: Row) -> float:
    """Mean Dice on the held-out maps over the numbers of templates: what rows are ranked by."""
    return float(np.mean([unseen(row, count) for count in row["segmentation"]]))


def best_objectives(rows: Rows, count: int) -> list[str]:
    """The objectives with the highest Dice at seed 0, best first."""
    ranked = sorted(
        (row for row in rows.values() if row["seed"] == 0 and row["name"] not in WITHOUT), key=tuned_mean, reverse=True
    )
    return [row["name"] for row in ranked[:count]]


def of_seeds(rows: Rows, name: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows.values() if row["name"] == name}


def objectives(rows: Rows) -> list[str]:
    """Names of the rows with pretraining that were run, in the order of the table."""
    return list(dict.fromkeys(row["name"] for row in rows.values() if row["name"] not in WITHOUT))


def separation(row: Row) -> float:
    """L1 between heads over L1 between contrasts of one head: how much more anatomy than contrast the features tell."""
    between = row["features"]["inter_subject"]
    within = row["features"]["intra_subject"]["l1"]
    return float(between["l1"] / within) if between and within > 0 else float("nan")


def next_rows(
    done: Rows, objectives: Iterable[str], parts: Iterable[str], seeds: int, repeat: int
) -> tuple[list[str], str]:
    """Keys of the rows that can run now, and what waits for rows that were not asked for."""
    singles = [row_key(name, 0) for name in (*WITHOUT, *objectives)]
    total = row_key(BEST_SUM, 0)
    asked = lambda keys: [key for key in keys if key not in done and any(part in key for part in parts)]  # noqa: E731
    missing = [key for key in singles if key not in done]
    if missing:
        return asked(missing), f"{BEST_SUM} and further seeds wait for: {'; '.join(missing)}"
    keys = [total] + [row_key(name, seed) for seed in range(1, seeds) for name in WITHOUT]
    if total not in done:
        return asked(keys), f"further seeds of the best rows wait for: {total}"
    keys += [row_key(name, seed) for seed in range(1, seeds) for name in best_objectives(done, repeat)]
    return asked(keys), ""


class Difference(NamedTuple):
    """Figures of a row less those of another with the same seeds: mean, own standard deviation (NaN for one seed)."""

    mean: float
    spread: float
    seeds: int
    verdict: str


def differences(rows: Rows, name: str, figure: Callable[[Row], float], other: str) -> dict[int, float]:
    """Figure of a row less that of ``other``, for each seed that both have; those that are not finite left out."""
    mine, theirs = of_seeds(rows, name), of_seeds(rows, other)
    found = {seed: figure(mine[seed]) - figure(theirs[seed]) for seed in sorted(set(mine) & set(theirs))}
    return {seed: value for seed, value in found.items() if np.isfinite(value)}


def noise(rows: Rows, figure: Callable[[Row], float], other: str) -> tuple[float, int]:
    """Standard deviation over seeds of the differences to ``other``, pooled over all rows; its degrees of freedom."""
    squares, freedom = 0.0, 0
    for name in {row["name"] for row in rows.values()} - {other}:
        values = np.array(list(differences(rows, name, figure, other).values()))
        if len(values) > 1:
            squares += float(((values - values.mean()) ** 2).sum())
            freedom += len(values) - 1
    return (np.sqrt(squares / freedom) if freedom else float("nan")), freedom


def difference(rows: Rows, name: str, figure: Callable[[Row], float], other: str = SCRATCH) -> Difference | None:
    """How a row compares with ``other`` over the seeds that both have; None where there are none.

    *better* or *worse* by a t-test of the mean difference at 5 %, corrected for the number of objectives (Bonferroni).
    Its noise is pooled over all rows with several seeds, so that a row with one seed is judged as well, more strictly.
    Else, and where no row has several seeds, *not told apart*.
    """
    values = np.array(list(differences(rows, name, figure, other).values()))
    if len(values) == 0:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    deviation, freedom = noise(rows, figure, other)
    clear = False
    if freedom:
        from scipy.stats import t

        compared = max(1, len(objectives(rows)))
        clear = bool(abs(mean) > t.ppf(1 - 0.025 / compared, freedom) * deviation / np.sqrt(len(values)))
    return Difference(mean, spread, len(values), ("better" if mean > 0 else "worse") if clear else "not told apart")


# -------------------------------------------------------------------------------------------------- text


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table in Markdown. Raises ValueError if a row has not one cell for each heading."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---"] * len(header)) + " |"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(header)} headings, but a row of {len(row)} cells: {row}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def spread_of(values: list[float], form: str = ".3f") -> str:
    """Mean, and standard deviation where there are several."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return NOT_RUN
    text = format(np.mean(finite), form)
    return f"{text} ± {format(np.std(finite, ddof=1), form)}" if len(finite) > 1 else text


def signed(found: Difference | None) -> str:
    if found is None:
        return NOT_RUN
    spread = f" ± {found.spread:.3f}" if found.seeds > 1 else ""
    return f"{found.mean:+.3f}{spread}"


def plural(count: str) -> str:
    return "1 template" if count == "1" else f"{count} templates"


def feature_table(rows: Rows, names: list[str], columns: dict[str, tuple[tuple[str, ...], str]]) -> str:
    """Measures of the features: ``columns`` holds for each heading the keys of the figure and its format."""
    lines = []
    for name in names:
        own = list(of_seeds(rows, name).values())
        cells = [name, str(len(own)) if own else NOT_RUN]
        for keys, form in columns.values():
            values = []
            for row in own:
                value: Any = row["features"]
                for key in keys:
                    value = value.get(key) if value is not None else None
                values += [float(value)] if value is not None else []
            cells.append(spread_of(values, form))
        lines.append(cells)
    return table(["row", "seeds", *columns], lines)


def dice_table(rows: Rows, names: list[str], counts: list[str], figure: Callable[[Row, str], float]) -> str:
    """Dice of each row and number of templates, and its difference to training from scratch."""
    header = ["row", "seeds"]
    for count in counts:
        header += [plural(count), "against scratch"]
    lines = []
    for name in names:
        own = of_seeds(rows, name)
        cells = [name, str(len(own)) if own else NOT_RUN]
        for count in counts:
            get = lambda row, count=count: figure(row, count)  # noqa: E731
            cells.append(spread_of([get(row) for row in own.values()]))
            cells.append("" if name == SCRATCH else verdict_cell(difference(rows, name, get)))
        lines.append(cells)
    return table(header, lines)


def verdict_cell(found: Difference | None) -> str:
    text = signed(found)
    return f"**{text}**" if found is not None and found.verdict != "not told apart" else text


def cost_table(rows: Rows, names: list[str], counts: list[str]) -> str:
    header = [
        "row",
        "steps of pretraining",
        "CPU seconds a step of pretraining",
        *[f"steps of segmentation, {plural(count)}" for count in counts],
    ]
    lines = []
    for name in names:
        own = list(of_seeds(rows, name).values())
        before = [row["pretraining"] for row in own if "pretraining" in row]
        cost = [spread_of([float(part["steps"]) for part in before], ".0f")]
        cost.append(spread_of([float(part["cpu_seconds_per_step"]) for part in before], ".2f"))
        steps = [spread_of([float(row["segmentation"][count]["steps"]) for row in own], ".0f") for count in counts]
        lines.append([name, *(cost if before or not own else ["", ""]), *steps])
    return table(header, lines)


def show(rows: Rows) -> None:
    """The table of the finished rows in the terminal."""
    counts = list(next(iter(rows.values()))["segmentation"]) if rows else []
    heads = "".join(f"{f'Dice, {count}':>10s}" for count in counts)
    print(f"{'row':28s} {'steps':>6s} {'L1':>6s} {'match':>6s} {'rank':>5s} {'probe':>6s}{heads}   real")
    for key, row in rows.items():
        features = row["features"]
        steps = row.get("pretraining", {}).get("steps", 0)
        dice = "".join(f"{unseen(row, count):10.3f}" for count in counts)
        print(
            f"{key:28s} {steps:6d} {features['intra_subject']['l1']:6.3f} {features['matching']:6.3f} "
            f"{features['effective_rank']:5.1f} {features['probe']['unseen_maps']['mean']:6.3f}{dice}"
            f"   {np.mean([real(row, count) for count in counts]):.3f}",
            flush=True,
        )
