"""Speed by batch size and seconds by phase: charts, and the same in numbers."""

from collections.abc import Iterator, Sequence

from deepspec.artifacts.results import BatchSpeed, Metrics
from deepspec.figures.charts import Point, Series, bar_chart, line_chart, ranged
from deepspec.figures.drawing import Chart
from deepspec.report.lines import Line, num_words, rows_of, totals_first
from deepspec.report.page import Gallery, Table

PHASES = ("draft", "verify", "bookkeeping")  # their number is their colour
PLAIN = 7  # the colour of plain decoding
SPEEDUP_NOTE = "Speed-up over plain decoding at the same batch size, with its 95 % interval."
PHASES_NOTE = (
    "Seconds of plain and of speculative decoding of the same prompts, all benchmarks together."
)


def speed_blocks(lines: Sequence[Line[Metrics]]) -> Iterator[Table | Gallery]:
    """Speed-up against batch size if there are several, seconds by phase, and both as a table."""
    micro, *_ = ordered = totals_first(lines)
    measured = [size for _, part, _ in rows_of(lines) for size in part.batch_sizes]
    if len({size.batch_size for size in measured}) > 1:
        highest = max(1.0, *(max(size.interval or [size.speedup]) for size in measured)) * 1.05
        charts = [_by_batch_size(line, highest) for line in ordered]
        yield Gallery("Speed-up by batch size", charts, SPEEDUP_NOTE)
    bars = [_bars(label, part) for label, part in micro.parts.items() if part]
    yield Gallery("Seconds by phase", bars, PHASES_NOTE)
    rows = [
        {**first, **_cells(size)} for first, part, _ in rows_of(lines) for size in part.batch_sizes
    ]
    yield Table("Speed by batch size, and seconds by phase", rows, num_words(micro))


def _by_batch_size(line: Line[Metrics], highest: float) -> Chart:
    series = []
    for colour, (label, part) in enumerate(line.parts.items()):
        sizes = sorted(part.batch_sizes, key=lambda size: size.batch_size) if part else []
        points = [Point(size.batch_size, size.speedup, size.interval) for size in sizes]
        series.append(Series(label, points, colour))
    labels = ("prompts decoded together", "speed-up")
    return line_chart(
        line.name, series, labels=labels, x="powers of two", y=(0.0, highest), reference=1.0
    )


def _bars(title: str, part: Metrics) -> Chart:
    rows = []
    for size in part.batch_sizes:
        phases = [getattr(size.seconds, f"{name}_seconds") for name in PHASES]
        plain = [("plain decoding", size.seconds.plain_seconds, PLAIN)]
        rows.append((f"{size.batch_size} plain", plain))
        parts = [*zip(PHASES, phases, range(3), strict=True)]
        if not _has_phases(size):
            parts = [("speculative decoding, served", size.seconds.seconds, 0)]
        rows.append((f"{size.batch_size} speculative", parts))
    return bar_chart(title, rows, label="seconds")


def _cells(size: BatchSpeed) -> dict[str, str]:
    seconds = zip(("plain", "speculative", *PHASES), size.seconds, strict=True)
    return {
        "batch": f"{size.batch_size:,}",
        "prompts": f"{size.prompts:,}",
        "groups": f"{size.groups:,}",
        "plain tokens/s": f"{size.tokens_per_s.plain:,.0f}",
        "tokens/s": f"{size.tokens_per_s.speculative:,.0f}",
        "speed-up": ranged(size.speedup, size.interval),
        **{
            f"{name} s": f"{took:.1f}" if name not in PHASES or _has_phases(size) else "–"
            for name, (_, took) in seconds
        },
    }


def _has_phases(size: BatchSpeed) -> bool:
    """Whether they were measured: a server does not report them."""
    return size.seconds.draft_seconds + size.seconds.verify_seconds > 0
