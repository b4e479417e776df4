"""What the terminal shows: a bar per stage while it works, tables and one line of JSON at the
end.
"""

import contextlib
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deepspec.artifacts.results import EvaluationSummary
from deepspec.process.progress_display import ProgressDisplay
from flows.reporting import StageOutcome, result_row, stage_row, watched_by

PLAIN_WIDTH = 120  # of tables where there is no terminal
# columns of the stages' table in Prefect that are the same after every run that succeeded
UNSHOWN = ("state", "missing")
TEXT_COLUMNS = ("benchmark", "stage")  # the others hold numbers


@contextlib.contextmanager
def shown_on_terminal(stages: Sequence[str]) -> Iterator[None]:
    """Shows the progress of a run in this block, of which these are the stages."""
    with ProgressDisplay(stages) as display, watched_by(display.show):
        yield


def show_summary(outcomes: Sequence[StageOutcome], results: EvaluationSummary | None) -> None:
    """The tables at the end of a run, and where everything is."""
    console = Console(width=None if Console().is_terminal else PLAIN_WIDTH, highlight=False)
    if results:
        console.print(
            _table("results", [result_row(part) for part in results.benchmarks]),
            _headline(results),
            sep="\n",
        )
    rows = [
        {key: value for key, value in stage_row(outcome).items() if key not in UNSHOWN}
        for outcome in outcomes
    ]
    console.print(_table("stages", rows))
    for outcome in outcomes:
        console.print(
            f"{outcome.status.stage:9} {outcome.status.artifact_url}", soft_wrap=True, markup=False
        )


def _table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _headline(results: EvaluationSummary) -> str:
    speeds, (identical, prompts) = results.tokens_per_s, results.lossless
    return (
        f"temperature {results.temperature:g}: "
        f"macro acceptance length {results.macro.acceptance_length:.2f}, "
        f"{speeds.speculative:.0f} against {speeds.plain:.0f} tokens/s = {results.speedup:.2f} x, "
        f"lossless: {identical}/{prompts}"
    )


def summary_line(
    outcomes: Sequence[StageOutcome], results: EvaluationSummary | None, *, total_s: float
) -> str:
    """The run in one JSON object, for scripts."""
    headline = (
        results.model_dump(include={"acceptance_length", "lossless", "speedup"}) if results else {}
    )
    seconds = {outcome.status.stage: round(outcome.seconds, 2) for outcome in outcomes}
    return json.dumps(
        {
            **headline,
            "seconds": {**seconds, "total": round(total_s, 2)},
            "peak_rss_bytes": peak_rss_bytes(),
            "result": outcomes[-1].status.artifact_url,
        }
    )


def peak_rss_bytes() -> int:
    """The most memory that one process of this run has held, children included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
