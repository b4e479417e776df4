"""An error of ours in a run's log is the paragraph that the terminal shows, not the stack trace
that Prefect would write.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from deepspec.errors import DeepSpecError

FLOW_RUNS = "prefect.flow_runs"
_written = WeakKeyDictionary[DeepSpecError, set[str]]()  # the runs in whose logs an error is


def show_plainly() -> None:
    """From now on; Prefect need not be there yet."""
    for name in (FLOW_RUNS, "prefect.task_runs"):
        logging.getLogger(name).addFilter(plainly)  # the same one again changes nothing


def plainly(record: logging.LogRecord) -> bool:
    """Whether the record is still to be written: what ends a flow run is written here, and sent
    before the run's end is.

    Who watches a run (`--watch`) hears of its end, and after that of little else.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, DeepSpecError):
        return True
    record.msg, record.args, record.exc_info = str(error), (), None
    if record.name != FLOW_RUNS:
        return True
    run, runs = str(vars(record).get("flow_run_id", "")), _written.setdefault(error, set())
    # where a worker started the run, Prefect says it once more at the process's end
    if run in runs:
        return False
    runs.add(run)
    logger = logging.getLogger(FLOW_RUNS)
    logger.callHandlers(record)
    for handler in logger.handlers:
        handler.flush()
    return False
