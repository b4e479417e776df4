"""A section of the report for each temperature: acceptance, also by position in the block,
losslessness and speed by run.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from deepspec.artifacts.results import Metrics
from deepspec.figures.charts import (
    Estimate,
    Look,
    Point,
    Series,
    interval_chart,
    line_chart,
    ranged,
)
from deepspec.figures.drawing import Chart
from deepspec.report.lines import (
    Line,
    Part,
    Result,
    lines_of,
    macro_line,
    num_words,
    rows_of,
    totals_first,
)
from deepspec.report.page import Gallery, ReportSection, Table
from deepspec.report.speed import speed_blocks

MEASURES = ("acceptance_length", "verify_rate", "speedup")
NOTE = (
    "Acceptance length: tokens committed per round, the target's bonus token included. Verify "
    "rate: committed tokens of all verified positions. In brackets 95 % bootstrap intervals: over "
    "prompts, of the speed-up over groups decoded together. Speed is that of the first batch size."
)
POSITIONS_NOTE = (
    "Conditional acceptance at k (solid): of the rounds that accepted the first k - 1 draft "
    "tokens, those that accepted the k-th. Prefix acceptance at k (dashed): rounds that accepted "
    "all of the first k. Shaded: 95 % intervals."
)
Kind = Literal["conditional", "prefix"]
LOOKS: dict[Kind, Look] = {"conditional": "marked", "prefix": "dashed"}


def temperature_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """A section for each temperature, with the results that have it."""
    for temperature in dict.fromkeys(at for one in results for at in one.summary.temperatures):
        having = [result for result in results if temperature in result.summary.temperatures]
        lines = lines_of(having, temperature)
        with_macro: list[Line[Part]] = [*lines, macro_line(having, temperature)]
        blocks: list[Table | Gallery] = [
            _summary_table(with_macro),
            _intervals(with_macro),
            _lossless_table(having, temperature),
            *_position_blocks(lines),
            *speed_blocks(lines),
        ]
        yield ReportSection(f"Temperature {temperature:g}", blocks)


def _estimate(part: Part, name: str) -> Estimate:
    return Estimate(getattr(part, name), getattr(part.intervals, name))


def _summary_table(lines: Sequence[Line[Part]]) -> Table:
    rows: list[dict[str, str]] = []
    strong = set()
    for first, part, line in rows_of(lines):
        if line.is_overall:
            strong.add(len(rows))
        counted = part if isinstance(part, Metrics) else None  # a mean has no counts
        length, rate, speedup = (ranged(*_estimate(part, name)) for name in MEASURES)
        rows.append(
            {
                **first,
                "domain": line.domain,
                "prompts": f"{counted.prompts:,}" if counted else "",
                "rounds": f"{counted.rounds:,}" if counted else "",
                "acceptance length": length,
                "verify rate": rate,
                "plain tokens/s": f"{counted.tokens_per_s.plain:,.0f}" if counted else "",
                "tokens/s": f"{counted.tokens_per_s.speculative:,.0f}" if counted else "",
                "speed-up": speedup,
            }
        )
    return Table("Acceptance and speed", rows, num_words(lines[0]) + 1, frozenset(strong), NOTE)


def _intervals(lines: Sequence[Line[Part]]) -> Gallery:
    names = list(lines[0].parts)
    charts = []
    for title, measure, unit in (
        ("Acceptance length", "acceptance_length", "tokens per round"),
        ("Speed-up over plain decoding", "speedup", "times as fast"),
    ):
        rows = [
            (
                line.name.partition(" (")[0],
                [_estimate(part, measure) if part else None for part in line.parts.values()],
            )
            for line in lines
        ]
        charts.append(interval_chart(title, rows, names=names, label=unit, reference=1.0))
    return Gallery("By benchmark", charts)


def _lossless_table(results: Sequence[Result], temperature: float) -> Table:
    rows = []
    for result in results:
        found = result.summary.temperatures[temperature].losslessness
        gap, usual = found.max_logit_gap, found.usual_logit_gap
        rows.append(
            {
                "run": result.label,
                "number format": found.dtype or "unknown",
                "shown": {True: "yes", False: "NO", None: "not by these counts"}[found.ok],
                "what is known": found.words,
                "identical": f"{found.identical}/{found.prompts}",
                "logit gap, 95 %": "" if usual is None else f"{usual:.3g}",
                "largest": "" if gap is None else f"{gap:.3g}",
            }
        )
    return Table("Losslessness", rows, words=4)


def _position_blocks(lines: Sequence[Line[Metrics]]) -> Iterator[Gallery | Table]:
    """The curves of all lines that have positions, and their numbers as a table."""
    having = totals_first(
        [line for line in lines if any(part and part.tried for part in line.parts.values())]
    )
    yield Gallery("Acceptance by position", [_curves(line) for line in having], POSITIONS_NOTE)
    found = [
        ({**first, "acceptance": kind}, _positions(part, kind))
        for first, part, _ in rows_of(having)
        for kind in LOOKS
    ]
    longest = max((len(positions) for _, positions in found), default=0)
    rows = []
    for first, positions in found:
        shown = ["–" if at is None else ranged(*at) for at in positions]
        shown += ["–"] * (longest - len(shown))
        rows.append({**first, **{f"k = {k}": cell for k, cell in enumerate(shown, start=1)}})
    yield Table("Acceptance by position, in numbers", rows, num_words(lines[0]) + 1)


def _positions(part: Metrics, kind: Kind) -> list[Estimate | None]:
    """The acceptance at each position, None where no round came so far."""
    counts = part.tried if kind == "conditional" else part.reached
    name = f"{kind}_acceptance"
    found = zip(getattr(part, name), getattr(part.intervals, name), counts, strict=True)
    return [Estimate(value, interval) if count else None for value, interval, count in found]


def _curves(line: Line[Metrics]) -> Chart:
    series = []
    for colour, (label, part) in enumerate(line.parts.items()):
        if part is None:
            continue
        for kind, look in LOOKS.items():
            found = enumerate(_positions(part, kind), start=1)
            points = [Point(k, *at) for k, at in found if at is not None]
            series.append(Series(f"{label}: {kind}", points, colour, look))
    labels = ("position in the block", "accepted")
    return line_chart(line.name, series, labels=labels, x="whole numbers", y=(0.0, 1.0))
