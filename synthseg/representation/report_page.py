"""The page of `synthseg features --report`: one HTML file, or a folder with the pictures beside it, and the figures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthseg.representation.picture import draw
from synthseg.representation.report import Measured
from synthseg.volume import atomic_path, write_text_atomically

DPI = 110
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Features of {{ figures.model }}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #1a202c; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: .25em .9em .25em 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; }
tr { border-bottom: 1px solid #e2e8f0; } figure { margin: 1.5em 0; } figcaption { color: #4a5568; }
</style></head><body>
<h1>Features of {{ figures.model }}</h1>
<p>{{ figures.channels }} channels at {{ "%.2g"|format(figures.spacing_mm) }} mm, levels
{{ figures.levels|join(", ") }}.
{{ figures.anatomies }} anatomies of {{ figures.templates|join(", ") }}, each in {{ figures.severities|length }}
appearances. synthseg {{ figures.synthseg }}, seed {{ figures.seed }}, weights {{ figures.sha256[:12] }}.</p>
<table><tr><th>Figure</th><th></th><th>What it says</th></tr>
{% for name, value, meaning in rows %}
<tr><td>{{ name }}</td><td class="n">{{ value }}</td><td>{{ meaning }}</td></tr>
{% endfor %}</table>
{% for name, source, caption in pictures %}
<figure><img src="{{ source }}" alt="{{ name }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</body></html>
"""

CAPTIONS = {
    "colours": "Each anatomy in several appearances: the image in grey, its features in colour (first three principal "
    "components, shared). Good features have one colour for one structure, in every row.",
    "severity": "Likeness of the features of each appearance with those of the mildest, and matching, from mild to "
    "severe. Dashed: the mean over pairs of different subjects.",
    "matching": "How far from the true place the most similar feature in another appearance lies.",
    "classes": "Cosine between the mean features of two classes. In an equiangular frame all but the diagonal have the "
    "value in the title.",
    "spectrum": "Variance that the first principal axes hold: few axes mean that dimensions have collapsed.",
    "probe": "Dice of a linear layer on the features, on anatomies that it was not fitted on.",
}


def write_report(page: Path, measured: Measured, *, pictures_beside: bool = False) -> None:
    """Write the page, and its figures as JSON under the same name.

    The pictures are inside the page, or PNG files beside it.
    """
    from jinja2 import Environment

    encoded = {"colours": _png(draw(measured.rows))} if measured.rows else {}
    encoded |= {name: plot(measured.figures) for name, plot in _PLOTS.items()}
    sources = {}
    for name, png in encoded.items():
        if pictures_beside:
            with atomic_path(page.parent / f"{name}.png") as temporary:
                temporary.write_bytes(png)
            sources[name] = f"{name}.png"
        else:
            sources[name] = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    pictures = [(name, source, CAPTIONS[name]) for name, source in sources.items()]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    text = template.render(figures=measured.figures, rows=table_rows(measured.figures), pictures=pictures)
    write_text_atomically(page.with_suffix(".json"), json.dumps(_plain(measured.figures), indent=2) + "\n")
    write_text_atomically(page, text)


