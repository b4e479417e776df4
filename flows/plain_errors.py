"""An error of ours in a run's log is the paragraph that the terminal shows, not the stack trace that Prefect would write."""

from __future__ import annotations

import logging

from deepspec.errors import DeepSpecError

FLOW_RUNS = "prefect.flow_runs"


def show_plainly() -> None:
    """From now on; Prefect need not be there yet."""
    for name in (FLOW_RUNS, "prefect.task_runs"):
        logging.getLogger(name).addFilter(plainly)  # the same one again changes nothing


def plainly(record: logging.LogRecord) -> bool:
    """Whether the record is still to be written: what ends a flow run is written here, and sent before the run's end is.

    Who watches a run (`--watch`) hears of its end, and after that of little else.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, DeepSpecError):
        return True
    record.msg, record.args, record.exc_info = str(error), (), None
    if record.name != FLOW_RUNS:
        return True
    logger = logging.getLogger(FLOW_RUNS)
    logger.callHandlers(record)
    for handler in logger.handlers:
        handler.flush()
    return False
