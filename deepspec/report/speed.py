"""Speed by batch size and seconds by phase: figures, and the same in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspec.artifacts.results import BatchSpeed, Metrics
from deepspec.figures.drawing import Figure, Point, Series, bar_figure, line_figure, powers
from deepspec.figures.picture import Key
from deepspec.report.lines import (
    Line,
    Part,
    Result,
    first_columns,
    ranged,
    rows_of,
    run_keys,
    totals_first,
)
from deepspec.report.page import Gallery, Table

PHASES = {
    "draft_seconds": "draft",
    "verify_seconds": "verify",
    "bookkeeping_seconds": "bookkeeping",
}
PLAIN = 7  # the colour of plain decoding


def speed_blocks(lines: Sequence[Line], results: Sequence[Result]) -> Iterator[Table | Gallery]:
    """Speed-up against batch size if there are several, seconds by phase, and both as a table."""
    timed = totals_first([line for line in lines if line.has_speeds])
    measured = [size for line in timed for part in line.pooled for size in _sizes(part)]
    if len({size.batch_size for size in measured}) > 1:
        yield _by_batch_size(timed, results, measured)
    yield _by_phase(timed[0].pooled, results)
    yield _table([line for line in lines if line.has_speeds], results)


def _sizes(part: Part | None) -> list[BatchSpeed]:
    return part.batch_sizes if isinstance(part, Metrics) else []


def _by_batch_size(
    lines: Sequence[Line], results: Sequence[Result], measured: Sequence[BatchSpeed]
) -> Gallery:
    sizes = [size.batch_size for size in measured]
    highest = max(1.0, *(max(size.interval or [size.speedup]) for size in measured)) * 1.05
    figures = []
    for line in lines:
        series = []
        for colour, (result, part) in enumerate(zip(results, line.pooled, strict=True)):
            points = []
            for size in sorted(_sizes(part), key=lambda size: size.batch_size):
                speedup = ranged(size.speedup, size.interval)
                note = f"{result.label}, batch {size.batch_size}: {speedup}"
                points.append(Point(size.batch_size, size.speedup, size.interval, note))
            series.append(Series(points, colour))
        labels = ("prompts decoded together", "speed-up")
        figures.append(
            line_figure(
                line.name, series, labels=labels, x=powers(sizes), y=(0.0, highest), reference=1.0
            )
        )
    note = "Speed-up over plain decoding at the same batch size, with its 95 % interval."
    return Gallery("Speed-up by batch size", run_keys(results), figures, note)


def _by_phase(parts: Sequence[Part | None], results: Sequence[Result]) -> Gallery:
    names = enumerate(PHASES.values())
    keys = [Key("plain decoding", PLAIN), *(Key(name, colour) for colour, name in names)]
    bars = [_bars(result, part) for result, part in zip(results, parts, strict=True) if part]
    note = (
        "Seconds of plain and of speculative decoding of the same prompts, all benchmarks together."
    )
    return Gallery("Seconds by phase", keys, bars, note)


def _bars(result: Result, part: Part) -> Figure:
    rows = []
    for size in _sizes(part):
        plain = [("plain decoding", size.seconds.plain_seconds, PLAIN)]
        phases = [
            (name, getattr(size.seconds, key), colour)
            for colour, (key, name) in enumerate(PHASES.items())
        ]
        rows.append((f"{size.batch_size} plain", plain))
        rows.append((f"{size.batch_size} speculative", phases))
    return bar_figure(result.label, rows, label="seconds")


def _table(lines: Sequence[Line], results: Sequence[Result]) -> Table:
    rows = [
        [*words, *_cells(size)]
        for words, part, _ in rows_of(lines, results)
        for size in _sizes(part)
    ]
    first = first_columns(results)
    counts = ["batch", "prompts", "groups"]
    speeds = ["plain tokens/s", "tokens/s", "speed-up"]
    seconds = [f"{name} s" for name in ("plain", "speculative", *PHASES.values())]
    header = [*first, *counts, *speeds, *seconds]
    return Table("Speed by batch size, and seconds by phase", header, rows, words=len(first))


def _cells(size: BatchSpeed) -> list[str]:
    counts = [f"{count:,}" for count in (size.batch_size, size.prompts, size.groups)]
    speeds = [f"{speed:,.0f}" for _, speed in size.tokens_per_s]
    seconds = [f"{phase:.1f}" for _, phase in size.seconds]
    return [*counts, *speeds, ranged(size.speedup, size.interval), *seconds]