def table_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the figures of the table."""
    intra, inter, apart = figures["intra_subject"], figures["inter_subject"], figures["separation"]
    matching, collapse = figures["matching"], figures["neural_collapse"]
    n_classes = len(figures["classes"])
    dice = [value for value in figures["probe"].values() if not math.isnan(value)]
    rows: list[tuple[str, float, str]] = [
        ("L1 within a subject", intra["l1"], "mean difference of channels scaled to [0, 1]; 0 is robust"),
        ("L1 between subjects", inter["l1"], "the same for different anatomies"),
        ("ratio of the two", apart["l1_ratio"], "above 1: anatomy moves the features more than appearance does"),
        ("SSIM within a subject", intra["ssim"], "1 is robust"),
        ("SSIM between subjects", inter["ssim"], "lower than within"),
        ("MS-SSIM within a subject", intra["ms_ssim"], "1 is robust"),
        ("MS-SSIM between subjects", inter["ms_ssim"], "lower than within"),
        ("matching accuracy", matching["accuracy"], f"most similar feature within {matching['within_mm']:.3g} mm"),
        ("linear probe", float(np.mean(dice)) if dice else math.nan, "mean Dice of the classes"),
        ("effective rank", collapse["effective_rank"], f"dimensions that are used, of {figures['channels']}"),
        ("effective rank of the means", collapse["effective_rank_means"], f"{n_classes - 1} for an equiangular frame"),
        (
            "mean deviation from equiangular",
            collapse["equiangular_mean"],
            "of the cosines of class means; 0 is a frame",
        ),
        ("largest deviation", collapse["equiangular_max"], "of the same"),
        ("norm of the mean of the means", collapse["mean_norm"], "0 for a frame"),
        ("deviation of the norms of the means", collapse["norm_deviation"], "0: classes have collapsed to points"),
        ("spread within classes", collapse["within_class_spread"], "mean distance to the own mean"),
        ("uniformity", figures["uniformity"], "lower is more uniform on the sphere"),
        ("tolerance", figures["tolerance"], "mean cosine of voxels of one class"),
        ("tolerance of neighbours", figures["neighbour_tolerance"], "mean cosine of neighbours of one class"),
    ]
    return [(name, f"{value:.3f}", meaning) for name, value, meaning in rows]


def _plain(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------------- plots


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, 1 + column) for column in range(columns)]


def _encoded(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _severity(figures: Mapping[str, Any]) -> bytes:
    figure, axes = _figure(10.5, 3.2, 3)
    at = figures["severities"][1:]
    for axis, key, name in zip(axes, ("l1", "ssim"), ("L1", "SSIM"), strict=False):
        axis.plot(at, [row[key] for row in figures["by_severity"]], "o-", color=BLUE, label="same subject")
        axis.axhline(figures["inter_subject"][key], color=ORANGE, ls="--", label="different subjects")
        axis.set(xlabel="severity", ylabel=f"{name} to the mildest", ylim=(0, None if key == "l1" else 1))
        axis.legend(frameon=False, fontsize=8)
    axes[2].plot(at, figures["matching"]["by_severity"], "o-", color=BLUE)
    within = figures["matching"]["within_mm"]
    axes[2].set(xlabel="severity", ylabel=f"matched within {within:.3g} mm", ylim=(0, 1))
    return _encoded(figure)


def _matching(figures: Mapping[str, Any]) -> bytes:
    figure, (axis,) = _figure(5.2, 3.2)
    found = figures["matching"]
    axis.step(found["distances_mm"], found["share_within"], where="post", color=BLUE)
    axis.axvline(found["within_mm"], color=GREY, ls=":")
    axis.set(xlabel="distance to the true place (mm)", ylabel="share of voxels", ylim=(0, 1), xlim=(0, None))
    return _encoded(figure)


def _classes(figures: Mapping[str, Any]) -> bytes:
    names, cosines = figures["classes"], np.array(figures["class_cosines"])
    figure, (axis,) = _figure(7.4, 6.2)
    drawn = axis.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(f"equiangular frame: {-1 / (len(names) - 1):.2f}", fontsize=10)
    figure.colorbar(drawn, ax=axis, shrink=0.8)
    return _encoded(figure)


def _spectrum(figures: Mapping[str, Any]) -> bytes:
    figure, (axis,) = _figure(5.2, 3.2)
    pairs = (("spectrum", "all voxels", BLUE), ("spectrum_means", "class means", ORANGE))
    for key, label, color in pairs:
        total = np.cumsum(figures[key])
        axis.plot(np.arange(1, len(total) + 1), total, ".-", color=color, label=label)
    axis.set(xlabel="principal axes", ylabel="share of the variance", ylim=(0, 1.02))
    axis.legend(frameon=False)
    return _encoded(figure)


def _probe(figures: Mapping[str, Any]) -> bytes:
    scores = figures["probe"]
    figure, (axis,) = _figure(8.4, 3.4)
    axis.bar(range(len(scores)), [0.0 if math.isnan(value) else value for value in scores.values()], color=BLUE)
    axis.set_xticks(range(len(scores)), list(scores), rotation=60, ha="right", fontsize=8)
    axis.set(ylabel="Dice", ylim=(0, 1))
    return _encoded(figure)


_PLOTS: dict[str, Callable[[Mapping[str, Any]], bytes]] = {
    "severity": _severity,
    "matching": _matching,
    "probe": _probe,
    "classes": _classes,
    "spectrum": _spectrum,
}
