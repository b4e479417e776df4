"""Where the results of a report come from: their lineage and every setting of their runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec.report.lines import Result
from deepspec.report.page import Preformatted, ReportSection, Table


def origin_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """The lineage of each result, and a table of all settings in which differing rows are bold."""
    lineages = [Preformatted(result.label, result.lineage) for result in results]
    yield ReportSection("Lineage", lineages, "What each result was made from, itself first.")
    flat = [dict(flattened(result.settings)) for result in results]
    rows: list[list[str]] = []
    strong = set()
    for name in dict.fromkeys(name for found in flat for name in found):
        values = [found.get(name, "–") for found in flat]
        if len(set(values)) > 1:
            strong.add(len(rows))
        rows.append([name, *values])
    header = ["setting", *(result.label for result in results)]
    note = "Settings in which the runs differ are bold." if len(results) > 1 else ""
    table = Table(
        "Every setting", header, rows, words=len(header), strong=frozenset(strong), note=note
    )
    yield ReportSection("Settings", [table])


def flattened(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested settings by its path: `train.lr`, `0.001`."""
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from flattened(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        for number, item in enumerate(settings):
            yield from flattened(item, f"{prefix}.{number}")
    else:
        yield prefix, "null" if settings is None else str(settings)
