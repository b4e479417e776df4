"""The training's numbers for TensorBoard: an event file in `tensorboard/`, made anew from all lines
of metrics.jsonl.

Appending would double the steps between a checkpoint and a crash; like this there is one truth, and
it is the lines.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact

log = logging.getLogger(__name__)

FOLDER = "tensorboard"
# the newest file, and the one before it, which a TensorBoard that looks on leaves only while it is
# there
KEEP = 2
AXES = ("step", "time")  # of a line: where its numbers stand, none of them themselves


def can_write_scalars() -> bool:
    """Whether TensorBoard is installed; if not, says how to get it."""
    if importlib.util.find_spec("tensorboard") is None:
        log.info(
            "stage=train TensorBoard is not installed, metrics.jsonl has the numbers: pip install 'deepspec[tensorboard]'"
        )
        return False
    return True


def write_scalars(artifact: Artifact, history: Sequence[Mapping[str, Any]]) -> None:
    """Put every number of the lines into a new event file; it stands for all before it, also where
    a TensorBoard has read those.

    A new name, because TensorBoard keeps the file that it has open; the mark of a restart at step 0
    has it forget what it read.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard goes on to the file whose name sorts last
    name = f"events.out.tfevents.{time.time_ns()}"
    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch, purge_step=0) as writer:
            for line in history:
                values = [
                    Summary.Value(tag=tag, simple_value=value)
                    for tag, value in line.items()
                    if tag not in AXES and isinstance(value, int | float)
                ]
                writer.file_writer.add_summary(
                    Summary(value=values), line["step"], line.get("time")
                )
        (local,) = Path(scratch).iterdir()
        artifact.put_file(local, f"{FOLDER}/{name}")
    for old in artifact.store.names(artifact.path(FOLDER))[:-KEEP]:
        artifact.store.remove(artifact.path(f"{FOLDER}/{old}"))
