"""The dashboard's panels as a picture: what Prometheus answered to their queries."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from benchmarks.panels import Panel, legend
from benchmarks.prometheus import Series

matplotlib.use("agg")

Drawn = list[tuple[Panel, list[list[Series]]]]
_COLUMNS = 4
_INK, _FAINT, _PAPER = "#d8d9da", "#4b4f58", "#181b1f"
_COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffa6b0")
_MOST_LINES = 8
_WEBP_QUALITY = 82


def draw(drawn: Drawn, target: Path) -> None:
    """Writes the panels, row by row of the dashboard, as a WebP picture."""
    began = min(t for _, answers in drawn for lines in answers for line in lines for t, _ in line.points)
    rows = list(dict.fromkeys(panel.row for panel, _ in drawn))
    grid = [(row, [d for d in drawn if d[0].row == row]) for row in rows]
    lines = sum(-(-len(members) // _COLUMNS) for _, members in grid)
    figure = Figure(figsize=(4.0 * _COLUMNS, 2.35 * lines), facecolor="#111217", dpi=80)
    line = 0
    for row, members in grid:
        for number, (panel, answers) in enumerate(members):
            at = (line + number // _COLUMNS) * _COLUMNS + number % _COLUMNS + 1
            axes = figure.add_subplot(lines, _COLUMNS, at)
            _panel(axes, panel, answers, began)
            if number == 0:
                axes.text(
                    0, 1.2, row, transform=axes.transAxes, color="white", fontsize=12, fontweight="bold"
                )
        line += -(-len(members) // _COLUMNS)
    figure.tight_layout(h_pad=1.6)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=figure.get_facecolor())
    with Image.open(file) as image:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(target, "WEBP", quality=_WEBP_QUALITY, method=6)


def _panel(axes: Axes, panel: Panel, answers: list[list[Series]], began: float) -> None:
    axes.set_facecolor(_PAPER)
    axes.set_title(panel.title, color=_INK, fontsize=9, loc="left")
    axes.tick_params(colors=_INK, labelsize=7, length=2)
    axes.grid(color=_FAINT, linewidth=0.4, alpha=0.6)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    top = max((v for lines in answers for line in lines for _, v in line.points), default=0.0) or 1.0
    unit, suffix = scale(top, panel.unit)
    for target, lines in zip(panel.targets, answers, strict=True):
        for line in lines:
            times = [(t - began) / 60 for t, _ in line.points]
            values = [v / unit for _, v in line.points]
            name = re.sub(r"127\.0\.0\.1:\d+", "server", legend(target.legend, line.labels))
            colour = _COLOURS[len(axes.lines) % len(_COLOURS)]
            axes.plot(times, values, linewidth=1.2, label=name[:24], color=colour)
    # Room above for the legend, and a little below: a line at zero is a line.
    axes.set_ylim(-0.03 * top / unit, 1.45 * top / unit)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{suffix}"))
    axes.set_xlabel("minutes", color=_INK, fontsize=6, labelpad=1)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[:_MOST_LINES],
        labels[:_MOST_LINES],
        fontsize=6,
        labelcolor=_INK,
        frameon=False,
        loc="upper left",
        ncols=2 if len(labels) > 2 else 1,
    )


def scale(top: float, unit: str) -> tuple[float, str]:
    """What to divide values up to `top` by, and what to write behind them, for a unit of Grafana."""
    if unit == "bytes":
        return (2**30, " GiB") if top >= 2**30 else (2**20, " MiB")
    if unit == "percentunit":
        return 0.01, "%"
    if unit == "s":
        return (1.0, " s") if top >= 1 else (1e-3, " ms")
    return 1.0, ""
