"""Progress of a stage that is run by hand."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from deepspec.process.events import answering_note, progress_texts

# in the note beside a bar: its columns show them
UNSAID = ("event", "stage", "done", "total", "unit", "left_s")


class TimeLeftColumn(TimeRemainingColumn):
    """The time left as the stage reckons it itself (field `left_s`); the bar's own guess is far
    off after a resume in the middle.
    """

    def render(self, task: Task) -> Text:
        left_s = task.fields.get("left_s")
        return (
            super().render(task)
            if left_s is None
            else Text(str(timedelta(seconds=left_s)), style="progress.remaining")
        )


class TerminalReport:
    """Progress of a stage run by hand: a bar per stage."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeLeftColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.tasks: dict[str, Any] = {}

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "result":
            typer.echo(
                json.dumps(
                    {key: event[key] for key in ("acceptance_length", "lossless", "speedup")}
                )
            )
        if event["event"] not in ("progress", "answering"):
            return
        if event["stage"] not in self.tasks:
            self.progress.start()
            self.tasks[event["stage"]] = self.progress.add_task(event["stage"], total=None, note="")
        if event["event"] == "answering":
            self.progress.update(self.tasks[event["stage"]], note=answering_note([event]))
            return
        numbers = {key: value for key, value in event.items() if key not in UNSAID}
        note = ", ".join(progress_texts(numbers))
        self.progress.update(
            self.tasks[event["stage"]],
            completed=event["done"],
            total=event["total"],
            note=note,
            left_s=event.get("left_s"),
        )
        if event["done"] == event["total"]:
            self.progress.stop()
