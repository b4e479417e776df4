"""Our errors in a run's log: the paragraph that the terminal shows, without the stack trace that
Prefect would write.
"""

import logging
from weakref import WeakKeyDictionary

from deepspec.errors import DeepSpecError

FLOW_RUNS = "prefect.flow_runs"
# runs whose logs have an error already
_logged_in = WeakKeyDictionary[DeepSpecError, set[str]]()


def log_errors_plainly() -> None:
    """From now on, also where Prefect is not imported yet."""
    for name in (FLOW_RUNS, "prefect.task_runs"):
        logging.getLogger(name).addFilter(_shorten)  # adding the same one again has no effect


def _shorten(record: logging.LogRecord) -> bool:
    """Whether the record is still to be written: the error that ends a flow run is written here,
    and sent to the server before the run's end is.

    `--watch` shows little of what arrives after a run's end.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, DeepSpecError):
        return True
    record.msg, record.args, record.exc_info = str(error), (), None
    if record.name != FLOW_RUNS:
        return True
    run = str(vars(record).get("flow_run_id", ""))
    runs = _logged_in.setdefault(error, set())
    # Where a worker started the run, Prefect logs the error again at the end of the process.
    if run in runs:
        return False
    runs.add(run)
    logger = logging.getLogger(FLOW_RUNS)
    logger.callHandlers(record)
    for handler in logger.handlers:
        handler.flush()
    return False
