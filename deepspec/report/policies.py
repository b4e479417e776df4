"""A section of the report for the prefix scheduler of each result that has one."""

from collections.abc import Iterator, Sequence

from deepspec.figures.charts import Point, Series, line_chart
from deepspec.report.lines import Result
from deepspec.report.page import Gallery, ReportSection, Table

MOST_COLOURS = 8
TITLE = "Throughput against speed per user"
LABELS = ("tokens/s of one request", "tokens/s of all")
TEXT = (
    "Recorded rounds replayed at several numbers of concurrent requests: "
    "further up and to the right is better."
)


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
        gallery = Gallery("Policies", [line_chart(TITLE, series, labels=LABELS)], note)
        table = Table("Policies, in numbers", rows)
        of_run = f" of {result.label}" if len(results) > 1 else ""
        yield ReportSection(f"Scheduler{of_run}", [gallery, table], TEXT)


def _is_fixed(name: str) -> bool:
    return name.startswith("fixed@")
