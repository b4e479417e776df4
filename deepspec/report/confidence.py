"""Sections of the report for the draft's confidence, of results that have it.

How well it is calibrated, and what cutting blocks at a threshold would have done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    having = [result for result in results if result.summary.get("calibration")]
    for result in having:
        of_run = f" of {result.label}" if len(results) > 1 else ""
        found = result.summary["calibration"]
        text = CALIBRATION_TEXT
        if found.get("fitted_on") and found.get("reported_on"):
            text += f" Temperatures were fitted on {_split(found['fitted_on'], 'prompts')}"
            text += f" and are scored on {_split(found['reported_on'], 'others')}."
        yield ReportSection(f"Confidence{of_run}", list(_calibration_blocks(found)), text)
    colours = {result.label: colour for colour, result in enumerate(results)}
    if swept := [result for result in having if result.summary["calibration"].get("thresholds")]:
        yield _threshold_section(swept, colours)


def _split(counts: Mapping[str, int], kind: str) -> str:
    return f"{counts['prompts']:,} {kind} ({counts['rounds']:,} rounds)"


def _calibration_blocks(found: Mapping[str, Any]) -> Iterator[Gallery | Table]:
    keys = [Key("before", SIDES["before"]), Key("after temperature scaling", SIDES["after"])]
    for name, title, suffix in (
        ("positions", "each position", ""),
        ("cumulative", "the cumulative product", " (product)"),
    ):
        if parts := found.get(name):
            figures = [_reliability(f"Position {part['position']}{suffix}", part) for part in parts]
            yield Gallery(f"Reliability of {title}", keys, figures)
            temperatures = found.get("temperatures") or []
            yield _calibration_table(f"Calibration of {title}", parts, temperatures)


def _reliability(title: str, part: Mapping[str, Any]) -> Figure:
    series = []
    for side, colour in SIDES.items():
        bins = [one for one in (part.get(side) or {}).get("bins", []) if one["count"]]
        most = max((one["count"] for one in bins), default=1)
        points = []
        for one in bins:
            shown = f"confidence {one['confidence']:.2f}, accepted {one['accepted']:.2f}"
            note = f"{side}: {shown} of {one['count']:,}"
            radius = 1.5 + 3 * (one["count"] / most) ** 0.5
            points.append(Point(one["confidence"], one["accepted"], note=note, radius=radius))
        series.append(Series(points, colour))
    labels = ("confidence", "accepted")
    return line_figure(title, series, labels=labels, x=FIFTHS, y=(0.0, 1.0), reference="diagonal")


def _calibration_table(
    title: str, parts: Sequence[Mapping[str, Any]], temperatures: Sequence[float]
) -> Table:
    rows = []
    for number, part in enumerate(parts):
        sides = [part.get(side) or {} for side in SIDES]
        scores = [_score(side.get(score)) for score in SCORES.values() for side in sides]
        count = (part.get("after") or part.get("before") or {}).get("count", 0)
        temperature = f"{temperatures[number]:.2f}" if number < len(temperatures) else "–"
        rows.append([f"{part['position']}", f"{count:,}", temperature, *scores])
    scores = [f"{score} {side}" for score in SCORES for side in SIDES]
    return Table(title, ["position", "labels", "temperature", *scores], rows)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _threshold_section(results: Sequence[Result], colours: Mapping[str, int]) -> ReportSection:
    sweeps = {result.label: result.summary["calibration"]["thresholds"] for result in results}
    figures = []
    for name, words in MEASURES.items():
        series = []
        for label, sweep in sweeps.items():
            points = []
            for at in sweep:
                note = f"{label}, {at['threshold']:.2f}: {at[name]:.2f}"
                points.append(Point(at["threshold"], at[name], note=note))
            series.append(Series(points, colours[label]))
        figures.append(
            line_figure(words.capitalize(), series, labels=("threshold", words), x=FIFTHS)
        )
    rows = [
        [label, f"{at['threshold']:.2f}", *(f"{at[name]:.2f}" for name in MEASURES)]
        for label, sweep in sweeps.items()
        for at in sweep
    ]
    keys = [Key(label, colours[label]) for label in sweeps]
    table = Table("Threshold sweep, in numbers", ["run", "threshold", *MEASURES.values()], rows)
    gallery = Gallery("Threshold sweep", keys, figures)
    return ReportSection("Thresholds", [gallery, table], THRESHOLDS_TEXT)
