"""Progress of a stage that is run by hand."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepspec.events import answering_note


class TerminalReport:
    """Progress of a stage run by hand: a bar per stage."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.tasks: dict[str, Any] = {}

    def show(self, event: dict[str, Any]) -> None:
        if event["event"] == "result":
            typer.echo(json.dumps({key: event[key] for key in ("acceptance_length", "lossless", "speedup")}))
        if event["event"] not in ("progress", "answering"):
            return
        if event["stage"] not in self.tasks:
            self.progress.start()
            self.tasks[event["stage"]] = self.progress.add_task(event["stage"], total=None, note="")
        if event["event"] == "answering":
            self.progress.update(self.tasks[event["stage"]], note=answering_note([event]))
            return
        numbers = {key: value for key, value in event.items() if key not in ("event", "stage", "done", "total", "unit")}
        note = " ".join(f"{key}={value}" for key, value in numbers.items())
        self.progress.update(self.tasks[event["stage"]], completed=event["done"], total=event["total"], note=note)
        if event["done"] == event["total"]:
            self.progress.stop()
