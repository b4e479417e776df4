"""A training's numbers for TensorBoard: an event file in `tensorboard/`, made anew from all lines.

Appending would double the steps between a checkpoint and a crash.
"""

import importlib.util
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspec.artifacts.artifact import Artifact

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
# The newest file, and the one before it: a TensorBoard that has it open moves on to the newer one
# only while it is still there.
KEEP = 2
AXES = {"step", "time"}  # of a line: where its numbers belong


def can_write_scalars() -> bool:
    """Whether TensorBoard is installed; if not, how to get it is logged."""
    if importlib.util.find_spec("tensorboard") is None:
        log.info(
            "stage=train TensorBoard is not installed, metrics.jsonl has the numbers: "
            "pip install 'deepspec[tensorboard]'"
        )
        return False
    return True


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
