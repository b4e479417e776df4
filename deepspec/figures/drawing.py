"""Figures as shapes with coordinates, which a template turns into SVG: nothing here knows colours
or a plotting library.

All coordinates are those of the figure's own view box, y downwards. A series is told apart by its
number (its colour).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 42
LABELS = 104  # room for the names of the rows of a figure that has rows
ROW, LANE = 22, 11  # height of a row with one mark, and of each further mark in it


class Point(NamedTuple):
    x: float
    y: float
    interval: Sequence[float] | None = None
    """Of y, or of x in a figure of intervals."""
    note: str = ""
    """What somebody reads who points at it."""
    radius: float = 2.6


class Series(NamedTuple):
    points: Sequence[Point]
    colour: int
    dashed: bool = False
    faint: bool = False


class Tick(NamedTuple):
    at: float
    label: str


class Mark(NamedTuple):
    x: float
    y: float
    radius: float
    note: str
    colour: int


class Stroke(NamedTuple):
    """A line through a series' points, and the band of its intervals ('' where it has none);
    both as SVG paths.
    """

    path: str
    band: str
    colour: int
    dashed: bool
    faint: bool


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: int
    note: str


class Figure(NamedTuple):
    """What is drawn. `alt` says in words what the picture shows."""

    title: str
    alt: str
    width: float
    height: float
    plot: tuple[float, float, float, float]  # left, top, right, bottom of the axes
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    strokes: Sequence[Stroke] = ()
    marks: Sequence[Mark] = ()
    whiskers: Sequence[Stroke] = ()
    bars: Sequence[Bar] = ()
    reference: str = ""
    """A path to compare with: the diagonal of a reliability diagram, a speed-up of 1."""


class Axis(NamedTuple):
    """A range of values and where it lies in the figure; as powers of two where `log` is set."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (
            (math.log2(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return round(
            self.start
            + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5),
            1,
        )


def line_figure(
    title: str,
    series: Sequence[Series],
    *,
    labels: tuple[str, str],
    x: Sequence[float] | Axis,
    y: tuple[float, float] | None = None,
    reference: float | str | None = None,
) -> Figure:
    """Series over a common x axis: `x` is its ticks, or an axis (`powers`, `from_zero`); `y` the y
    range, else it follows the data.

    `reference` is a y value to compare with, or "diagonal".
    """
    left, top, right, bottom = plot = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    tops = [
        value
        for one in series
        for point in one.points
        for value in (point.y, *(point.interval or ()))
    ]
    low, high = y or (0.0, max([*tops, 1e-9]) * 1.05)
    y_axis = Axis(low, high, bottom, top)
    if not isinstance(x, Axis):
        x_axis, x_values = Axis(min(x), max(x), left + 8, right - 8), list(x)
    elif x.log:
        every = [
            2.0**power for power in range(round(math.log2(x.low)), round(math.log2(x.high)) + 1)
        ]
        x_axis, x_values = x, every[:: 1 + len(every) // 8]
    else:
        x_axis, x_values = x, nice_ticks(x.low, x.high)
    y_ticks = [Tick(y_axis.at(value), _short(value)) for value in nice_ticks(low, high)]
    x_ticks = [Tick(x_axis.at(value), _short(value)) for value in x_values]
    marks = [
        Mark(x_axis.at(point.x), y_axis.at(point.y), point.radius, point.note, one.colour)
        for one in series
        if not one.faint
        for point in one.points
        if point.radius
    ]
    drawn = ""
    if reference == "diagonal":
        drawn = _path([(x_axis.at(low), y_axis.at(low)), (x_axis.at(high), y_axis.at(high))])
    elif isinstance(reference, float):
        drawn = _path([(left, y_axis.at(reference)), (right, y_axis.at(reference))])
    strokes = [_stroke(one, x_axis.at, y_axis.at) for one in series]
    return Figure(
        title,
        _in_words(title, series),
        WIDTH,
        HEIGHT,
        plot,
        *labels,
        x_ticks,
        y_ticks,
        strokes,
        marks,
        reference=drawn,
    )


def powers(values: Sequence[float]) -> Axis:
    """An x axis in powers of two that holds all values."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return Axis(2.0**low, 2.0 ** max(high, low + 1), LEFT + 8, WIDTH - RIGHT - 8, log=True)


def from_zero(highest: float) -> Axis:
    """An x axis that holds all values up to the highest."""
    return Axis(0.0, highest * 1.02, LEFT + 8, WIDTH - RIGHT - 8)


def interval_figure(
    title: str,
    rows: Sequence[tuple[str, Sequence[Point | None]]],
    *,
    label: str,
    reference: float | None = None,
) -> Figure:
    """A row per name with a mark and a whisker for each run (None where a run has nothing):
    `Point.x` is the value.
    """
    lanes = max(len(points) for _, points in rows)
    height = ROW + LANE * (lanes - 1)
    left, top, right = LABELS, TOP, WIDTH - RIGHT
    bottom = top + height * len(rows)
    known = [
        value
        for _, points in rows
        for point in points
        if point
        for value in (point.x, *(point.interval or ()))
    ]
    axis = Axis(0.0, max([*known, reference or 0.0, 1e-9]) * 1.06, left, right)
    marks, whiskers, names = [], [], []
    for number, (name, points) in enumerate(rows):
        middle = top + height * (number + 0.5)
        names.append(Tick(middle, name))
        for lane, point in enumerate(points):
            at = middle + LANE * (lane - (lanes - 1) / 2)
            if point is None:
                continue
            marks.append(Mark(axis.at(point.x), at, 3.4, point.note, lane))
            if point.interval:
                ends = [(axis.at(edge), at) for edge in point.interval]
                whiskers.append(Stroke(_path(ends), "", lane, dashed=False, faint=False))
    ticks = [Tick(axis.at(value), _short(value)) for value in nice_ticks(axis.low, axis.high)]
    drawn = (
        _path([(axis.at(reference), top), (axis.at(reference), bottom)])
        if reference is not None
        else ""
    )
    alt = f"{title}. " + "; ".join(point.note for _, points in rows for point in points if point)
    plot = (left, top, right, bottom)
    return Figure(
        title,
        alt,
        WIDTH,
        bottom + BOTTOM,
        plot,
        label,
        "",
        ticks,
        names,
        marks=marks,
        whiskers=whiskers,
        reference=drawn,
    )


def bar_figure(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], *, label: str
) -> Figure:
    """A stacked horizontal bar per name: its parts are (what, how much, colour)."""
    left, top, right = LABELS, TOP, WIDTH - RIGHT
    bottom = top + ROW * len(rows)
    axis = Axis(
        0.0,
        max([*(sum(size for _, size, _ in parts) for _, parts in rows), 1e-9]) * 1.02,
        left,
        right,
    )
    bars = []
    for number, (name, parts) in enumerate(rows):
        begun = 0.0
        for what, size, colour in parts:
            x = axis.at(begun)
            begun += max(size, 0.0)
            bars.append(
                Bar(
                    x,
                    top + ROW * number + 4,
                    round(axis.at(begun) - x, 1),
                    ROW - 8,
                    colour,
                    f"{name}: {what} {size:.3g}",
                )
            )
    names = [Tick(top + ROW * (number + 0.5), name) for number, (name, _) in enumerate(rows)]
    ticks = [Tick(axis.at(value), _short(value)) for value in nice_ticks(axis.low, axis.high)]
    alt = f"{title}. " + "; ".join(bar.note for bar in bars)
    return Figure(
        title,
        alt,
        WIDTH,
        bottom + BOTTOM,
        (left, top, right, bottom),
        label,
        "",
        ticks,
        names,
        bars=bars,
    )


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values inside the range, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [
        round(step * number, 12)
        for number in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)
    ]


def _stroke(one: Series, x_at: Callable[[float], float], y_at: Callable[[float], float]) -> Stroke:
    edges = [
        (x_at(point.x), y_at(point.interval[0]), y_at(point.interval[1]))
        for point in one.points
        if point.interval
    ]
    around = [*((x, high) for x, _, high in edges), *((x, low) for x, low, _ in reversed(edges))]
    band = _path(around) + "Z" if len(edges) > 1 else ""
    return Stroke(
        _path([(x_at(point.x), y_at(point.y)) for point in one.points]),
        band,
        one.colour,
        one.dashed,
        one.faint,
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points) if points else ""


def _short(value: float) -> str:
    scale, letter = next(
        (one for one in ((1e6, "M"), (1e3, "k")) if abs(value) >= 10 * one[0]), (1.0, "")
    )
    return f"{value / scale:g}{letter}"


def _in_words(title: str, series: Sequence[Series]) -> str:
    return f"{title}. " + "; ".join(
        point.note for one in series if not one.faint for point in one.points if point.note
    )
