"""A static report of a run: ``report.html``, self-contained, and its pictures ``curves.png`` and ``classes.png``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from synthseg.config import TrainConfig, to_yaml
from synthseg.volume import atomic_path, write_text_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Table = Mapping[str, Mapping[str, float]]
MOST_COLUMNS = 12  # of the validations, in the picture of the classes over time
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$name</title><style>
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em }
h1 { margin-bottom: .1em } h2 { margin-top: 1.8em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 2px 9px; text-align: right }
td:first-child, th:first-child { text-align: left } thead th { border-bottom: 1px solid #999; vertical-align: bottom }
.facts td { text-align: left } img { max-width: 100% } .wide { overflow-x: auto }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12.5px } p.note { color: #666 }
</style></head><body>
<h1>$name</h1><p class="note">$summary</p>
<table class="facts"><tbody>$facts</tbody></table>
<h2>Curves</h2>$curves
<h2>Validation</h2>$validation
<h2>Templates</h2>$templates
<h2>Recipe</h2><pre>$recipe</pre>
</body></html>
""")


@dataclass(frozen=True)
class Curves:
    """Columns of ``log.csv``: steps, seconds spent on steps, running means of loss and soft Dice; float64 (n,)."""

    step: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    dice: np.ndarray

    @property
    def steps_per_hour(self) -> np.ndarray:
        """Between each line and the one before, (n - 1,); NaN where no time passed."""
        seconds = np.diff(self.seconds)
        return np.where(seconds > 0, 3600 * np.diff(self.step) / np.where(seconds > 0, seconds, 1), np.nan)


def read_curves(log: Path) -> Curves:
    """The curves of a log; empty if there is none. Lines that begin with # tell of validations and are passed over."""
    lines = log.read_text().splitlines() if log.is_file() else []
    rows = [[float(value) for value in line.split(",")] for line in lines if line and not line.startswith("#")]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Curves(*columns)


def write_report(
    folder: Path, config: TrainConfig, manifest: Mapping[str, Any], validations: Sequence[Mapping[str, Any]]
) -> Path:
    """Write the report of a run as it stands, from its log, manifest and validations; returns the page's path."""
    curves = read_curves(folder / "log.csv")
    pictures = {"curves": curves_figure(curves, validations)}
    if validations:
        pictures["classes"] = classes_figure(validations)
    tags = {}
    for name, figure in pictures.items():
        data = _png(figure)
        with atomic_path(folder / f"{name}.png") as temporary:
            temporary.write_bytes(data)
        source = base64.b64encode(data).decode()
        tags[name] = f'<p><img src="data:image/png;base64,{source}" alt="{name}"></p>'
    page = PAGE.substitute(
        name=escape(config.name),
        summary=escape(_summary(config, manifest)),
        facts="".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in _facts(manifest, curves)),
        curves=tags["curves"],
        validation=_validation(validations[-1]) + tags["classes"] if validations else "<p>There is none yet.</p>",
        templates=_templates(manifest),
        recipe=escape(to_yaml(config)),
    )
    write_text_atomically(folder / "report.html", page)
    return folder / "report.html"


# ------------------------------------------------------------------------------------------------ the page


def _summary(config: TrainConfig, manifest: Mapping[str, Any]) -> str:
    steps = manifest["steps"]
    return f"step {steps} of {config.steps} ({steps / config.steps:.0%}), classes of {config.scheme}"


def _facts(manifest: Mapping[str, Any], curves: Curves) -> list[tuple[str, str]]:
    hours = manifest["train_seconds"] / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    facts = [("time on steps", spent)]
    if hours > 0:
        facts.append(("steps per hour", f"{manifest['steps'] / hours:.0f} over the whole run"))
    if np.isfinite(curves.steps_per_hour).any():
        facts.append(("", f"{np.nanmedian(curves.steps_per_hour[-5:]):.0f} of late"))
    if len(curves.loss):
        facts.append(("loss", f"{curves.loss[-1]:.3f}, soft Dice {curves.dice[-1]:.3f} (training images)"))
    facts.append(("parameters", f"{manifest['parameters'] / 1e6:.2f} million"))
    facts.append(("devices", str(manifest["devices"])))
    facts += [("begun from", f"{run['steps']} steps of an earlier run") for run in manifest["earlier"][-1:]]
    facts.append(("versions", f"synthseg {manifest['synthseg']}, torch {manifest['torch']}, {manifest['python']}"))
    return facts


