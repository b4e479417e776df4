"""The numbers of a training, a line for each logged step: `metrics.jsonl`, and what is made of it.

All lines are written again each time, so that those after a resumed checkpoint are there once. For
TensorBoard, an event file in `tensorboard/` is made anew from all of them: appending would double
the steps between a checkpoint and a crash. Another tracker goes into `MetricsLog.write`.
"""

import contextlib
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspec.artifacts.artifact import Artifact

log = logging.getLogger(__name__)

FILE, FOLDER = "metrics.jsonl", "tensorboard"
# The newest file, and the one before it: a TensorBoard that has it open moves on to the newer one
# only while it is still there.
KEEP = 2
AXES = {"step", "time"}  # of a line: where its numbers belong


class MetricsLog:
    """The lines of a training so far, those up to step `first`, before it was resumed, included."""

    def __init__(self, artifact: Artifact, *, first: int, is_writer: bool) -> None:
        self.artifact = artifact
        self.is_writer = is_writer
        self.lines: list[dict[str, float]] = []
        with contextlib.suppress(FileNotFoundError):
            lines = map(json.loads, artifact.read(FILE).decode().splitlines())
            self.lines = [line for line in lines if line["step"] <= first]
        self.has_tensorboard = importlib.util.find_spec("tensorboard") is not None
        if is_writer and not self.has_tensorboard:
            log.info(
                "stage=train TensorBoard is not installed, metrics.jsonl has the numbers: "
                "pip install 'deepspec[tensorboard]'"
            )

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a line; without any numbers, none."""
        if numbers:
            self.lines.append({"step": step, "time": time.time(), **numbers})

    def write(self) -> None:
        """Write all lines, on the one rank that is the writer."""
        if self.is_writer:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            self.artifact.write(FILE, text.encode())
            if self.has_tensorboard:
                write_scalars(self.artifact, self.lines)


def write_scalars(artifact: Artifact, lines: Sequence[Mapping[str, float]]) -> None:
    """Write every number of the lines into a new event file, which replaces those before it.

    A running TensorBoard keeps the file that it has open and goes on to the one whose name sorts
    last, so the name is new; the mark of a restart at step 0 makes it forget what it read.
    """
    from torch.utils.tensorboard import SummaryWriter

    name = f"events.out.tfevents.{time.time_ns()}"
    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch, purge_step=0) as writer:
            for line in lines:
                for tag in line.keys() - AXES:
                    writer.add_scalar(tag, line[tag], line["step"], line.get("time"))
        (local,) = Path(scratch).iterdir()
        artifact.put_file(local, f"{FOLDER}/{name}")
    for old in artifact.names(FOLDER)[:-KEEP]:
        artifact.remove(f"{FOLDER}/{old}")
