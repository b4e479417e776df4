"""The kinds of charts: lines over a common axis, intervals by row, stacked bars by row.

Colours are numbers. A mark has a note with its values, for readers who point at it and for those
who cannot see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from deepspec.figures.drawing import (
    BOTTOM,
    QUIET,
    RULE,
    TOP,
    Chart,
    Key,
    chart_of,
    colour_of,
    mark,
    styled_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = 104  # room for the names of rows
MOST_LETTERS = 16  # of such a name
ROW, LANE = 22, 11  # height of a row with one mark, and of each further mark in it
COMPARED: dict[str, Any] = {
    "color": QUIET,
    "linewidth": 1,
    "linestyle": (0, (2, 3)),
}  # a line to compare with
Look = Literal["marked", "dashed", "plain", "faint"]
LOOKS: dict[Look, dict[str, Any]] = {
    "marked": {},
    "plain": {},
    "dashed": {"linewidth": 1.4, "linestyle": (0, (3.5, 3))},
    "faint": {"linewidth": 1.2, "color": RULE},
}  # of lines; marks are on the marked and the dashed ones


class Point(NamedTuple):
    """A value with its 95 % interval; `note` is added to that of its mark."""

    x: float
    y: float
    interval: Sequence[float] | None = None
    note: str = ""
    radius: float = 2.6


class Series(NamedTuple):
    """A line through points; without a name it is in no legend."""

    name: str
    points: Sequence[Point]
    colour: int
    look: Look = "marked"


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    interval: Sequence[float] | None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    labels: tuple[str, str],
    x: Literal["from zero", "whole numbers", "powers of two"] = "from zero",
    y: tuple[float, float | None] = (0.0, None),
    reference: float | Literal["diagonal"] | None = None,
) -> Chart:
    """Series over a common x axis of the kind `x`; `y` is the range of the other.

    `reference` is a y value to compare with, or the diagonal of the unit square.
    """
    with styled_axes() as (figure, axes):
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.yaxis.set_label_coords(-0.105, 0.5)  # left of the widest tick label
        axes.grid(axis="y")
        if x == "from zero":
            axes.update_datalim([(0, 0)])
        elif x == "whole numbers":
            axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        else:
            axes.set_xscale("log", base=2)
        if reference == "diagonal":
            axes.plot([0, 1], [0, 1], **COMPARED)
        elif reference is not None:
            axes.axhline(reference, **COMPARED)
        for one in series:
            _line(axes, one, labels)
        axes.set_ylim(*y)
        axes.xaxis.set_major_formatter(_short)
        axes.yaxis.set_major_formatter(_short)
        named = [one for one in series if one.name and one.look != "faint"]
        keys = [Key(one.name, one.colour, one.look == "dashed") for one in named]
        return chart_of(figure, title, keys)


def interval_chart(
    title: str,
    rows: Sequence[tuple[str, Sequence[Estimate | None]]],
    *,
    names: Sequence[str],
    label: str,
    reference: float,
) -> Chart:
    """A row per name with an estimate for each of `names` (None: it has no value)."""
    height = ROW + LANE * (len(names) - 1)
    with _rows([row for row, _ in rows], height, label) as (figure, axes):
        for number, (row, estimates) in enumerate(rows):
            for lane, (name, found) in enumerate(zip(names, estimates, strict=True)):
                if found is None:
                    continue
                y = number + (lane - (len(names) - 1) / 2) * LANE / height
                colour = colour_of(lane)
                ends = found.interval or ()
                axes.plot(ends, [y] * len(ends), color=colour)
                note = f"{row}, {name}: {ranged(*found)}"
                mark(axes, found.value, y, colour=colour, radius=3.4, note=note)
        axes.axvline(reference, **COMPARED)
        axes.set_xlim(left=0)
        return chart_of(figure, title, [Key(name, lane) for lane, name in enumerate(names)])


def bar_chart(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, int]]]], *, label: str
) -> Chart:
    """A stacked horizontal bar per name: its parts are (what, how much, colour)."""
    keys = []
    with _rows([name for name, _ in rows], ROW, label) as (figure, axes):
        for row, (name, parts) in enumerate(rows):
            end = 0.0
            for what, size, colour in parts:
                note = f"note:{name}: {what} {size:.3g}"
                axes.barh(row, size, 0.64, end, color=colour_of(colour), gid=note)
                end += size
                keys.append(Key(what, colour))
        return chart_of(figure, title, keys)


def ranged(value: float, interval: Sequence[float] | None) -> str:
    """`2.31 (2.20–2.42)`."""
    return f"{value:,.2f}" + (f" ({interval[0]:.2f}–{interval[1]:.2f})" if interval else "")


@contextmanager
def _rows(names: Sequence[str], height: float, label: str) -> Iterator[tuple[Figure, Axes]]:
    """Axes with a row of this height for each name, the first on top."""
    with styled_axes(TOP + height * len(names) + BOTTOM, NAMES) as (figure, axes):
        short = [
            name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…" for name in names
        ]
        axes.set_yticks(range(len(names)), short)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(_short)
        axes.grid(axis="x")
        yield figure, axes


def _line(axes: Axes, one: Series, labels: tuple[str, str]) -> None:
    colour = colour_of(one.colour)
    band = [(point.x, *point.interval) for point in one.points if point.interval]
    if len(band) > 1:
        at, low, high = zip(*band, strict=True)
        outline = [*at, *reversed(at)], [*high, *reversed(low)]
        axes.fill(*outline, color=colour, alpha=0.16, linewidth=0)
    style = {"color": colour, **LOOKS[one.look]}
    axes.plot([point.x for point in one.points], [point.y for point in one.points], **style)
    if one.look in ("marked", "dashed"):
        for point in one.points:
            where = f"{one.name}, {labels[0]} {point.x:,.5g}"
            note = f"{where}: {labels[1]} {ranged(point.y, point.interval)}{point.note}"
            mark(axes, point.x, point.y, colour=colour, radius=point.radius, note=note)


def _short(value: float, _: float) -> str:
    """A tick's label."""
    for scale, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"
