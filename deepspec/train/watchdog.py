"""A training that stalls ends by itself, instead of holding its GPUs, and logs where it stood."""

import faulthandler
import logging
import os
import sys
import threading
import time
from typing import Self

from deepspec.errors import EXIT_TRANSIENT, TransientError
from deepspec.process.events import Report

log = logging.getLogger(__name__)

# Ranks stall together: all must have dumped their stacks before one reports, which ends them all.
LINGER_S = 2.0


class Watchdog:
    """Ends the process with "try again" where `beat` is not called for `limit_s` in its block.

    It is called for every step, and for every shard that is captured for one.
    """

    def __init__(self, limit_s: float, report: Report) -> None:
        self.limit_s = limit_s
        self.report = report
        self._beaten = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Note that training has made progress."""
        self._beaten.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._left.set()
        self._beaten.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.is_set():
            if not self._beaten.wait(self.limit_s):
                self._end()
            self._beaten.clear()

    def _end(self) -> None:
        """End without unwinding the main thread, which may never return from where it is."""
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(LINGER_S)
        minutes = f"{self.limit_s / 60:g} minutes (resources.retries.stall_minutes)"
        error = TransientError(
            f"no training step was finished for {minutes}",
            fix="run it again: it goes on from its newest checkpoint; where each thread stood is "
            "in the log",
        )
        log.error("stage=train %s", error.what)
        self.report({"event": "error", **error.to_json()})
        sys.stdout.flush()
        os._exit(EXIT_TRANSIENT)
