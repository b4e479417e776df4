"""How the progress of stages looks: a bar for each on a terminal, a line now and then elsewhere.

`python -m deepspec` shows its one stage with it, a flow all stages of its run.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple, Self

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

from deepspec.process.events import answering_note, progress_texts

LINE_PAUSE_S = 10.0  # between two lines about one stage where there is no terminal
TROUBLE = ("retries", "rejected", "failed")  # shown where it is not 0
UNSHOWN = ("left_s", "rows_per_s", "num_bytes", *TROUBLE)  # not among the other numbers

ENVELOPE = ("event", "stage", "done", "total", "unit")  # the rest of an event are numbers

State = Literal["running", "waited", "done", "already done", "in training", "failed"]


class Progress(NamedTuple):
    """How far a stage is."""

    stage: str
    state: State
    done: int
    total: int
    """0 while it is unknown."""
    unit: str
    numbers: Mapping[str, Any]
    """What the stage counts (rows, tokens, loss, ...)."""
    note: str = ""
    """A sentence, shown instead of the numbers."""


class ProgressDisplay:
    """Shows stages on stderr; those that are named at the start have a bar from the start."""

    def __init__(self, stages: Sequence[str] = ()) -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description:9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]:6}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            _TimeLeftColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._first: dict[str, tuple[float, int]] = {}  # time and count of each stage's first show
        self._last: dict[str, tuple[str, float]] = {}  # state and time of each stage's last line
        for stage in stages:
            self._add_bar(stage)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The bars stay as they are."""
        self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Bring the stage's bar up to date, or write a line if it is time for one."""
        if self._bars.disable:
            self._write_line(progress)
            return
        self._bars.start()  # no effect where they were started before
        if progress.stage not in self._tasks:
            self._add_bar(progress.stage)
        task = self._tasks[progress.stage]
        if progress.state == "running":
            self._bars.start_task(task)
        is_counted = progress.state in ("running", "done")
        self._bars.update(
            task,
            completed=progress.done,
            total=progress.total or None,
            unit=progress.unit,
            note=", ".join(self._texts(progress)) if is_counted else progress.state,
            left_s=progress.numbers.get("left_s"),
        )
        if progress.state != "running":
            self._bars.stop_task(task)

    def _add_bar(self, stage: str) -> None:
        self._tasks[stage] = self._bars.add_task(stage, start=False, total=None, unit="", note="")

    def _write_line(self, progress: Progress) -> None:
        texts = self._texts(progress)
        state, at = self._last.get(progress.stage, ("", 0.0))
        if progress.state == state and time.monotonic() - at < LINE_PAUSE_S:
            return
        self._last[progress.stage] = (progress.state, time.monotonic())
        line = f"{progress.stage}: {progress.state}"
        if progress.total and progress.unit:
            line += f" {progress.done} of {progress.total} {progress.unit}"
        if left_s := progress.numbers.get("left_s"):
            texts.append(f"{timedelta(seconds=left_s)} left")
        typer.echo(", ".join([line, *texts]), err=True)

    def _texts(self, progress: Progress) -> list[str]:
        """Numbers and rates of a stage; rates are measured from its first show on where the stage
        measures none.
        """
        numbers = progress.numbers
        trouble = [f"{numbers[name]:,} {name}" for name in TROUBLE if numbers.get(name)]
        if progress.note:
            return [progress.note, *trouble]
        now = time.monotonic()
        began, first_done = self._first.setdefault(progress.stage, (now, progress.done))
        seconds = max(now - began, 1e-3)
        shown = {name: value for name, value in numbers.items() if name not in UNSHOWN}
        texts = trouble
        if numbers.get("tokens"):
            shown.setdefault("tokens_per_s", numbers["tokens"] / seconds)
        elif progress.done > first_done:
            speed = (progress.done - first_done) / seconds
            texts = [f"{speed:.2f} {progress.unit}/s", *trouble]
        return [*progress_texts(shown), *texts]


class _TimeLeftColumn(TimeRemainingColumn):
    """The time left as the stage computes it itself (field `left_s`); the bar's own guess is far
    off after a resume in the middle.
    """

    def render(self, task: Task) -> Text:
        left_s = task.fields.get("left_s")
        if left_s is None:
            return super().render(task)
        return Text(str(timedelta(seconds=left_s)), style="progress.remaining")


class TerminalReport:
    """A report that shows the events of one stage."""

    def __init__(self) -> None:
        self.display = ProgressDisplay()
        self.progress = Progress("", "running", 0, 0, "", {})

    def show(self, event: dict[str, Any]) -> None:
        """Show one event; kinds that have no place on a terminal are passed over."""
        if event["event"] == "result":
            keys = ("acceptance_length", "lossless", "speedup")
            typer.echo(json.dumps({key: event[key] for key in keys}))
        elif event["event"] == "answering":
            note = answering_note([event])
            self.progress = self.progress._replace(stage=event["stage"], note=note)
            self.display.show(self.progress)
        elif event["event"] == "progress":
            total = event["total"] or 0  # null while it is unknown
            has_ended = event["done"] == total
            self.progress = Progress(
                stage=event["stage"],
                state="done" if has_ended else "running",
                done=event["done"],
                total=total,
                unit=event.get("unit", ""),
                numbers={key: value for key, value in event.items() if key not in ENVELOPE},
                note="" if has_ended else self.progress.note,
            )
            self.display.show(self.progress)
            if has_ended:
                self.display.close()
