"""What the terminal shows: a bar per stage while it works, tables and one line of JSON at the
end.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from deepspec.process.events import progress_texts
from deepspec.process.terminal import TimeLeftColumn
from flows.reporting import Progress, StageOutcome, Watcher, result_row, stage_row, watched_by

PLAIN_PAUSE_S = 10.0  # between two lines about one stage where there is no terminal
PLAIN_WIDTH = 120
SHOWN = ("loss", "acceptance_length")  # what a bar says beside its rate
TROUBLE = ("retries", "rejected", "failed")  # said where it is not 0
# columns of the stages' table in Prefect that say nothing after a run that succeeded
UNSHOWN = ("state", "missing")
WORDS = ("benchmark", "stage")  # columns that hold words, not numbers


@contextlib.contextmanager
def shown_on_terminal(stages: Sequence[str]) -> Iterator[None]:
    """Progress of the run in this block: bars on a terminal, now and then a line on stderr
    elsewhere.
    """
    console = Console()
    if not console.is_terminal:
        with watched_by(_plain_lines()):
            yield
        return
    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]:6}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeftColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with (
        Bars(*columns, console=console, refresh_per_second=4) as bars,
        watched_by(_bar_per_stage(bars, stages)),
    ):
        yield


def _bar_per_stage(bars: Bars, stages: Sequence[str]) -> Watcher:
    tasks: dict[str, TaskID] = {
        stage: bars.add_task(stage, start=False, total=None, unit="", note="") for stage in stages
    }
    rate = _Rates()

    def show(progress: Progress) -> None:
        task = tasks[progress.stage]
        note = rate.describe(progress) if progress.state in ("running", "done") else progress.state
        if progress.state == "running":
            bars.start_task(task)
        left_s = progress.numbers.get("left_s")
        bars.update(
            task,
            completed=progress.done,
            total=progress.total or None,
            unit=progress.unit,
            note=note,
            left_s=left_s,
        )
        if progress.state != "running":
            bars.stop_task(task)

    return show


def _plain_lines() -> Watcher:
    last: dict[str, tuple[str, float]] = {}
    rate = _Rates()

    def show(progress: Progress) -> None:
        state, at = last.get(progress.stage, ("", 0.0))
        if progress.state != state or time.monotonic() - at >= PLAIN_PAUSE_S:
            last[progress.stage] = (progress.state, time.monotonic())
            how_far = (
                f"{progress.done} of {progress.total} {progress.unit}" if progress.total else ""
            )
            left = (
                progress_texts({"left_s": progress.numbers["left_s"]})
                if progress.numbers.get("left_s")
                else []
            )
            words = [
                f"{progress.stage}: {progress.state} {how_far} {rate.describe(progress)}".rstrip(),
                *left,
            ]
            sys.stderr.write("  ".join(words) + "\n")
            sys.stderr.flush()

    return show


class _Rates:
    """Speed of each stage since its first sign of life: tokens per second where tokens are
    counted.
    """

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}

    def describe(self, progress: Progress) -> str:
        began, first = self._begun.setdefault(progress.stage, (time.monotonic(), progress.done))
        trouble = [
            f"{progress.numbers[name]:,} {name}" for name in TROUBLE if progress.numbers.get(name)
        ]
        if progress.note:
            return "  ".join([progress.note, *trouble])
        seconds = max(time.monotonic() - began, 1e-3)
        words = [
            f"{name} {progress.numbers[name]:.3g}" for name in SHOWN if name in progress.numbers
        ]
        if "tokens_per_s" in progress.numbers:
            words += progress_texts({"tokens_per_s": progress.numbers["tokens_per_s"]})
        elif progress.numbers.get("tokens"):
            words.append(f"{progress.numbers['tokens'] / seconds:,.0f} tokens/s")
        elif progress.done > first:
            words.append(f"{(progress.done - first) / seconds:.2f} {progress.unit}/s")
        return "  ".join([*words, *trouble])


def show_summary(outcomes: Sequence[StageOutcome], results: Mapping[str, Any] | None) -> None:
    """The tables at the end of a run, and where everything is."""
    console = Console(width=None if Console().is_terminal else PLAIN_WIDTH, highlight=False)
    if results:
        console.print(
            _table("results", [result_row(part) for part in results["benchmarks"]]),
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
        table.add_column(name, justify="left" if name in WORDS else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _headline(results: Mapping[str, Any]) -> str:
    speeds, (identical, prompts) = results["tokens_per_s"], results["lossless"]
    return (
        f"temperature {results['temperature']:g}: macro acceptance length {results['acceptance_length']['macro']:.2f}, "
        f"{speeds['speculative']:.0f} against {speeds['plain']:.0f} tokens/s = {results['speedup']:.2f} x, lossless: {identical}/{prompts}"
    )


def summary_line(
    outcomes: Sequence[StageOutcome], results: Mapping[str, Any] | None, *, total_s: float
) -> str:
    """The run in one JSON object, for scripts."""
    headline = (
        {key: results[key] for key in ("acceptance_length", "lossless", "speedup")}
        if results
        else {}
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
