"""A comparison of two results as it is printed: matches, numbers, and the settings that differ."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import RenderableType

from deepspec.artifacts.records import Stored
from deepspec.evaluate.compare import ComparedLine, Comparison, compare
from deepspec.evaluate.results import read_rows
from deepspec.report.origin import settings_by_path, settings_of
from deepspec.report.page import Table, for_terminal
from deepspec.report.report import labels_of, open_results

UNIMPORTANT = ("name", "store", "resources")  # of a run: no result depends on them
ACCEPTANCE_NOTE = (
    "resampled: prompts, both sides of each together; T: temperature; "
    "B better in: share of the resamples"
)
SPEED_NOTE = "resampled: groups of prompts that A decoded together"


class ComparedResult(Stored):
    """One of the two results: the name of its run, and where it is."""

    name: str
    url: str


class ResultComparison(Comparison):
    """A comparison with the names of both results and the settings that differ."""

    a: ComparedResult
    b: ComparedResult
    settings: dict[str, list[str | None]]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values; a line has no key for what does not apply to it."""
        return self.model_dump(mode="json", exclude_unset=True)


def compare_results(
    a: str, b: str, overrides: Sequence[str] = (), *, store: str | None = None
) -> ResultComparison:
    """Two runs or result folders compared: their names, their numbers and the settings that differ.

    Raises:
        ArtifactMismatch: one of them is no result, or they have no prompt in common.
    """
    artifacts = open_results([a, b], overrides, store=store)
    runs = [
        {name: value for name, value in settings_of(one).items() if name not in UNIMPORTANT}
        for one in artifacts
    ]
    settings = settings_by_path(runs)
    names = [
        ComparedResult(name=label, url=artifact.url)
        for label, artifact in zip(labels_of(artifacts), artifacts, strict=True)
    ]
    return ResultComparison(
        **dict(compare(*map(read_rows, artifacts))),
        a=names[0],
        b=names[1],
        settings={path: pair for path, pair in settings.items() if pair[0] != pair[1]},
    )


def comparison_tables(found: ResultComparison) -> Iterator[RenderableType]:
    """The comparison for a terminal, one table after another."""
    only_a, only_b = found.unmatched
    yield f"A  {found.a.name}  {found.a.url}\nB  {found.b.name}  {found.b.url}"
    yield (
        f"{found.matched:,} prompts are in both; "
        f"{only_a:,} only in A, {only_b:,} only in B are left out"
    )
    yield _table("acceptance length", found.acceptance, ACCEPTANCE_NOTE)
    if found.speed:
        yield _table("speed-up over plain decoding", found.speed, SPEED_NOTE)
    if found.settings:
        rows = [
            {"setting": name, "A": str(a), "B": str(b)} for name, (a, b) in found.settings.items()
        ]
        yield for_terminal(Table("settings that differ", rows, words=3))


def _table(title: str, lines: Sequence[ComparedLine], note: str) -> RenderableType:
    """Lines of acceptance count prompts; lines of speed have a batch size and count groups."""
    rows = []
    for line in lines:
        interval, above = "unknown", "unknown"
        if line.interval is not None:
            interval = "{:+.3f} to {:+.3f}".format(*line.interval)
            above = f"{line.above_zero:.1%}"
        counts = {"prompts": line.prompts, "batch": line.batch_size, "groups": line.groups}
        rows.append(
            {
                "benchmark": line.benchmark or line.overall or "",
                "T": f"{line.temperature:g}",
                **{name: f"{count:,}" for name, count in counts.items() if count is not None},
                "A": f"{line.a:.3f}",
                "B": f"{line.b:.3f}",
                "B - A": f"{line.difference:+.3f}",
                "95 % interval": interval,
                "B better in": above,
            }
        )
    strong = frozenset(number for number, line in enumerate(lines) if line.overall)
    return for_terminal(Table(title, rows, strong=strong, note=note))
