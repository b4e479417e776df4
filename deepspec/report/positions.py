"""Acceptance by position in the block: curves for each line, and the same in numbers."""

from collections.abc import Iterator, Sequence
from typing import Literal

from deepspec.artifacts.results import Metrics
from deepspec.figures.charts import Estimate, Look, Point, Series, line_chart, ranged
from deepspec.figures.drawing import Chart
from deepspec.report.lines import Line, Result, num_words, rows_of, totals_first
from deepspec.report.page import Gallery, Table

NOTE = (
    "Conditional acceptance at k (solid): of the rounds that accepted the first k - 1 draft "
    "tokens, those that accepted the k-th. Prefix acceptance at k (dashed): rounds that accepted "
    "all of the first k. Shaded: 95 % intervals."
)
Kind = Literal["conditional", "prefix"]
LOOKS: dict[Kind, Look] = {"conditional": "marked", "prefix": "dashed"}


def position_blocks(
    lines: Sequence[Line[Metrics]], results: Sequence[Result]
) -> Iterator[Gallery | Table]:
    """The curves of all lines that have positions, and their numbers as a table."""
    having = totals_first(
        [line for line in lines if any(part and part.tried for part in line.parts)]
    )
    yield Gallery("Acceptance by position", [_curves(line, results) for line in having], NOTE)
    found = [
        ({**first, "acceptance": kind}, _positions(part, kind))
        for first, part, _ in rows_of(having, results)
        for kind in LOOKS
    ]
    longest = max((len(positions) for _, positions in found), default=0)
    rows = []
    for first, positions in found:
        shown = ["–" if at is None else ranged(*at) for at in positions]
        shown += ["–"] * (longest - len(shown))
        rows.append({**first, **{f"k = {k}": cell for k, cell in enumerate(shown, start=1)}})
    yield Table("Acceptance by position, in numbers", rows, num_words(results) + 1)


def _positions(part: Metrics, kind: Kind) -> list[Estimate | None]:
    """The acceptance at each position, None where no round came so far."""
    counts = part.tried if kind == "conditional" else part.reached
    name = f"{kind}_acceptance"
    found = zip(getattr(part, name), getattr(part.intervals, name), counts, strict=True)
    return [Estimate(value, interval) if count else None for value, interval, count in found]


def _curves(line: Line[Metrics], results: Sequence[Result]) -> Chart:
    series = []
    for colour, (result, part) in enumerate(zip(results, line.parts, strict=True)):
        if part is None:
            continue
        for kind, look in LOOKS.items():
            found = enumerate(_positions(part, kind), start=1)
            points = [Point(k, *at) for k, at in found if at is not None]
            series.append(Series(f"{result.label}: {kind}", points, colour, look))
    labels = ("position in the block", "accepted")
    return line_chart(line.name, series, labels=labels, x="whole numbers", y=(0.0, 1.0))