def _validation(last: Mapping[str, Any]) -> str:
    parts = [f"<p>Hard Dice of the averaged weights at step {last['step']}; mean <b>{last['mean']:.3f}</b>.</p>"]
    if "dice" in last:
        parts += ["<h3>Held-out templates, by contrast</h3>", _html_table(last["dice"])]
    if "scans" in last:
        parts += ["<h3>Real scans</h3>", _html_table(last["scans"])]
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    """One row for each class, one column for each contrast or scan; a mean at the end of both."""
    classes = list(dict.fromkeys(name for row in table.values() for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["class", *table, "mean"])
    body = []
    for name in classes:
        values = [row.get(name, float("nan")) for row in table.values()]
        body.append(f"<tr><td>{escape(name)}</td>{_cells(values)}</tr>")
    means = [float(np.mean(list(row.values()))) if row else float("nan") for row in table.values()]
    body.append(f"<tr><th>mean</th>{_cells(means)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cells(values: Sequence[float]) -> str:
    """The values and their mean."""
    return "".join(_cell(value) for value in [*values, float(np.nanmean(values))])


def _cell(value: float) -> str:
    if not np.isfinite(value):
        return "<td></td>"
    hue = 120 * min(1.0, max(0.0, (value - 0.3) / 0.6))  # red up to 0.3, green from 0.9
    return f'<td style="background: hsl({hue:.0f} 65% 82%)">{value:.3f}</td>'


def _templates(manifest: Mapping[str, Any]) -> str:
    trained, held_out = manifest["templates"], manifest["validation_templates"]
    lines = [f"<p>Trained on ({len(trained)}): {escape(', '.join(trained))}</p>"]
    if held_out:
        lines.append(f"<p>Held out ({len(held_out)}): {escape(', '.join(held_out))}</p>")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the pictures


def curves_figure(curves: Curves, validations: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, Dice, validation by contrast and scan, and speed, each over the steps."""
    figure = _figure(11.0, 6.6)
    (loss, dice), (parts, speed) = figure.subplots(2, 2, sharex=True)
    marker = "." if len(curves.step) < 40 else ""
    loss.plot(curves.step, curves.loss, marker=marker)
    loss.set_title("loss (running mean)")
    dice.plot(curves.step, curves.dice, marker=marker, label="soft, training images")
    steps = [entry["step"] for entry in validations]
    if steps:
        dice.plot(steps, [entry["mean"] for entry in validations], marker="o", ms=4, label="hard, validation")
    dice.set_title("Dice")
    for number, name in enumerate(_names(validations)):
        values = [_mean_of(entry, name) for entry in validations]
        style = "-" if number < 10 else "--"  # the colours come again after ten
        parts.plot(steps, values, style, marker="o", ms=3, label=_short(name, 24))
    parts.set_title("Dice by contrast and scan")
    speed.plot(curves.step[1:], curves.steps_per_hour, marker=marker)
    speed.set_title("steps per hour")
    speed.set_ylim(bottom=0)
    for axes in (loss, dice, parts, speed):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
    for axes in (parts, speed):
        axes.set_xlabel("step")
    return figure


def classes_figure(validations: Sequence[Mapping[str, Any]]) -> Figure:
    """Dice of each class: in each contrast and scan at the last validation, and its mean over the validations."""
    last = validations[-1]
    columns: dict[str, Mapping[str, float]] = {**last.get("dice", {}), **last.get("scans", {})}
    chosen = np.unique(np.linspace(0, len(validations) - 1, MOST_COLUMNS).round().astype(int))
    history = {f"{validations[i]['step']}": _class_means(validations[i]) for i in chosen}
    classes = list(dict.fromkeys(name for row in columns.values() for name in row))
    panels: list[tuple[str, Table]] = [("last validation", columns), ("mean over the run, by step", history)]
    shown = panels if len(history) > 1 else panels[:1]
    width = sum(max(2, len(table)) for _, table in shown)
    figure = _figure(3.2 + 0.62 * width + 0.6 * len(shown), 1.7 + 0.27 * len(classes))
    ratios = [max(2, len(table)) for _, table in shown]
    axes = figure.subplots(1, len(shown), squeeze=False, width_ratios=ratios)[0]
    for ax, (title, table) in zip(axes, shown, strict=True):
        _heat_map(ax, title, table, classes)
    for ax in axes[1:]:
        ax.set_yticklabels([])
    return figure


def _heat_map(axes: Axes, title: str, table: Table, classes: Sequence[str]) -> None:
    values = np.array([[row.get(name, np.nan) for row in table.values()] for name in classes], dtype=float)
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(table)), [_short(name, 18) for name in table], rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(classes)), [_short(name, 34) for name in classes], fontsize=8)
    axes.set_title(title, fontsize=10)


def _names(validations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Contrasts, then scans, of all validations."""
    return list(
        dict.fromkeys(name for kind in ("dice", "scans") for entry in validations for name in entry.get(kind, {}))
    )


def _mean_of(entry: Mapping[str, Any], name: str) -> float:
    row = entry.get("dice", {}).get(name) or entry.get("scans", {}).get(name)
    return float(np.mean(list(row.values()))) if row else float("nan")


def _class_means(entry: Mapping[str, Any]) -> dict[str, float]:
    """Mean of each class over contrasts and scans."""
    rows = [*entry.get("dice", {}).values(), *entry.get("scans", {}).values()]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _short(name: str, most: int) -> str:
    text = name if len(name) <= most else name[: most - 1] + "…"
    return text.replace("$", r"\$")  # not mathematics


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
