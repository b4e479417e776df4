"""A section of the report for each temperature: acceptance, losslessness and speed by run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspec.artifacts.results import Metrics
from deepspec.figures.drawing import Point, interval_figure
from deepspec.report.lines import Line, Result, first_columns, lines_of, ranged, rows_of, run_keys
from deepspec.report.page import Gallery, ReportSection, Table
from deepspec.report.positions import position_blocks
from deepspec.report.speed import speed_blocks

MEASURES = ("acceptance_length", "verify_rate", "speedup")
NOTE = (
    "Acceptance length: tokens committed per round, the target's bonus token included. Verify "
    "rate: committed tokens of all verified positions. In brackets 95 % bootstrap intervals: over "
    "prompts, of the speed-up over groups decoded together. Speed is that of the first batch size."
)


def temperature_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """A section for each temperature, with the results that have it."""
    temperatures = dict.fromkeys(at for result in results for at in result.summary.temperatures)
    for temperature in temperatures:
        having = [result for result in results if temperature in result.summary.temperatures]
        lines = lines_of(having, temperature)
        blocks: list[Table | Gallery] = [
            _summary_table(lines, having),
            _intervals(lines, having),
            _lossless_table(having, temperature),
            *position_blocks(lines, having),
            *speed_blocks(lines, having),
        ]
        yield ReportSection(f"Temperature {temperature:g}", blocks)


def _summary_table(lines: Sequence[Line], results: Sequence[Result]) -> Table:
    rows: list[list[str]] = []
    strong = set()
    for words, part, line in rows_of(lines, results):
        if line.is_overall:
            strong.add(len(rows))
        counts, per_s = ["", ""], ["", ""]
        if isinstance(part, Metrics):
            counts = [f"{part.prompts:,}", f"{part.rounds:,}"]
            per_s = [f"{speed:,.0f}" for _, speed in part.tokens_per_s]
        length, rate, speedup = (
            ranged(getattr(part, name), getattr(part.intervals, name)) for name in MEASURES
        )
        rows.append([*words, line.domain, *counts, length, rate, *per_s, speedup])
    first = [*first_columns(results), "domain"]
    acceptance = ["prompts", "rounds", "acceptance length", "verify rate"]
    header = [*first, *acceptance, "plain tokens/s", "tokens/s", "speed-up"]
    return Table(
        "Acceptance and speed", header, rows, words=len(first), strong=frozenset(strong), note=NOTE
    )


def _intervals(lines: Sequence[Line], results: Sequence[Result]) -> Gallery:
    figures = []
    for title, name, unit in (
        ("Acceptance length", "acceptance_length", "tokens per round"),
        ("Speed-up over plain decoding", "speedup", "times as fast"),
    ):
        rows: list[tuple[str, list[Point | None]]] = []
        for line in lines:
            points: list[Point | None] = []
            for result, part in zip(results, line.parts, strict=True):
                if part is None:
                    points.append(None)
                    continue
                value, interval = getattr(part, name), getattr(part.intervals, name)
                note = f"{line.name}, {result.label}: {ranged(value, interval)}"
                points.append(Point(value, 0.0, interval, note))
            rows.append((line.name.partition(" (")[0], points))
        figures.append(interval_figure(title, rows, label=unit, reference=1.0))
    return Gallery("By benchmark", run_keys(results), figures)


def _lossless_table(results: Sequence[Result], temperature: float) -> Table:
    rows = []
    for result in results:
        found = result.summary.temperatures[temperature].losslessness
        verdict = {True: "yes", False: "NO", None: "not by these counts"}[found.ok]
        gap = "" if found.max_logit_gap is None else f"{found.max_logit_gap:.3g}"
        identical = f"{found.identical}/{found.prompts}"
        dtype = found.dtype or "unknown"
        rows.append([result.label, dtype, verdict, found.words, identical, gap])
    header = ["run", "number format", "shown", "what is known", "identical", "largest logit gap"]
    return Table("Losslessness", header, rows, words=4)
