"""Where the results of a report come from: their lineage and every setting of their runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import lineage_lines
from deepspec.report.lines import Result
from deepspec.report.page import Preformatted, ReportSection, Table


def origin_sections(results: Sequence[Result]) -> Iterator[ReportSection]:
    """The lineage of each result, and a table of all settings in which differing rows are bold."""
    lineages = [
        Preformatted(result.label, list(lineage_lines(result.artifact))) for result in results
    ]
    yield ReportSection("Lineage", lineages, "What each result was made from, itself first.")
    settings = settings_by_path([settings_of(result.artifact) for result in results])
    labels = [result.label for result in results]
    rows = [
        {"setting": path, **dict(zip(labels, (value or "–" for value in values), strict=True))}
        for path, values in settings.items()
    ]
    differing = [number for number, values in enumerate(settings.values()) if len({*values}) > 1]
    note = "Settings in which the runs differ are bold." if len(results) > 1 else ""
    table = Table("Every setting", rows, len(results) + 1, frozenset(differing), note)
    yield ReportSection("Settings", [table])


def settings_of(artifact: Artifact) -> Mapping[str, Any]:
    """The run that an artifact was made by, empty if the artifact has no record of it."""
    info = artifact.info()
    return info.run if info else {}


def settings_by_path(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str | None]]:
    """Every run's value of every setting; None: the run has no such setting."""
    flat = [dict(_flattened(run)) for run in runs]
    paths = dict.fromkeys(path for found in flat for path in found)
    return {path: [found.get(path) for found in flat] for path in paths}


def _flattened(settings: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value of nested settings by its path: `train.lr`, `0.001`."""
    if isinstance(settings, list) and any(isinstance(item, Mapping) for item in settings):
        settings = dict(enumerate(settings))
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flattened(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, "null" if settings is None else str(settings)
