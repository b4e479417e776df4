"""A section of the report for the prefix scheduler of each result that has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from deepspec.artifacts.results import SimulatedServing
from deepspec.figures.drawing import Figure, Point, Series, from_zero, line_figure
from deepspec.figures.picture import Key
from deepspec.report.lines import Result
from deepspec.report.page import Gallery, ReportSection, Table

MOST_COLOURS = 8
TEXT = (
    "Recorded rounds replayed at several numbers of concurrent requests: "
    "further up and to the right is better."
)
Policies = Mapping[str, Sequence[SimulatedServing]]  # each policy's numbers by requests


def scheduler_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """Throughput of all requests against the speed of one, for each policy."""
    for result in results:
        if (found := result.summary.scheduler) is None:
            continue
        of_run = f" of {result.label}" if len(results) > 1 else ""
        # Fixed lengths last, also in the table.
        names = sorted(found.policies, key=_is_fixed)
        policies = {name: found.policies[name] for name in names}
        named = [name for name in names if not _is_fixed(name)]
        if len(named) > MOST_COLOURS:
            named = [name for name in named if "@" not in name]
        keys = [Key(name, colour) for colour, name in enumerate(named)]
        note = ""
        if len(named) < len(policies):
            note = "Thin lines: the other policies below, fixed lengths among them."
        gallery = Gallery("Policies", keys, [_curves(policies, named)], note)
        yield ReportSection(f"Scheduler{of_run}", [gallery, _table(policies)], TEXT)


def _is_fixed(name: str) -> bool:
    return name.startswith("fixed@")


def _curves(policies: Policies, named: Sequence[str]) -> Figure:
    series = []
    for name, steps in policies.items():
        points = [
            Point(
                at.per_user,
                at.throughput,
                note=f"{name}, {at.requests} requests: {at.throughput:,.0f} tokens/s",
            )
            for at in steps
        ]
        faint = name not in named
        series.append(Series(points, 0 if faint else named.index(name), faint=faint))
    series.sort(key=lambda one: not one.faint)  # the coloured ones on top
    fastest = max((point.x for one in series for point in one.points), default=1.0)
    labels = ("tokens/s of one request", "tokens/s of all")
    title = "Throughput against speed per user"
    return line_figure(title, series, labels=labels, x=from_zero(fastest))


def _table(policies: Policies) -> Table:
    rows = []
    for name, steps in policies.items():
        for at in steps:
            speeds = [f"{at.throughput:,.1f}", f"{at.per_user:,.1f}"]
            rows.append([name, f"{at.requests:,}", *speeds, f"{at.verified_per_round:.2f}"])
    header = ["policy", "requests", "tokens/s", "tokens/s per user", "verified per round"]
    return Table("Policies, in numbers", header, rows)
