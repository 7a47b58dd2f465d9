"""The dashboard's panels as a picture: what Prometheus answered to their queries."""

from __future__ import annotations

import io
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
    for target, lines in zip(panel.targets, answers, strict=True):
        for line in lines:
            times, values = zip(*line.points, strict=True)
            label = legend(target.legend, line.labels).replace("127.0.0.1", "server")
            colour = _COLOURS[len(axes.lines) % len(_COLOURS)]
            axes.plot(
                [(t - began) / 60 for t in times], values, linewidth=1.2, label=label[:24], color=colour
            )
    top = max((v for lines in answers for line in lines for _, v in line.points), default=0.0) or 1.0
    # Room above for the legend, and a little below: a line at zero is a line.
    axes.set_ylim(-0.03 * top, 1.45 * top)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
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


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it in that unit, roughly."""
    if unit == "bytes":
        return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{value * 1e3:g} ms" if value < 1 else f"{value:g} s"
    return f"{value:g}"
