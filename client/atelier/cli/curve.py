"""A loss curve as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 36

Point = tuple[float, float]


def loss_curve(points: Sequence[Point], marks: Sequence[float] = ()) -> str:
    """An <svg> of (step, loss): every value faintly, a running mean over it, a dashed line at every mark."""
    if len(points) < 2:
        return "<p>Too few steps for a curve.</p>"
    last = max(*(step for step, _ in points), *marks, 1.0)
    top = _ceiling(max(loss for _, loss in points))

    def place(step: float, loss: float) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / top

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="training loss by step">']
    for part in range(5):
        loss = top * part / 4
        _, y = place(0, loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
        x, _ = place(last * part / 4, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{last * part / 4:.0f}</text>')
    for step in marks:
        x, _ = place(step, 0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(_line("every", [place(*point) for point in points]))
    parts.append(_line("mean", [place(*point) for point in running_mean(points)]))
    return "".join([*parts, "</svg>"])


def running_mean(points: Sequence[Point], rate: float = 0.08) -> list[Point]:
    """Exponential moving average of the losses, without the pull of its first value (Adam's correction)."""
    smooth: list[Point] = []
    total = weight = 0.0
    for step, loss in points:
        total = (1 - rate) * total + rate * loss
        weight = (1 - rate) * weight + rate
        smooth.append((step, total / weight))
    return smooth


def _ceiling(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten, so that quarters of it read well."""
    if value <= 0:
        return 1.0
    power = 10.0 ** (len(f"{int(value)}") - 1)
    while power > value:
        power /= 10
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)


def _line(kind: str, points: Sequence[Point]) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'
