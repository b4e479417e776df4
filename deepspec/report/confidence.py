"""Sections of the report for the draft's confidence, of results that have it.

How well it is calibrated, what cutting blocks at a threshold would have done, and what the prefix
scheduler makes of it.
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
MOST_COLOURS = 8
POLICIES_TITLE = "Throughput against speed per user"
POLICIES_LABELS = ("tokens/s of one request", "tokens/s of all")
SCHEDULER_TEXT = (
    "Recorded rounds replayed at several numbers of concurrent requests: "
    "further up and to the right is better."
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


def scheduler_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """Throughput of all requests against the speed of one, for each policy."""
    for result in results:
        if (found := result.summary.scheduler) is None:
            continue
        # Fixed lengths last, also in the table.
        policies = dict(sorted(found.policies.items(), key=lambda item: _is_fixed(item[0])))
        coloured = [name for name in policies if not _is_fixed(name)]
        if len(coloured) > MOST_COLOURS:
            coloured = [name for name in coloured if "@" not in name]
        series, rows = [], []
        for name, steps in policies.items():
            points = []
            for at in steps:
                note = f", {at.requests} requests"
                points.append(Point(at.per_user, at.throughput, note=note))
                rows.append(
                    {
                        "policy": name,
                        "requests": f"{at.requests:,}",
                        "tokens/s": f"{at.throughput:,.1f}",
                        "tokens/s per user": f"{at.per_user:,.1f}",
                        "verified per round": f"{at.verified_per_round:.2f}",
                    }
                )
            if name in coloured:
                series.append(Series(name, points, coloured.index(name)))
            else:
                series.insert(0, Series(name, points, 0, "faint"))  # beneath the others
        note = ""
        if len(coloured) < len(policies):
            note = "Thin lines: the other policies below, fixed lengths among them."
        gallery = Gallery(
            "Policies", [line_chart(POLICIES_TITLE, series, labels=POLICIES_LABELS)], note
        )
        table = Table("Policies, in numbers", rows)
        of_run = f" of {result.label}" if len(results) > 1 else ""
        yield ReportSection(f"Scheduler{of_run}", [gallery, table], SCHEDULER_TEXT)


def _is_fixed(name: str) -> bool:
    return name.startswith("fixed@")
