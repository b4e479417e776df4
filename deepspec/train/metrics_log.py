"""The numbers of a training, a line for each logged step: `metrics.jsonl`, and what is made of it.

All lines are written again each time, so that those after a resumed checkpoint are there once.
Another tracker goes into `MetricsLog.write`.
"""

import json
import time
from collections.abc import Mapping

from deepspec.artifacts.artifact import Artifact
from deepspec.train.tensorboard_log import can_write_scalars, write_scalars

FILE = "metrics.jsonl"


class MetricsLog:
    """The lines of a training so far, those before it was resumed included."""

    def __init__(self, artifact: Artifact, *, first: int, is_writer: bool) -> None:
        self.artifact = artifact
        self.lines = read_metrics(artifact, first)
        self.is_writer = is_writer
        self.has_scalars = is_writer and can_write_scalars()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a line; without any numbers, none."""
        if numbers:
            self.lines.append({"step": step, "time": time.time(), **numbers})

    def write(self) -> None:
        """Write all lines, on the one rank that is the writer."""
        if self.is_writer:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            self.artifact.write(FILE, text.encode())
        if self.has_scalars:
            write_scalars(self.artifact, self.lines)


def read_metrics(artifact: Artifact, last: int) -> list[dict[str, float]]:
    """The lines of the steps up to `last`."""
    try:
        lines = artifact.read(FILE).decode().splitlines()
    except FileNotFoundError:
        return []
    return [entry for entry in map(json.loads, lines) if entry["step"] <= last]
