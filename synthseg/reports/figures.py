"""Numbers for the small figures of the report: how a volume lies among those of the batch, and where time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

FAR_SCORE = 3.5
FAR_LEAST = 10  # values; with fewer, no distance from the rest is stated
WIDTH = 160  # of a figure, in its own units
HEIGHT = 20
_EDGE = 6
_HISTOGRAM_FROM = 40  # values; fewer are drawn one by one
_BINS = 24


@dataclass(frozen=True, eq=False)
class Distribution:
    """One volume over the scans of a batch, and how it is drawn in a box of `WIDTH` × `HEIGHT`.

    Attributes
    ----------
    values : ml, float64 (n,).
    ground : SVG path of all values: a line for each, or a histogram.
    filled : whether ``ground`` is an area.
    dots : number of the scan, its value, and its place in the box; the ones at the ends if there are very many.
    """

    values: np.ndarray
    ground: str
    filled: bool
    dots: tuple[tuple[int, float, float, float], ...]

    @classmethod
    def of(cls, numbered: Sequence[tuple[int, float]], most_dots: int) -> Distribution:
        """From pairs of the number of a scan and its value in ml."""
        values = np.array([value for _, value in numbered], dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        filled = len(values) >= _HISTOGRAM_FROM and high > low
        if filled:
            counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
            step = (WIDTH - 2 * _EDGE) / _BINS
            tops = HEIGHT - 1 - (HEIGHT - 4) * counts / counts.max()
            steps = "".join(f"V{top:.1f}h{step:.2f}" for top in tops)
            ground = f"M{_EDGE} {HEIGHT - 1}{steps}V{HEIGHT - 1}z"
        else:
            ground = "".join(f"M{_place(value, low, high):.1f} 5v{HEIGHT - 10}" for value in values)
        ranked = sorted(range(len(values)), key=lambda i: -abs(values[i] - np.median(values)))[:most_dots]
        dots = tuple(
            (numbered[i][0], float(values[i]), _place(values[i], low, high), _lane(numbered[i][0]))
            for i in sorted(ranked)
        )
        return cls(values, ground, filled, dots)

    def is_far(self, value: float) -> bool:
        """Whether a value lies far from the others: modified z-score over 3.5 (Iglewicz and Hoaglin 1993).

        The score is 0.6745 × distance from the median / median distance from it. Never where fewer than ten are known.
        """
        if len(self.values) < FAR_LEAST or not np.isfinite(value) or self.spread == 0:
            return False
        return 0.6745 * abs(value - self.median) / self.spread > FAR_SCORE

    @cached_property
    def median(self) -> float:
        return float(np.median(self.values))

    @cached_property
    def spread(self) -> float:
        """Median distance from the median."""
        return float(np.median(np.abs(self.values - self.median)))

    @property
    def low(self) -> float:
        return float(self.values.min())

    @property
    def high(self) -> float:
        return float(self.values.max())

    def place(self, value: float) -> float:
        """Where a value lies along the box."""
        return _place(value, self.low, self.high)


def _place(value: float, low: float, high: float) -> float:
    if high <= low:
        return WIDTH / 2
    return _EDGE + (WIDTH - 2 * _EDGE) * (value - low) / (high - low)


def _lane(number: int) -> float:
    """A height for the dot of a scan, so that neighbours do not hide each other; the same in every figure."""
    return HEIGHT / 2 + (number * 0.618034 % 1 - 0.5) * (HEIGHT - 8)


def timing_bar(timings_s: Mapping[str, float]) -> list[tuple[str, float, float, float]]:
    """Name, seconds, start and length of each step, in percent of the whole."""
    total = sum(timings_s.values())
    parts = []
    start = 0.0
    for step, seconds in timings_s.items():
        length = 100 * seconds / total if total > 0 else 0.0
        parts.append((step, seconds, start, length))
        start += length
    return parts
