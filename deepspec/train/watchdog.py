"""A training that stalls ends by itself, instead of holding its GPUs, and logs where it stood."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from deepspec.errors import EXIT_TRANSIENT, TransientError
from deepspec.process.events import Report

log = logging.getLogger(__name__)

# Ranks stall together: all must have dumped their stacks before one reports, which ends them all.
LINGER_S = 2.0


@contextlib.contextmanager
def watchdog(limit_s: float, report: Report) -> Iterator[Callable[[], None]]:
    """Ends the process with "try again" where what it yields is not called for `limit_s`.

    It is called for every step, and for every shard that is captured for one.
    """
    beaten, left = threading.Event(), threading.Event()

    def watch() -> None:
        while not left.is_set():
            if not beaten.wait(limit_s):
                _end(limit_s, report)
            beaten.clear()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beaten.set
    finally:
        left.set()
        beaten.set()
        thread.join()


def _end(limit_s: float, report: Report) -> None:
    """End without unwinding the main thread, which may never return from where it is."""
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(LINGER_S)
    error = TransientError(
        f"no training step was finished for {limit_s / 60:g} minutes "
        "(resources.retries.stall_minutes)",
        fix="run it again: it goes on from its newest checkpoint; where each thread stood is in "
        "the log",
    )
    log.error("stage=train %s", error.what)
    report({"event": "error", **error.to_json()})
    sys.stdout.flush()
    os._exit(EXIT_TRANSIENT)
