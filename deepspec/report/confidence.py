"""Sections of the report for the draft's confidence, of results that have it.

How well it is calibrated, and what cutting blocks at a threshold would have done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deepspec.artifacts.results import (
    CalibrationSummary,
    PositionCalibration,
    RoundCounts,
    ThresholdPoint,
)
from deepspec.figures.drawing import Figure, Point, Series, line_figure
from deepspec.figures.picture import Key
from deepspec.report.lines import Result
from deepspec.report.page import Gallery, ReportSection, Table

SIDES = {"before": 7, "after": 0}  # of temperature scaling, with their colours
SCORES = {"ECE": "ece", "AUROC": "auroc", "Brier": "brier"}
FIFTHS = [number / 5 for number in range(6)]
MEASURES = {
    "acceptance_length": "acceptance length",
    "verify_rate": "verify rate",
    "proposed_per_round": "proposed per round",
}
CALIBRATION_TEXT = (
    "How often the target accepted a draft token, against the draft's confidence in it. "
    "On the dotted line both are the same."
)
THRESHOLDS_TEXT = (
    "What cutting each block at the first confidence below a threshold would have done, "
    "replayed on recorded full rounds."
)


def calibration_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """A section for each result with a calibration, then one with all threshold sweeps."""
    sweeps: dict[str, Sequence[ThresholdPoint]] = {}
    for result in results:
        if (found := result.summary.calibration) is None:
            continue
        sweeps[result.label] = found.thresholds
        of_run = f" of {result.label}" if len(results) > 1 else ""
        text = (
            f"{CALIBRATION_TEXT} Temperatures were fitted on {_split(found.fitted_on, 'prompts')} "
            f"and are scored on {_split(found.reported_on, 'others')}."
        )
        yield ReportSection(f"Confidence{of_run}", list(_calibration_blocks(found)), text)
    if sweeps:
        colours = {result.label: colour for colour, result in enumerate(results)}
        yield _threshold_section(sweeps, colours)


def _split(size: RoundCounts, kind: str) -> str:
    return f"{size.prompts:,} {kind} ({size.rounds:,} rounds)"


def _calibration_blocks(found: CalibrationSummary) -> Iterator[Gallery | Table]:
    keys = [Key("before", SIDES["before"]), Key("after temperature scaling", SIDES["after"])]
    for parts, title, suffix in (
        (found.positions, "each position", ""),
        (found.cumulative, "the cumulative product", " (product)"),
    ):
        figures = [_reliability(f"Position {part.position}{suffix}", part) for part in parts]
        yield Gallery(f"Reliability of {title}", keys, figures)
        yield _calibration_table(f"Calibration of {title}", parts, found.temperatures)


def _reliability(title: str, part: PositionCalibration) -> Figure:
    series = []
    for side, measures in (("before", part.before), ("after", part.after)):
        colour = SIDES[side]
        most = max((one.count for one in measures.bins), default=1)
        points = []
        for one in measures.bins:
            if one.confidence is None or one.accepted is None:
                continue
            shown = f"confidence {one.confidence:.2f}, accepted {one.accepted:.2f}"
            note = f"{side}: {shown} of {one.count:,}"
            radius = 1.5 + 3 * (one.count / most) ** 0.5
            points.append(Point(one.confidence, one.accepted, note=note, radius=radius))
        series.append(Series(points, colour))
    labels = ("confidence", "accepted")
    return line_figure(title, series, labels=labels, x=FIFTHS, y=(0.0, 1.0), reference="diagonal")


def _calibration_table(
    title: str, parts: Sequence[PositionCalibration], temperatures: Sequence[float]
) -> Table:
    rows = []
    for part, temperature in zip(parts, temperatures, strict=True):
        sides = (part.before, part.after)
        scores = [_score(getattr(side, score)) for score in SCORES.values() for side in sides]
        rows.append([f"{part.position}", f"{part.after.count:,}", f"{temperature:.2f}", *scores])
    scores = [f"{score} {side}" for score in SCORES for side in SIDES]
    return Table(title, ["position", "labels", "temperature", *scores], rows)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _threshold_section(
    sweeps: Mapping[str, Sequence[ThresholdPoint]], colours: Mapping[str, int]
) -> ReportSection:
    figures = []
    for name, words in MEASURES.items():
        series = []
        for label, sweep in sweeps.items():
            points = []
            for at in sweep:
                value = getattr(at, name)
                note = f"{label}, {at.threshold:.2f}: {value:.2f}"
                points.append(Point(at.threshold, value, note=note))
            series.append(Series(points, colours[label]))
        figures.append(
            line_figure(words.capitalize(), series, labels=("threshold", words), x=FIFTHS)
        )
    rows = [
        [label, f"{at.threshold:.2f}", *(f"{getattr(at, name):.2f}" for name in MEASURES)]
        for label, sweep in sweeps.items()
        for at in sweep
    ]
    keys = [Key(label, colours[label]) for label in sweeps]
    table = Table("Threshold sweep, in numbers", ["run", "threshold", *MEASURES.values()], rows)
    gallery = Gallery("Threshold sweep", keys, figures)
    return ReportSection("Thresholds", [gallery, table], THRESHOLDS_TEXT)
