"""Sections of the report for the draft's confidence, of results that have it.

How well it is calibrated, and what cutting blocks at a threshold would have done.
"""

from collections.abc import Iterator, Mapping, Sequence

from deepspec.artifacts.results import PositionCalibration, RoundCounts, ThresholdPoint
from deepspec.figures.charts import Point, Series, line_chart
from deepspec.figures.drawing import Chart
from deepspec.report.lines import Result
from deepspec.report.page import Gallery, ReportSection, Table

SIDES = {"before": 7, "after": 0}  # of temperature scaling, with their colours
SCORES = {"ECE": "ece", "AUROC": "auroc", "Brier": "brier"}
MEASURES = ("acceptance_length", "verify_rate", "proposed_per_round")
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
    sweeps = {}
    for colour, result in enumerate(results):
        if (found := result.summary.calibration) is None:
            continue
        sweeps[result.label, colour] = found.thresholds
        of_run = f" of {result.label}" if len(results) > 1 else ""
        text = (
            f"{CALIBRATION_TEXT} Temperatures were fitted on {_split(found.fitted_on, 'prompts')} "
            f"and are scored on {_split(found.reported_on, 'others')}."
        )
        blocks: list[Gallery | Table] = []
        for title, parts in (
            ("each position", found.positions),
            ("the cumulative product", found.cumulative),
        ):
            blocks.append(Gallery(f"Reliability of {title}", [*map(_reliability, parts)]))
            blocks.append(_calibration_table(title, parts, found.temperatures))
        yield ReportSection(f"Confidence{of_run}", blocks, text)
    if sweeps:
        yield _threshold_section(sweeps)


def _split(size: RoundCounts, kind: str) -> str:
    return f"{size.prompts:,} {kind} ({size.rounds:,} rounds)"


def _reliability(part: PositionCalibration) -> Chart:
    series = []
    for side, colour in SIDES.items():
        bins = [one for one in getattr(part, side).bins if one.count]
        most = max((one.count for one in bins), default=1)
        points = []
        for one in bins:
            radius = 1.5 + 3 * (one.count / most) ** 0.5
            of_all = f" of {one.count:,}"
            points.append(Point(one.confidence, one.accepted, note=of_all, radius=radius))
        series.append(Series(f"{side} temperature scaling", points, colour))
    labels = ("confidence", "accepted")
    title = f"Position {part.position}"
    return line_chart(title, series, labels=labels, y=(0.0, 1.0), reference="diagonal")


def _calibration_table(
    title: str, parts: Sequence[PositionCalibration], temperatures: Sequence[float]
) -> Table:
    rows = []
    for part, temperature in zip(parts, temperatures, strict=True):
        row = {
            "position": f"{part.position}",
            "labels": f"{part.after.count:,}",
            "temperature": f"{temperature:.2f}",
        }
        for name, score in SCORES.items():
            for side in SIDES:
                value = getattr(getattr(part, side), score)
                row[f"{name} {side}"] = "–" if value is None else f"{value:.3f}"
        rows.append(row)
    return Table(f"Calibration of {title}", rows)


def _threshold_section(sweeps: Mapping[tuple[str, int], Sequence[ThresholdPoint]]) -> ReportSection:
    charts = []
    for measure in MEASURES:
        name = measure.replace("_", " ")
        series = [
            Series(label, [Point(at.threshold, getattr(at, measure)) for at in sweep], colour)
            for (label, colour), sweep in sweeps.items()
        ]
        charts.append(line_chart(name.capitalize(), series, labels=("threshold", name)))
    rows = [
        {
            "run": label,
            **{
                name.replace("_", " "): f"{getattr(at, name):.2f}"
                for name in ("threshold", *MEASURES)
            },
        }
        for (label, _), sweep in sweeps.items()
        for at in sweep
    ]
    table = Table("Threshold sweep, in numbers", rows)
    return ReportSection("Thresholds", [Gallery("Threshold sweep", charts), table], THRESHOLDS_TEXT)
