"""Curves for the report: inline SVG that stretches with the page, labels as HTML so that text keeps its size.

The plot's own coordinates are 0..100 both ways; strokes do not scale (`vector-effect`). Values under the cursor are
shown by `page.js`, which gets the same points as JSON.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

_SHORT_EXPONENT = re.compile(r"e([+-])0")

Points = dict[int, float]
"""Iteration → value; an iteration without one is skipped by the line."""


@dataclass(frozen=True)
class Line:
    """One curve; `low` and `high` make a band around it."""

    name: str
    points: Points
    low: Points = field(default_factory=dict)
    high: Points = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """A panel. `form` is how values are written: `percent`, `number`, `count`, `seconds` or `tokens`."""

    key: str
    title: str
    note: str
    lines: Sequence[Line]
    form: str = "number"
    floor: float | None = 0.0
    ceiling: float | None = None
    stacked: bool = False

    @property
    def drawn(self) -> list[Line]:
        """Lines that have a value at all."""
        return [line for line in self.lines if line.points]


def number(value: float, form: str = "number") -> str:
    """A value as the page writes it; `page.js` has the same rules."""
    if not math.isfinite(value):
        return "not finite"
    if form == "percent":
        return f"{value * 100:.1f}\u202f%"
    if form == "seconds":
        return duration(value)
    if form == "count":
        return f"{value:,.0f}"
    if form == "tokens":
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    size = abs(value)
    if value == 0 or 0.001 <= size < 1000:
        return f"{value:.3f}" if size < 10 else f"{value:.1f}"
    if 0.00001 <= size < 0.001:
        return f"{value:.5f}"
    return f"{value:,.0f}" if 1000 <= size < 1e7 else _SHORT_EXPONENT.sub(r"e\1", f"{value:.1e}")


def interval(low: float, high: float, form: str = "number") -> str:
    """A range of values: `79.2–90.6 %`."""
    first = f"{low * 100:.1f}" if form == "percent" else number(low, form)
    return f"{first}–{number(high, form)}"


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round values that cover low..high; their ends are the axis' ends."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def draw(chart: Chart, iterations: Sequence[int]) -> str:
    """One panel, which has values, as HTML: title, latest values, plot."""
    title = f'<span class="chart-title">{escape(chart.title)}</span>'
    last = max(iteration for line in chart.drawn for iteration in line.points)
    readouts = "".join(_readout(chart, position, line, last) for position, line in enumerate(chart.drawn))
    return (
        f'<figure class="chart" data-chart="{escape(chart.key)}" tabindex="0" role="group" '
        f'aria-label="{escape(_spoken(chart))}">'
        f'<figcaption>{title}<span class="chart-at" data-at>after update {last}</span></figcaption>'
        f'<div class="readouts">{readouts}</div>{_plot(chart, iterations)}'
        f'<p class="chart-note">{escape(chart.note)}</p></figure>'
    )


def payload(chart: Chart) -> dict[str, object]:
    """What the cursor needs, as plain JSON."""
    lines = [{"points": sorted(line.points.items()), "low": line.low, "high": line.high} for line in chart.drawn]
    return {"key": chart.key, "form": chart.form, "lines": lines}


def _readout(chart: Chart, position: int, line: Line, newest: int) -> str:
    """The latest value of a line, and which update it is of when other lines of the panel have a later one."""
    last = max(line.points)
    band = ""
    if last in line.low and last in line.high:
        band = interval(line.low[last], line.high[last], chart.form)
    many = len(chart.drawn) > 1
    name = f'<span class="key key-{position}" aria-hidden="true"></span>{escape(line.name)} ' if many else ""
    return (
        f'<span class="readout">{name}<b data-value>{number(line.points[last], chart.form)}</b>'
        f'<span class="band-text" data-band>{band}</span>'
        f'<span class="soft" data-of>{"" if last == newest else f" after update {last}"}</span></span>'
    )


def _spoken(chart: Chart) -> str:
    said = []
    for line in chart.drawn:
        first, last = min(line.points), max(line.points)
        start, end = number(line.points[first], chart.form), number(line.points[last], chart.form)
        said.append(f"{line.name} from {start} at {first} to {end} at {last}")
    return f"{chart.title} by update: {'; '.join(said)}. Left and right arrow keys read single values."


def _plot(chart: Chart, iterations: Sequence[int]) -> str:
    first, last = min(iterations), max(iterations)
    ticks = _y_ticks(chart)
    low, high = ticks[0], ticks[-1]
    half = 0.5 if chart.stacked else 0.0

    def x(iteration: float) -> float:
        span = last - first + 2 * half
        return 50.0 if span == 0 else (iteration - first + half) / span * 100

    def y(value: float) -> float:
        return (high - min(max(value, low), high)) / (high - low) * 100

    grid = "".join(f'<line class="grid" x1="0" x2="100" y1="{y(tick):.2f}" y2="{y(tick):.2f}"/>' for tick in ticks)
    shapes = _bars(chart, iterations, x, y) if chart.stacked else _curves(chart, x, y)
    y_labels = "".join(
        f'<span style="top:{y(tick):.2f}%">{escape(_tick_text(tick, chart.form, high))}</span>' for tick in ticks
    )
    x_labels = "".join(f'<span style="left:{x(tick):.2f}%">{tick}</span>' for tick in _x_ticks(first, last))
    return (
        f'<div class="plot" data-first="{first}" data-last="{last}" data-half="{half}">'
        f'<div class="y-axis" aria-hidden="true">{y_labels}</div><div class="canvas">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{grid}{shapes}</svg>'
        f'<i class="cursor" hidden></i></div><div class="x-axis" aria-hidden="true">{x_labels}</div></div>'
    )


def _curves(chart: Chart, x, y) -> str:
    shapes = []
    for position, line in enumerate(chart.drawn):
        points = sorted(line.points.items())
        banded = [iteration for iteration, _ in points if iteration in line.low and iteration in line.high]
        if len(banded) > 1:
            upper = " ".join(f"{x(i):.2f},{y(line.high[i]):.2f}" for i in banded)
            lower = " ".join(f"{x(i):.2f},{y(line.low[i]):.2f}" for i in reversed(banded))
            shapes.append(f'<polygon class="band band-{position}" points="{upper} {lower}"/>')
        elif banded:
            (i,) = banded
            shapes.append(f'<path class="whisker" d="M{x(i):.2f} {y(line.low[i]):.2f}V{y(line.high[i]):.2f}"/>')
        path = " ".join(f"{x(i):.2f},{y(value):.2f}" for i, value in points)
        shapes.append(f'<polyline class="curve curve-{position}" points="{path}"/>')
        if len(points) <= 32:
            dots = "".join(f"M{x(i):.2f} {y(value):.2f}h0" for i, value in points)
            shapes.append(f'<path class="dots dots-{position}" d="{dots}"/>')
    return "".join(shapes)


def _bars(chart: Chart, iterations: Sequence[int], x, y) -> str:
    shapes = []
    width = min(78 / len(iterations), 22)
    for iteration in iterations:
        base = 0.0
        for position, line in enumerate(chart.drawn):
            value = line.points.get(iteration, 0.0)
            top, bottom = y(base + value), y(base)
            left = x(iteration) - width / 2
            shapes.append(
                f'<rect class="bar bar-{position}" x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" '
                f'height="{bottom - top:.2f}"/>'
            )
            base += value
    return "".join(shapes)


def _y_ticks(chart: Chart) -> list[float]:
    values: Iterable[float] = [value for line in chart.drawn for value in _values(line)]
    if chart.stacked:
        steps = {iteration for line in chart.drawn for iteration in line.points}
        values = [sum(line.points.get(step, 0.0) for line in chart.drawn) for step in steps]
    values = [value for value in values if math.isfinite(value)] or [0.0]
    low = min(values) if chart.floor is None else min(chart.floor, *values)
    high = max(values) if chart.ceiling is None else max(chart.ceiling, *values)
    if low == high and low == 0:
        high = 1.0
    return nice_ticks(low, high)


def _values(line: Line) -> list[float]:
    return [*line.points.values(), *line.low.values(), *line.high.values()]


def _x_ticks(first: int, last: int) -> list[int]:
    if last == first:
        return [first]
    step = max(1, round(nice_ticks(0, last - first, 6)[1]))
    return list(range(first, last + 1, step))


def _tick_text(value: float, form: str, high: float) -> str:
    if form == "percent":
        return f"{value * 100:.4g} %"
    if form == "seconds":
        return f"{value:.4g} s" if high < 180 else f"{value / 60:.4g} min"
    return f"{value:,.0f}" if abs(value) >= 1000 else _SHORT_EXPONENT.sub(r"e\1", f"{value:.6g}")
