"""Acceptance by position in the block: a curve for each line, and the same in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from deepspec.artifacts.results import Metrics
from deepspec.figures.drawing import Figure, Point, Series, line_figure
from deepspec.figures.picture import Key
from deepspec.report.lines import (
    Line,
    Result,
    first_columns,
    ranged,
    rows_of,
    run_keys,
    totals_first,
)
from deepspec.report.page import Gallery, Table

NOTE = (
    "Conditional acceptance at k (solid): of the rounds that accepted the first k - 1 draft "
    "tokens, those that accepted the k-th. Prefix acceptance at k (dashed): rounds that accepted "
    "all of the first k. Shaded: 95 % intervals."
)
Kind = Literal["conditional", "prefix"]
KINDS: tuple[Kind, ...] = ("conditional", "prefix")


class Position(NamedTuple):
    """The acceptance at one position, of `num_rounds` rounds."""

    value: float
    interval: Sequence[float] | None
    num_rounds: int


def position_blocks(lines: Sequence[Line], results: Sequence[Result]) -> Iterator[Gallery | Table]:
    """The curves of all lines that have positions, and their numbers as a table."""
    having = totals_first([line for line in lines if line.has_positions])
    keys = [
        Key(f"{key.name}: {kind}", key.colour, dashed=kind == "prefix")
        for kind in KINDS
        for key in run_keys(results)
    ]
    yield Gallery("Acceptance by position", keys, [_curves(line, results) for line in having], NOTE)
    yield _table(having, results)


def _positions(part: Metrics, kind: Kind) -> list[Position]:
    name = f"{kind}_acceptance"
    counts = part.tried if kind == "conditional" else part.reached
    return [*map(Position, getattr(part, name), getattr(part.intervals, name), counts)]


def _curves(line: Line, results: Sequence[Result]) -> Figure:
    series = []
    for colour, (result, part) in enumerate(zip(results, line.pooled, strict=True)):
        if part is None:
            continue
        for kind in reversed(KINDS):
            points = [
                Point(
                    k,
                    at.value,
                    at.interval,
                    f"{result.label}, {kind} at {k}: {ranged(at.value, at.interval)}",
                )
                for k, at in enumerate(_positions(part, kind), start=1)
                if at.num_rounds
            ]
            series.append(Series(points, colour, dashed=kind == "prefix"))
    labels = ("position in the block", "accepted")
    ticks = range(1, _longest([line]) + 1)
    return line_figure(line.name, series, labels=labels, x=ticks, y=(0.0, 1.0))


def _longest(lines: Sequence[Line]) -> int:
    return max((len(part.tried) for line in lines for part in line.pooled if part), default=0)


def _table(lines: Sequence[Line], results: Sequence[Result]) -> Table:
    longest = _longest(lines)
    rows = []
    for words, part, _ in rows_of(lines, results):
        if not isinstance(part, Metrics):
            continue
        for kind in KINDS:
            found = _positions(part, kind)
            cells = [ranged(at.value, at.interval) if at.num_rounds else "–" for at in found]
            rows.append([*words, kind, *cells, *["–"] * (longest - len(cells))])
    first = [*first_columns(results), "acceptance"]
    header = [*first, *(f"k = {k}" for k in range(1, longest + 1))]
    return Table("Acceptance by position, in numbers", header, rows, words=len(first))
