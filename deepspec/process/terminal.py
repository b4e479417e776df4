"""The events of a single stage, shown on the terminal."""

import json
from typing import Any

import typer

from deepspec.process.events import answering_note
from deepspec.process.progress_display import Progress, ProgressDisplay

ENVELOPE = ("event", "stage", "done", "total", "unit")


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
            self._show(self.progress._replace(stage=event["stage"], note=answering_note([event])))
        elif event["event"] == "progress":
            self._show_progress(event)

    def _show_progress(self, event: dict[str, Any]) -> None:
        total = event["total"] or 0  # null while it is unknown
        has_ended = event["done"] == total
        progress = Progress(
            stage=event["stage"],
            state="done" if has_ended else "running",
            done=event["done"],
            total=total,
            unit=event.get("unit", ""),
            numbers={key: value for key, value in event.items() if key not in ENVELOPE},
            note="" if has_ended else self.progress.note,
        )
        self._show(progress)
        if has_ended:
            self.display.close()

    def _show(self, progress: Progress) -> None:
        self.progress = progress
        self.display.show(progress)
