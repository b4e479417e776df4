"""An error of ours in a run's log is the paragraph that the terminal shows, not the stack trace that Prefect would write."""

from __future__ import annotations

import logging

from deepspec.errors import DeepSpecError

RUNS = ("prefect.flow_runs", "prefect.task_runs")


def show_plainly() -> None:
    """From now on; Prefect need not be there yet."""
    for name in RUNS:
        logging.getLogger(name).addFilter(plainly)  # the same one again changes nothing


def plainly(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, DeepSpecError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True
